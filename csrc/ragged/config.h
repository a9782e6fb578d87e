// What both compilers must agree on.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTAGG_HD __host__ __device__ __forceinline__
#else
#define FASTAGG_HD inline
#endif
