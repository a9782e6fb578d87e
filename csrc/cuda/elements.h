// Elements of factors as bits, at any byte address: another writer's file may put a tensor anywhere.
// Reads go through __ldg, for which no store of the kernel is waited.
#pragma once

#include "../ragged/dtype.h"
#include "device.h"

namespace fastagg::cuda {

template <int kBytes>
__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kBytes == 0;
}

__device__ __forceinline__ uint32_t load16(const char* from) {
  if (is_aligned<2>(from)) return __ldg(reinterpret_cast<const uint16_t*>(from));
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  return static_cast<uint32_t>(__ldg(bytes)) | static_cast<uint32_t>(__ldg(bytes + 1)) << 8;
}

__device__ __forceinline__ uint32_t load32(const char* from) {
  if (is_aligned<4>(from)) return __ldg(reinterpret_cast<const uint32_t*>(from));
  return load16(from) | load16(from + 2) << 16;
}

__device__ __forceinline__ void store16(char* to, uint32_t bits) {
  if (is_aligned<2>(to)) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
  } else {
    to[0] = static_cast<char>(bits & 0xffu);
    to[1] = static_cast<char>(bits >> 8 & 0xffu);
  }
}

__device__ __forceinline__ void store32(char* to, uint32_t bits) {
  if (is_aligned<4>(to)) {
    *reinterpret_cast<uint32_t*>(to) = bits;
  } else {
    store16(to, bits);
    store16(to + 2, bits >> 16);
  }
}

__device__ __forceinline__ uint32_t load_bits(const char* from, int64_t size) {
  return size == 4 ? load32(from) : load16(from);
}

__device__ __forceinline__ void store_bits(char* to, uint32_t bits, int64_t size) {
  if (size == 4)
    store32(to, bits);
  else
    store16(to, bits);
}

template <DType dtype>
constexpr int kSizeOf = dtype == DType::Float32 ? 4 : 2;

__device__ __forceinline__ float decoded(uint32_t bits, DType dtype) {
  if (dtype == DType::Float32) return float_from_bits(bits);
  if (dtype == DType::BFloat16) return bfloat16_to_float(static_cast<uint16_t>(bits));
  return half_to_float(static_cast<uint16_t>(bits));
}

__device__ __forceinline__ uint32_t encoded(float value, DType dtype) {
  if (dtype == DType::Float32) return bits_from_float(value);
  return dtype == DType::BFloat16 ? float_to_bfloat16(value) : float_to_half(value);
}

// kCount elements of kSize bytes as they lie in memory.
template <int kCount, int kSize>
struct Packed {
  static constexpr int kWords = kCount * kSize / 4;
  uint32_t word[kWords];

  __device__ __forceinline__ uint32_t bits(int k) const {
    if constexpr (kSize == 4)
      return word[k];
    else
      return word[k / 2] >> 16 * (k % 2) & 0xffffu;
  }

  __device__ __forceinline__ void set(int k, uint32_t bits) {
    if constexpr (kSize == 4)
      word[k] = bits;
    else
      word[k / 2] = k % 2 ? word[k / 2] | bits << 16 : bits;
  }

  // Aligned means to 16 bytes, or to all of it where it is smaller.
  template <bool kAligned>
  __device__ __forceinline__ void load(const char* from) {
    if constexpr (kAligned && kWords % 4 == 0) {
      for (int w = 0; w < kWords; w += 4) {
        const uint4 four = __ldg(reinterpret_cast<const uint4*>(from + 4 * w));
        word[w] = four.x, word[w + 1] = four.y, word[w + 2] = four.z, word[w + 3] = four.w;
      }
    } else if constexpr (kAligned && kWords == 2) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
      word[0] = two.x, word[1] = two.y;
    } else {
      for (int w = 0; w < kWords; ++w) word[w] = load32(from + 4 * w);
    }
  }

  __device__ __forceinline__ void store(char* to) const {
    static_assert(kWords == 4, "16 bytes, aligned");
    *reinterpret_cast<uint4*>(to) = {word[0], word[1], word[2], word[3]};
  }
};

// What a check of a tensor needs to know of its elements. The square of a float never overflows a
// double, so the sum tells whether any is not finite; they are counted only then.
struct Moments {
  double sum_of_squares = 0;
  int nonfinite = 0;

  template <int kCount>
  __device__ __forceinline__ void add(const float (&value)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      sum_of_squares += static_cast<double>(value[k]) * static_cast<double>(value[k]);
    if (sum_of_squares < static_cast<double>(INFINITY)) return;
    for (int k = 0; k < kCount; ++k)
      nonfinite += (bits_from_float(value[k]) & 0x7f800000u) == 0x7f800000u;
  }
};

}  // namespace fastagg::cuda
