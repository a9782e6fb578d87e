// Inner products of rows in fp64, the one product that torch's BLAS does not do well here: it knows
// no symmetric rank-k update, and MKL keeps to 256-bit vectors on other makers' CPUs.
#pragma once

#include <cstdint>

namespace fastagg::cpu {

// Panels and results are padded with zeros to whole register tiles.
constexpr int64_t kRowPadding = 12;
constexpr int64_t kWidthPadding = 8;

inline int64_t padded(int64_t size, int64_t padding) {
  return (size + padding - 1) / padding * padding;
}

// out (a_rows, b_rows) += a (a_rows, width) b (b_rows, width)^T, all row-major and padded. Where a
// is b, only the tiles on and above the diagonal need be filled.
void add_inner_products(const double* a, int64_t a_rows, const double* b, int64_t b_rows,
                        int64_t width, double* out);

}  // namespace fastagg::cpu
