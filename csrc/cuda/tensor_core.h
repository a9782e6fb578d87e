// The matrix instructions of one warp, and the copies that feed them. This is all of the project's
// PTX: the shim emulates each function, lane for lane, from the layouts of the PTX manual.
#pragma once

#include "device.h"

#ifdef FASTAGG_SIMT
#include "simt_tensor_core.h"
#else

namespace fastagg::cuda {

// d (16 x 8, fp32) += a (16 x 16, bf16) b (16 x 8, bf16). With group = lane / 4, pair = 2 (lane % 4):
// a[0], a[1] hold rows group, group + 8 at columns pair, pair + 1; a[2], a[3] the same at columns + 8;
// b[0], b[1] hold column group at rows pair, pair + 1 and rows + 8; d[0], d[1] row group at columns
// pair, pair + 1, and d[2], d[3] row group + 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (8 x 8, fp64) += a (8 x 4) b (4 x 8): a is row lane / 4, column lane % 4; b row lane % 4, column
// lane / 4; d[0], d[1] row lane / 4, columns 2 (lane % 4) and the next.
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};\n"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// d (16 x 8, fp64) += a (16 x 16) b (16 x 8) in fragments of mma_f64: a[step][half] is that of rows
// 8 half and columns 4 step, b[step] that of rows 4 step, d[half] that of rows 8 half.
__device__ __forceinline__ void mma_f64_deep(double (&d)[2][2], const double (&a)[4][2],
                                             const double (&b)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7,%8,%9,%10,%11}, "
      "{%12,%13,%14,%15}, {%0,%1,%2,%3};\n"
      : "+d"(d[0][0]), "+d"(d[0][1]), "+d"(d[1][0]), "+d"(d[1][1])
      : "d"(a[0][0]), "d"(a[0][1]), "d"(a[1][0]), "d"(a[1][1]), "d"(a[2][0]), "d"(a[2][1]),
        "d"(a[3][0]), "d"(a[3][1]), "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) mma_f64(d[half], a[step][half], b[step]);
#endif
}

// Four 8 x 8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8 (16
// bytes, aligned), and gets of each matrix row lane / 4, columns 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory without a register, both aligned; zeros where `valid` is
// false (the source is not read then).
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until at most `pending` groups of this thread's copies are under way; a barrier must follow before
// another thread reads them.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Asks for 32 bytes of global memory to be brought into the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

}  // namespace fastagg::cuda

#endif
