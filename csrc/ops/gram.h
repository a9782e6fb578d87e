#pragma once

#include "results.h"
#include "slabs.h"
#include "tables.h"

namespace fastagg::ops {

template <class Kernels>
std::tuple<Tensor, Tensor> gram(const Tensor& a, const Tensor& bt) {
  const Stack stack = stack_of("gram", a, bt, Kernels::kDevice, true);
  check_countable("gram", "A", {stack.modules, stack.rows, stack.rows});

  Kernels kernels(stack.home);
  const auto one = [&](const Tensor& slab) {
    Tensor out = empty_on(stack.home, {stack.modules, stack.rows, stack.rows}, ScalarType::Double);
    kernels.gram(slab_of(slab), stack.modules, data_of<double>(out));
    return out;
  };
  Tensor of_a = one(stack.a);
  return {of_a, one(stack.bt)};
}

template <class Kernels>
Tensor update_gram(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                   const Tensor& owners, int64_t clients) {
  const char* op = "update_gram";
  const Stack stack = stack_of(op, a, bt, Kernels::kDevice, true);
  const Coefficients c(op, given, stack);
  check(clients >= 0, op, "clients", "expected a count of at least 0, got ", clients);
  check_countable(op, "clients", {stack.modules, clients, clients});
  auto table = values_of<int64_t>(op, "owners", owners, stack.home, {stack.modules, stack.rows});
  if (const int64_t* owner = table.on_host())
    for (int64_t i = 0; i < stack.modules * stack.rows; ++i)
      check(owner[i] >= -1 && owner[i] < clients, op, "owners", "expected a client below ", clients,
            " or -1 for a row of nobody, got ", owner[i]);

  Kernels kernels(stack.home);
  Tensor out = empty_on(stack.home, {stack.modules, clients, clients}, ScalarType::Double);
  kernels.update_gram(slab_of(stack.a), slab_of(stack.bt), c.data(), table.on(stack.home),
                      stack.modules, clients, data_of<double>(out));
  return out;
}

}  // namespace fastagg::ops
