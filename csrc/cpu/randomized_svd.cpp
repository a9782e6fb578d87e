// The randomized route: a Rademacher sketch of l columns, q power iterations, each basis made
// orthonormal by column scaling by powers of two, an fp64 Gram matrix and a pivoted Cholesky.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../ragged/philox.h"
#include "cholesky.h"
#include "householder.h"
#include "linear_maps.h"
#include "svd.h"

namespace fastagg::cpu {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kBasisTolerance = 1e-13;  // smaller pivots are noise of the fp32 columns

// Vectors that a Gram matrix gives further from orthogonal than this are corrected.
constexpr double kLargestLoss = 1e-8;

// Products are off by at most about so many roundings of the terms that they sum.
constexpr double kRoundings = 2.0;

// The same of the two fp64 sums of squares whose difference is the certificate.
constexpr double kNormRoundings = 32.0;

template <class T>
void fill_identity(const Skinny<T>& x, int64_t modules) {
  std::fill_n(x.data.get(), modules * x.size * x.l, T(0));
  for (int64_t module = 0; module < modules; ++module)
    for (int64_t i = 0; i < x.l; ++i) x.all(module).data[i * x.l + i] = T(1);
}

// The Rademacher test matrix (n, l), or the identity where l = n and nothing need be random.
template <class T>
void fill_test_matrix(const Sketch& sketch, int64_t modules, const Skinny<T>& omega) {
  const int64_t count = omega.size * omega.l;
  const int64_t blocks = tiles(count, kSignsPerBlock);
  if (omega.l == omega.size) return fill_identity(omega, modules);
  for_each_task(modules, [&](int64_t l) {
    T* out = omega.all(l).data;
    const auto stream = static_cast<uint64_t>(sketch.streams ? sketch.streams[l] : l);
    for (int64_t b = 0; b < blocks; ++b) {
      const Philox4 words = rademacher_block(sketch.seed, stream, static_cast<uint64_t>(b));
      const int64_t first = b * kSignsPerBlock;
      for (int64_t e = 0; e < std::min(kSignsPerBlock, count - first); ++e)
        out[first + e] = static_cast<T>(rademacher_sign(words, e));
    }
  });
}

// G = Y^T Y (l, l) in fp64 for every module.
template <class T>
Workspace<double> column_gram(const Skinny<T>& y, int64_t modules) {
  const int64_t l = y.l;
  Workspace<double> out(modules * l * l);
  for_each_task(modules, [&](int64_t module) {
    double* g = out.get() + module * l * l;
    std::fill_n(g, l * l, 0.0);
    Workspace<double> panel(kPanel * l);
    for (int64_t row = 0; row < y.size; row += kPanel) {
      const int64_t height = std::min(kPanel, y.size - row);
      const T* from = y.rows(module, row, height).data;
      for (int64_t i = 0; i < height * l; ++i) panel[i] = static_cast<double>(from[i]);
      const Matrix<double> rows = row_major(panel.get(), height, l);
      multiply_add(rows.transposed(), rows, row_major(g, l, l));
    }
  });
  return out;
}

// y x for one panel of rows, in fp64.
template <class T, class Write>
void apply_rows(const Skinny<T>& y, int64_t module, int64_t row, int64_t height,
                const Matrix<double>& x, const Write& write) {
  Workspace<double> in(height * y.l), out(height * x.cols);
  const T* from = y.rows(module, row, height).data;
  for (int64_t i = 0; i < height * y.l; ++i) in[i] = static_cast<double>(from[i]);
  multiply(row_major(in.get(), height, y.l), x, row_major(out.get(), height, x.cols));
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < x.cols; ++j) write(row + i, j, out[i * x.cols + j]);
}

// The pivoted Cholesky of Y^T Y after its columns are scaled to about unit norm by powers of two.
struct Basis {
  std::vector<double> scale;  // (l,)
  PivotedCholesky cholesky;
};

Basis basis_of(const double* g, int64_t l, double tolerance) {
  Basis basis;
  basis.scale.resize(static_cast<size_t>(l));
  for (int64_t i = 0; i < l; ++i) {
    const double norm = std::sqrt(g[i * l + i]);
    basis.scale[i] = norm > 0 && std::isfinite(norm) ? std::ldexp(1.0, -nearest_exponent(norm)) : 0;
  }
  basis.cholesky = pivoted_cholesky(scaled(g, basis.scale).data(), l, tolerance);
  return basis;
}

// Replaces the columns of y by an orthonormal basis of their span, zeros after its dimension.
template <class T>
void orthonormalise(const Skinny<T>& y, int64_t modules) {
  const int64_t l = y.l;
  const Workspace<double> g = column_gram(y, modules);
  std::vector<std::vector<double>> x(static_cast<size_t>(modules));
  for_each_task(modules, [&](int64_t module) {
    const Basis basis = basis_of(g.get() + module * l * l, l, kBasisTolerance);
    const int64_t rank = basis.cholesky.rank;
    std::vector<double> identity(static_cast<size_t>(rank * l), 0.0);
    for (int64_t k = 0; k < rank; ++k) identity[k * l + k] = 1.0;
    x[module] = coordinates(basis.cholesky, basis.scale, std::move(identity), l);
  });
  const int64_t panels = tiles(y.size, kPanel);
  for_each_task(modules * panels, [&](int64_t task) {
    const int64_t module = task / panels, row = task % panels * kPanel;
    apply_rows(y, module, row, std::min(kPanel, y.size - row), row_major(x[module].data(), l, l),
               [&](int64_t i, int64_t j, double value) {
                 y.all(module).data[i * l + j] = static_cast<T>(value);
               });
  });
}

// x (l, kept) such that Y x is orthonormal where Y x0 nearly is: x0 (I - E / 2 + 3 E^2 / 8) with
// E = (Y x0)^T (Y x0) - I, which moves no column by more than its error.
template <class T>
std::vector<double> polished(const Skinny<T>& y, int64_t module, std::vector<double> x,
                             int64_t kept) {
  std::vector<double> e(static_cast<size_t>(kept * kept), 0.0), e2(e), correction(e);
  const auto error = row_major(e.data(), kept, kept), squared = row_major(e2.data(), kept, kept);
  Workspace<double> in(kPanel * y.l), vectors(kPanel * kept);
  const auto coordinates = row_major(x.data(), y.l, kept);
  for (int64_t row = 0; row < y.size; row += kPanel) {
    const int64_t height = std::min(kPanel, y.size - row);
    const T* from = y.rows(module, row, height).data;
    for (int64_t i = 0; i < height * y.l; ++i) in[i] = static_cast<double>(from[i]);
    const auto panel = row_major(vectors.get(), height, kept);
    multiply(row_major(in.get(), height, y.l), coordinates, panel);
    multiply_add(panel.transposed(), panel, error);
  }
  for (int64_t j = 0; j < kept; ++j) e[j * kept + j] -= 1.0;
  multiply(error, error, squared);
  for (int64_t i = 0; i < kept * kept; ++i)
    correction[i] = (i % (kept + 1) == 0 ? 1.0 : 0.0) - 0.5 * e[i] + 0.375 * e2[i];
  std::vector<double> out(x.size());
  multiply(coordinates, row_major(correction.data(), kept, kept), row_major(out.data(), y.l, kept));
  return out;
}

template <class T>
bool has_nonfinite(const Skinny<T>& y, int64_t module) {
  T sum = 0;  // zero, or NaN where any entry is not finite
  for (int64_t i = 0; i < y.size * y.l; ++i) sum += T(0) * y.all(module).data[i];
  return sum != 0;
}

// From Q and Z = dW^T Q: T = Z^T = F Q_Z^T, its core's SVD F = u s v^T, U = Q u, V = Q_Z v.
template <class T, class Map>
void finish(const Map& map, const Skinny<T>& q, const Skinny<T>& z,
            const std::vector<double>& squared_norms, const SvdOut<T>& out) {
  const int64_t l = q.l;
  const Workspace<double> g = column_gram(z, out.modules);
  for_each_task(out.modules, [&](int64_t module) {
    const double* gram = g.get() + module * l * l;
    double captured = 0;
    for (int64_t i = 0; i < l; ++i) captured += gram[i * l + i];
    const double squared = squared_norms[module];
    if (!std::isfinite(squared) || !std::isfinite(captured) || has_nonfinite(q, module))
      return fill_nonfinite(out, module);

    const Basis basis = basis_of(gram, l, 4.0 * static_cast<double>(l) * kEps);
    const int64_t rank = basis.cholesky.rank;
    std::vector<double> f(basis.cholesky.factor);
    for (int64_t i = 0; i < l; ++i)
      for (int64_t k = 0; k < rank; ++k)
        if (basis.scale[i] != 0) f[i * rank + k] /= basis.scale[i];
    std::vector<double> u(static_cast<size_t>(l * rank)), s(static_cast<size_t>(rank));
    std::vector<double> vt(static_cast<size_t>(rank * rank));
    svd(f.data(), l, rank, u.data(), s.data(), vt.data());
    // Q and Z are rounded to T: singular values below that rounding are its noise.
    const double terms = std::max(map.terms(module), std::sqrt(squared));
    const double rounding = static_cast<double>(std::numeric_limits<T>::epsilon()) * terms;
    const double noise = std::ldexp(rounding, -map.exponent(module));
    int64_t count = 0;
    while (count < rank && s[count] > noise) ++count;
    const int64_t kept = std::min(count, out.r);

    std::vector<double> left(static_cast<size_t>(l * kept)),
        right(static_cast<size_t>(rank * kept));
    for (int64_t j = 0; j < kept; ++j) {
      for (int64_t i = 0; i < l; ++i) left[i * kept + j] = u[i * rank + j];
      for (int64_t i = 0; i < rank; ++i) right[i * kept + j] = vt[j * rank + i];
      out.s[module * out.r + j] = static_cast<T>(std::ldexp(s[j], map.exponent(module)));
    }
    std::vector<double> y = coordinates(basis.cholesky, basis.scale, std::move(right), kept);
    if (kept > 0) {
      // Z's Gram matrix knows the directions of its small singular values only roughly.
      if (kEps * captured > kLargestLoss * s[kept - 1] * s[kept - 1])
        y = polished(z, module, std::move(y), kept);
      for (int64_t row = 0; row < out.m; row += kPanel)
        apply_rows(q, module, row, std::min(kPanel, out.m - row), row_major(left.data(), l, kept),
                   [&](int64_t i, int64_t j, double value) {
                     out.u[(module * out.m + i) * out.r + j] = static_cast<T>(value);
                   });
      for (int64_t row = 0; row < out.n; row += kPanel)
        apply_rows(z, module, row, std::min(kPanel, out.n - row),
                   row_major(const_cast<double*>(y.data()), l, kept),
                   [&](int64_t i, int64_t j, double value) {
                     out.vt[(module * out.r + j) * out.n + i] = static_cast<T>(value);
                   });
    }
    fix_signs(out, module, kept);
    // error^2 - optimal^2 <= |dW - Q Q^T dW|_F^2 = |dW|_F^2 - |Q^T dW|_F^2, where what Q^T dW lost
    // to the Cholesky factor's tolerance, and what was dropped of the first r as noise, is missed
    // too.
    double found = 0;
    for (int64_t j = 0; j < rank; ++j)
      if (j < kept || j >= out.r) found += s[j] * s[j];
    double* stats = out.stats + module * kStats;
    const double missed = squared - std::ldexp(found, 2 * map.exponent(module));
    stats[kSquaredNorm] = squared;
    const double excess = kRoundings * rounding;
    stats[kCertificate] = std::max(missed, 0.0) + excess * (2 * std::sqrt(squared) + excess) +
                          kNormRoundings * kEps * terms * terms;
    stats[kNumericalRank] = static_cast<double>(count);
  });
}

template <class T, class Map>
void sketched_svd(const Map& map, const Sketch& sketch, const std::vector<double>& squared_norms,
                  const SvdOut<T>& out) {
  const int64_t l = std::max<int64_t>(sketch.columns, 0);
  const Skinny<T> x(out.modules, out.n, l), y(out.modules, out.m, l);
  if (l == out.m) {
    // As many columns as rows: random signs might miss a direction, the identity cannot.
    fill_identity(y, out.modules);
  } else {
    fill_test_matrix(sketch, out.modules, x);
    map.forward(x, y);
    for (int64_t q = 0; l < out.n && q < sketch.power_iterations; ++q) {
      orthonormalise(y, out.modules);
      map.adjoint(y, x);
      orthonormalise(x, out.modules);
      map.forward(x, y);
    }
    // The last basis takes two passes: the first leaves what the pivots' range lost.
    orthonormalise(y, out.modules);
    orthonormalise(y, out.modules);
  }
  map.adjoint(y, x);
  finish(map, y, x, squared_norms, out);
}

}  // namespace

template <class T>
void randomized_svd(const Slab& a, const Slab& bt, const double* coefficients, const Sketch& sketch,
                    const SvdOut<T>& out) {
  std::vector<double> squared_norms(static_cast<size_t>(out.modules));
  squared_norm(a, bt, coefficients, out.modules, squared_norms.data());
  sketched_svd(FactoredMap<T>(a, bt, coefficients, out.modules), sketch, squared_norms, out);
}

template <class T>
void randomized_svd_dense(const Slab& w, const Sketch& sketch, const SvdOut<T>& out) {
  const std::vector<double> norms = row_norms(w, out.modules);
  std::vector<double> squared_norms(static_cast<size_t>(out.modules), 0.0);
  for (int64_t i = 0; i < out.modules * out.m; ++i) squared_norms[i / out.m] += norms[i] * norms[i];
  sketched_svd(DenseMap<T>(w, squared_norms), sketch, squared_norms, out);
}

template void randomized_svd(const Slab&, const Slab&, const double*, const Sketch&,
                             const SvdOut<float>&);
template void randomized_svd(const Slab&, const Slab&, const double*, const Sketch&,
                             const SvdOut<double>&);
template void randomized_svd_dense(const Slab&, const Sketch&, const SvdOut<float>&);
template void randomized_svd_dense(const Slab&, const Sketch&, const SvdOut<double>&);

}  // namespace fastagg::cpu
