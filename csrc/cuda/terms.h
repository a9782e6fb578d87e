// Values as sums of bf16 terms, on the way from global memory to the tensor cores: x = hi + mid + lo
// with hi = bf16(x), mid = bf16(x - hi), and so on. Rounded to nearest, each term takes eight bits, so
// one term holds a bf16, two an fp16 and three an fp32 exactly, as long as its last bit is at least
// 2^-133 (bf16's smallest subnormal; the scales of the callers keep values near one).
#pragma once

#include "../ragged/dtype.h"
#include "../ragged/slab.h"
#include "device.h"

namespace fastagg::cuda::bf16 {

// |term i| <= 2^-8i |x|. Of a product of two sums the pairs i + j < kOrders are kept: what is left out
// is below 2^-23 |x y| at worst, for fp32 operands, and nothing where one of them is bf16 or both fp16.
constexpr int kOrders = 3;

FASTAGG_HD int terms_of(DType dtype) {
  return dtype == DType::BFloat16 ? 1 : dtype == DType::Float16 ? 2 : 3;
}

// The bits of x rounded to bf16, ties away from zero: both neighbours leave a remainder of 16 bits. No
// finite value becomes infinite, and no NaN is lost.
__device__ __forceinline__ uint32_t leading_term(float x) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = magnitude < 0x7f7f8000u   ? bits + 0x8000u
                           : magnitude > 0x7f800000u ? bits | 0x400000u
                                                     : bits;
  return rounded & 0xffff0000u;
}

constexpr int kOctet = 8;  // values that are loaded, split and stored together: 16 bytes of a term

// How many of them lie within `end` when the first is at `begin`.
__device__ __forceinline__ int valid_values(int64_t begin, int64_t end) {
  return end - begin >= kOctet ? kOctet : end > begin ? static_cast<int>(end - begin) : 0;
}

// Eight values as they lie in memory; the last four words are fp32's alone.
struct Octet {
  uint32_t word[8];
};

__device__ __forceinline__ void copy_words(uint32_t* to, const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  to[0] = words.x;
  to[1] = words.y;
  to[2] = words.z;
  to[3] = words.w;
}

__device__ __forceinline__ bool aligned(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// The first `valid` of eight values that begin at `from`; zeros for the others, which are not read.
__device__ __forceinline__ Octet read_octet(const void* from, DType dtype, int valid) {
  Octet octet{};
  if (dtype == DType::Float32) {
    if (valid == kOctet && aligned(from)) {
      copy_words(octet.word, from);
      copy_words(octet.word + 4, static_cast<const char*>(from) + 16);
    } else {
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        if (i < valid) octet.word[i] = static_cast<const uint32_t*>(from)[i];
    }
  } else if (valid == kOctet && aligned(from)) {
    copy_words(octet.word, from);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < valid)
        octet.word[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i])
                             << (16 * (i % 2));
  }
  return octet;
}

__device__ __forceinline__ void widen(const Octet& octet, DType dtype, float (&values)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const auto half = static_cast<uint16_t>(octet.word[i / 2] >> (16 * (i % 2)));
    values[i] = dtype == DType::Float32    ? float_from_bits(octet.word[i])
                : dtype == DType::BFloat16 ? bfloat16_to_float(half)
                                           : half_to_float(half);
  }
}

// The leading term of each value, which is left with its remainder.
__device__ __forceinline__ uint4 take_term(float (&values)[kOctet]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    const uint32_t first = leading_term(values[i]), second = leading_term(values[i + 1]);
    values[i] -= float_from_bits(first);
    values[i + 1] -= float_from_bits(second);
    word[i / 2] = first >> 16 | second;
  }
  return {word[0], word[1], word[2], word[3]};
}

// The first `valid` of eight values to where they belong, rounded to `dtype`.
__device__ __forceinline__ void write_octet(const float (&values)[kOctet], void* to, DType dtype,
                                            int valid) {
  const bool whole = valid == kOctet && aligned(to);
  if (dtype == DType::Float32) {
    if (whole) {
      auto* vectors = static_cast<float4*>(to);
      vectors[0] = {values[0], values[1], values[2], values[3]};
      vectors[1] = {values[4], values[5], values[6], values[7]};
      return;
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < valid) static_cast<float*>(to)[i] = values[i];
    return;
  }
  uint32_t half[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    half[i] = dtype == DType::BFloat16 ? float_to_bfloat16(values[i]) : float_to_half(values[i]);
  if (whole) {
    *static_cast<uint4*>(to) = {half[0] | half[1] << 16, half[2] | half[3] << 16,
                                half[4] | half[5] << 16, half[6] | half[7] << 16};
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i)
    if (i < valid) static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(half[i]);
}

}  // namespace fastagg::cuda::bf16
