// Kernels with one mistake each, for the test that the shim sees it, and the tensor-core functions.
#include "cuda/reduce.h"
#include "cuda/tensor_core.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread reads its neighbour's value, with or without the barrier that this needs.
__global__ void neighbour(const double* in, double* out, bool barrier) {
  auto* shared = shared_memory<double>();
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

__global__ void unset(double* out) { out[threadIdx.x] = shared_memory<double>()[threadIdx.x]; }

__global__ void beyond(const double* in, double* out, int64_t index) {
  out[threadIdx.x] = in[index] + shared_memory<double>()[threadIdx.x % 8];
}

__global__ void beyond_shared(double* out, int64_t index) {
  shared_memory<double>()[index] = 1.0;
  out[threadIdx.x] = 0.0;
}

__global__ void divergent(double* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0.0;
}

__global__ void half_a_warp(double* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = warp_sum(1.0);
}

// A copy that is committed but, where `waits` is false, not waited for.
__global__ void copied(const double* in, double* out, bool waits) {
  auto* shared = shared_memory<double>();
  copy_async(shared + 2 * threadIdx.x, in + 2 * threadIdx.x);
  copy_async_commit();
  if (waits) copy_async_wait<0>();
  __syncthreads();
  out[2 * threadIdx.x] = shared[2 * threadIdx.x];
  out[2 * threadIdx.x + 1] = shared[2 * threadIdx.x + 1];
  copy_async_wait<0>();
}

// d (16 x 8) = a (16 x 16, row-major) b (16 x 8, row-major, loaded transposed), bf16 in shared memory.
__global__ void product_bf16(const uint16_t* a, const uint16_t* b, float* d) {
  auto* shared_a = shared_memory<uint16_t>();
  uint16_t* shared_b = shared_a + 16 * 16;
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += kWarp) shared_a[i] = a[i];
  for (int i = lane; i < 16 * 8; i += kWarp) shared_b[i] = b[i];
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  load_matrices(of_a, shared_a + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices_transposed(of_b, shared_b + (lane % 16) * 8);
  float sum[4] = {};
  const uint32_t pair[2] = {of_b[0], of_b[1]};
  mma_bf16(sum, of_a, pair);
  const int row = lane / 4, col = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) d[(row + 8 * (i / 2)) * 8 + col + i % 2] = sum[i];
}

// Eight rows of sixteen bytes, `offset` values from where they may begin.
__global__ void misplaced_rows(double* out, int64_t offset) {
  auto* shared = shared_memory<uint16_t>();
  uint32_t matrices[4];
  load_matrices(matrices, shared + offset + threadIdx.x % 8 * 8);
  out[threadIdx.x] = matrices[0];
}

// d (8 x 8) = a (8 x 4) b (4 x 8), row-major.
__global__ void product_f64(const double* a, const double* b, double* d) {
  const int lane = threadIdx.x;
  double sum[2] = {};
  mma_f64(sum, a[lane / 4 * 4 + lane % 4], b[lane % 4 * 8 + lane / 4]);
  for (int i = 0; i < 2; ++i) d[lane / 4 * 8 + 2 * (lane % 4) + i] = sum[i];
}

}  // namespace
}  // namespace fastagg::cuda

using namespace fastagg::cuda;

extern "C" {

void planted_neighbour(const double* in, double* out, bool barrier) {
  launch(neighbour, 1, kThreads, kThreads * 8, nullptr, in, out, barrier);
}
void planted_unset(double* out) { launch(unset, 1, kThreads, kThreads * 8, nullptr, out); }
void planted_beyond(const double* in, double* out, int64_t index) {
  launch(beyond, 1, kThreads, 64, nullptr, in, out, index);
}
void planted_beyond_shared(double* out, int64_t index) {
  launch(beyond_shared, 1, kThreads, 64, nullptr, out, index);
}
void planted_divergent(double* out) { launch(divergent, 1, kThreads, 0, nullptr, out); }
void planted_half_a_warp(double* out) { launch(half_a_warp, 1, kThreads, 0, nullptr, out); }
void planted_copied(const double* in, double* out, bool waits) {
  launch(copied, 1, kThreads, kThreads * 16, nullptr, in, out, waits);
}
void planted_product_bf16(const uint16_t* a, const uint16_t* b, float* d) {
  launch(product_bf16, 1, kWarp, 1024, nullptr, a, b, d);
}
void planted_misplaced_rows(double* out, int64_t offset) {
  launch(misplaced_rows, 1, kWarp, 256, nullptr, out, offset);
}
void planted_product_f64(const double* a, const double* b, double* d) {
  launch(product_f64, 1, kWarp, 0, nullptr, a, b, d);
}
}
