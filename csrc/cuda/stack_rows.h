// The rows of A, which are contiguous in the clients' buffers and in the slab: a warp copies a piece
// of a row.
#pragma once

#include "reduce.h"
#include "stacking.h"

namespace fastagg::cuda {

constexpr int kPiece = 2048;   // elements
constexpr int kUnderWay = 64;  // bytes, at most, that a lane has asked for before it waits

template <DType kSlab, int kSize, bool kAligned>
__device__ __forceinline__ void copy_vectors(const char* from, const Conversion& conversion,
                                             char* to, int vectors, Moments& moments) {
  constexpr int kCount = 16 / kSizeOf<kSlab>;
  constexpr int kBatch = kCount * kSize > 16 ? kUnderWay / (kCount * kSize) : 4;
  const int lane = threadIdx.x % kWarp;
  for (int first = lane; first < vectors; first += kBatch * kWarp) {
    Packed<kCount, kSize> in[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (first + b * kWarp < vectors)
        in[b].template load<kAligned>(from + (first + b * kWarp) * kCount * kSize);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kWarp >= vectors) continue;
      float value[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) value[k] = decoded(in[b].bits(k), conversion.from);
      moments.add(value);
      Packed<kCount, kSizeOf<kSlab>> out;
#pragma unroll
      for (int k = 0; k < kCount; ++k) out.set(k, conversion(in[b].bits(k), value[k], kSlab));
      out.store(to + (first + b * kWarp) * 16);
    }
  }
}

template <DType kSlab, int kSize>
__device__ __forceinline__ Moments copy(const char* from, const Conversion& conversion, char* to,
                                        int length, bool aligned) {
  constexpr int kCount = 16 / kSizeOf<kSlab>;
  Moments moments;
  // Which lane adds an element is decided for the slab, not by a row's address: a module's sums are
  // the same wherever it lies.
  const int vectors = aligned ? length / kCount : 0;
  constexpr int kWidest = kCount * kSize < 16 ? kCount * kSize : 16;
  if (is_aligned<kWidest>(from))
    copy_vectors<kSlab, kSize, true>(from, conversion, to, vectors, moments);
  else
    copy_vectors<kSlab, kSize, false>(from, conversion, to, vectors, moments);
#pragma unroll 4
  for (int e = vectors * kCount + threadIdx.x % kWarp; e < length; e += kWarp) {
    const uint32_t bits = load_bits(from + e * kSize, kSize);
    const float value[1] = {decoded(bits, conversion.from)};
    moments.add(value);
    store_bits(to + e * kSizeOf<kSlab>, conversion(bits, value[0], kSlab), kSizeOf<kSlab>);
  }
  return moments;
}

template <DType kSlab>
__device__ __forceinline__ void clear(char* to, int length, bool aligned) {
  constexpr int kCount = 16 / kSizeOf<kSlab>;
  const int lane = threadIdx.x % kWarp, vectors = aligned ? length / kCount : 0;
  for (int v = lane; v < vectors; v += kWarp) *reinterpret_cast<uint4*>(to + v * 16) = {0, 0, 0, 0};
  for (int e = vectors * kCount + lane; e < length; e += kWarp)
    store_bits(to + e * kSizeOf<kSlab>, 0, kSizeOf<kSlab>);
}

template <DType kSlab>
__device__ __forceinline__ void copy_a(const Stacking& in, int64_t row, int64_t piece) {
  const StackOut& out = in.out;
  const int64_t begin = piece * kPiece;
  const int length = static_cast<int>(out.n - begin < kPiece ? out.n - begin : kPiece);
  char* to = static_cast<char*>(out.a) + (row * out.n + begin) * kSizeOf<kSlab>;
  const int32_t owner = in.owner[row];
  Moments moments;
  if (owner == 0) {
    clear<kSlab>(to, length, in.aligned);
  } else {
    const Source source = in.sources[owner - 1];
    const Conversion conversion{source.a_dtype, source.a_dtype == kSlab && !in.scaled,
                                source.scale};
    const int64_t skipped = (row - source.first) * out.n + begin;
    if (source.a_dtype == DType::Float32)
      moments = copy<kSlab, 4>(source.a + skipped * 4, conversion, to, length, in.aligned);
    else
      moments = copy<kSlab, 2>(source.a + skipped * 2, conversion, to, length, in.aligned);
  }
  const double sum = warp_sum(moments.sum_of_squares);
  const int nonfinite = warp_sum(moments.nonfinite);
  if (threadIdx.x % kWarp != 0) return;
  in.a_partials[piece * out.modules * out.rows + row] = sum;
  if (owner != 0) count_nonfinite(out, owner - 1, 0, nonfinite);
}

}  // namespace fastagg::cuda
