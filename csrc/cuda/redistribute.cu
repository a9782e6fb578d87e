// Every client's next factors from one decomposition: A_k = V_r^T and B_k = U_r S_r / s_k, each at
// the client's own rank and dtype, straight into its flat buffer. Both are runs of memory that begin
// at any byte: threads write aligned vectors of 16 bytes and, at both ends, single elements.
#include "elements.h"
#include "flats.h"
#include "kernels.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kFactors = 4096;  // kept in shared memory: 16 KiB

struct Decomposition {
  const float* u;   // (modules, m, r)
  const float* s;   // (modules, r)
  const float* vt;  // (modules, r, n)
  int64_t modules, m, n, r;
};

__device__ __forceinline__ void load_four(const float* from, float (&value)[4]) {
  const float4 four = __ldg(reinterpret_cast<const float4*>(from));
  value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
}

// The rows of Vt that a client keeps; a rank above the decomposition's has nothing to carry.
struct RowsOfA {
  const float* vt;
  int64_t kept;  // elements

  __device__ __forceinline__ float one(int64_t e) const { return e < kept ? __ldg(vt + e) : 0.0f; }

  __device__ __forceinline__ void four(int64_t e, float (&value)[4]) const {
    if (e + 4 <= kept && is_aligned<16>(vt + e)) return load_four(vt + e, value);
    for (int k = 0; k < 4; ++k) value[k] = one(e + k);
  }
};

struct RowsOfB {
  const float* u;
  const float* s;
  double scaling;
  const float* factors;  // S / s_k, the first kFactors of them
  int64_t rank, kept, r;

  __device__ __forceinline__ float at(int64_t i, int64_t j) const {
    if (j >= kept) return 0.0f;
    return __ldg(u + i * r + j) * (j < kFactors ? factors[j] : static_cast<float>(s[j] / scaling));
  }

  __device__ __forceinline__ int64_t row_of(int64_t e) const {
    if (((e | rank) >> 32) == 0) return static_cast<uint32_t>(e) / static_cast<uint32_t>(rank);
    return e / rank;
  }

  __device__ __forceinline__ float one(int64_t e) const {
    const int64_t i = row_of(e);
    return at(i, e - i * rank);
  }

  __device__ __forceinline__ void four(int64_t e, float (&value)[4]) const {
    int64_t i = row_of(e), j = e - i * rank;
    if (j + 4 <= kept && j + 4 <= kFactors && is_aligned<16>(u + i * r + j)) {
      load_four(u + i * r + j, value);
      for (int k = 0; k < 4; ++k) value[k] *= factors[j + k];
      return;
    }
    for (int k = 0; k < 4; ++k) {
      value[k] = at(i, j);
      if (++j == rank) ++i, j = 0;
    }
  }
};

// to[e] = values.one(e) for every e < count, by `threads` threads of which this is number `thread`.
template <DType kTo, class Values>
__device__ __forceinline__ void write(const Values& values, int64_t count, char* to, int64_t thread,
                                      int64_t threads) {
  constexpr int kSize = kSizeOf<kTo>, kCount = 16 / kSize;
  const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 16);
  int64_t head = misplaced == 0 ? 0 : (16 - misplaced) / kSize;
  if (misplaced % kSize != 0 || head > count) head = count;  // no element of it is aligned
  const int64_t vectors = (count - head) / kCount;
  for (int64_t v = thread; v < vectors; v += threads) {
    const int64_t e = head + v * kCount;
    Packed<kCount, kSize> out;
    float value[kCount / 4][4];
#pragma unroll
    for (int q = 0; q < kCount / 4; ++q) values.four(e + 4 * q, value[q]);
#pragma unroll
    for (int k = 0; k < kCount; ++k) out.set(k, encoded(value[k / 4][k % 4], kTo));
    out.store(to + e * kSize);
  }
  const int64_t inside = vectors * kCount;
  for (int64_t i = thread; i < count - inside; i += threads) {
    const int64_t e = i < head ? i : i + inside;
    store_bits(to + e * kSize, encoded(values.one(e), kTo), kSize);
  }
}

template <class Values>
__device__ __forceinline__ void write_as(DType dtype, const Values& values, int64_t count, char* to,
                                         int64_t thread, int64_t threads) {
  if (dtype == DType::Float32)
    write<DType::Float32>(values, count, to, thread, threads);
  else if (dtype == DType::BFloat16)
    write<DType::BFloat16>(values, count, to, thread, threads);
  else
    write<DType::Float16>(values, count, to, thread, threads);
}

// `parts` blocks a slot, each of which writes a part of A and a part of B.
__global__ __launch_bounds__(kThreads) void hand_out(Decomposition from, const HandOutSlot* slots,
                                                     const double* scalings, uint32_t parts,
                                                     Window<char> window) {
  const uint32_t index = blockIdx.x / parts, part = blockIdx.x % parts;
  const HandOutSlot slot = slots[index];
  const bool here = slot.flat >= window.first && slot.flat < window.first + window.count;
  const int64_t flat = here ? slot.flat - window.first : 0;
  const bool possible = here && is_possible(slot, from.modules, from.m, from.n, window.bytes[flat]);

  const int64_t module = possible ? slot.module : 0;
  const int64_t kept = !possible ? 0 : slot.rank < from.r ? slot.rank : from.r;
  const double scaling = scalings[index];
  const float* s = from.s + module * from.r;
  auto* factors = shared_memory<float>();
  for (int64_t j = threadIdx.x; j < kept && j < kFactors; j += kThreads)
    factors[j] = static_cast<float>(s[j] / scaling);
  __syncthreads();
  if (!possible) return;

  const int64_t thread = static_cast<int64_t>(part) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(parts) * kThreads;
  char* to = window.data[flat];
  if (from.n > 0) {  // an empty matrix may claim any rank
    const RowsOfA a{from.vt + module * from.r * from.n, kept * from.n};
    write_as(slot.a_dtype, a, slot.rank * from.n, to + slot.a_offset, thread, threads);
  }
  if (from.m > 0) {
    const RowsOfB b{
        from.u + module * from.m * from.r, s, scaling, factors, slot.rank, kept, from.r};
    write_as(slot.b_dtype, b, from.m * slot.rank, to + slot.b_offset, thread, threads);
  }
}

}  // namespace

void redistribute(const float* u, const float* s, const float* vt, int64_t modules, int64_t m,
                  int64_t n, int64_t r, const HandOutSlot* slots, const double* scalings,
                  int64_t count, void* const* flats, const int64_t* sizes, int64_t flat_count,
                  Stream stream) {
  // At rank 4 in 16 bits, one vector of A and one of B a thread; at higher ranks a few.
  const int64_t parts = std::clamp<int64_t>(tiles(std::max(m, n), 512), 1, 1024);
  const int64_t shared_bytes = std::min(r, kFactors) * static_cast<int64_t>(sizeof(float));
  for_each_window(flats, sizes, flat_count, Window<char>{}, [&](const Window<char>& window) {
    launch(hand_out, count * parts, kThreads, shared_bytes, stream,
           Decomposition{u, s, vt, modules, m, n, r}, slots, scalings, static_cast<uint32_t>(parts),
           window);
  });
}

}  // namespace fastagg::cuda
