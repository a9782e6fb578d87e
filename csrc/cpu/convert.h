// Element conversions over contiguous runs. Sources need no alignment: a safetensors file of
// another writer may put a tensor at any byte.
#pragma once

#include "../ragged/tables.h"

namespace fastagg::cpu {

// to[i] = scale * from[i]; a scale that is a power of two keeps every bit.
void load(const void* from, DType dtype, int64_t count, float scale, float* to);
void load(const void* from, DType dtype, int64_t count, double scale, double* to);

// to[i] = from[i], rounded to nearest even.
void store(const float* from, int64_t count, void* to, DType dtype);

double sum_of_squares(const float* data, int64_t count);
int64_t count_nonfinite(const void* from, DType dtype, int64_t count);

// What a check of a tensor needs to know of `count` of its elements.
struct Moments {
  int64_t nonfinite = 0;
  double sum_of_squares = 0;
};
Moments moments(const float* data, int64_t count);

inline const char* at(const void* base, int64_t bytes) {
  return static_cast<const char*>(base) + bytes;
}
inline char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

}  // namespace fastagg::cpu
