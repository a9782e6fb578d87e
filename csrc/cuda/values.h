// One element of a tensor of any dtype, as a double.
#pragma once

#include <type_traits>

#include "../ragged/dtype.h"
#include "device.h"

namespace fastagg::cuda {

template <DType dtype>
__device__ __forceinline__ double value_at(const void* data, int64_t index) {
  if constexpr (dtype == DType::Float64)
    return static_cast<const double*>(data)[index];
  else if constexpr (dtype == DType::Float32)
    return static_cast<double>(static_cast<const float*>(data)[index]);
  else if constexpr (dtype == DType::BFloat16)
    return static_cast<double>(bfloat16_to_float(static_cast<const uint16_t*>(data)[index]));
  else
    return static_cast<double>(half_to_float(static_cast<const uint16_t*>(data)[index]));
}

// Calls `function` with the dtype as a constant: std::integral_constant<DType, ...>.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::Float32:
      return function(std::integral_constant<DType, DType::Float32>{});
    case DType::BFloat16:
      return function(std::integral_constant<DType, DType::BFloat16>{});
    case DType::Float16:
      return function(std::integral_constant<DType, DType::Float16>{});
    case DType::Float64:
      return function(std::integral_constant<DType, DType::Float64>{});
  }
}

}  // namespace fastagg::cuda
