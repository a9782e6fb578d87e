// The two movements of a stack: rows of A as they are, rows of B transposed. Each converts, scales,
// sums squares and stores in one pass.
#pragma once

#include <cstdint>

#include "../ragged/dtype.h"

namespace fastagg::cpu {

// Elements at any byte address.
struct Source {
  const void* data;
  DType dtype;
};

// Elements of a slab, each at a multiple of its size. `stream` writes past the caches, for a slab that
// does not fit into them: what is written need not be read first, which would be a third of the traffic.
struct Target {
  void* data;
  DType dtype;
  bool stream;
};

// to (rows, cols) = scale * from, or from itself; sums[i] becomes the sum of the squares of row i of from.
void copy_rows(Source from, int64_t rows, int64_t cols, const float* scale, Target to,
               double* sums);

// to (cols, rows) = from (rows, cols) transposed, rows of `to` stride apart; sums[j] grows by the sum of
// the squares of column j of from.
void transpose_rows(Source from, int64_t rows, int64_t cols, Target to, int64_t stride,
                    double* sums);

// Both by AVX-512, where has_avx512() says so.
bool has_avx512();
void copy_rows_avx512(Source from, int64_t rows, int64_t cols, const float* scale, Target to,
                      double* sums);
void transpose_rows_avx512(Source from, int64_t rows, int64_t cols, Target to, int64_t stride,
                           double* sums);

}  // namespace fastagg::cpu
