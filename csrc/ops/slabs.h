// Checked tensors as the kernels see them.
#pragma once

#include "../ragged/slab.h"
#include "checks.h"

namespace fastagg::ops {

// A contiguous (modules, rows, cols) tensor.
inline Slab slab_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(1), tensor.size(2)};
}

}  // namespace fastagg::ops
