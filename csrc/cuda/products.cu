#include "products.h"

#include "device.h"
#include "product_tile.h"

namespace fastagg::cuda {
namespace {

using product::kThreads;
using product::kTile;
using product::Lines;
using product::lines_of;
using product::Sums;

template <bool x_along, bool y_along>
constexpr int64_t kSharedBytes = product::kDoubles<x_along, y_along> * int64_t{sizeof(double)};

// x_along: x's rows are contiguous; y_along: y's columns are.
template <bool x_along, bool y_along>
__global__ void __launch_bounds__(kThreads, 2)
    multiply_tiles(Operand x, Operand y, Result out, Shape shape, const int32_t* skip) {
  const int64_t tiles_n = tiles(shape.n, kTile), tiles_m = tiles(shape.m, kTile);
  const int64_t module = blockIdx.x / (tiles_m * tiles_n);
  if (skip && skip[module] != 0) return;
  const int64_t first_row = blockIdx.x / tiles_n % tiles_m * kTile;
  const int64_t first_col = blockIdx.x % tiles_n * kTile;
  const product::Quarter mine = product::quarter();
  const bool wanted = first_row + mine.row < shape.m && first_col + mine.col < shape.n;
  Sums sums;
  product::tile<x_along, y_along>(lines_of<x_along>(x, module, shape.m, shape.k),
                                  lines_of<y_along>(y.transposed(), module, shape.n, shape.k),
                                  first_row, first_col, wanted, shared_memory<double>(), sums);
  sums.for_each([&](int row, int col, double value) {
    const int64_t i = first_row + row, j = first_col + col;
    if (i >= shape.m || j >= shape.n) return;
    const int64_t at = module * out.module_stride + i * out.row_stride + j * out.col_stride;
    if (out.dtype == DType::Float64)
      static_cast<double*>(out.data)[at] = value;
    else
      static_cast<float*>(out.data)[at] = static_cast<float>(value);
  });
}

template <bool along>
__global__ void __launch_bounds__(kThreads, 2)
    inner_product_tiles(Operand x, double* out, int64_t size, int64_t k) {
  const int64_t side = tiles(size, kTile), count = side * (side + 1) / 2;
  const int64_t module = blockIdx.x / count;
  const product::UpperTile at = product::upper_tile(blockIdx.x % count, side);
  const Lines lines = lines_of<along>(x, module, size, k);
  Sums sums;
  product::tile<along, along>(lines, lines, at.i, at.j, at.wanted(size), shared_memory<double>(),
                              sums);
  double* square = out + module * size * size;
  sums.for_each([&](int row, int col, double value) {
    const int64_t i = at.i + row, j = at.j + col;
    if (i > j || j >= size) return;
    square[i * size + j] = value;
    square[j * size + i] = value;
  });
}

}  // namespace

void multiply(const Operand& x, const Operand& y, const Result& out, const Shape& shape,
              const int32_t* skip, Stream stream) {
  const int64_t blocks = shape.modules * tiles(shape.m, kTile) * tiles(shape.n, kTile);
  if (blocks == 0) return;
  const auto run = [&](auto kernel, int64_t shared_bytes) {
    launch(kernel, blocks, kThreads, shared_bytes, stream, x, y, out, shape, skip);
  };
  const bool x_along = x.col_stride == 1, y_along = y.row_stride == 1;
  if (x_along && y_along)
    run(multiply_tiles<true, true>, kSharedBytes<true, true>);
  else if (x_along)
    run(multiply_tiles<true, false>, kSharedBytes<true, false>);
  else if (y_along)
    run(multiply_tiles<false, true>, kSharedBytes<false, true>);
  else
    run(multiply_tiles<false, false>, kSharedBytes<false, false>);
}

void inner_products(const Operand& x, double* out, int64_t modules, int64_t size, int64_t k,
                    Stream stream) {
  const int64_t side = tiles(size, kTile);
  const int64_t blocks = modules * product::upper_tiles(side, 0, side);
  if (blocks == 0) return;
  const auto run = [&](auto kernel, int64_t shared_bytes) {
    launch(kernel, blocks, kThreads, shared_bytes, stream, x, out, size, k);
  };
  if (x.col_stride == 1)
    run(inner_product_tiles<true>, kSharedBytes<true, true>);
  else
    run(inner_product_tiles<false>, kSharedBytes<false, false>);
}

}  // namespace fastagg::cuda
