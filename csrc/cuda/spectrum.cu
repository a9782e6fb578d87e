#include "spectrum.h"

#include <limits>

#include "reduce.h"

namespace fastagg::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int kThreads = 256;
constexpr int64_t kScratch = kThreads / kWarp * sizeof(double);

// Vectors below this part of the first singular value are made orthogonal once more: above it,
// rounding leaves them so to 1e-6.
constexpr double kOrthogonal = 1e-9;

// The sum of the squares of count values, over a whole block.
__device__ double squared_norm_of(const double* values, int64_t count, double* scratch) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += values[i] * values[i];
  return block_sum(sum, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    spectrum_of(const double* all_s, const double* factor_a, const double* factor_b, int64_t rows,
                const int32_t* skip, SvdOut<T> out, int32_t* all_kept) {
  auto* scratch = shared_memory<double>();
  const int64_t module = blockIdx.x, square = rows * rows;
  if (skip[module]) return;
  const double* s = all_s + module * rows;
  const double terms = sqrt(squared_norm_of(factor_a + module * square, square, scratch)) *
                       sqrt(squared_norm_of(factor_b + module * square, square, scratch));
  const double rounding = 8.0 * static_cast<double>(rows) * kEps * terms;
  int64_t above = 0;
  double head = 0, tail = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    if (!(s[i] > rounding)) continue;
    ++above;
    (i < out.r ? head : tail) += s[i] * s[i];
    if (i < out.r) out.s[module * out.r + i] = static_cast<T>(s[i]);
  }
  head = block_sum(head, scratch);
  tail = block_sum(tail, scratch);
  const auto rank = block_sum(above, reinterpret_cast<int64_t*>(scratch));
  if (threadIdx.x != 0) return;
  all_kept[module] = static_cast<int32_t>(rank < out.r ? rank : out.r);
  double* stats = out.stats + module * kStats;
  stats[kSquaredNorm] = head + tail;
  // error <= optimal + excess, and the optimal error is the tail.
  const double excess = kPromise * sqrt(head + tail) + rounding;
  stats[kCertificate] = excess * (2 * sqrt(tail) + excess);
  stats[kNumericalRank] = static_cast<double>(rank);
}

// Modified Gram-Schmidt in the order of falling singular values: a column moves by its own error, and
// the product by no more than that times its singular value, which is the rounding of s[0].
__device__ void orthonormalise(double* w, int64_t rows, int64_t columns, int64_t kept,
                               double* scratch) {
  for (int64_t j = 0; j < kept; ++j) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < rows; i += kThreads)
      sum += w[i * columns + j] * w[i * columns + j];
    sum = block_sum(sum, scratch);
    const double scale = sum > 0 ? 1.0 / sqrt(sum) : 0.0;
    for (int64_t i = threadIdx.x; i < rows; i += kThreads) w[i * columns + j] *= scale;
    __syncthreads();
    for (int64_t k = j + 1 + threadIdx.x; k < kept; k += kThreads) {
      double dot = 0;
      for (int64_t i = 0; i < rows; ++i) dot += w[i * columns + j] * w[i * columns + k];
      for (int64_t i = 0; i < rows; ++i) w[i * columns + k] -= dot * w[i * columns + j];
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    lead(const double* all_u, const double* all_s, const int32_t* all_kept, int64_t rows,
         int64_t columns, const int32_t* skip, double* all_w) {
  const int64_t module = blockIdx.x;
  if (skip[module]) return;
  const double *u = all_u + module * rows * rows, *s = all_s + module * rows;
  double* w = all_w + module * rows * columns;
  const int64_t kept = all_kept[module];
  for (int64_t i = threadIdx.x / kWarp; i < rows; i += kThreads / kWarp)
    for (int64_t j = threadIdx.x % kWarp; j < columns; j += kWarp)
      w[i * columns + j] = j < kept ? u[i * rows + j] : 0.0;
  __syncthreads();
  if (kept > 0 && s[kept - 1] < kOrthogonal * s[0])
    orthonormalise(w, rows, columns, kept, shared_memory<double>());
}

}  // namespace

template <class T>
void write_spectrum(const double* s, const double* factor_a, const double* factor_b, int64_t rows,
                    const int32_t* skip, const SvdOut<T>& out, int32_t* kept, Stream stream) {
  launch(spectrum_of<T>, out.modules, kThreads, kScratch, stream, s, factor_a, factor_b, rows, skip,
         out, kept);
}

void leading_vectors(const double* u, const double* s, const int32_t* kept, int64_t modules,
                     int64_t rows, int64_t columns, const int32_t* skip, double* w, Stream stream) {
  launch(lead, modules, kThreads, kScratch, stream, u, s, kept, rows, columns, skip, w);
}

template void write_spectrum(const double*, const double*, const double*, int64_t, const int32_t*,
                             const SvdOut<float>&, int32_t*, Stream);
template void write_spectrum(const double*, const double*, const double*, int64_t, const int32_t*,
                             const SvdOut<double>&, int32_t*, Stream);

}  // namespace fastagg::cuda
