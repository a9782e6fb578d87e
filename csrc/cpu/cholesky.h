// Small fp64 matrices: pivoted Cholesky and triangular solves.
#pragma once

#include <cstdint>
#include <vector>

namespace fastagg::cpu {

// P^T G P = L L^T, stopped where the largest remaining pivot is at most `tolerance` times the first:
// rank revealing, and nothing in it can fail, as a plain Cholesky of a singular matrix does.
struct PivotedCholesky {
  int64_t size = 0;
  int64_t rank = 0;
  double smallest = 0;  // the last pivot, a squared distance of a column from the others
  double dropped = 0;   // the squared norm of what the columns left out have beside the others
  std::vector<int64_t> pivots;  // rank entries: the rows of G that were chosen
  std::vector<double> factor;  // (size, rank) row-major, rows in G's own order: G = factor factor^T
};
PivotedCholesky pivoted_cholesky(const double* g, int64_t size, double tolerance);

// Solves L^T x = y in place for y (rank, cols) row-major, where L = factor[pivots].
void solve_transposed(const PivotedCholesky& cholesky, double* y, int64_t cols);

// diag(d) G diag(d), row-major.
std::vector<double> scaled(const double* g, const std::vector<double>& d);

// For columns scaled by d whose Gram matrix was factored, (size, cols) x such that the unscaled columns
// times x are Q w, where Q is their orthonormal basis and w (rank, cols).
std::vector<double> coordinates(const PivotedCholesky& cholesky, const std::vector<double>& d,
                                std::vector<double> w, int64_t cols);

// The Frobenius norm.
double norm(const std::vector<double>& values);

}  // namespace fastagg::cpu
