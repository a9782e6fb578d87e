// Truncated SVDs of dW = B diag(c) A, batched over the modules of a bucket. Non-finite input gives
// NaN throughout, never a rank: the caller decides.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fastagg::cpu {

// Exact: fp64 Gram matrices, pivoted Cholesky, SVD of the R x R core.
template <class T>
void gram_svd(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out);

// Halko, Martinsson and Tropp (SIAM Review 2011), of the factors: Y = B (c * (A Omega)).
template <class T>
void randomized_svd(const Slab& a, const Slab& bt, const double* coefficients, const Sketch& sketch,
                    const SvdOut<T>& out);

// The same of a dense dW (modules, m, n).
template <class T>
void randomized_svd_dense(const Slab& w, const Sketch& sketch, const SvdOut<T>& out);

// Writes the singular values and stats of an exact route and returns how many of r columns carry
// weight: those above what rounding leaves of dW's terms, whose norm is at most `terms`.
template <class T>
int64_t write_spectrum(const std::vector<double>& s, int64_t rows, double terms, int64_t module,
                       const SvdOut<T>& out);

// The exact route of one module by QR, for diag(alpha) A and B diag(beta). Returns the columns
// kept, for fix_signs.
template <class T>
int64_t qr_svd(const Slab& a, const Slab& bt, const std::vector<double>& alpha,
               const std::vector<double>& beta, int64_t module, const SvdOut<T>& out);

// Zeroes the columns from `kept` on, and makes the largest entry of each u positive (the lowest
// index breaks a tie), so that a decomposition is a function of its input.
template <class T>
void fix_signs(const SvdOut<T>& out, int64_t module, int64_t kept);

template <class T>
void fill_nonfinite(const SvdOut<T>& out, int64_t module);

}  // namespace fastagg::cpu
