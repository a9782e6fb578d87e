#include "cholesky.h"

#include <algorithm>
#include <cmath>

#include "runtime.h"
#include "vectorize.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kBlock = 32;  // columns factored between two updates by BLAS

FASTAGG_VECTORIZE void subtract_scaled(double* to, const double* from, double factor,
                                       int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] -= factor * from[i];
}

}  // namespace

// Right-looking by blocks. The work matrix is symmetric, so its row p is its column p: the columns
// of L are kept as contiguous rows of `lt` (rank, size), and G never has to be permuted.
PivotedCholesky pivoted_cholesky(const double* g, int64_t size, double tolerance) {
  PivotedCholesky result;
  result.size = size;
  std::vector<double> work(g, g + size * size);
  std::vector<double> diagonal(static_cast<size_t>(size));
  std::vector<char> used(static_cast<size_t>(size), 0);
  std::vector<double> lt;
  lt.reserve(static_cast<size_t>(size * size));
  for (int64_t i = 0; i < size; ++i) diagonal[i] = work[i * size + i];
  double first = 0;
  int64_t block_start = 0;
  for (int64_t k = 0; k < size; ++k) {
    int64_t pivot = -1;
    for (int64_t i = 0; i < size; ++i)
      if (!used[i] && (pivot < 0 || diagonal[i] > diagonal[pivot])) pivot = i;
    if (k == 0) first = diagonal[pivot];
    if (!(diagonal[pivot] > tolerance * first) || !(diagonal[pivot] > 0)) break;

    lt.resize(static_cast<size_t>((k + 1) * size));
    double* column = lt.data() + k * size;
    std::copy_n(work.data() + pivot * size, size, column);
    for (int64_t b = block_start; b < k; ++b)
      subtract_scaled(column, lt.data() + b * size, lt[b * size + pivot], size);
    const double diagonal_of_pivot = diagonal[pivot];
    const double root = std::sqrt(diagonal_of_pivot);
    for (int64_t i = 0; i < size; ++i) {
      column[i] = used[i] ? 0.0 : column[i] / root;
      if (!used[i]) diagonal[i] -= column[i] * column[i];
    }
    column[pivot] = root;
    result.smallest = diagonal_of_pivot;
    used[pivot] = 1;
    result.pivots.push_back(pivot);

    if (k + 1 - block_start == kBlock && k + 1 < size) {
      const Matrix<double> block = row_major(lt.data() + block_start * size, kBlock, size);
      Workspace<double> update(size * size);
      multiply(block.transposed(), block, row_major(update.get(), size, size));
      subtract_scaled(work.data(), update.get(), 1.0, size * size);
      block_start = k + 1;
    }
  }
  for (int64_t i = 0; i < size; ++i)
    if (!used[i]) result.dropped += std::max(diagonal[i], 0.0);
  result.rank = static_cast<int64_t>(result.pivots.size());
  result.factor.resize(static_cast<size_t>(size * result.rank));
  for (int64_t k = 0; k < result.rank; ++k)
    for (int64_t i = 0; i < size; ++i) result.factor[i * result.rank + k] = lt[k * size + i];
  return result;
}

// Back substitution on rows of y; L^T is upper triangular with L^T[i][k] = factor[pivots[k]][i].
void solve_transposed(const PivotedCholesky& cholesky, double* y, int64_t cols) {
  const int64_t rank = cholesky.rank;
  for (int64_t k = rank - 1; k >= 0; --k) {
    const double* row = cholesky.factor.data() + cholesky.pivots[k] * rank;
    const double inverse = 1.0 / row[k];
    for (int64_t j = 0; j < cols; ++j) y[k * cols + j] *= inverse;
    for (int64_t i = 0; i < k; ++i) subtract_scaled(y + i * cols, y + k * cols, row[i], cols);
  }
}

std::vector<double> scaled(const double* g, const std::vector<double>& d) {
  const auto size = static_cast<int64_t>(d.size());
  std::vector<double> out(static_cast<size_t>(size * size));
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) out[i * size + j] = d[i] * d[j] * g[i * size + j];
  return out;
}

std::vector<double> coordinates(const PivotedCholesky& cholesky, const std::vector<double>& d,
                                std::vector<double> w, int64_t cols) {
  solve_transposed(cholesky, w.data(), cols);
  std::vector<double> x(static_cast<size_t>(cholesky.size * cols), 0.0);
  for (int64_t k = 0; k < cholesky.rank; ++k) {
    const int64_t row = cholesky.pivots[k];
    for (int64_t j = 0; j < cols; ++j) x[row * cols + j] = d[row] * w[k * cols + j];
  }
  return x;
}

double norm(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

}  // namespace fastagg::cpu
