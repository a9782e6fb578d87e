#include <torch/csrc/stable/library.h>

#include "../cpu/kernels.h"
#include "checks.h"
#include "slabs.h"

namespace fastagg::ops {
namespace {

void check_base(const char* op, const char* argument, ScalarType dtype) {
  check(is_factor_dtype(dtype), op, argument, "expected dtype Float, BFloat16 or Half, got ",
        name_of(dtype));
}

}  // namespace

Tensor reconstruct(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                   ScalarType dtype) {
  const Stack stack = stack_of("reconstruct", a, bt, false);
  const auto c = coefficients("reconstruct", given, stack.modules, stack.rows);
  check_base("reconstruct", "dtype", dtype);
  check_countable("reconstruct", "A", {stack.modules, stack.m, stack.n});
  Tensor out = empty_cpu({stack.modules, stack.m, stack.n}, dtype);
  cpu::reconstruct(slab_of(stack.a), slab_of(stack.bt), c.empty() ? nullptr : c.data(),
                   stack.modules, out.mutable_data_ptr(), dtype_of(out), true);
  return out;
}

void reconstruct_(const Tensor& base, const Tensor& a, const Tensor& bt,
                  const std::optional<Tensor>& given) {
  const Stack stack = stack_of("reconstruct_", a, bt, false);
  const auto c = coefficients("reconstruct_", given, stack.modules, stack.rows);
  check_cpu("reconstruct_", "base", base);
  check_base("reconstruct_", "base", base.scalar_type());
  check_shape("reconstruct_", "base", base, {stack.modules, stack.m, stack.n});
  for (int64_t d = 0; d < base.dim(); ++d)
    check(base.stride(d) != 0 || base.size(d) <= 1, "reconstruct_", "base",
          "expected memory of its own for every entry, got an expanded tensor; clone it first");
  // A weight may be a view (a transposed one, or a slice): the sum is made beside it and copied in.
  Tensor target = as_contiguous(base);
  cpu::reconstruct(slab_of(stack.a), slab_of(stack.bt), c.empty() ? nullptr : c.data(),
                   stack.modules, target.mutable_data_ptr(), dtype_of(base), false);
  if (target.get() != base.get()) {
    Tensor view = base;
    torch::stable::copy_(view, target);
  }
}

}  // namespace fastagg::ops

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) {
  m.def("reconstruct(Tensor A, Tensor Bt, Tensor? coefficients, ScalarType dtype) -> Tensor");
  m.def("reconstruct_(Tensor(a!) base, Tensor A, Tensor Bt, Tensor? coefficients) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) {
  m.impl("reconstruct", TORCH_BOX(&fastagg::ops::reconstruct));
  m.impl("reconstruct_", TORCH_BOX(&fastagg::ops::reconstruct_));
}
