#pragma once

#include "results.h"
#include "slabs.h"

namespace fastagg::ops {

// How the product is made: by the device's measured choice, by the project's kernel, or by the matrix
// product of torch's library. The last one makes no use of coefficients, which would have to be
// rounded to the factors' dtype, and computes in one dtype throughout. The codes are the op's
// interface; a device with one way only takes every code for it.
enum class Route : int64_t { Measured = 0, Kernel = 1, Library = 2 };

inline bool library_can(const Stack& stack, bool has_coefficients, ScalarType result) {
  return !has_coefficients && stack.a.scalar_type() == result && stack.bt.scalar_type() == result;
}

inline Route route_of(const char* op, int64_t code, const Stack& stack, bool has_coefficients,
                      ScalarType result) {
  check(code >= 0 && code <= 2, op, "route",
        "expected 0 (as measured), 1 (kernel) or 2 (library), got ", code);
  const auto route = static_cast<Route>(code);
  check(route != Route::Library || library_can(stack, has_coefficients, result), op, "route",
        "expected no coefficients and one dtype of factors and result for 2 (library), got ",
        has_coefficients ? "coefficients, " : "", name_of(stack.a.scalar_type()), ", ",
        name_of(stack.bt.scalar_type()), " and ", name_of(result));
  return route;
}

inline void check_base(const char* op, const char* argument, ScalarType dtype) {
  check(is_factor_dtype(dtype), op, argument, "expected dtype Float, BFloat16 or Half, got ",
        name_of(dtype));
}

template <class Kernels>
Tensor reconstruct(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                   ScalarType dtype, int64_t code) {
  const char* op = "reconstruct";
  const Stack stack = stack_of(op, a, bt, Kernels::kDevice, false);
  const Coefficients c(op, given, stack);
  check_base(op, "dtype", dtype);
  check_countable(op, "A", {stack.modules, stack.m, stack.n});
  const Route route = route_of(op, code, stack, given.has_value(), dtype);

  Kernels kernels(stack.home);
  Tensor out = empty_on(stack.home, {stack.modules, stack.m, stack.n}, dtype);
  kernels.reconstruct(stack, c.data(), out, true, route);
  return out;
}

template <class Kernels>
void reconstruct_(const Tensor& base, const Tensor& a, const Tensor& bt,
                  const std::optional<Tensor>& given, int64_t code) {
  const char* op = "reconstruct_";
  const Stack stack = stack_of(op, a, bt, Kernels::kDevice, false);
  const Coefficients c(op, given, stack);
  check_device(op, "base", base, stack.home);
  check_base(op, "base", base.scalar_type());
  check_shape(op, "base", base, {stack.modules, stack.m, stack.n});
  for (int64_t d = 0; d < base.dim(); ++d)
    check(base.stride(d) != 0 || base.size(d) <= 1, op, "base",
          "expected memory of its own for every entry, got an expanded tensor; clone it first");
  const Route route = route_of(op, code, stack, given.has_value(), base.scalar_type());

  Kernels kernels(stack.home);
  // A weight may be a view (a transposed one, or a slice): the sum is made beside it and copied in.
  const Tensor target = as_contiguous(base);
  kernels.reconstruct(stack, c.data(), target, false, route);
  if (target.get() != base.get()) {
    Tensor view = base;
    torch::stable::copy_(view, target);
  }
}

}  // namespace fastagg::ops
