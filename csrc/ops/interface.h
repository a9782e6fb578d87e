// The ops: their schemas, and their registration with the kernels of one device. Plans, engines and
// compiled graphs are written against these schemas.
#pragma once

#include <torch/csrc/stable/library.h>

#include "gram.h"
#include "reconstruct.h"
#include "redistribute.h"
#include "scan.h"
#include "stack.h"
#include "svd.h"

namespace fastagg::ops {

using Library = torch::stable::detail::StableLibrary;

inline void define_ops(Library& m) {
  m.def("scan(Tensor flat, Tensor spans) -> (Tensor nonfinite, Tensor sum_of_squares)");
  m.def(
      "stack(Tensor[] flats, Tensor slots, Tensor? scale, int modules, int rows, int m, int n, "
      "ScalarType dtype) -> (Tensor A, Tensor Bt, Tensor nonfinite, Tensor sum_of_squares)");
  m.def(
      "stack_(Tensor(a!) A, Tensor(b!) Bt, Tensor[] flats, Tensor slots, Tensor? scale) "
      "-> (Tensor nonfinite, Tensor sum_of_squares)");
  m.def(
      "reconstruct(Tensor A, Tensor Bt, Tensor? coefficients, ScalarType dtype, int route=0) "
      "-> Tensor");
  m.def(
      "reconstruct_(Tensor(a!) base, Tensor A, Tensor Bt, Tensor? coefficients, int route=0) "
      "-> ()");
  m.def("gram(Tensor A, Tensor Bt) -> (Tensor, Tensor)");
  m.def(
      "update_gram(Tensor A, Tensor Bt, Tensor? coefficients, Tensor owners, int clients) "
      "-> Tensor");
  m.def(
      "gram_svd(Tensor A, Tensor Bt, Tensor? coefficients, int rank) "
      "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)");
  m.def(
      "randomized_svd(Tensor A, Tensor Bt, Tensor? coefficients, int rank, int oversampling, "
      "int power_iterations, int seed, Tensor? streams) "
      "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)");
  m.def(
      "randomized_svd_dense(Tensor W, int rank, int oversampling, int power_iterations, int seed, "
      "Tensor? streams) -> (Tensor U, Tensor S, Tensor Vt, Tensor stats)");
  m.def(
      "redistribute(Tensor U, Tensor S, Tensor Vt, Tensor slots, Tensor scalings, int[] sizes) "
      "-> Tensor[]");
  m.def(
      "redistribute_(Tensor(a!)[] flats, Tensor U, Tensor S, Tensor Vt, Tensor slots, "
      "Tensor scalings) -> ()");
}

template <class Kernels>
void implement_ops(Library& m) {
  m.impl("scan", TORCH_BOX(&scan<Kernels>));
  m.impl("stack", TORCH_BOX(&stack<Kernels>));
  m.impl("stack_", TORCH_BOX(&stack_<Kernels>));
  m.impl("reconstruct", TORCH_BOX(&reconstruct<Kernels>));
  m.impl("reconstruct_", TORCH_BOX(&reconstruct_<Kernels>));
  m.impl("gram", TORCH_BOX(&gram<Kernels>));
  m.impl("update_gram", TORCH_BOX(&update_gram<Kernels>));
  m.impl("gram_svd", TORCH_BOX(&gram_svd<Kernels>));
  m.impl("randomized_svd", TORCH_BOX(&randomized_svd<Kernels>));
  m.impl("randomized_svd_dense", TORCH_BOX(&randomized_svd_dense<Kernels>));
  m.impl("redistribute", TORCH_BOX(&redistribute<Kernels>));
  m.impl("redistribute_", TORCH_BOX(&redistribute_<Kernels>));
}

}  // namespace fastagg::ops
