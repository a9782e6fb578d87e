// dW = Q_B (R_B R_A^T) Q_A^T. One block takes the QR of one factor after the other, in a piece of
// memory of its own, as there may be any number of lossy modules and the factors in fp64 are large.
// Hence Q is not kept until the core's SVD is known, but made a second time: the same reflectors to
// the last bit, for twice the arithmetic of a route that is seldom taken.
#include "qr_svd.h"

#include <algorithm>

#include "householder.h"
#include "products.h"
#include "small.h"
#include "spectrum.h"
#include "values.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = kQrThreads, kWarps = kQrWarps;
constexpr int64_t kMostScratch = int64_t{512} << 20;  // bytes of all blocks' factors

// One factor of every module, and what its QR takes and gives.
template <class T>
struct Side {
  Slab slab;
  const double* scale;  // (modules, rows)
  double* upper;        // (modules, rows, rows): R, zeros below
  double* w;            // (modules, rows, columns): the vectors in the basis Q
  T* vectors;           // Q w: entry i of vector j at i * row_stride + j * col_stride of its module
  int64_t module_stride, row_stride, col_stride;
};

// The lossy modules in rising order, which the blocks share out.
struct Lossy {
  int32_t* modules;
  int32_t* count;
  int32_t* others;  // (modules): zero where a module is lossy
};

// A block's memory in doubles: for the QR of a factor, and for a skinny matrix by columns.
__host__ __device__ int64_t scratch_size(int64_t size, int64_t rows, int64_t columns) {
  return size * (rows + columns) + rows + Qr::inner_size(rows);
}

__device__ Qr qr_in(double* scratch, int64_t size, int64_t rows) {
  return {scratch, scratch + size * rows, scratch + size * rows + rows, size, rows};
}

__global__ void __launch_bounds__(kThreads)
    list_lossy(const int32_t* lossy, int64_t modules, Lossy out) {
  auto* scratch = shared_memory<int32_t>();
  const int thread = static_cast<int>(threadIdx.x);
  int32_t before = 0;
  for (int64_t first = 0; first < modules; first += kThreads) {
    const int64_t module = first + thread;
    const bool mine = module < modules && lossy[module] != 0;
    if (module < modules) out.others[module] = !mine;
    const unsigned votes = __ballot_sync(kAllLanes, mine);
    __syncthreads();  // scratch is read below, and in the turn before
    if (thread % kWarp == 0) scratch[thread / kWarp] = __popc(votes);
    __syncthreads();
    int32_t place = before + __popc(votes & ((1u << (thread % kWarp)) - 1));
    for (int warp = 0; warp < kWarps; ++warp) {
      before += scratch[warp];
      if (warp < thread / kWarp) place += scratch[warp];
    }
    if (mine) out.modules[place] = static_cast<int32_t>(module);
  }
  if (thread == 0) *out.count = before;
}

template <DType dtype>
__device__ void load_columns(const Slab& slab, const double* scale, int64_t module,
                             double* columns) {
  for (int64_t j = 0; j < slab.rows; ++j) {
    const int64_t from = (module * slab.rows + j) * slab.cols;
    for (int64_t i = threadIdx.x; i < slab.cols; i += kThreads)
      columns[j * slab.cols + i] = scale[j] * value_at<dtype>(slab.data, from + i);
  }
}

// The QR of one factor of a module.
__device__ void factorise(const Slab& slab, const double* scale, int64_t module, const Qr& qr) {
  scale += module * slab.rows;
  switch (slab.dtype) {
    case DType::Float32:
      load_columns<DType::Float32>(slab, scale, module, qr.columns);
      break;
    case DType::BFloat16:
      load_columns<DType::BFloat16>(slab, scale, module, qr.columns);
      break;
    case DType::Float16:
      load_columns<DType::Float16>(slab, scale, module, qr.columns);
      break;
    case DType::Float64:
      load_columns<DType::Float64>(slab, scale, module, qr.columns);
      break;
  }
  __syncthreads();
  factorise(qr);
}

// Two factors a lossy module: item 2 i is B of the i-th.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    factor_lossy(Side<T> b, Side<T> a, Lossy lossy, double* scratch, int64_t piece) {
  for (int64_t item = blockIdx.x; item < 2 * *lossy.count; item += gridDim.x) {
    const Side<T> side = item % 2 == 0 ? b : a;
    const int64_t module = lossy.modules[item / 2], rows = side.slab.rows, size = side.slab.cols;
    const Qr qr = qr_in(scratch + blockIdx.x * piece, size, rows);
    factorise(side.slab, side.scale, module, qr);
    double* upper = side.upper + module * rows * rows;
    for (int64_t i = threadIdx.x; i < rows * rows; i += kThreads) {
      const int64_t row = i / rows, column = i % rows;
      upper[i] = row <= column && row < size ? qr.columns[column * size + row] : 0.0;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    vectors_of_lossy(Side<T> b, Side<T> a, Lossy lossy, double* scratch, int64_t piece,
                     int64_t columns, const int32_t* kept) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t item = blockIdx.x; item < 2 * *lossy.count; item += gridDim.x) {
    const Side<T> side = item % 2 == 0 ? b : a;
    const int64_t module = lossy.modules[item / 2], rows = side.slab.rows, size = side.slab.cols;
    const Qr qr = qr_in(scratch + blockIdx.x * piece, size, rows);
    factorise(side.slab, side.scale, module, qr);
    const double* w = side.w + module * rows * columns;
    double* x = scratch + (blockIdx.x + 1) * piece - size * columns;
    const int64_t count = kept[module];
    for (int64_t column = warp; column < count; column += kWarps)
      for (int64_t i = lane; i < size; i += kWarp)
        x[column * size + i] = i < qr.rank() ? w[i * columns + column] : 0.0;
    __syncthreads();
    apply_q(qr, x, count);
    __syncthreads();
    T* to = side.vectors + module * side.module_stride;
    for (int64_t column = warp; column < count; column += kWarps)
      for (int64_t i = lane; i < size; i += kWarp)
        to[i * side.row_stride + column * side.col_stride] = static_cast<T>(x[column * size + i]);
    __syncthreads();
  }
}

}  // namespace

template <class T>
void qr_svd(const Slab& a, const Slab& bt, const double* alpha, const double* beta,
            const int32_t* lossy, const SvdOut<T>& out, int32_t* kept, Workspace& workspace,
            Stream stream) {
  const int64_t rows = a.rows, modules = out.modules, square = modules * rows * rows;
  const int64_t columns = std::min(out.r, rows);
  const Lossy list{workspace.take<int32_t>(modules), workspace.take<int32_t>(1),
                   workspace.take<int32_t>(modules)};
  launch(list_lossy, 1, kThreads, kWarps * sizeof(int32_t), stream, lossy, modules, list);

  const auto take = [&] { return workspace.take<double>(square); };
  const auto take_w = [&] { return workspace.take<double>(modules * rows * columns); };
  const Side<T> side_a{a, alpha, take(), take_w(), out.vt, out.r * out.n, 1, out.n};
  const Side<T> side_b{bt, beta, take(), take_w(), out.u, out.m * out.r, out.r, 1};
  const int64_t piece = scratch_size(std::max(a.cols, bt.cols), rows, columns);
  const int64_t held = kMostScratch / (std::max<int64_t>(piece, 1) * int64_t{sizeof(double)});
  const int64_t blocks =
      std::clamp<int64_t>(held, 1, std::min<int64_t>(2 * modules, limits().multiprocessors));
  auto* scratch = workspace.take<double>(blocks * piece);
  launch(factor_lossy<T>, blocks, kThreads, kQrShared, stream, side_b, side_a, list, scratch,
         piece);

  double* core = take();
  multiply(row_major(side_b.upper, rows, rows), row_major(side_a.upper, rows, rows).transposed(),
           row_major_result(core, rows, rows), {modules, rows, rows, rows}, list.others, stream);
  double *u = take(), *v = take();
  auto* s = workspace.take<double>(modules * rows);
  core_svd(core, modules, rows, list.others, u, s, v, workspace, stream);
  write_spectrum(s, side_a.upper, side_b.upper, rows, list.others, out, kept, stream);
  leading_vectors(u, s, kept, modules, rows, columns, list.others, side_b.w, stream);
  leading_vectors(v, s, kept, modules, rows, columns, list.others, side_a.w, stream);
  launch(vectors_of_lossy<T>, blocks, kThreads, kQrShared, stream, side_b, side_a, list, scratch,
         piece, columns, kept);
}

template void qr_svd(const Slab&, const Slab&, const double*, const double*, const int32_t*,
                     const SvdOut<float>&, int32_t*, Workspace&, Stream);
template void qr_svd(const Slab&, const Slab&, const double*, const double*, const int32_t*,
                     const SvdOut<double>&, int32_t*, Workspace&, Stream);

}  // namespace fastagg::cuda
