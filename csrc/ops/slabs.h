// Checked tensors as the CPU kernels see them.
#pragma once

#include "../cpu/kernels.h"
#include "checks.h"

namespace fastagg::ops {

// A contiguous (modules, rows, cols) tensor.
inline cpu::Slab slab_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(1), tensor.size(2)};
}

}  // namespace fastagg::ops
