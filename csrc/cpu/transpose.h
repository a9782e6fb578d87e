// The transposition of B into a slab's rows.
#pragma once

#include <cstdint>

namespace fastagg::cpu {

// out (cols, rows) = in (rows, cols) transposed, out rows out_stride apart; sums[j] grows by the
// sum of the squares of column j. `stream` writes past the caches, for a slab that does not fit
// into them.
void transpose(const float* in, int64_t rows, int64_t cols, float* out, int64_t out_stride,
               bool stream, double* sums);

}  // namespace fastagg::cpu
