// Sums and maxima over warps and blocks, in an order that the thread indices alone decide.
#pragma once

#include "device.h"

namespace fastagg::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

// The sum of every thread's value, given to every thread; `scratch` holds one T a warp.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_sum(value);
  __syncthreads();  // scratch may still be read from an earlier sum
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : T(0));
}

}  // namespace fastagg::cuda
