// Which of the two ways of `reconstruct` is faster on which GPU.
#pragma once

#include <array>

#include "../reconstruct.h"

namespace fastagg::ops {

// One measurement: on GPUs of this compute capability (90 for 9.0), with a base and factors of these
// dtypes and first_rows <= R <= last_rows, torch's library was the faster way; `record` is the file in
// bench/results/ that shows it. Without a row the project's kernel is taken.
struct LibraryIsFaster {
  int architecture;
  ScalarType base, factors;
  int64_t first_rows, last_rows;
  const char* record;
};

constexpr std::array<LibraryIsFaster, 0> kLibraryIsFaster{};  // nothing has been measured yet

Route measured_route(const Stack& stack, const double* coefficients, ScalarType base);

// base = Bt^T A (`replace`), or base += Bt^T A, by torch's batched product: cuBLAS, under the flags
// that torch.backends.cuda.matmul has (TF32, reduced-precision sums).
void multiply_by_library(const Stack& stack, const Tensor& base, bool replace);

}  // namespace fastagg::ops
