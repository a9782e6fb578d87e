// The element types of factors and their exact conversions, for tables that address tensors by
// byte.
#pragma once

#include <cstring>

#include "config.h"

namespace fastagg {

// The codes stand in int64 tables (stack slots, scan spans): they are part of the ops' interface.
enum class DType : int64_t { Float32 = 0, BFloat16 = 1, Float16 = 2, Float64 = 3 };

FASTAGG_HD int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::Float32:
      return 4;
    case DType::Float64:
      return 8;
    default:
      return 2;
  }
}

FASTAGG_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTAGG_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTAGG_HD float bfloat16_to_float(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even. A NaN stays a NaN: the carry of the rounding could turn it into infinity.
FASTAGG_HD uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// Exponent and mantissa are moved into place and the bias corrected by one exact multiplication,
// which also normalises subnormals: no branch, so that the loop over it vectorises.
FASTAGG_HD float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000u);  // 2^112
  const uint32_t is_special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_from_bits(bits_from_float(scaled) | is_special |
                         (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

// Round to nearest even, overflow to infinity. Adding a power of two whose last mantissa bit is the
// half's last one lets the floating-point unit do the rounding, in the subnormal range too.
FASTAGG_HD uint16_t float_to_half(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude < 0x38800000u) {                                               // < 2^-14
    const float rounded = float_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_from_float(rounded) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace fastagg
