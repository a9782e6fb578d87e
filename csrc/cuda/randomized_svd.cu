// The randomized route (Halko, Martinsson and Tropp, SIAM Review 2011): a Rademacher sketch of l
// columns, q power iterations, each basis made orthonormal by column scaling by powers of two, an fp64
// Gram matrix and a pivoted Cholesky. The twin of csrc/cpu/randomized_svd.cpp: the same test matrix and
// the same steps, with every decision taken on the device.
#include <algorithm>
#include <limits>

#include "basis.h"
#include "device.h"
#include "finish.h"
#include "kernels.h"
#include "linear_maps.h"
#include "products.h"
#include "reduce.h"
#include "small.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr double kEps = std::numeric_limits<double>::epsilon();
// Products are off by at most about so many roundings of the terms that they sum.
constexpr double kRoundings = 2.0;

// The same of the two fp64 sums of squares whose difference is the certificate.
constexpr double kNormRoundings = 32.0;

// The core's right vectors are orthonormal to rounding times s[0] / s[j]: beyond this they are not near
// enough to it to be polished.
constexpr double kSmallestOfCore = 1e-11;

// Temporaries of one turn over the modules; more modules take more turns.
constexpr int64_t kTurnBytes = int64_t{2} << 30;

// F of Z^T = F Q_Z^T: the Cholesky factor, its rows' scaling undone.
__global__ void __launch_bounds__(kThreads)
    unscaled_kernel(const double* factor, const double* scale, int64_t count, int64_t l,
                    double* f) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const double of_row = scale[e / l];
  f[e] = of_row == 0 ? 0.0 : factor[e] / of_row;
}

// One block a module: NaN where any entry of q is not finite, else zero.
template <class T>
__global__ void __launch_bounds__(kThreads) finite_kernel(const T* q, int64_t count, double* out) {
  auto* scratch = shared_memory<double>();
  const int64_t module = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    sum += 0.0 * static_cast<double>(q[module * count + i]);
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out[module] = sum;
}

template <class T>
struct Truncation {
  const double* gram;  // of Z (modules, l, l)
  const double* q_finite;
  const double *u, *s, *v;  // of the core
  MapNorms norms;
  double *left, *right;       // (modules, l, r): the kept columns of u and v
  int32_t *kept, *nonfinite;  // (modules)
  SvdOut<T> out;
  int64_t l;
};

// One block a module: which singular values are above rounding, S, and the stats.
template <class T>
__global__ void __launch_bounds__(kThreads) truncate_kernel(Truncation<T> t) {
  auto* scratch = shared_memory<double>();
  const int64_t module = blockIdx.x, l = t.l, r = t.out.r;
  const double* s = t.s + module * l;
  double captured = 0;
  for (int64_t i = threadIdx.x; i < l; i += kThreads)
    captured += t.gram[module * l * l + i * (l + 1)];
  captured = block_sum(captured, scratch);
  const double squared = t.norms.squared[module];
  const bool finite = isfinite(squared) && isfinite(captured) && t.q_finite[module] == 0;

  // Q and Z are rounded to T: singular values below that rounding are its noise.
  const int exponent = t.norms.exponents[module];
  const double whole = sqrt(squared);
  const double terms = t.norms.terms[module] > whole ? t.norms.terms[module] : whole;
  const double rounding = (sizeof(T) == 4 ? 0x1p-23 : kEps) * terms;
  const double noise = ldexp(rounding, -exponent);
  const double floor = l > 0 && s[0] * kSmallestOfCore > noise ? s[0] * kSmallestOfCore : noise;
  int count = 0;
  for (int64_t j = threadIdx.x; j < l; j += kThreads) count += s[j] > floor;
  count = block_sum(count, reinterpret_cast<int*>(scratch));
  const int64_t kept = count < r ? count : r;

  // error^2 - optimal^2 <= |dW - Q Q^T dW|_F^2 = |dW|_F^2 - |Q^T dW|_F^2, where what Q^T dW lost to
  // the Cholesky factor's tolerance, and what was dropped of the first r as noise, is missed too.
  double found = 0;
  for (int64_t j = threadIdx.x; j < l; j += kThreads)
    if (j < kept || j >= r) found += s[j] * s[j];
  found = block_sum(found, scratch);
  for (int64_t e = threadIdx.x; e < l * r; e += kThreads) {
    const int64_t i = e / r, j = e % r;
    const bool keeps = j < kept;
    t.left[module * l * r + e] = keeps ? t.u[(module * l + i) * l + j] : 0.0;
    t.right[module * l * r + e] = keeps ? t.v[(module * l + i) * l + j] : 0.0;
  }
  for (int64_t j = threadIdx.x; j < kept; j += kThreads)
    t.out.s[module * r + j] = static_cast<T>(ldexp(s[j], exponent));
  if (threadIdx.x != 0) return;
  double* stats = t.out.stats + module * kStats;
  const double missed = squared - ldexp(found, 2 * exponent);
  const double excess = kRoundings * rounding;
  stats[kSquaredNorm] = squared;
  stats[kCertificate] = (missed > 0 ? missed : 0.0) + excess * (2 * whole + excess) +
                        kNormRoundings * kEps * terms * terms;
  stats[kNumericalRank] = static_cast<double>(count);
  t.kept[module] = static_cast<int32_t>(kept);
  t.nonfinite[module] = finite ? 0 : 1;
}

// From Q and Z = dW^T Q: Z^T = F Q_Z^T, its core's SVD F = u s v^T, U = Q u, V = Q_Z v.
template <class T>
void finish_sketch(const MapNorms& norms, const Skinny<T>& q, const Skinny<T>& z,
                   const SvdOut<T>& out, Workspace& workspace, Stream stream) {
  const int64_t modules = out.modules, l = q.l, r = out.r;
  const Basis basis = basis_of(z, 4.0 * static_cast<double>(l) * kEps, workspace, stream);
  auto* f = workspace.take<double>(modules * l * l);
  auto* u = workspace.take<double>(modules * l * l);
  auto* s = workspace.take<double>(modules * l);
  auto* v = workspace.take<double>(modules * l * l);
  launch(unscaled_kernel, tiles(modules * l * l, kThreads), kThreads, 0, stream,
         basis.cholesky.factor, basis.scale, modules * l * l, l, f);
  core_svd(f, modules, l, nullptr, u, s, v, workspace, stream);

  auto* q_finite = workspace.take<double>(modules);
  launch(finite_kernel<T>, modules, kThreads, kWarps * sizeof(double), stream, q.now, q.size * l,
         q_finite);
  auto* left = workspace.take<double>(modules * l * r);
  auto* right = workspace.take<double>(modules * l * r);
  auto* kept = workspace.take<int32_t>(modules);
  auto* nonfinite = workspace.take<int32_t>(modules);
  launch(truncate_kernel<T>, modules, kThreads, kWarps * sizeof(double), stream,
         Truncation<T>{basis.gram, q_finite, u, s, v, norms, left, right, kept, nonfinite, out, l});
  auto* x = workspace.take<double>(modules * l * r);
  coordinates(basis.cholesky, basis.scale, right, r, x, stream);
  // Z's Gram matrix knows the directions of its small singular values only roughly.
  x = polished(z, x, r, workspace, stream);
  multiply(q.operand(), row_major(left, l, r), {out.u, kDType<T>, out.m * r, r, 1},
           {modules, out.m, r, l}, nullptr, stream);
  multiply(row_major(x, l, r).transposed(), z.operand().transposed(),
           {out.vt, kDType<T>, r * out.n, out.n, 1}, {modules, r, out.n, l}, nullptr, stream);
  finish(out, kept, nonfinite, workspace, stream);
}

template <class T, class Map>
void sketched_svd(const Map& map, const Sketch& sketch, const SvdOut<T>& out, Workspace& workspace,
                  Stream stream) {
  const int64_t l = std::max<int64_t>(sketch.columns, 0);
  Skinny<T> x(out.modules, out.n, l, workspace), y(out.modules, out.m, l, workspace);
  Recycled recycled(workspace);  // of the many bases, one is needed at a time
  const auto make_basis = [&](Skinny<T>& columns) {
    recycled.rewind();
    orthonormalise(columns, recycled, stream);
  };
  if (l == out.m) {
    // As many columns as rows: random signs might miss a direction, the identity cannot.
    fill_identity(y, stream);
  } else {
    const int64_t iterations = l < out.n ? sketch.power_iterations : 0;
    const auto pass_after = [&](int64_t done) {
      return done < iterations ? Pass::Power : Pass::Final;
    };
    if (l == out.n) {
      fill_identity(x, stream);
      map.forward(x.now, l, y.now, Pass::Final);
    } else {
      map.sketch(sketch.seed, sketch.streams, l, y.now, pass_after(0), workspace);
    }
    for (int64_t q = 1; q <= iterations; ++q) {
      make_basis(y);
      map.adjoint(y.now, l, x.now, Pass::Power);
      make_basis(x);
      map.forward(x.now, l, y.now, pass_after(q));
    }
    // The last basis takes two passes: the first leaves what the pivots' range lost.
    make_basis(y);
    make_basis(y);
  }
  map.adjoint(y.now, l, x.now, Pass::Final);
  recycled.rewind();
  finish_sketch(map.norms(), y, x, out, recycled, stream);
}

// Calls `run(first, count, workspace)` for groups of modules whose temporaries stay bounded.
template <class Run>
void in_turns(int64_t modules, int64_t bytes_a_module, Workspace& workspace, const Run& run) {
  const int64_t most = std::max<int64_t>(1, kTurnBytes / std::max<int64_t>(1, bytes_a_module));
  Recycled recycled(workspace);
  for (int64_t first = 0; first < modules; first += most) {
    recycled.rewind();
    run(first, std::min(most, modules - first), recycled);
  }
}

__global__ void __launch_bounds__(kThreads)
    streams_kernel(const int64_t* given, int64_t first, int64_t count, int64_t* streams) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) streams[i] = given ? given[first + i] : first + i;
}

template <class T>
SvdOut<T> part_of(const SvdOut<T>& out, int64_t first, int64_t count) {
  return {out.u + first * out.m * out.r,
          out.s + first * out.r,
          out.vt + first * out.r * out.n,
          out.stats + first * kStats,
          count,
          out.m,
          out.n,
          out.r};
}

Slab part_of(const Slab& slab, int64_t first) {
  return {slab.row(first, 0), slab.dtype, slab.rows, slab.cols};
}

// The sketch of a part of the modules: their streams stay what they are in the whole.
Sketch part_of(const Sketch& sketch, int64_t first, int64_t count, Workspace& workspace,
               Stream stream) {
  auto* streams = workspace.take<int64_t>(count);
  launch(streams_kernel, tiles(count, kThreads), kThreads, 0, stream, sketch.streams, first, count,
         streams);
  return {sketch.columns, sketch.power_iterations, sketch.seed, streams};
}

template <class T>
int64_t bytes_a_module(int64_t m, int64_t n, int64_t rows, const Sketch& sketch) {
  const int64_t l = sketch.columns;
  return (2 * (m + n) + rows) * l * static_cast<int64_t>(sizeof(T)) +
         (n * l + 16 * l * l) * static_cast<int64_t>(sizeof(double));
}

}  // namespace

template <class T>
void randomized_svd(const Slab& a, const Slab& bt, const double* coefficients, const Sketch& sketch,
                    const SvdOut<T>& out, Workspace& workspace, Stream stream) {
  in_turns(out.modules, bytes_a_module<T>(out.m, out.n, a.rows, sketch), workspace,
           [&](int64_t first, int64_t count, Workspace& memory) {
             const FactoredMap<T> map(part_of(a, first), part_of(bt, first),
                                      coefficients ? coefficients + first * a.rows : nullptr, count,
                                      sketch.columns, memory, stream);
             sketched_svd(map, part_of(sketch, first, count, memory, stream),
                          part_of(out, first, count), memory, stream);
           });
}

template <class T>
void randomized_svd_dense(const Slab& w, const Sketch& sketch, const SvdOut<T>& out,
                          Workspace& workspace, Stream stream) {
  in_turns(out.modules, bytes_a_module<T>(out.m, out.n, 0, sketch), workspace,
           [&](int64_t first, int64_t count, Workspace& memory) {
             const DenseMap<T> map(part_of(w, first), count, memory, stream);
             sketched_svd(map, part_of(sketch, first, count, memory, stream),
                          part_of(out, first, count), memory, stream);
           });
}

template void randomized_svd(const Slab&, const Slab&, const double*, const Sketch&,
                             const SvdOut<float>&, Workspace&, Stream);
template void randomized_svd(const Slab&, const Slab&, const double*, const Sketch&,
                             const SvdOut<double>&, Workspace&, Stream);
template void randomized_svd_dense(const Slab&, const Sketch&, const SvdOut<float>&, Workspace&,
                                   Stream);
template void randomized_svd_dense(const Slab&, const Sketch&, const SvdOut<double>&, Workspace&,
                                   Stream);

}  // namespace fastagg::cuda
