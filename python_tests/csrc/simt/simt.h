// Runs CUDA kernels on a CPU: each thread of a block is a fiber, one block at a time. A barrier or a
// warp function lets the others run; the order in which they do is chosen (forward, reverse, random),
// so that a result which depends on it is seen. Shared memory starts each block as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

// Global in CUDA.
using std::isfinite;
using std::isinf;
using std::isnan;

namespace simt {

struct Index {
  unsigned x;
};
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

void* shared();
int64_t shared_limit();
int multiprocessors();
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

void block_barrier();
void warp_barrier();

// Every lane's value of one warp function, `bytes` each; the pointer is good until the lane's next one.
const unsigned char* exchange(const void* mine, size_t bytes);
constexpr size_t kMostExchanged = 64;

void require_all_lanes(unsigned mask);

template <class T>
T lane_value(T mine, unsigned lane) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMostExchanged);
  const unsigned char* all = exchange(&mine, sizeof(T));
  T value;
  std::memcpy(&value, all + (lane % 32) * kMostExchanged, sizeof(T));
  return value;
}

inline unsigned lane() { return thread_index().x % 32; }

}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::require_all_lanes(mask);
  simt::warp_barrier();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  simt::require_all_lanes(mask);
  return simt::lane_value(value, static_cast<unsigned>(source));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  simt::require_all_lanes(mask);
  return simt::lane_value(value, simt::lane() ^ static_cast<unsigned>(lanes));
}

// A lane without a source keeps its own value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  simt::require_all_lanes(mask);
  const unsigned source = simt::lane() + delta;
  return simt::lane_value(value, source < 32 ? source : simt::lane());
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  simt::require_all_lanes(mask);
  return simt::lane_value(value, simt::lane() >= delta ? simt::lane() - delta : simt::lane());
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::require_all_lanes(mask);
  const int mine = predicate != 0;
  const unsigned char* all = simt::exchange(&mine, sizeof mine);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    int vote;
    std::memcpy(&vote, all + lane * simt::kMostExchanged, sizeof vote);
    votes |= static_cast<unsigned>(vote) << lane;
  }
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == 0xffffffffu;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// One thread runs at a time: an addition is whole.
template <class T>
T atomicAdd(T* target, T value) {
  static_assert(std::is_integral_v<T>, "a sum of floating-point atomics has no order");
  const T old = *target;
  *target += value;
  return old;
}

template <class T>
T atomicMax(T* target, T value) {
  static_assert(std::is_integral_v<T>);
  const T old = *target;
  if (value > old) *target = value;
  return old;
}

inline void __threadfence() {}

struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
