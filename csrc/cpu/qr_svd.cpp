// The exact route by Householder QR of both factors in fp64, dW = Q_B (R_B R_A^T) Q_A^T. A Gram
// matrix squares the condition of a factor: where clients nearly cancel, or the wanted singular
// values spread over many decades, it cannot keep the promise, and a QR does at some times its
// cost.
#include <algorithm>
#include <cmath>

#include "cholesky.h"
#include "householder.h"
#include "products.h"
#include "svd.h"

namespace fastagg::cpu {
namespace {

HouseholderQr qr_of(const Slab& slab, int64_t module, const std::vector<double>& scale) {
  std::vector<double> columns(static_cast<size_t>(slab.rows * slab.cols));
  load_panel(slab, module, 0, slab.rows, 0, slab.cols, scale.data(), columns.data());
  return {std::move(columns), slab.cols, slab.rows};
}

}  // namespace

template <class T>
int64_t qr_svd(const Slab& a, const Slab& bt, const std::vector<double>& alpha,
               const std::vector<double>& beta, int64_t module, const SvdOut<T>& out) {
  const HouseholderQr qa = qr_of(a, module, alpha), qb = qr_of(bt, module, beta);
  std::vector<double> ra = qa.upper(), rb = qb.upper();
  const int64_t rows = a.rows, ka = qa.rank(), kb = qb.rank(), k = std::min(ka, kb);
  std::vector<double> core(static_cast<size_t>(kb * ka));
  multiply(row_major(rb.data(), kb, rows), row_major(ra.data(), ka, rows).transposed(),
           row_major(core.data(), kb, ka));
  std::vector<double> u(static_cast<size_t>(kb * k)), s(static_cast<size_t>(k));
  std::vector<double> vt(static_cast<size_t>(k * ka));
  svd(core.data(), kb, ka, u.data(), s.data(), vt.data());

  const int64_t kept = write_spectrum(s, rows, norm(ra) * norm(rb), module, out);
  std::vector<double> ut(static_cast<size_t>(kept * kb));
  for (int64_t j = 0; j < kept; ++j)
    for (int64_t i = 0; i < kb; ++i) ut[j * kb + i] = u[i * k + j];
  const std::vector<double> left = qb.times(ut, kept), right = qa.times(vt, kept);
  for (int64_t j = 0; j < kept; ++j)
    for (int64_t i = 0; i < out.m; ++i)
      out.u[(module * out.m + i) * out.r + j] = static_cast<T>(left[j * out.m + i]);
  for (int64_t i = 0; i < kept * out.n; ++i)
    out.vt[module * out.r * out.n + i] = static_cast<T>(right[i]);
  return kept;
}

template int64_t qr_svd(const Slab&, const Slab&, const std::vector<double>&,
                        const std::vector<double>&, int64_t, const SvdOut<float>&);
template int64_t qr_svd(const Slab&, const Slab&, const std::vector<double>&,
                        const std::vector<double>&, int64_t, const SvdOut<double>&);

}  // namespace fastagg::cpu
