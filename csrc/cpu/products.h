// Products of a slab (rows x cols, any dtype, one module) with a skinny matrix, panel by panel: a
// panel of the slab is converted once, in cache, and multiplied by torch's BLAS.
#pragma once

#include <cstdint>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "runtime.h"

namespace fastagg::cpu {

constexpr int64_t kPanel = 512;  // columns of a slab converted at a time
constexpr int64_t kTile = 256;   // rows of a Gram tile: two fp64 panels of 1 MiB stay in the L2

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// panel (row_count, col_count) = diag(scale) slab[row.., col..]; scale null means one.
template <class T>
void load_panel(const Slab& slab, int64_t module, int64_t row, int64_t row_count, int64_t col,
                int64_t col_count, const double* scale, T* panel) {
  const int64_t size = element_size(slab.dtype);
  for (int64_t i = 0; i < row_count; ++i)
    load(static_cast<const char*>(slab.row(module, row + i)) + col * size, slab.dtype, col_count,
         scale ? static_cast<T>(scale[row + i]) : T(1), panel + i * col_count);
}

// Columns [col, col + count) of slab^T x: out (count, l) with x (rows, l).
template <class T>
void expand_panel(const Slab& slab, int64_t module, const double* scale, const Matrix<T>& x,
                  int64_t col, int64_t count, const Matrix<T>& out) {
  Workspace<T> panel(slab.rows * count);
  load_panel(slab, module, 0, slab.rows, col, count, scale, panel.get());
  multiply(row_major(panel.get(), slab.rows, count).transposed(), x, out);
}

// Rows [row, row + count) of slab x: out (count, l) with x (cols, l), summed over panels.
template <class T>
void contract_rows(const Slab& slab, int64_t module, const double* scale, const Matrix<T>& x,
                   int64_t row, int64_t count, const Matrix<T>& out) {
  Workspace<T> panel(count * kPanel);
  for (int64_t col = 0; col < slab.cols; col += kPanel) {
    const int64_t width = std::min(kPanel, slab.cols - col);
    load_panel(slab, module, row, count, col, width, scale, panel.get());
    const Matrix<T> part{x.data + col * x.row_stride, width, x.cols, x.row_stride, x.col_stride};
    const Matrix<T> rows = row_major(panel.get(), count, width);
    if (col == 0)
      multiply(rows, part, out);
    else
      multiply_add(rows, part, out);
  }
}

// A (rows i) x A (rows j)^T over all columns: out (i_count, j_count). Products in T, and the sum over
// panels in fp64: with T = float each panel's error is random and nothing accumulates.
template <class T>
void gram_tile(const Slab& slab, int64_t module, int64_t i, int64_t i_count, int64_t j,
               int64_t j_count, const Matrix<double>& out) {
  Workspace<T> left(i_count * kPanel);
  Workspace<T> right(i == j ? 0 : j_count * kPanel);
  Workspace<T> product(i_count * j_count);
  for (int64_t col = 0; col < slab.cols; col += kPanel) {
    const int64_t width = std::min(kPanel, slab.cols - col);
    load_panel<T>(slab, module, i, i_count, col, width, nullptr, left.get());
    if (i != j) load_panel<T>(slab, module, j, j_count, col, width, nullptr, right.get());
    const Matrix<T> rows = row_major(left.get(), i_count, width);
    const Matrix<T> cols = row_major(i == j ? left.get() : right.get(), j_count, width);
    multiply(rows, cols.transposed(), row_major(product.get(), i_count, j_count));
    for (int64_t r = 0; r < i_count; ++r)
      for (int64_t c = 0; c < j_count; ++c) {
        double& sum = out.data[r * out.row_stride + c];
        sum = (col == 0 ? 0.0 : sum) + static_cast<double>(product[r * j_count + c]);
      }
  }
  if (slab.cols == 0)
    for (int64_t r = 0; r < i_count; ++r)
      std::fill_n(out.data + r * out.row_stride, j_count, 0.0);
}

}  // namespace fastagg::cpu
