#include "inner_products.h"

#include "runtime.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTAGG_AVX512 __attribute__((target("avx512f")))
#define FASTAGG_HAS_AVX512 1
#endif

namespace fastagg::cpu {
namespace {

#ifdef FASTAGG_HAS_AVX512

using Vector = double __attribute__((vector_size(64), aligned(8)));

// 24 of the 32 registers accumulate, 4 hold b and one a: ten loads for 24 multiply-adds.
constexpr int kTileRows = 6;
constexpr int kTileCols = 4;

FASTAGG_AVX512 inline __attribute__((always_inline)) void tile(const double* a, const double* b,
                                                               int64_t width, double* out,
                                                               int64_t out_stride) {
  Vector sums[kTileRows][kTileCols] = {};
  for (int64_t k = 0; k < width; k += 8) {
    Vector right[kTileCols];
    for (int j = 0; j < kTileCols; ++j)
      right[j] = *reinterpret_cast<const Vector*>(b + j * width + k);
    for (int i = 0; i < kTileRows; ++i) {
      const Vector left = *reinterpret_cast<const Vector*>(a + i * width + k);
      for (int j = 0; j < kTileCols; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kTileCols; ++j) {
      const Vector v = sums[i][j];
      out[i * out_stride + j] += ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    }
}

FASTAGG_AVX512 void add_by_tiles(const double* a, int64_t a_rows, const double* b, int64_t b_rows,
                                 int64_t width, double* out) {
  for (int64_t i = 0; i < a_rows; i += kTileRows)
    for (int64_t j = a == b ? i / kTileCols * kTileCols : 0; j < b_rows; j += kTileCols)
      tile(a + i * width, b + j * width, width, out + i * b_rows + j, b_rows);
}

#endif

void add_by_blas(const double* a, int64_t a_rows, const double* b, int64_t b_rows, int64_t width,
                 double* out) {
  const auto left = row_major(const_cast<double*>(a), a_rows, width);
  const auto right = row_major(const_cast<double*>(b), b_rows, width);
  multiply_add(left, right.transposed(), row_major(out, a_rows, b_rows));
}

}  // namespace

void add_inner_products(const double* a, int64_t a_rows, const double* b, int64_t b_rows,
                        int64_t width, double* out) {
#ifdef FASTAGG_HAS_AVX512
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  if (has_avx512) return add_by_tiles(a, a_rows, b, b_rows, width, out);
#endif
  add_by_blas(a, a_rows, b, b_rows, width, out);
}

}  // namespace fastagg::cpu
