// Which tensors of a flat buffer hold a NaN or an infinity, and how large each is: one block a span.
// A client's file holds hundreds of spans; 512 threads with four vectors of 16 bytes each under way
// are 32 KiB, what one multiprocessor needs to keep its share of the memory busy.
#include "../ragged/slots.h"
#include "elements.h"
#include "kernels.h"
#include "reduce.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kCount = 8;  // elements of a vector
constexpr int kBatch = 4;  // vectors of a thread under way

// Which thread adds an element depends on its place in the span alone, not on its address: the same
// tensor has the same sum wherever it lies.
template <int kSize, bool kAligned>
__device__ __forceinline__ void add_vectors(const char* from, DType dtype, int64_t vectors,
                                            Moments& moments) {
  for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kBatch) {
    Packed<kCount, kSize> in[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (first + b * kThreads < vectors)
        in[b].template load<kAligned>(from + (first + b * kThreads) * kCount * kSize);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kThreads >= vectors) continue;
      float value[kCount];
      for (int k = 0; k < kCount; ++k) value[k] = decoded(in[b].bits(k), dtype);
      moments.add(value);
    }
  }
}

template <int kSize>
__device__ __forceinline__ Moments moments_of(const char* from, const Span& span) {
  Moments moments;
  const int64_t vectors = span.count / kCount;
  if (is_aligned<16>(from))
    add_vectors<kSize, true>(from, span.dtype, vectors, moments);
  else
    add_vectors<kSize, false>(from, span.dtype, vectors, moments);
  const int64_t last = vectors * kCount + threadIdx.x;
  if (last < span.count) {
    const float value[1] = {decoded(load_bits(from + last * kSize, kSize), span.dtype)};
    moments.add(value);
  }
  return moments;
}

__global__ __launch_bounds__(kThreads) void scan_spans(const char* flat, int64_t bytes,
                                                       const Span* spans, int64_t* nonfinite,
                                                       double* sum_of_squares) {
  const Span span = spans[blockIdx.x];
  const bool possible = is_possible(span, bytes);
  Moments moments;
  if (possible)
    moments = span.dtype == DType::Float32 ? moments_of<4>(flat + span.offset, span)
                                           : moments_of<2>(flat + span.offset, span);
  auto* scratch = shared_memory<double>();
  const double sum = block_sum(moments.sum_of_squares, scratch);
  const int64_t bad =
      block_sum<int64_t>(moments.nonfinite, reinterpret_cast<int64_t*>(scratch + kWarp));
  if (threadIdx.x != 0) return;
  nonfinite[blockIdx.x] = possible ? bad : -1;
  sum_of_squares[blockIdx.x] = sum;
}

}  // namespace

void scan(const void* flat, int64_t bytes, const Span* spans, int64_t count, int64_t* nonfinite,
          double* sum_of_squares, Stream stream) {
  launch(scan_spans, count, kThreads, 2 * kWarp * 8, stream, static_cast<const char*>(flat), bytes,
         spans, nonfinite, sum_of_squares);
}

}  // namespace fastagg::cuda
