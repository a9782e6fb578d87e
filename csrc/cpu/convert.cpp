#include "convert.h"

#include <algorithm>

#include "vectorize.h"

namespace fastagg::cpu {
namespace {

template <class T>
inline T unaligned(const void* from, int64_t i) {
  T value;
  memcpy(&value, static_cast<const char*>(from) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

FASTAGG_VECTORIZE void load_float(const void* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale * unaligned<float>(from, i);
}

FASTAGG_VECTORIZE void load_bfloat16(const void* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = scale * bfloat16_to_float(unaligned<uint16_t>(from, i));
}

FASTAGG_VECTORIZE void load_half(const void* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale * half_to_float(unaligned<uint16_t>(from, i));
}

FASTAGG_VECTORIZE void load_double_as_float(const void* from, int64_t count, double scale,
                                            float* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = static_cast<float>(scale * unaligned<double>(from, i));
}

FASTAGG_VECTORIZE void widen_float(const void* from, int64_t count, double scale, double* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = scale * static_cast<double>(unaligned<float>(from, i));
}

FASTAGG_VECTORIZE void widen_bfloat16(const void* from, int64_t count, double scale, double* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = scale * static_cast<double>(bfloat16_to_float(unaligned<uint16_t>(from, i)));
}

FASTAGG_VECTORIZE void widen_half(const void* from, int64_t count, double scale, double* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = scale * static_cast<double>(half_to_float(unaligned<uint16_t>(from, i)));
}

FASTAGG_VECTORIZE void widen_double(const void* from, int64_t count, double scale, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = scale * unaligned<double>(from, i);
}

FASTAGG_VECTORIZE void store_bfloat16(const float* from, int64_t count, char* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = float_to_bfloat16(from[i]);
    memcpy(to + 2 * i, &bits, 2);
  }
}

FASTAGG_VECTORIZE void store_half(const float* from, int64_t count, char* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = float_to_half(from[i]);
    memcpy(to + 2 * i, &bits, 2);
  }
}

constexpr int64_t kLanes = 16;

// Sixteen independent sums: the order of additions is fixed, and it is the order of a vector.
FASTAGG_VECTORIZE double add_squares(const float* data, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) {
      const double x = data[i + l];
      lanes[l] += x * x;
    }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(data[i]) * data[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return total + lanes[0];
}

FASTAGG_VECTORIZE int64_t count_special(const float* data, int64_t count) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i)
    bad += (bits_from_float(data[i]) & 0x7f800000u) == 0x7f800000u;
  return bad;
}

}  // namespace

void load(const void* from, DType dtype, int64_t count, float scale, float* to) {
  switch (dtype) {
    case DType::Float32:
      return load_float(from, count, scale, to);
    case DType::BFloat16:
      return load_bfloat16(from, count, scale, to);
    case DType::Float16:
      return load_half(from, count, scale, to);
    case DType::Float64:
      return load_double_as_float(from, count, scale, to);
  }
}

void load(const void* from, DType dtype, int64_t count, double scale, double* to) {
  switch (dtype) {
    case DType::Float32:
      return widen_float(from, count, scale, to);
    case DType::BFloat16:
      return widen_bfloat16(from, count, scale, to);
    case DType::Float16:
      return widen_half(from, count, scale, to);
    case DType::Float64:
      return widen_double(from, count, scale, to);
  }
}

void store(const float* from, int64_t count, void* to, DType dtype) {
  switch (dtype) {
    case DType::BFloat16:
      return store_bfloat16(from, count, static_cast<char*>(to));
    case DType::Float16:
      return store_half(from, count, static_cast<char*>(to));
    default:
      // An empty vector has no address, and memcpy wants one even for nothing.
      if (count > 0) memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  }
}

double sum_of_squares(const float* data, int64_t count) { return add_squares(data, count); }

int64_t count_nonfinite(const void* from, DType dtype, int64_t count) {
  constexpr int64_t kBlock = 2048;
  float block[kBlock];
  int64_t bad = 0;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t length = std::min(kBlock, count - i);
    load(at(from, i * element_size(dtype)), dtype, length, 1.0f, block);
    bad += count_special(block, length);
  }
  return bad;
}

Moments moments(const float* data, int64_t count) {
  // The sum itself tells in all but pathological cases; the exact count is made only when it must.
  Moments result;
  result.sum_of_squares = add_squares(data, count);
  if (!(result.sum_of_squares < __builtin_inf())) result.nonfinite = count_special(data, count);
  return result;
}

}  // namespace fastagg::cpu
