// Products of a slab (rows x cols, any dtype, one module) with a skinny matrix, panel by panel: a
// panel of the slab is converted once, in cache, and multiplied by torch's BLAS.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convert.h"
#include "inner_products.h"
#include "kernels.h"
#include "runtime.h"

namespace fastagg::cpu {

constexpr int64_t kPanel = 512;  // columns of a slab converted at a time
constexpr int64_t kTile = 192;   // rows of a Gram tile: its fp64 panels stay in the L2 cache

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

// Columns [col, col + count) of slab^T x: out (count, l) with x (rows, l), summed over panels: BLAS
// splits longer sums by the number of threads that it might have used, also where it uses one.
template <class T>
void expand_panel(const Slab& slab, int64_t module, const double* scale, const Matrix<T>& x,
                  int64_t col, int64_t count, const Matrix<T>& out) {
  Workspace<T> panel(std::min(kPanel, slab.rows) * count);
  for (int64_t row = 0; row < slab.rows; row += kPanel) {
    const int64_t height = std::min(kPanel, slab.rows - row);
    load_panel(slab, module, row, height, col, count, scale, panel.get());
    const Matrix<T> part{x.data + row * x.row_stride, height, x.cols, x.row_stride, x.col_stride};
    const Matrix<T> columns = row_major(panel.get(), height, count).transposed();
    if (row == 0)
      multiply(columns, part, out);
    else
      multiply_add(columns, part, out);
  }
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

// Rows [i, i + i_count) times rows [j, j + j_count) of a slab, transposed, in fp64: the result is
// (padded i_count, padded j_count). Where i = j only its upper triangle is filled.
inline Workspace<double> gram_tile(const Slab& slab, int64_t module, int64_t i, int64_t i_count,
                                   int64_t j, int64_t j_count) {
  const int64_t i_padded = padded(i_count, kRowPadding), j_padded = padded(j_count, kRowPadding);
  Workspace<double> left(i_padded * kPanel);
  Workspace<double> right(i == j ? 0 : j_padded * kPanel);
  Workspace<double> out(i_padded * j_padded);
  std::fill_n(out.get(), i_padded * j_padded, 0.0);
  const auto load_padded = [&](int64_t row, int64_t count, int64_t col, int64_t width,
                               int64_t stride, double* panel) {
    for (int64_t r = 0; r < padded(count, kRowPadding); ++r) {
      double* to = panel + r * stride;
      const int64_t filled = r < count ? width : 0;
      if (filled)
        load(static_cast<const char*>(slab.row(module, row + r)) + col * element_size(slab.dtype),
             slab.dtype, width, 1.0, to);
      std::fill(to + filled, to + stride, 0.0);
    }
  };
  for (int64_t col = 0; col < slab.cols; col += kPanel) {
    const int64_t width = std::min(kPanel, slab.cols - col);
    const int64_t stride = padded(width, kWidthPadding);
    load_padded(i, i_count, col, width, stride, left.get());
    if (i != j) load_padded(j, j_count, col, width, stride, right.get());
    add_inner_products(left.get(), i_padded, i == j ? left.get() : right.get(), j_padded, stride,
                       out.get());
  }
  return out;
}

}  // namespace fastagg::cpu
