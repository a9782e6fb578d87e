// The exact route. With dW = B~ A~ (coefficients and balance folded in), G_B = B~^T B~ = F_B F_B^T and
// G_A = A~ A~^T = F_A F_A^T by pivoted Cholesky, B~ = Q_B F_B^T with Q_B = B~[:, piv] L_B^-T, so
//     dW = Q_B (F_B^T F_A) Q_A^T,
// and the SVD u s v^T of the small core gives U = Q_B u, V = Q_A v. The scalings never touch the
// factors: they act on the R x R Gram matrices, and on the R x r matrices X, Y of U = B X, V = A^T Y.
// A module whose Gram matrices cannot keep the promise (clients that all but cancel, wanted singular
// values over many decades) is found by its pivots and its vectors' terms, and left to qr_svd.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../ragged/balance.h"
#include "cholesky.h"
#include "householder.h"
#include "products.h"
#include "svd.h"

namespace fastagg::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// Above this growth of its terms a product is summed in fp64; below, fp32 keeps the promise.
constexpr double kSinglePrecisionGrowth = 4.0;

// Vectors that are sums of terms this much larger lose their orthogonality: eps growth^2 < 1e-6.
constexpr double kLargestGrowth = 6e4;

struct Core {
  bool finite = true;
  bool lossy = false;  // the Gram matrices cannot keep the promise
  int64_t kept = 0;
  bool single_u = false, single_v = false;
  std::vector<double> alpha, beta;
  std::vector<double> x, y;  // (R, kept): U = B x, V = A^T y
};

// How much larger the terms of a column of B x are than the unit vector that they sum to.
double growth(const double* g, const std::vector<double>& x, int64_t rows, int64_t kept) {
  double largest = 0;
  for (int64_t j = 0; j < kept; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += g[i * rows + i] * x[i * kept + j] * x[i * kept + j];
    largest = std::max(largest, sum);
  }
  return std::sqrt(largest);
}

// A bound of the largest singular value of a factor, from its Gram matrix.
double spectral_norm(const std::vector<double>& g, int64_t rows) {
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < rows; ++j) sum += std::abs(g[i * rows + j]);
    largest = std::max(largest, sum);
  }
  return std::sqrt(largest);
}

// How far the factor is from the columns that its Cholesky factor stands for: what was dropped, and
// the rounding of the Gram matrix, which the smallest pivot magnifies.
double distance(const PivotedCholesky& cholesky) {
  if (cholesky.rank == 0) return 0;
  const double trace = std::pow(norm(cholesky.factor), 2);
  return std::sqrt(cholesky.dropped) +
         static_cast<double>(cholesky.size) * kEps * trace / std::sqrt(cholesky.smallest);
}

template <class T>
Core solve_core(const double* ga, const double* gb, const double* c, int64_t rows, int64_t module,
                const SvdOut<T>& out) {
  Core core;
  std::vector<double>&alpha = core.alpha, &beta = core.beta;
  alpha.resize(static_cast<size_t>(rows));
  beta.resize(static_cast<size_t>(rows));
  double check = 0;
  for (int64_t j = 0; j < rows; ++j) {
    const double coefficient = c ? c[j] : 1.0;
    const double aa = ga[j * rows + j], bb = gb[j * rows + j];
    check += 0.0 * (aa + bb + coefficient);  // zero, or NaN where anything is not finite
    if (check != 0) break;
    const Balance scale = balance(coefficient, std::sqrt(aa), std::sqrt(bb));
    alpha[j] = scale.alpha;
    beta[j] = scale.beta;
  }
  if (check != 0) {
    core.finite = false;
    return core;
  }
  const double tolerance = 4.0 * static_cast<double>(rows) * kEps;
  const std::vector<double> scaled_a = scaled(ga, alpha), scaled_b = scaled(gb, beta);
  const PivotedCholesky a = pivoted_cholesky(scaled_a.data(), rows, tolerance);
  const PivotedCholesky b = pivoted_cholesky(scaled_b.data(), rows, tolerance);
  const int64_t k = std::min(a.rank, b.rank);
  std::vector<double> small(static_cast<size_t>(b.rank * a.rank));
  std::vector<double> u(static_cast<size_t>(b.rank * k)), s(static_cast<size_t>(k));
  std::vector<double> vt(static_cast<size_t>(k * a.rank));
  if (k > 0) {
    const auto fb = row_major(const_cast<double*>(b.factor.data()), rows, b.rank);
    const auto fa = row_major(const_cast<double*>(a.factor.data()), rows, a.rank);
    multiply(fb.transposed(), fa, row_major(small.data(), b.rank, a.rank));
    svd(small.data(), b.rank, a.rank, u.data(), s.data(), vt.data());
  }
  core.kept = write_spectrum(s, rows, norm(a.factor) * norm(b.factor), module, out);
  const double excess =
      distance(a) * spectral_norm(scaled_b, rows) + distance(b) * spectral_norm(scaled_a, rows);
  core.lossy = excess > 0.5 * kPromise * norm(s);
  if (core.lossy) return core;

  std::vector<double> wu(static_cast<size_t>(b.rank * core.kept));
  std::vector<double> wv(static_cast<size_t>(a.rank * core.kept));
  for (int64_t i = 0; i < b.rank; ++i)
    for (int64_t j = 0; j < core.kept; ++j) wu[i * core.kept + j] = u[i * k + j];
  for (int64_t i = 0; i < a.rank; ++i)
    for (int64_t j = 0; j < core.kept; ++j) wv[i * core.kept + j] = vt[j * a.rank + i];
  core.x = coordinates(b, beta, std::move(wu), core.kept);
  core.y = coordinates(a, alpha, std::move(wv), core.kept);
  const double growth_u = growth(gb, core.x, rows, core.kept);
  const double growth_v = growth(ga, core.y, rows, core.kept);
  core.single_u = growth_u <= kSinglePrecisionGrowth;
  core.single_v = growth_v <= kSinglePrecisionGrowth;
  core.lossy = std::max(growth_u, growth_v) > kLargestGrowth;
  return core;
}

// out columns [col, col + count) of x^T slab, (kept, count), in the compute type C.
template <class C>
Workspace<C> transformed_panel(const Slab& slab, int64_t module, const std::vector<double>& x,
                               int64_t kept, int64_t col, int64_t count) {
  // In fp32 the rows of the slab and of x meet near one: their product could leave its range.
  std::vector<double> scale(static_cast<size_t>(slab.rows), 1.0);
  Workspace<C> xt(kept * slab.rows);
  for (int64_t i = 0; i < slab.rows; ++i) {
    double largest = 0;
    for (int64_t j = 0; j < kept; ++j) largest = std::max(largest, std::abs(x[i * kept + j]));
    if (sizeof(C) == sizeof(float) && largest > 0) scale[i] = 1.0 / unit_scale(largest);
    for (int64_t j = 0; j < kept; ++j)
      xt[j * slab.rows + i] = static_cast<C>(x[i * kept + j] / scale[i]);
  }
  Workspace<C> panel(slab.rows * count);
  load_panel(slab, module, 0, slab.rows, col, count, scale.data(), panel.get());
  Workspace<C> out(kept * count);
  multiply(row_major(xt.get(), kept, slab.rows), row_major(panel.get(), slab.rows, count),
           row_major(out.get(), kept, count));
  return out;
}

// Columns [col, col + count) of V^T, or rows [col, col + count) of U.
template <class C, class T>
void write_vectors(const Slab& slab, int64_t module, const std::vector<double>& x, int64_t kept,
                   int64_t col, int64_t count, bool is_u, const SvdOut<T>& out) {
  const Workspace<C> vectors = transformed_panel<C>(slab, module, x, kept, col, count);
  if (!is_u) {
    for (int64_t j = 0; j < kept; ++j) {
      T* to = out.vt + (module * out.r + j) * out.n + col;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(vectors[j * count + i]);
    }
    return;
  }
  T* to = out.u + (module * out.m + col) * out.r;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < kept; ++j) to[i * out.r + j] = static_cast<T>(vectors[j * count + i]);
}

}  // namespace

template <class T>
void gram_svd(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out) {
  const int64_t rows = a.rows;
  const int64_t square = rows * rows;
  Workspace<double> ga(out.modules * square), gb(out.modules * square);
  gram(a, out.modules, ga.get());
  gram(bt, out.modules, gb.get());

  std::vector<Core> cores(static_cast<size_t>(out.modules));
  for_each_task(out.modules, [&](int64_t l) {
    Core& core = cores[l];
    core = solve_core(ga.get() + l * square, gb.get() + l * square,
                      coefficients ? coefficients + l * rows : nullptr, rows, l, out);
    if (core.lossy) core.kept = qr_svd(a, bt, core.alpha, core.beta, l, out);
  });

  const int64_t u_panels = tiles(out.m, kPanel), panels = u_panels + tiles(out.n, kPanel);
  for_each_task(out.modules * panels, [&](int64_t task) {
    const int64_t l = task / panels, p = task % panels;
    const Core& core = cores[l];
    const bool is_u = p < u_panels;
    const int64_t col = (is_u ? p : p - u_panels) * kPanel;
    const int64_t count = std::min(kPanel, (is_u ? out.m : out.n) - col);
    if (core.kept == 0 || core.lossy) return;
    const bool single = sizeof(T) == sizeof(float) && (is_u ? core.single_u : core.single_v);
    const auto write = single ? write_vectors<float, T> : write_vectors<double, T>;
    write(is_u ? bt : a, l, is_u ? core.x : core.y, core.kept, col, count, is_u, out);
  });
  for_each_task(out.modules, [&](int64_t l) {
    cores[l].finite ? fix_signs(out, l, cores[l].kept) : fill_nonfinite(out, l);
  });
}

template void gram_svd(const Slab&, const Slab&, const double*, const SvdOut<float>&);
template void gram_svd(const Slab&, const Slab&, const double*, const SvdOut<double>&);

}  // namespace fastagg::cpu
