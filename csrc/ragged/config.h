// What both compilers must agree on.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTAGG_HD __host__ __device__ __forceinline__
#define FASTAGG_MEMBER __host__ __device__
#else
#define FASTAGG_HD inline
#define FASTAGG_MEMBER
#endif
