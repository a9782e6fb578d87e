// The two slabs of a stack and the coefficients beside them, checked against each other.
#pragma once

#include <optional>

#include "../ragged/slab.h"
#include "checks.h"

namespace fastagg::ops {

// A contiguous (modules, rows, cols) tensor as the kernels see it.
inline Slab slab_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(1), tensor.size(2)};
}

// A (L, R, n) and Bt (L, R, m), contiguous.
struct Stack {
  Device home;
  Tensor a;
  Tensor bt;
  int64_t modules, rows, m, n;
};

inline Stack stack_of(const char* op, const Tensor& a, const Tensor& bt, DeviceType type,
                      bool allow_float64) {
  const Device home = home_of(op, "A", a, type);
  for (const auto& [name, tensor] : {std::pair{"A", &a}, std::pair{"Bt", &bt}}) {
    check_device(op, name, *tensor, home);
    check(tensor->dim() == 3, op, name, "expected three dimensions (modules, rows, ",
          *name == 'A' ? "n" : "m", "), got shape ", shape_of(*tensor));
    const ScalarType dtype = tensor->scalar_type();
    check(is_factor_dtype(dtype) || (allow_float64 && dtype == ScalarType::Double), op, name,
          "expected dtype Float, BFloat16 or Half", allow_float64 ? " or Double" : "", ", got ",
          name_of(dtype));
  }
  check(a.size(0) == bt.size(0) && a.size(1) == bt.size(1), op, "Bt",
        "expected the modules and rows of A, ", shape_of(a), ", got ", shape_of(bt));
  const int64_t modules = a.size(0), rows = a.size(1), m = bt.size(2), n = a.size(2);
  return {home, as_contiguous(a), as_contiguous(bt), modules, rows, m, n};
}

// Coefficients (L, R) as float64.
class Coefficients {
 public:
  Coefficients(const char* op, const std::optional<Tensor>& given, const Stack& stack) {
    if (!given) return;
    check_device(op, "coefficients", *given, stack.home);
    check_shape(op, "coefficients", *given, {stack.modules, stack.rows});
    const ScalarType dtype = given->scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, op, "coefficients",
          "expected dtype Float or Double, got ", name_of(dtype));
    const Tensor dense = as_contiguous(*given);
    storage_ = dtype == ScalarType::Double ? dense : torch::stable::to(dense, ScalarType::Double);
  }

  // Null where none are given: then all are one.
  const double* data() const {
    return storage_ ? static_cast<const double*>(storage_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> storage_;
};

}  // namespace fastagg::ops
