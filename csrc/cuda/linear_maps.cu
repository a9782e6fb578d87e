#include "linear_maps.h"

#include "../ragged/balance.h"
#include "../ragged/philox.h"
#include "device.h"
#include "kernels.h"
#include "products.h"
#include "reduce.h"
#include "skinny.h"
#include "values.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Terms this much larger than their sum cancel: bf16's rounding of them, 2^-9, is no longer small.
constexpr double kCancelling = 4.0;
constexpr int kPowerTerms = 1, kAllTerms = 3;

// One warp a row.
template <DType dtype>
__global__ void __launch_bounds__(kThreads)
    row_norms_kernel(const void* data, int64_t rows, int64_t cols, double* norms) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  double sum = 0;
  for (int64_t i = lane; row < rows && i < cols; i += kWarp) {
    const double value = value_at<dtype>(data, row * cols + i);
    sum += value * value;
  }
  sum = warp_sum(sum);
  if (lane == 0 && row < rows) norms[row] = sqrt(sum);
}

double* row_norms(const Slab& slab, int64_t modules, Workspace& workspace, Stream stream) {
  const int64_t rows = modules * slab.rows;
  auto* norms = workspace.take<double>(rows);
  with_dtype(slab.dtype, [&](auto dtype) {
    launch(row_norms_kernel<dtype>, tiles(rows, kWarps), kThreads, 0, stream, slab.data, rows,
           slab.cols, norms);
  });
  return norms;
}

// The largest value of the block, given to every thread.
__device__ double block_max(double value, double* scratch) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_max(threadIdx.x % kWarp < kWarps ? scratch[threadIdx.x % kWarp] : 0.0);
}

// One block a module. scale_a and scale_b come in as the rows' norms and leave as their scalings.
__global__ void __launch_bounds__(kThreads)
    factored_scales_kernel(const double* coefficients, int64_t rows, bool unit_rows,
                           double* scale_a, double* scale_b, double* middle, MapNorms norms,
                           int32_t* cancels, int32_t* adds_up) {
  auto* scratch = shared_memory<double>();
  const int64_t module = blockIdx.x, first = module * rows;
  double largest = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const double c = coefficients ? coefficients[first + i] : 1.0;
    const double term = fabs(c) * scale_a[first + i] * scale_b[first + i];
    largest = term > largest ? term : largest;
  }
  largest = block_max(largest, scratch);
  const bool scalable = largest > 0 && isfinite(largest);
  const int exponent = scalable ? nearest_exponent(largest) : 0;
  double squares = 0;  // of the terms over the largest, which cannot overflow
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const double c = coefficients ? coefficients[first + i] : 1.0;
    double a = scale_a[first + i], b = scale_b[first + i];
    const double term = fabs(c) * a * b / (scalable ? largest : 1.0);
    squares += term * term;
    // An infinite norm has no exponent: let NaN into the products instead.
    const double nothing = 0.0 * (c + a + b);
    a = nothing == 0 ? (unit_rows ? unit_scale(a) : 1.0) : nothing;
    b = nothing == 0 ? (unit_rows ? unit_scale(b) : 1.0) : nothing;
    scale_a[first + i] = a;
    scale_b[first + i] = b;
    const double unscaled = a * b;
    middle[first + i] = unscaled == 0 ? 0.0 : ldexp(c / unscaled, -exponent);
  }
  squares = block_sum(squares, scratch);
  if (threadIdx.x == 0) {
    const double terms = (scalable ? largest : 1.0) * sqrt(squares);
    norms.terms[module] = terms;
    norms.exponents[module] = exponent;
    cancels[module] = terms > kCancelling * sqrt(norms.squared[module]);
    adds_up[module] = !cancels[module];
  }
}

// One block a module: |W|_F^2 from its rows' norms, summed in their order by thread and tree.
__global__ void __launch_bounds__(kThreads)
    dense_scales_kernel(int64_t rows, double* row_norms, MapNorms norms) {
  auto* scratch = shared_memory<double>();
  const int64_t module = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const double norm = row_norms[module * rows + i];
    sum += norm * norm;
  }
  sum = block_sum(sum, scratch);
  const double scale = sum > 0 && isfinite(sum) ? unit_scale(sqrt(sum)) : 1.0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) row_norms[module * rows + i] = scale;
  if (threadIdx.x == 0) {
    norms.squared[module] = sum;
    norms.terms[module] = sqrt(sum);
    norms.exponents[module] = -nearest_exponent(scale);
  }
}

// Row i of module t of x (modules, size, l) times factor[t * stride + (i, or 0 where stride is 1)].
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(double* x, int64_t count, int64_t size, int64_t l, const double* factors,
                      int64_t stride, bool one_a_module) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t row = e / l;
  x[e] *= factors[row / size * stride + (one_a_module ? 0 : row % size)];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    test_matrix_kernel(uint64_t seed, const int64_t* streams, int64_t modules, int64_t count,
                       int64_t blocks, T* out) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t module = task / blocks, block = task % blocks;
  if (module >= modules) return;
  const auto stream = static_cast<uint64_t>(streams ? streams[module] : module);
  const Philox4 words = rademacher_block(seed, stream, static_cast<uint64_t>(block));
  const int64_t first = block * kSignsPerBlock;
#pragma unroll
  for (int word = 0; word < 4; ++word)  // unrolled, so that the words stay in registers
    for (int bit = 0; bit < 32; ++bit) {
      const int64_t e = first + 32 * word + bit;
      if (e < count) out[module * count + e] = (words.word[word] >> bit) & 1u ? T(1) : T(-1);
    }
}

// Of a dense dW, in which nothing cancels any more.
int terms_of(Pass pass) { return pass == Pass::Final ? kAllTerms : kPowerTerms; }

template <class T>
MapNorms take_norms(int64_t modules, Workspace& workspace) {
  return {workspace.take<double>(modules), workspace.take<double>(modules),
          workspace.take<int32_t>(modules)};
}

Operand skinny_operand(const double* x, int64_t size, int64_t l) { return row_major(x, size, l); }

void scale_rows(double* x, int64_t modules, int64_t size, int64_t l, const double* factors,
                int64_t stride, bool one_a_module, Stream stream) {
  const int64_t count = modules * size * l;
  launch(scale_rows_kernel, tiles(count, kThreads), kThreads, 0, stream, x, count, size, l, factors,
         stride, one_a_module);
}

// fp64: out = slab x, or out = slab^T x.
void contract(const Slab& slab, const double* x, int64_t modules, int64_t l, double* out,
              Stream stream) {
  multiply(operand_of(slab), skinny_operand(x, slab.cols, l), row_major_result(out, slab.rows, l),
           {modules, slab.rows, l, slab.cols}, nullptr, stream);
}

void expand(const Slab& slab, const double* x, int64_t modules, int64_t l, double* out,
            Stream stream) {
  multiply(operand_of(slab).transposed(), skinny_operand(x, slab.rows, l),
           row_major_result(out, slab.cols, l), {modules, slab.cols, l, slab.rows}, nullptr,
           stream);
}

double* test_matrix(uint64_t seed, const int64_t* streams, int64_t modules, int64_t count,
                    Workspace& workspace, Stream stream) {
  auto* omega = workspace.take<double>(modules * count);
  const int64_t blocks = tiles(count, kSignsPerBlock);
  launch(test_matrix_kernel<double>, tiles(modules * blocks, kThreads), kThreads, 0, stream, seed,
         streams, modules, count, blocks, omega);
  return omega;
}

}  // namespace

template <class T>
FactoredMap<T>::FactoredMap(const Slab& a, const Slab& bt, const double* coefficients,
                            int64_t modules, int64_t columns, Workspace& workspace, Stream stream)
    : a_(a),
      bt_(bt),
      modules_(modules),
      norms_(take_norms<T>(modules, workspace)),
      scale_a_(row_norms(a, modules, workspace, stream)),
      scale_b_(row_norms(bt, modules, workspace, stream)),
      middle_(workspace.take<double>(modules * a.rows)),
      cancels_(workspace.take<int32_t>(modules)),
      adds_up_(workspace.take<int32_t>(modules)),
      inner_(workspace.take<T>(modules * a.rows * columns)),
      stream_(stream) {
  squared_norm(a, bt, coefficients, modules, norms_.squared, workspace, stream);
  launch(factored_scales_kernel, modules, kThreads, kWarps * sizeof(double), stream, coefficients,
         a.rows, sizeof(T) == sizeof(float), scale_a_, scale_b_, middle_, norms_, cancels_,
         adds_up_);
}

// Calls `product` with how many terms count, and the modules that it is to skip, until all are done.
template <class T>
template <class Product>
void FactoredMap<T>::with_terms(Pass pass, const Product& product) const {
  if (pass == Pass::Final) return product(kAllTerms, nullptr);
  product(kPowerTerms, cancels_);
  product(kAllTerms, adds_up_);
}

template <>
void FactoredMap<float>::through(const Slab& first, const double* first_scale, const float* in,
                                 const Slab& second, const double* second_scale, float* out,
                                 int64_t l, Pass pass) const {
  with_terms(pass, [&](int terms, const int32_t* skip) {
    contract(first, first_scale, middle_, in, modules_, l, inner_, terms, skip, stream_);
    expand(second, second_scale, inner_, modules_, l, out, terms, skip, stream_);
  });
}

template <>
void FactoredMap<double>::through(const Slab& first, const double*, const double* in,
                                  const Slab& second, const double*, double* out, int64_t l,
                                  Pass) const {
  contract(first, in, modules_, l, inner_, stream_);
  scale_rows(inner_, modules_, first.rows, l, middle_, first.rows, false, stream_);
  expand(second, inner_, modules_, l, out, stream_);
}

template <class T>
void FactoredMap<T>::forward(const T* x, int64_t l, T* y, Pass pass) const {
  through(a_, scale_a_, x, bt_, scale_b_, y, l, pass);
}

template <class T>
void FactoredMap<T>::adjoint(const T* y, int64_t l, T* x, Pass pass) const {
  through(bt_, scale_b_, y, a_, scale_a_, x, l, pass);
}

template <>
void FactoredMap<float>::sketch(uint64_t seed, const int64_t* streams, int64_t l, float* y,
                                Pass pass, Workspace&) const {
  contract_signs(a_, scale_a_, middle_, seed, streams, modules_, l, inner_, stream_);
  with_terms(pass, [&](int terms, const int32_t* skip) {
    expand(bt_, scale_b_, inner_, modules_, l, y, terms, skip, stream_);
  });
}

template <>
void FactoredMap<double>::sketch(uint64_t seed, const int64_t* streams, int64_t l, double* y,
                                 Pass pass, Workspace& workspace) const {
  forward(test_matrix(seed, streams, modules_, a_.cols * l, workspace, stream_), l, y, pass);
}

template <class T>
DenseMap<T>::DenseMap(const Slab& w, int64_t modules, Workspace& workspace, Stream stream)
    : w_(w),
      modules_(modules),
      norms_(take_norms<T>(modules, workspace)),
      scale_(row_norms(w, modules, workspace, stream)),
      stream_(stream) {
  launch(dense_scales_kernel, modules, kThreads, kWarps * sizeof(double), stream, w.rows, scale_,
         norms_);
}

template <>
void DenseMap<float>::forward(const float* x, int64_t l, float* y, Pass pass) const {
  contract(w_, scale_, nullptr, x, modules_, l, y, terms_of(pass), nullptr, stream_);
}

template <>
void DenseMap<float>::adjoint(const float* y, int64_t l, float* x, Pass pass) const {
  expand(w_, scale_, y, modules_, l, x, terms_of(pass), nullptr, stream_);
}

template <>
void DenseMap<float>::sketch(uint64_t seed, const int64_t* streams, int64_t l, float* y, Pass,
                             Workspace&) const {
  contract_signs(w_, scale_, nullptr, seed, streams, modules_, l, y, stream_);
}

template <>
void DenseMap<double>::forward(const double* x, int64_t l, double* y, Pass) const {
  contract(w_, x, modules_, l, y, stream_);
  scale_rows(y, modules_, w_.rows, l, scale_, w_.rows, true, stream_);
}

template <>
void DenseMap<double>::adjoint(const double* y, int64_t l, double* x, Pass) const {
  expand(w_, y, modules_, l, x, stream_);
  scale_rows(x, modules_, w_.cols, l, scale_, w_.rows, true, stream_);
}

template <>
void DenseMap<double>::sketch(uint64_t seed, const int64_t* streams, int64_t l, double* y,
                              Pass pass, Workspace& workspace) const {
  forward(test_matrix(seed, streams, modules_, w_.cols * l, workspace, stream_), l, y, pass);
}

template class FactoredMap<float>;
template class FactoredMap<double>;
template class DenseMap<float>;
template class DenseMap<double>;

}  // namespace fastagg::cuda
