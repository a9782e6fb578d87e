#include "cuda/skinny.h"
#include "ragged/philox.h"

using namespace fastagg;

extern "C" {

void simt_contract(const void* slab, int64_t dtype, int64_t rows, int64_t cols, const double* scale,
                   const double* after, const float* x, int64_t modules, int64_t l, float* out,
                   int64_t terms) {
  cuda::contract({slab, static_cast<DType>(dtype), rows, cols}, scale, after, x, modules, l, out,
                 static_cast<int>(terms), nullptr, nullptr);
}

void simt_contract_signs(const void* slab, int64_t dtype, int64_t rows, int64_t cols,
                         const double* scale, const double* after, uint64_t seed,
                         const int64_t* streams, int64_t modules, int64_t l, float* out) {
  cuda::contract_signs({slab, static_cast<DType>(dtype), rows, cols}, scale, after, seed, streams,
                       modules, l, out, nullptr);
}

void simt_expand(const void* slab, int64_t dtype, int64_t rows, int64_t cols, const double* scale,
                 const float* x, int64_t modules, int64_t l, float* out, int64_t terms) {
  cuda::expand({slab, static_cast<DType>(dtype), rows, cols}, scale, x, modules, l, out,
               static_cast<int>(terms), nullptr, nullptr);
}

// The first `count` elements of the Rademacher matrix, one by one.
void simt_signs(uint64_t seed, uint64_t stream, int64_t count, float* out) {
  for (int64_t e = 0; e < count; ++e)
    out[e] =
        rademacher_sign(rademacher_block(seed, stream, static_cast<uint64_t>(e / kSignsPerBlock)),
                        e % kSignsPerBlock);
}

}  // extern "C"
