// What the kernels of `stack` know of a bucket.
#pragma once

#include "../ragged/slab.h"
#include "elements.h"

namespace fastagg::cuda {

// A slot that is possible.
struct Source {
  const char* a;
  const char* b;
  DType a_dtype, b_dtype;
  int64_t first;  // row of the slabs, counted over the modules
  int64_t rank;
  float scale;  // of A
};

struct Stacking {
  StackOut out;
  const Source* sources;
  const int32_t* owner;  // (modules, rows): one more than the slot whose row it is, or 0
  bool scaled;
  bool aligned;        // each row of A's slab, to 16 bytes
  double* a_partials;  // (pieces, modules, rows): sums of squares
  double* b_partials;  // (tiles, modules, rows)
};

// How a value becomes a slab's. `exact`: its bits stay what they are.
struct Conversion {
  DType from;
  bool exact;
  float scale;

  __device__ __forceinline__ uint32_t operator()(uint32_t bits, float value, DType slab) const {
    return exact ? bits : encoded(scale * value, slab);
  }
};

__device__ __forceinline__ void count_nonfinite(const StackOut& out, int64_t slot, int factor,
                                                int found) {
  // Unsigned because CUDA has this atomic so; the sum is the same.
  if (found > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(out.nonfinite + 2 * slot + factor),
              static_cast<unsigned long long>(found));
}

}  // namespace fastagg::cuda
