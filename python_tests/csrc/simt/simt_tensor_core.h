// The functions of csrc/cuda/tensor_core.h for the CPU, from the register layouts of the PTX manual.
#pragma once

#include <cmath>
#include <cstring>

namespace simt {

void copy_later(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);

inline float bf16(uint32_t word, int half) {
  const uint32_t bits = (half ? word >> 16 : word & 0xffffu) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Tensor cores drop the bits of an fp32 sum that they cannot keep.
inline float truncated(double value) {
  auto rounded = static_cast<float>(value);
  if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value))
    rounded = std::nextafterf(rounded, 0.0f);
  return rounded;
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
  double sums[4] = {d[0], d[1], d[2], d[3]};
  for (unsigned quarter = 0; quarter < 4; ++quarter) {
    const Fragment row = fragment(group * 4 + quarter);
    for (unsigned c = 0; c < 2; ++c) {
      const Fragment column = fragment((2 * pair + c) * 4 + quarter);
      for (int upper = 0; upper < 2; ++upper)
        for (int half = 0; half < 2; ++half) {
          const double y = simt::bf16(column.b[upper], half);
          sums[c] += simt::bf16(row.a[2 * upper], half) * y;
          sums[2 + c] += simt::bf16(row.a[2 * upper + 1], half) * y;
        }
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = simt::truncated(sums[i]);
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
  const unsigned char* all = simt::exchange(&row, sizeof row);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const uint32_t* words;
    std::memcpy(&words, all + (8 * matrix + simt::lane() / 4) * simt::kMostExchanged, sizeof words);
    to[matrix] = words[simt::lane() % 4];
  }
  simt::warp_barrier();  // nobody may overwrite what another lane has yet to read
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
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

}  // namespace fastagg::cuda
