// dW = B diag(c) A, by row blocks. An fp32 base takes the sum where it lies: BLAS adds the product into
// it, so that memory sees each entry once each way. Any other dtype is widened block by block, added to
// in fp32 and rounded once; never more of dW is held than one block a thread.
#include <algorithm>

#include "products.h"

namespace fastagg::cpu {
namespace {

// Rows of dW in one task. BLAS packs A anew for each: taller blocks are faster, but one module of 4096
// rows must keep eight threads busy. Where a block is held, half as many rows are as fast and stay in
// caches better. Neither number may depend on the threads: the bits would, too.
constexpr int64_t kRows = 512;
constexpr int64_t kHeldRows = 256;

}  // namespace

void reconstruct(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                 void* base, DType dtype, bool replace) {
  const int64_t m = bt.cols, n = a.cols, rows = a.rows;
  if (modules == 0 || m == 0 || n == 0) return;
  const int64_t size = element_size(dtype);
  const bool in_place = dtype == DType::Float32;
  const int64_t height = in_place ? kRows : kHeldRows;
  const int64_t blocks = tiles(m, height);
  // A is widened once a module where it is not fp32 already; c goes to B's side.
  const bool widen = a.dtype != DType::Float32;
  Workspace<float> wide(widen ? modules * rows * n : 0);
  if (widen)
    for_each_task(modules * rows, [&](int64_t row) {
      load(a.row(0, row), a.dtype, n, 1.0f, wide.get() + row * n);
    });
  for_each_task(modules * blocks, [&](int64_t task) {
    const int64_t l = task / blocks;
    const int64_t first = task % blocks * height;
    const int64_t count = std::min(height, m - first);
    Workspace<float> left(rows * count);
    load_panel(bt, l, 0, rows, first, count, coefficients ? coefficients + l * rows : nullptr,
               left.get());
    auto* right =
        widen ? wide.get() + l * rows * n : static_cast<float*>(const_cast<void*>(a.row(l, 0)));
    char* target = at(base, (l * m + first) * n * size);
    Workspace<float> held(in_place ? 0 : count * n);
    float* sum = in_place ? reinterpret_cast<float*>(target) : held.get();
    if (!in_place && !replace) load(target, dtype, count * n, 1.0f, sum);
    const Matrix<float> b = row_major(left.get(), rows, count).transposed();
    if (rows == 0 && replace)
      std::fill_n(sum, count * n, 0.0f);
    else if (replace)
      multiply(b, row_major(right, rows, n), row_major(sum, count, n));
    else if (rows > 0)
      multiply_add(b, row_major(right, rows, n), row_major(sum, count, n));
    if (!in_place) store(sum, count * n, target, dtype);
  });
}

}  // namespace fastagg::cpu
