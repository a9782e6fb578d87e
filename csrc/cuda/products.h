// Batched matrix products in fp64 on the tensor cores: what carries every step of the SVD routes that
// must not round.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// A matrix for every module: element (i, j) of module l is data[l * module_stride + i * row_stride +
// j * col_stride] of `dtype`; row_stride or col_stride is 1.
struct Operand {
  const void* data;
  DType dtype;
  int64_t module_stride, row_stride, col_stride;

  FASTAGG_MEMBER Operand transposed() const {
    return {data, dtype, module_stride, col_stride, row_stride};
  }
};

struct Result {
  void* data;
  DType dtype;  // Float32 or Float64
  int64_t module_stride, row_stride, col_stride;
};

inline Operand operand_of(const Slab& slab) {
  return {slab.data, slab.dtype, slab.rows * slab.cols, slab.cols, 1};
}

inline Operand row_major(const double* data, int64_t rows, int64_t cols) {
  return {data, DType::Float64, rows * cols, cols, 1};
}

inline Result row_major_result(double* data, int64_t rows, int64_t cols) {
  return {data, DType::Float64, rows * cols, cols, 1};
}

struct Shape {
  int64_t modules, m, n, k;
};

// out (m x n) = x (m x k) y (k x n), rounded once. A module whose `skip` is not zero is left as it
// is; null skips none. k = 0 gives zeros.
void multiply(const Operand& x, const Operand& y, const Result& out, const Shape& shape,
              const int32_t* skip, Stream stream);

// out (size x size) = x x^T, exactly symmetric, for x (size x k); out is row-major fp64.
void inner_products(const Operand& x, double* out, int64_t modules, int64_t size, int64_t k,
                    Stream stream);

}  // namespace fastagg::cuda
