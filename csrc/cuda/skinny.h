// Products of a slab with a skinny fp32 matrix on bf16 tensor cores. A value is a sum of bf16 terms:
// bf16 takes one, fp16 two, fp32 three, each exactly; `terms` says how many of the skinny operand
// count (NUMERICS: one in a power iteration, more where the result is final). A module whose `skip` is
// not zero is left as it is; null skips none.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// out (modules, rows, l) = diag(after) diag(scale) slab x for x (modules, cols, l). scale (modules,
// rows) are powers of two, applied to the slab's values before anything is multiplied; after (modules,
// rows) is applied to the sums; null means one.
void contract(const Slab& slab, const double* scale, const double* after, const float* x,
              int64_t modules, int64_t l, float* out, int terms, const int32_t* skip,
              Stream stream);

// The same with the Rademacher test matrix for x, made where it is used: element (i, j) of module t is
// the sign of element i * l + j of stream streams[t] (null: t).
void contract_signs(const Slab& slab, const double* scale, const double* after, uint64_t seed,
                    const int64_t* streams, int64_t modules, int64_t l, float* out, Stream stream);

// out (modules, cols, l) = slab^T diag(scale) x for x (modules, rows, l).
void expand(const Slab& slab, const double* scale, const float* x, int64_t modules, int64_t l,
            float* out, int terms, const int32_t* skip, Stream stream);

}  // namespace fastagg::cuda
