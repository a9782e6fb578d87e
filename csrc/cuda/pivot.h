// The choice of a pivot.
#pragma once

#include "device.h"

namespace fastagg::cuda {

struct Pivot {
  double value;
  int row;
};

// The largest positive of `count` values, the first of equals; value 0 where none is. Every warp of a
// block finds it for itself, which spares a barrier.
__device__ inline Pivot largest(const double* values, int count) {
  Pivot best{0.0, 0};
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp)
    if (values[i] > best.value) best = {values[i], i};
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const Pivot other{__shfl_xor_sync(kAllLanes, best.value, lanes),
                      __shfl_xor_sync(kAllLanes, best.row, lanes)};
    if (other.value > best.value || (other.value == best.value && other.row < best.row))
      best = other;
  }
  return best;
}

}  // namespace fastagg::cuda
