// The functions of csrc/cuda/tensor_core.h for the CPU, from the register layouts of the PTX manual.
#pragma once

#include <cmath>
#include <cstring>

namespace simt {

void copy_later(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);
void require_aligned(const void* row);

inline float bf16(uint32_t word, int half) {
  const uint32_t bits = (half ? word >> 16 : word & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float towards_zero(double value) {
  auto rounded = static_cast<float>(value);
  if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value))
    rounded = std::nextafterf(rounded, 0.0f);
  return rounded;
}

// What tensor cores make of nine addends: each loses what lies more than 24 bits below the leading one
// of the largest, and the sum what fp32 cannot hold. So the A100 does (Fasi, Higham, Mikaitis and
// Pranesh, PeerJ Computer Science, 2021); later GPUs keep a bit more.
inline float cut_off_sum(float before, const double (&product)[8]) {
  double sum = before, largest = std::fabs(sum);
  for (const double value : product) {
    sum += value;
    largest = std::fmax(largest, std::fabs(value));
  }
  if (!std::isfinite(sum) || largest == 0) return static_cast<float>(sum);
  const double units = std::ldexp(1.0, 24 - std::ilogb(largest));
  auto cut_off = static_cast<int64_t>(before * units);
  for (const double value : product) cut_off += static_cast<int64_t>(value * units);
  return towards_zero(static_cast<double>(cut_off) / units);
}

}  // namespace simt

namespace fastagg::cuda {

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned char* all = simt::exchange(&mine, sizeof mine);
  const auto fragment = [&](unsigned lane) {
    Fragment other;
    std::memcpy(&other, all + lane * simt::kMostExchanged, sizeof other);
    return other;
  };
  const unsigned group = simt::lane() / 4, pair = simt::lane() % 4;
  for (int upper = 0; upper < 2; ++upper)
    for (unsigned c = 0; c < 2; ++c) {
      double above[8], below[8];  // of rows group and group + 8
      for (unsigned quarter = 0; quarter < 4; ++quarter) {
        const Fragment row = fragment(group * 4 + quarter);
        const Fragment column = fragment((2 * pair + c) * 4 + quarter);
        for (int half = 0; half < 2; ++half) {
          const double y = simt::bf16(column.b[upper], half);
          above[2 * quarter + half] = simt::bf16(row.a[2 * upper], half) * y;
          below[2 * quarter + half] = simt::bf16(row.a[2 * upper + 1], half) * y;
        }
      }
      d[c] = simt::cut_off_sum(d[c], above);
      d[2 + c] = simt::cut_off_sum(d[2 + c], below);
    }
}

inline void mma_f64(double (&d)[2], double a, double b) {
  struct Fragment {
    double a, b;
  } mine{a, b};
  const unsigned char* all = simt::exchange(&mine, sizeof mine);
  const unsigned group = simt::lane() / 4, pair = simt::lane() % 4;
  for (unsigned k = 0; k < 4; ++k) {
    Fragment row;
    std::memcpy(&row, all + (group * 4 + k) * simt::kMostExchanged, sizeof row);
    for (unsigned c = 0; c < 2; ++c) {
      Fragment column;
      std::memcpy(&column, all + ((2 * pair + c) * 4 + k) * simt::kMostExchanged, sizeof column);
      d[c] = std::fma(row.a, column.b, d[c]);
    }
  }
}

inline void mma_f64_deep(double (&d)[2][2], const double (&a)[4][2], const double (&b)[4]) {
  for (int step = 0; step < 4; ++step)
    for (int half = 0; half < 2; ++half) mma_f64(d[half], a[step][half], b[step]);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  simt::require_aligned(row);
  const unsigned char* all = simt::exchange(&row, sizeof row);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const uint32_t* words;
    std::memcpy(&words, all + (8 * matrix + simt::lane() / 4) * simt::kMostExchanged, sizeof words);
    to[matrix] = words[simt::lane() % 4];
  }
  simt::warp_barrier();  // nobody may overwrite what another lane has yet to read
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  simt::require_aligned(row);
  const unsigned char* all = simt::exchange(&row, sizeof row);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t word = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const uint16_t* values;
      const unsigned source = 8 * matrix + 2 * (simt::lane() % 4) + half;
      std::memcpy(&values, all + source * simt::kMostExchanged, sizeof values);
      word |= static_cast<uint32_t>(values[simt::lane() / 4]) << (16 * half);
    }
    to[matrix] = word;
  }
  simt::warp_barrier();
}

inline void copy_async(void* shared, const void* global, bool valid = true) {
  simt::copy_later(shared, global, valid);
}
inline void copy_async_commit() { simt::commit_copies(); }
template <int pending>
inline void copy_async_wait() {
  simt::wait_for_copies(pending);
}

// Reads, so that a sanitizer sees an address that is not there.
inline void prefetch(const void* global) { *static_cast<const volatile char*>(global); }

}  // namespace fastagg::cuda
