#include "reconstruct_route.h"

#include "current.h"

namespace fastagg::ops {
namespace {

// The same memory without autograd's history: an out argument is refused where an input has one.
Tensor plain(const Tensor& tensor, bool transposed) {
  const int64_t rows = tensor.size(1), cols = tensor.size(2);
  const std::array<int64_t, 3> sizes{tensor.size(0), transposed ? cols : rows,
                                     transposed ? rows : cols};
  const std::array<int64_t, 3> strides{rows * cols, transposed ? 1 : cols, transposed ? cols : 1};
  return torch::stable::from_blob(tensor.data_ptr(), sizes, strides, tensor.device(),
                                  tensor.scalar_type());
}

}  // namespace

Route measured_route(const Stack& stack, const double* coefficients, ScalarType base) {
  if (!library_can(stack, coefficients != nullptr, base)) return Route::Kernel;
  for (const LibraryIsFaster& row : kLibraryIsFaster)
    if (row.base == base && row.factors == stack.a.scalar_type() && stack.rows >= row.first_rows &&
        stack.rows <= row.last_rows && row.architecture == cuda::architecture())
      return Route::Library;
  return Route::Kernel;
}

// Not by the dispatcher, which would let autocast round the factors.
void multiply_by_library(const Stack& stack, const Tensor& base, bool replace) {
  const Tensor left = plain(stack.bt, true), right = plain(stack.a, false);
  const Tensor out = plain(base, false);
  const AOTITorchError error =
      replace ? FASTAGG_TORCH(bmm_out)(out.get(), left.get(), right.get())
              : FASTAGG_TORCH(baddbmm_out)(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0);
  TORCH_ERROR_CODE_CHECK(error);
}

}  // namespace fastagg::ops
