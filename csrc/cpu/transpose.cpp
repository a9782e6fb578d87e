#include "transpose.h"

#include <algorithm>

#include "vectorize.h"

#if defined(__x86_64__) && defined(__GNUC__)
// GCC 12 warns of the undefined operands inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define FASTAGG_HAS_AVX512 1
#endif

namespace fastagg::cpu {
namespace {

constexpr int64_t kTile = 16;

#ifdef FASTAGG_HAS_AVX512

#define FASTAGG_AVX512 __attribute__((target("avx512f"), always_inline)) inline

FASTAGG_AVX512 __m512 unpack_low(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

FASTAGG_AVX512 __m512 unpack_high(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// The tile's rows are in v; afterwards its columns are. Four rounds of shuffles, as in any
// butterfly: pairs of floats, pairs of doubles, then quarters and halves of the registers.
FASTAGG_AVX512 void transpose_registers(__m512 (&v)[kTile]) {
  __m512 t[kTile];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = unpack_low(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = unpack_high(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = unpack_low(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = unpack_high(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    v[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    v[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

__attribute__((target("avx512f"))) void transpose_avx512(const float* in, int64_t rows,
                                                         int64_t cols, float* out,
                                                         int64_t out_stride, bool stream,
                                                         double* sums) {
  for (int64_t c = 0; c < cols; c += kTile) {
    const int64_t width = std::min(kTile, cols - c);
    const auto col_mask = static_cast<__mmask16>((1u << width) - 1);
    __m512d sum_low = _mm512_setzero_pd(), sum_high = _mm512_setzero_pd();
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t height = std::min(kTile, rows - r);
      const auto row_mask = static_cast<__mmask16>((1u << height) - 1);
      __m512 v[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        v[i] = i < height ? _mm512_maskz_loadu_ps(col_mask, in + (r + i) * cols + c)
                          : _mm512_setzero_ps();
        const __m512d pair = _mm512_castps_pd(v[i]);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v[i]));
        const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(pair, 1)));
        sum_low = _mm512_fmadd_pd(low, low, sum_low);
        sum_high = _mm512_fmadd_pd(high, high, sum_high);
      }
      transpose_registers(v);
      for (int64_t j = 0; j < kTile; ++j) {
        if (j >= width) break;
        float* to = out + (c + j) * out_stride + r;
        if (stream && height == kTile && reinterpret_cast<uintptr_t>(to) % 64 == 0)
          _mm512_stream_ps(to, v[j]);
        else
          _mm512_mask_storeu_ps(to, row_mask, v[j]);
      }
    }
    double sum[kTile];
    _mm512_storeu_pd(sum, sum_low);
    _mm512_storeu_pd(sum + kTile / 2, sum_high);
    for (int64_t j = 0; j < width; ++j) sums[c + j] += sum[j];
  }
  // Such stores are weakly ordered: another thread must see them before it hears of the end.
  if (stream) _mm_sfence();
}

#endif

FASTAGG_VECTORIZE void transpose_portable(const float* in, int64_t rows, int64_t cols, float* out,
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

}  // namespace

void transpose(const float* in, int64_t rows, int64_t cols, float* out, int64_t out_stride,
               [[maybe_unused]] bool stream, double* sums) {
#ifdef FASTAGG_HAS_AVX512
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  if (has_avx512) return transpose_avx512(in, rows, cols, out, out_stride, stream, sums);
#endif
  transpose_portable(in, rows, cols, out, out_stride, sums);
}

}  // namespace fastagg::cpu
