// The exact route, step by step that of csrc/cpu/gram_svd.cpp, where its equations are: every step is a
// launch or two for all modules of a chunk, and a module that the Gram matrices fail is left to qr_svd.
#include "gram_svd.h"

#include <algorithm>
#include <limits>

#include "../ragged/balance.h"
#include "finish.h"
#include "kernels.h"
#include "products.h"
#include "qr_svd.h"
#include "reduce.h"
#include "small.h"
#include "spectrum.h"

namespace fastagg::cuda {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// Vectors that are sums of terms this much larger lose their orthogonality: eps growth^2 < 1e-6.
constexpr double kLargestGrowth = 6e4;

constexpr int kThreads = 256;
constexpr int64_t kScratch = kThreads / kWarp * sizeof(double);

// Bytes of the temporaries of one chunk of modules, which hold some twenty matrices of the core's size.
constexpr int64_t kMostTemporaries = int64_t{2} << 30;
constexpr int64_t kMatrices = 20;

// What becomes of a module; (modules) each, no flags but zero and one.
struct Verdicts {
  int32_t *nonfinite, *lossy, *left_out;  // the last: either of the first two
  int32_t* kept;
};

// The largest of the threads' values, given to every thread.
__device__ double block_max(double value, double* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  value = warp_max(value);
  __syncthreads();  // scratch may still be read from before
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_max(scratch[lane % (kThreads / kWarp)]);
}

__global__ void __launch_bounds__(kThreads)
    balance_rows(const double* ga, const double* gb, const double* coefficients, int64_t rows,
                 double* alpha, double* beta, Verdicts out) {
  const int64_t module = blockIdx.x;
  double check = 0;  // stays zero, or becomes NaN where anything is not finite
  for (int64_t j = threadIdx.x; j < rows; j += kThreads) {
    const int64_t row = module * rows + j;
    const double coefficient = coefficients ? coefficients[row] : 1.0;
    const double aa = ga[row * rows + j], bb = gb[row * rows + j];
    const double mine = 0.0 * (aa + bb + coefficient);
    check += mine;
    const Balance scale = mine == 0 ? balance(coefficient, sqrt(aa), sqrt(bb)) : Balance{0.0, 0.0};
    alpha[row] = scale.alpha;
    beta[row] = scale.beta;
  }
  check = block_sum(check, shared_memory<double>());
  if (threadIdx.x != 0) return;
  out.nonfinite[module] = check != 0;
  out.kept[module] = 0;
}

// A bound of the largest singular value of the columns scaled by d, from their Gram matrix.
__device__ double spectral_norm(const double* g, const double* d, int64_t rows, double* scratch) {
  double largest = 0;
  for (int64_t i = threadIdx.x / kWarp; i < rows; i += kThreads / kWarp) {
    double sum = 0;
    for (int64_t j = threadIdx.x % kWarp; j < rows; j += kWarp)
      sum += fabs(d[i] * d[j] * g[i * rows + j]);
    sum = warp_sum(sum);
    largest = sum > largest ? sum : largest;
  }
  return sqrt(block_max(largest, scratch));
}

// How far the factor is from the columns that its Cholesky factor stands for: what was dropped, and
// the rounding of the Gram matrix, which the smallest pivot magnifies.
__device__ double distance(const Cholesky& cholesky, int64_t module, double* scratch) {
  const int64_t square = cholesky.size * cholesky.size;
  const double* factor = cholesky.factor + module * square;
  double trace = 0;
  for (int64_t i = threadIdx.x; i < square; i += kThreads) trace += factor[i] * factor[i];
  trace = block_sum(trace, scratch);
  if (cholesky.rank[module] == 0) return 0;
  return sqrt(cholesky.dropped[module]) +
         static_cast<double>(cholesky.size) * kEps * trace / sqrt(cholesky.smallest[module]);
}

// One side of the product: its Gram matrices, the scale of its columns, and (modules, rows, columns) x,
// which its columns are multiplied by.
struct Side {
  const double *g, *d;
  Cholesky cholesky;
  double* x;
};

// How much larger the terms of a column of B x are than the unit vector that they sum to.
__device__ double growth(const Side& side, int64_t module, int64_t rows, int64_t columns,
                         double* scratch) {
  const double* g = side.g + module * rows * rows;
  const double* x = side.x + module * rows * columns;
  double largest = 0;
  for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i)
      sum += g[i * rows + i] * x[i * columns + j] * x[i * columns + j];
    largest = sum > largest ? sum : largest;
  }
  return sqrt(block_max(largest, scratch));
}

__global__ void __launch_bounds__(kThreads)
    judge(Side a, Side b, const double* all_s, int64_t rows, int64_t columns, Verdicts out) {
  auto* scratch = shared_memory<double>();
  const int64_t module = blockIdx.x, square = rows * rows;
  if (out.nonfinite[module]) {
    if (threadIdx.x == 0) {
      out.lossy[module] = 0;
      out.left_out[module] = 1;
    }
    return;
  }
  const double norm_a = spectral_norm(a.g + module * square, a.d + module * rows, rows, scratch);
  const double norm_b = spectral_norm(b.g + module * square, b.d + module * rows, rows, scratch);
  const double excess = distance(a.cholesky, module, scratch) * norm_b +
                        distance(b.cholesky, module, scratch) * norm_a;
  double squared = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads)
    squared += all_s[module * rows + i] * all_s[module * rows + i];
  const double norm = sqrt(block_sum(squared, scratch));
  const double growth_u = growth(b, module, rows, columns, scratch);
  const double growth_v = growth(a, module, rows, columns, scratch);
  const double largest = growth_u > growth_v ? growth_u : growth_v;
  if (threadIdx.x != 0) return;
  const bool lossy = excess > 0.5 * kPromise * norm || largest > kLargestGrowth;
  out.lossy[module] = lossy;
  out.left_out[module] = lossy;
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == sizeof(float) ? DType::Float32 : DType::Float64;
}

// The modules of one chunk.
template <class T>
void solve(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out,
           Workspace& workspace, Stream stream) {
  const int64_t modules = out.modules, rows = a.rows, columns = std::min(out.r, rows);
  const auto take = [&](int64_t cols) { return workspace.take<double>(modules * rows * cols); };
  const auto take_flags = [&] { return workspace.take<int32_t>(modules); };

  double *ga = take(rows), *gb = take(rows), *alpha = take(1), *beta = take(1);
  gram(a, modules, ga, stream);
  gram(bt, modules, gb, stream);
  const Verdicts verdicts{take_flags(), take_flags(), take_flags(), take_flags()};
  launch(balance_rows, modules, kThreads, kScratch, stream, ga, gb, coefficients, rows, alpha, beta,
         verdicts);

  const double tolerance = 4.0 * static_cast<double>(rows) * kEps;
  const Side side_a{ga, alpha,
                    pivoted_cholesky(ga, alpha, modules, rows, tolerance, workspace, stream),
                    take(columns)};
  const Side side_b{gb, beta,
                    pivoted_cholesky(gb, beta, modules, rows, tolerance, workspace, stream),
                    take(columns)};
  const double *fa = side_a.cholesky.factor, *fb = side_b.cholesky.factor;
  double *core = take(rows), *u = take(rows), *s = take(1), *v = take(rows);
  multiply(row_major(fb, rows, rows).transposed(), row_major(fa, rows, rows),
           row_major_result(core, rows, rows), {modules, rows, rows, rows}, verdicts.nonfinite,
           stream);
  core_svd(core, modules, rows, verdicts.nonfinite, u, s, v, workspace, stream);
  write_spectrum(s, fa, fb, rows, verdicts.nonfinite, out, verdicts.kept, stream);

  double *wu = take(columns), *wv = take(columns);
  leading_vectors(u, s, verdicts.kept, modules, rows, columns, verdicts.nonfinite, wu, stream);
  leading_vectors(v, s, verdicts.kept, modules, rows, columns, verdicts.nonfinite, wv, stream);
  coordinates(side_b.cholesky, beta, wu, columns, side_b.x, stream);
  coordinates(side_a.cholesky, alpha, wv, columns, side_a.x, stream);
  launch(judge, modules, kThreads, kScratch, stream, side_a, side_b, s, rows, columns, verdicts);

  multiply(operand_of(bt).transposed(), row_major(side_b.x, rows, columns),
           {out.u, dtype_of<T>(), out.m * out.r, out.r, 1}, {modules, out.m, columns, rows},
           verdicts.left_out, stream);
  multiply(row_major(side_a.x, rows, columns).transposed(), operand_of(a),
           {out.vt, dtype_of<T>(), out.r * out.n, out.n, 1}, {modules, columns, out.n, rows},
           verdicts.left_out, stream);
  qr_svd(a, bt, alpha, beta, verdicts.lossy, out, verdicts.kept, workspace, stream);
  finish(out, verdicts.kept, verdicts.nonfinite, workspace, stream);
}

}  // namespace

template <class T>
void gram_svd_by_chunks(const Slab& a, const Slab& bt, const double* coefficients,
                        const SvdOut<T>& out, int64_t chunk, Workspace& workspace, Stream stream) {
  const int64_t rows = a.rows;
  Recycled recycled(workspace);
  for (int64_t first = 0; first < out.modules; first += chunk) {
    recycled.rewind();
    solve({a.row(first, 0), a.dtype, rows, a.cols}, {bt.row(first, 0), bt.dtype, rows, bt.cols},
          coefficients ? coefficients + first * rows : nullptr,
          SvdOut<T>{out.u + first * out.m * out.r, out.s + first * out.r,
                    out.vt + first * out.r * out.n, out.stats + first * kStats,
                    std::min(chunk, out.modules - first), out.m, out.n, out.r},
          recycled, stream);
  }
}

template <class T>
void gram_svd(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out,
              Workspace& workspace, Stream stream) {
  const int64_t bytes = kMatrices * a.rows * a.rows * static_cast<int64_t>(sizeof(double));
  const int64_t chunk = std::max<int64_t>(1, kMostTemporaries / std::max<int64_t>(1, bytes));
  gram_svd_by_chunks(a, bt, coefficients, out, chunk, workspace, stream);
}

#define FASTAGG_INSTANTIATE(T)                                                                  \
  template void gram_svd_by_chunks(const Slab&, const Slab&, const double*, const SvdOut<T>&,   \
                                   int64_t, Workspace&, Stream);                                \
  template void gram_svd(const Slab&, const Slab&, const double*, const SvdOut<T>&, Workspace&, \
                         Stream);
FASTAGG_INSTANTIATE(float)
FASTAGG_INSTANTIATE(double)
#undef FASTAGG_INSTANTIATE

}  // namespace fastagg::cuda
