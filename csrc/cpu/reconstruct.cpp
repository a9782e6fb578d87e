// dW = B diag(c) A, by row blocks: fp32 products and sums, rounded once into the base's dtype, and
// never more of dW in memory than one block a thread.
#include <algorithm>

#include "products.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kRows = 512;  // rows of dW in one task: BLAS is at its full rate

}  // namespace

void reconstruct(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                 void* base, DType dtype, bool replace) {
  const int64_t m = bt.cols, n = a.cols, rows = a.rows;
  if (modules == 0 || m == 0 || n == 0) return;
  const int64_t size = element_size(dtype);
  const int64_t blocks = tiles(m, kRows);
  // A is widened once a module where it is not fp32 already; c goes to B's side.
  const bool widen = a.dtype != DType::Float32;
  Workspace<float> wide(widen ? modules * rows * n : 0);
  if (widen)
    for_each_task(modules * rows, [&](int64_t row) {
      load(a.row(0, row), a.dtype, n, 1.0f, wide.get() + row * n);
    });
  for_each_task(modules * blocks, [&](int64_t task) {
    const int64_t l = task / blocks;
    const int64_t first = task % blocks * kRows;
    const int64_t count = std::min(kRows, m - first);
    Workspace<float> left(rows * count);
    load_panel(bt, l, 0, rows, first, count, coefficients ? coefficients + l * rows : nullptr,
               left.get());
    auto* right =
        widen ? wide.get() + l * rows * n : static_cast<float*>(const_cast<void*>(a.row(l, 0)));
    char* target = at(base, (l * m + first) * n * size);
    const bool direct = replace && dtype == DType::Float32;
    Workspace<float> product(direct ? 0 : count * n);
    float* out = direct ? reinterpret_cast<float*>(target) : product.get();
    if (rows == 0)
      std::fill_n(out, count * n, 0.0f);
    else
      multiply(row_major(left.get(), rows, count).transposed(), row_major(right, rows, n),
               row_major(out, count, n));
    if (direct) return;
    Workspace<float> line(n);
    for (int64_t i = 0; i < count; ++i) {
      float* sum = out + i * n;
      if (!replace) {
        load(target + i * n * size, dtype, n, 1.0f, line.get());
        for (int64_t j = 0; j < n; ++j) sum[j] += line[j];
      }
      store(sum, n, target + i * n * size, dtype);
    }
  });
}

}  // namespace fastagg::cpu
