// Elements of the factors' dtypes in AVX-512 registers. For the one file that says, per function, that it
// may use them: everything here is inlined into it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../ragged/dtype.h"

// GCC 12 warns of the undefined operands inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define FASTAGG_AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
#define FASTAGG_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl"), always_inline)) inline

namespace fastagg::cpu::avx512 {

constexpr int64_t kLanes = 16;
constexpr int64_t kLine = 64;  // bytes of a cache line: a store past the caches must write it whole

constexpr int64_t size_of(DType dtype) { return dtype == DType::Float32 ? 4 : 2; }

FASTAGG_AVX512 __mmask16 first(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// What the processor foresees by itself ends with a page.
FASTAGG_AVX512 void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) _mm_prefetch(from + i, _MM_HINT_T0);
}

// Sixteen elements, each in the low bits of a lane of 32: of kFold places `apart` as many columns each.
// What is not in a place's mask is zero and is not read; masks lie where the columns go.
template <DType dtype, int64_t kFold>
FASTAGG_AVX512 __m512i load(const char* from, int64_t apart, const __mmask16 (&masks)[kFold]) {
  // A place is read as if all its predecessors' columns came before its own: no shuffle is needed.
  const int64_t step = apart - kLanes / kFold * size_of(dtype);
  if constexpr (dtype == DType::Float32) {
    __m512i lanes = _mm512_maskz_loadu_epi32(masks[0], from);
    for (int64_t g = 1; g < kFold; ++g)
      lanes = _mm512_mask_loadu_epi32(lanes, masks[g], from + g * step);
    return lanes;
  } else {
    __m256i lanes = _mm256_maskz_loadu_epi16(masks[0], from);
    for (int64_t g = 1; g < kFold; ++g)
      lanes = _mm256_mask_loadu_epi16(lanes, masks[g], from + g * step);
    return _mm512_cvtepu16_epi32(lanes);
  }
}

template <DType dtype>
FASTAGG_AVX512 __m512 widen(__m512i lanes) {
  if constexpr (dtype == DType::Float32) return _mm512_castsi512_ps(lanes);
  if constexpr (dtype == DType::Float16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes));
  return _mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16));
}

// Rounded to nearest even, as float_to_bfloat16 and float_to_half round.
template <DType dtype>
FASTAGG_AVX512 __m512i narrow(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  if constexpr (dtype == DType::Float32) return bits;
  if constexpr (dtype == DType::Float16)
    return _mm512_cvtepu16_epi32(
        _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7fc0));
}

// Up to a line of the target, of `count` elements in lanes of its own width.
template <DType dtype>
FASTAGG_AVX512 void store(char* to, __m512i line, int64_t count, bool stream) {
  constexpr int64_t kWhole = kLine / size_of(dtype);
  if (count >= kWhole) {
    if (stream && reinterpret_cast<uintptr_t>(to) % kLine == 0)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    else
      _mm512_storeu_si512(to, line);
  } else if constexpr (dtype == DType::Float32) {
    _mm512_mask_storeu_epi32(to, first(count), line);
  } else {
    _mm512_mask_storeu_epi16(to, (__mmask32{1} << count) - 1, line);
  }
}

// Sixteen sums in a fixed order: of columns, or of every sixteenth element of a row.
struct Squares {
  __m512d low, high;

  FASTAGG_AVX512 Squares() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}
  FASTAGG_AVX512 void add(__m512 value) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
    const __m512d b =
        _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1)));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
};

FASTAGG_AVX512 __m512i unpack_low(__m512i a, __m512i b) { return _mm512_unpacklo_epi64(a, b); }
FASTAGG_AVX512 __m512i unpack_high(__m512i a, __m512i b) { return _mm512_unpackhi_epi64(a, b); }

// The tile's rows are in v; afterwards its columns are. Four rounds of shuffles, as in any
// butterfly: pairs of lanes, pairs of pairs, then quarters and halves of the registers.
FASTAGG_AVX512 void transpose_registers(__m512i (&v)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = unpack_low(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = unpack_high(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = unpack_low(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = unpack_high(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace fastagg::cpu::avx512
