#include "svd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace fastagg::cpu {

template <class T>
int64_t write_spectrum(const std::vector<double>& s, int64_t rows, double terms, int64_t module,
                       const SvdOut<T>& out) {
  const double rounding =
      8.0 * static_cast<double>(rows) * std::numeric_limits<double>::epsilon() * terms;
  int64_t rank = 0;
  while (rank < static_cast<int64_t>(s.size()) && s[rank] > rounding) ++rank;
  const int64_t kept = std::min(rank, out.r);
  double head = 0, tail = 0;
  for (int64_t i = 0; i < rank; ++i) (i < kept ? head : tail) += s[i] * s[i];
  for (int64_t i = 0; i < kept; ++i) out.s[module * out.r + i] = static_cast<T>(s[i]);
  double* stats = out.stats + module * kStats;
  stats[kSquaredNorm] = head + tail;
  // error <= optimal + excess, and the optimal error is the tail.
  const double excess = kPromise * std::sqrt(head + tail) + rounding;
  stats[kCertificate] = excess * (2 * std::sqrt(tail) + excess);
  stats[kNumericalRank] = static_cast<double>(rank);
  return kept;
}

template <class T>
void fix_signs(const SvdOut<T>& out, int64_t module, int64_t kept) {
  T* u = out.u + module * out.m * out.r;
  T* s = out.s + module * out.r;
  T* vt = out.vt + module * out.r * out.n;
  std::vector<T> largest(static_cast<size_t>(kept), T(0));
  for (int64_t i = 0; i < out.m; ++i) {
    T* row = u + i * out.r;
    for (int64_t j = 0; j < kept; ++j)
      if (std::abs(row[j]) > std::abs(largest[j])) largest[j] = row[j];
    std::fill(row + kept, row + out.r, T(0));
  }
  for (int64_t i = 0; i < out.m; ++i) {
    T* row = u + i * out.r;
    for (int64_t j = 0; j < kept; ++j) row[j] = largest[j] < 0 ? -row[j] : row[j];
  }
  for (int64_t j = 0; j < kept; ++j) {
    if (!(largest[j] < 0)) continue;
    T* row = vt + j * out.n;
    for (int64_t i = 0; i < out.n; ++i) row[i] = -row[i];
  }
  std::fill(s + kept, s + out.r, T(0));
  std::fill(vt + kept * out.n, vt + out.r * out.n, T(0));
}

template <class T>
void fill_nonfinite(const SvdOut<T>& out, int64_t module) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::fill_n(out.u + module * out.m * out.r, out.m * out.r, nan);
  std::fill_n(out.s + module * out.r, out.r, nan);
  std::fill_n(out.vt + module * out.r * out.n, out.r * out.n, nan);
  std::fill_n(out.stats + module * kStats, kStats, std::numeric_limits<double>::quiet_NaN());
}

template int64_t write_spectrum(const std::vector<double>&, int64_t, double, int64_t,
                                const SvdOut<float>&);
template int64_t write_spectrum(const std::vector<double>&, int64_t, double, int64_t,
                                const SvdOut<double>&);
template void fix_signs(const SvdOut<float>&, int64_t, int64_t);
template void fix_signs(const SvdOut<double>&, int64_t, int64_t);
template void fill_nonfinite(const SvdOut<float>&, int64_t);
template void fill_nonfinite(const SvdOut<double>&, int64_t);

}  // namespace fastagg::cpu
