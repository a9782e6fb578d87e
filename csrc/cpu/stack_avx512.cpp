// The movements of a stack in AVX-512: a value is in a register from its load to its store, and lines
// are written whole.
#include <algorithm>
#include <type_traits>

#include "stack_rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTAGG_PORTABLE)
#include "avx512.h"

namespace fastagg::cpu {
namespace {

using namespace avx512;

constexpr int64_t kAhead = 1024;  // bytes between what is read of A and what is asked for
constexpr int64_t kRows = 128;  // rows of B at a time: at rank 64 in bf16, 16 KiB, in the L1 cache

template <DType in, DType out, bool kScaled>
FASTAGG_AVX512_TARGET void copy(const char* from, int64_t rows, int64_t cols, float scale, char* to,
                                bool stream, double* sums) {
  constexpr int64_t kStep = 2 * kLanes;
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < rows; ++row) {
    // Two sums, so that an addition need not wait for the one before it.
    Squares squares[2];
    for (int64_t i = 0; i < cols; i += kStep) {
      prefetch(from + kAhead, kStep * size_of(in));
      __m512i lanes[2];
      for (int64_t half = 0; half < 2; ++half) {
        const __mmask16 mask[1] = {first(cols - i - half * kLanes)};
        lanes[half] = load<in, 1>(from + half * kLanes * size_of(in), 0, mask);
        const __m512 value = widen<in>(lanes[half]);
        squares[half].add(value);
        if constexpr (kScaled) lanes[half] = narrow<out>(_mm512_mul_ps(value, factor));
        if constexpr (!kScaled && in != out) lanes[half] = narrow<out>(value);
      }
      if constexpr (out == DType::Float32) {
        store<out>(to, lanes[0], cols - i, stream);
        store<out>(to + kLine, lanes[1], cols - i - kLanes, stream);
      } else {
        const __m512i quarters = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        const __m512i packed = _mm512_packus_epi32(lanes[0], lanes[1]);
        store<out>(to, _mm512_permutexvar_epi64(quarters, packed), cols - i, stream);
      }
      from += std::min(kStep, cols - i) * size_of(in);
      to += std::min(kStep, cols - i) * size_of(out);
    }
    const __m512d low = _mm512_add_pd(squares[0].low, squares[1].low);
    const __m512d high = _mm512_add_pd(squares[0].high, squares[1].high);
    sums[row] = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  // Such stores are weakly ordered: another thread must see them before it hears of the end.
  if (stream) _mm_sfence();
}

// Rows of B, transposed by tiles: 16 columns wide and as many rows tall as fill a line of the target.
// Where the target has 16 bits, a lane carries two rows: the same shuffles move twice as many elements.
// Where there are at most 16 / kFold columns, kFold tiles lie side by side in the registers.
template <DType in, DType out, int64_t kFold>
struct Transposition {
  static constexpr int64_t kTall = kLine / size_of(out);
  static constexpr int64_t kWidth = kLanes / kFold;

  const char* from;
  int64_t rows, cols;
  char* to;
  int64_t stride;
  bool stream;
  double* sums;

  // The row r of the first tile, and with it those of the tiles beside it. Rows beyond `end` are zero.
  FASTAGG_AVX512 __m512i row(int64_t r, int64_t end, int64_t c, __mmask16 columns,
                             Squares& squares) const {
    __mmask16 masks[kFold];
    for (int64_t g = 0; g < kFold; ++g)
      masks[g] = static_cast<__mmask16>(r + g * kTall < end ? columns << (g * kWidth) : 0);
    const int64_t pitch = cols * size_of(in);
    const __m512i lanes = load<in, kFold>(from + r * pitch + c * size_of(in), kTall * pitch, masks);
    const __m512 value = widen<in>(lanes);
    squares.add(value);
    return in == out ? lanes : narrow<out>(value);
  }

  FASTAGG_AVX512 void tiles(int64_t r, int64_t end, int64_t c, int64_t width,
                            Squares& squares) const {
    const __mmask16 columns = first(width);
    __m512i v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      if constexpr (kTall == kLanes) {
        v[i] = row(r + i, end, c, columns, squares);
      } else {
        const __m512i even = row(r + 2 * i, end, c, columns, squares);
        const __m512i odd = row(r + 2 * i + 1, end, c, columns, squares);
        v[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
      }
    }
    transpose_registers(v);
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t j = i % kWidth, first_row = r + i / kWidth * kTall;
      if (j < width && first_row < end)
        store<out>(to + ((c + j) * stride + first_row) * size_of(out), v[i], end - first_row,
                   stream);
    }
  }

  FASTAGG_AVX512_TARGET void run() const {
    for (int64_t block = 0; block < rows; block += kRows) {
      const int64_t end = std::min(block + kRows, rows);
      const char* ahead = from + end * cols * size_of(in);
      for (int64_t c = 0; c < cols; c += kWidth) {
        const int64_t width = std::min(kWidth, cols - c);
        Squares squares;
        for (int64_t r = block; r < end; r += kFold * kTall) {
          // The next block, a tile's share at a time.
          const int64_t share = kFold * kTall * width * size_of(in);
          prefetch(ahead, share);
          ahead += share;
          tiles(r, end, c, width, squares);
        }
        double sum[kLanes];
        _mm512_storeu_pd(sum, squares.low);
        _mm512_storeu_pd(sum + kLanes / 2, squares.high);
        for (int64_t i = 0; i < kLanes; ++i)
          if (i % kWidth < width) sums[c + i % kWidth] += sum[i];
      }
    }
    if (stream) _mm_sfence();
  }
};

template <DType value>
struct Constant {
  static constexpr DType dtype = value;
};

// f(Constant) of a factor's dtype.
template <class F>
void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::Float32) f(Constant<DType::Float32>());
  if (dtype == DType::BFloat16) f(Constant<DType::BFloat16>());
  if (dtype == DType::Float16) f(Constant<DType::Float16>());
}

}  // namespace

bool has_avx512() {
  static const bool found = __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
  return found;
}

void copy_rows_avx512(Source from, int64_t rows, int64_t cols, const float* scale, Target to,
                      double* sums) {
  const auto* source = static_cast<const char*>(from.data);
  auto* target = static_cast<char*>(to.data);
  with_dtype(from.dtype, [&](auto in) {
    with_dtype(to.dtype, [&](auto out) {
      if (scale)
        copy<in.dtype, out.dtype, true>(source, rows, cols, *scale, target, to.stream, sums);
      else
        copy<in.dtype, out.dtype, false>(source, rows, cols, 1, target, to.stream, sums);
    });
  });
}

void transpose_rows_avx512(Source from, int64_t rows, int64_t cols, Target to, int64_t stride,
                           double* sums) {
  const auto* source = static_cast<const char*>(from.data);
  auto* target = static_cast<char*>(to.data);
  with_dtype(from.dtype, [&](auto in) {
    with_dtype(to.dtype, [&](auto out) {
      const auto run = [&](auto folds) {
        Transposition<in.dtype, out.dtype, folds>{source, rows,      cols, target,
                                                  stride, to.stream, sums}
            .run();
      };
      if (cols <= kLanes / 4)
        run(std::integral_constant<int64_t, 4>());
      else if (cols <= kLanes / 2)
        run(std::integral_constant<int64_t, 2>());
      else
        run(std::integral_constant<int64_t, 1>());
    });
  });
}

}  // namespace fastagg::cpu

#else

namespace fastagg::cpu {

bool has_avx512() { return false; }
void copy_rows_avx512(Source, int64_t, int64_t, const float*, Target, double*) {}
void transpose_rows_avx512(Source, int64_t, int64_t, Target, int64_t, double*) {}

}  // namespace fastagg::cpu

#endif
