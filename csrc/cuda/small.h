// The small square problems of the SVD routes, one block a matrix where it fits its shared memory.
// All are fp64 and row-major, every decision is taken on the device, and nothing can fail: a matrix
// with a NaN in it gives garbage after a bounded time, which the caller replaces.
#pragma once

#include <cstdint>

#include "launch.h"

namespace fastagg::cuda {

// cpu::PivotedCholesky of every module of a batch: P^T G P = L L^T.
struct Cholesky {
  int64_t modules, size;
  double* factor;    // (modules, size, size): rows in G's own order, columns beyond the rank zero
  int32_t* pivots;   // (modules, size): the rows of G that were chosen, first `rank` entries
  int32_t* rank;     // (modules)
  double* smallest;  // (modules): the last pivot
  double*
      dropped;  // (modules): the squared norm of what the columns left out have beside the others
};

// Of diag(d) G diag(d), d (modules, size), G (modules, size, size), which it leaves as it is.
Cholesky pivoted_cholesky(const double* g, const double* d, int64_t modules, int64_t size,
                          double tolerance, Workspace& workspace, Stream stream);

// x (modules, size, cols) = d * L^-T w in the rows of the pivots, zero elsewhere, for w (modules,
// size, cols) of which the first `rank` rows count: cpu::coordinates.
void coordinates(const Cholesky& cholesky, const double* d, const double* w, int64_t cols,
                 double* x, Stream stream);

// C = U diag(s) V^T for every module, C (modules, size, size), by one-sided Jacobi: s (modules, size)
// decreases, and the columns of u and v (modules, size, size) are the vectors. u is orthonormal to
// 1e-10 at worst and v to rounding times s[0] / s[j] besides; where s is at most its own rounding,
// size * eps * s[0], the vectors are zero. A module whose `skip` is not zero is left as it is; null
// skips none.
void core_svd(const double* c, int64_t modules, int64_t size, const int32_t* skip, double* u,
              double* s, double* v, Workspace& workspace, Stream stream);

}  // namespace fastagg::cuda
