#include <torch/csrc/stable/library.h>

#include "../cpu/kernels.h"
#include "checks.h"
#include "slabs.h"

namespace fastagg::ops {

std::tuple<Tensor, Tensor> gram(const Tensor& a, const Tensor& bt) {
  const Stack stack = stack_of("gram", a, bt, true);
  check_countable("gram", "A", {stack.modules, stack.rows, stack.rows});
  Tensor ga = empty_cpu({stack.modules, stack.rows, stack.rows}, ScalarType::Double);
  Tensor gb = empty_cpu({stack.modules, stack.rows, stack.rows}, ScalarType::Double);
  cpu::gram(slab_of(stack.a), stack.modules, static_cast<double*>(ga.mutable_data_ptr()));
  cpu::gram(slab_of(stack.bt), stack.modules, static_cast<double*>(gb.mutable_data_ptr()));
  return {ga, gb};
}

Tensor update_gram(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                   const Tensor& owners, int64_t clients) {
  const Stack stack = stack_of("update_gram", a, bt, true);
  const auto c = coefficients("update_gram", given, stack.modules, stack.rows);
  check(clients >= 0, "update_gram", "clients", "expected a count of at least 0, got ", clients);
  check_countable("update_gram", "clients", {stack.modules, clients, clients});
  check_cpu("update_gram", "owners", owners);
  check(owners.scalar_type() == ScalarType::Long, "update_gram", "owners",
        "expected dtype Long, got ", name_of(owners.scalar_type()));
  check_shape("update_gram", "owners", owners, {stack.modules, stack.rows});
  const Tensor owner_storage = as_contiguous(owners);
  const auto* owner_data = static_cast<const int64_t*>(owner_storage.const_data_ptr());
  for (int64_t i = 0; i < owner_storage.numel(); ++i)
    check(owner_data[i] >= -1 && owner_data[i] < clients, "update_gram", "owners",
          "expected a client below ", clients, " or -1 for a row of nobody, got ", owner_data[i]);
  Tensor out = empty_cpu({stack.modules, clients, clients}, ScalarType::Double);
  cpu::update_gram(slab_of(stack.a), slab_of(stack.bt), c.empty() ? nullptr : c.data(), owner_data,
                   stack.modules, clients, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace fastagg::ops

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) {
  m.def("gram(Tensor A, Tensor Bt) -> (Tensor, Tensor)");
  m.def(
      "update_gram(Tensor A, Tensor Bt, Tensor? coefficients, Tensor owners, int clients) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) {
  m.impl("gram", TORCH_BOX(&fastagg::ops::gram));
  m.impl("update_gram", TORCH_BOX(&fastagg::ops::update_gram));
}
