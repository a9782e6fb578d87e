#include "stack_rows.h"

#include <algorithm>

#include "convert.h"
#include "runtime.h"
#include "vectorize.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements of a row handled at a time
constexpr int64_t kRows = 64;     // rows of B transposed at a time: at rank 64, 16 KiB

FASTAGG_VECTORIZE void transpose(const float* in, int64_t rows, int64_t cols, float* out,
                                 int64_t out_stride, double* sums) {
  for (int64_t c = 0; c < cols; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const float value = in[r * cols + c];
      out[c * out_stride + r] = value;
      sum += static_cast<double>(value) * static_cast<double>(value);
    }
    sums[c] += sum;
  }
}

double copy_row(Source from, int64_t count, const float* scale, Target to) {
  double sum = 0;
  float block[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t length = std::min(kBlock, count - i);
    const void* source = at(from.data, i * element_size(from.dtype));
    void* target = at(to.data, i * element_size(to.dtype));
    // An fp32 slab is its own block: the element is converted in place of a copy.
    float* values = to.dtype == DType::Float32 ? static_cast<float*>(target) : block;
    load(source, from.dtype, length, 1.0f, values);
    sum += sum_of_squares(values, length);
    if (scale) load(values, DType::Float32, length, *scale, values);
    if (values != block) continue;
    if (from.dtype == to.dtype && !scale)
      memcpy(target, source, static_cast<size_t>(length * element_size(to.dtype)));
    else
      store(block, length, target, to.dtype);
  }
  return sum;
}

void transpose_rows_portable(Source from, int64_t rows, int64_t cols, Target to, int64_t stride,
                             double* sums) {
  const bool direct = to.dtype == DType::Float32;
  const int64_t size = element_size(to.dtype);
  Workspace<float> block(kRows * cols);
  Workspace<float> columns(direct ? 0 : kRows * cols);
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t length = std::min(kRows, rows - i);
    load(at(from.data, i * cols * element_size(from.dtype)), from.dtype, length * cols, 1.0f,
         block.get());
    if (direct) {
      transpose(block.get(), length, cols, static_cast<float*>(to.data) + i, stride, sums);
      continue;
    }
    transpose(block.get(), length, cols, columns.get(), kRows, sums);
    for (int64_t j = 0; j < cols; ++j)
      store(columns.get() + j * kRows, length, at(to.data, (j * stride + i) * size), to.dtype);
  }
}

}  // namespace

void copy_rows(Source from, int64_t rows, int64_t cols, const float* scale, Target to,
               double* sums) {
  if (has_avx512()) return copy_rows_avx512(from, rows, cols, scale, to, sums);
  for (int64_t row = 0; row < rows; ++row)
    sums[row] =
        copy_row({at(from.data, row * cols * element_size(from.dtype)), from.dtype}, cols, scale,
                 {at(to.data, row * cols * element_size(to.dtype)), to.dtype, to.stream});
}

void transpose_rows(Source from, int64_t rows, int64_t cols, Target to, int64_t stride,
                    double* sums) {
  return has_avx512() ? transpose_rows_avx512(from, rows, cols, to, stride, sums)
                      : transpose_rows_portable(from, rows, cols, to, stride, sums);
}

}  // namespace fastagg::cpu
