// Gram-Schmidt with a launch a pivot, then blocks of rows that meet two by two in the shared memory of
// a thread block, with a launch a round of meetings. Convergence is a flag on the device: what is
// launched after it returns at once.
#include <cstdint>

#include "jacobi.h"
#include "orthogonalise.h"
#include "pivot.h"
#include "reduce.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMostRows = 16;  // of a block

// A warp a row.
__global__ void __launch_bounds__(kThreads)
    load_rows(const double* __restrict__ c, const double* __restrict__ scales, int64_t modules,
              int64_t size, const int32_t* skip, double* rows, double* norms2) {
  const int64_t which = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (which >= modules * size) return;  // the warp as a whole
  const int64_t module = which / size;
  if (skip && skip[module] != 0) return;
  double sum = 0;
  for (int64_t i = lane; i < size; i += kWarp) {
    const double value = scales[module] * c[which * size + i];
    rows[which * size + i] = value;
    sum += value * value;
  }
  sum = warp_sum(sum);
  if (lane == 0) norms2[2 * module * size + which % size] = sum;
}

// Row k of `factor` (modules, size, size) becomes the components of all rows along the longest one,
// which are taken out of them; zero if what is left is rounding. A warp a row.
__global__ void __launch_bounds__(kThreads)
    take_out_longest(double* rows, double* norms2, int k, int size, const int32_t* skip,
                     double* factor) {
  const int64_t groups = (size + kWarps - 1) / kWarps;
  const int64_t module = blockIdx.x / groups;
  const int j = static_cast<int>(blockIdx.x % groups) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (j >= size || (skip && skip[module] != 0)) return;  // the warp as a whole
  rows += module * size * size;
  const double* now = norms2 + (2 * module + k % 2) * size;
  double* next = norms2 + (2 * module + (k + 1) % 2) * size;

  const Pivot pivot = largest(now, size);
  const bool noise = !(pivot.value > kNoise * kNoise);
  double component = 0, left = now[j];
  if (!noise && j == pivot.row) {
    component = sqrt(pivot.value);
    left = kChosen;
  } else if (!noise && left != kChosen) {
    const double* along = rows + static_cast<int64_t>(pivot.row) * size;
    double* row = rows + static_cast<int64_t>(j) * size;
    const double inverse = 1 / sqrt(pivot.value);
    for (int i = lane; i < size; i += kWarp) component += along[i] * row[i];
    component = warp_sum(component) * inverse;
    left = 0;
    for (int i = lane; i < size; i += kWarp) {
      const double value = row[i] - component * inverse * along[i];
      row[i] = value;
      left += value * value;
    }
    left = warp_sum(left);
  }
  if (lane != 0) return;
  next[j] = left;
  factor[(module * size + k) * size + j] = component;
}

// One warp makes two rows in shared memory orthogonal; true where they were far from it.
__device__ bool orthogonalise(double* x, double* y, int size) {
  const int lane = threadIdx.x % kWarp;
  double xx = 0, yy = 0, xy = 0;
  for (int i = lane; i < size; i += kWarp) {
    xx += x[i] * x[i];
    yy += y[i] * y[i];
    xy += x[i] * y[i];
  }
  const Rotation r = rotation(warp_sum(xx), warp_sum(yy), warp_sum(xy));
  if (r.s != 0)
    for (int i = lane; i < size; i += kWarp) {
      const double a = x[i], b = y[i];
      x[i] = r.c * a - r.s * b;
      y[i] = r.s * a + r.c * b;
    }
  return r.far;
}

// Every two rows of different blocks of `block` rows once, in a sweep's first round also those of one
// block. A thread block a meeting.
__global__ void __launch_bounds__(kThreads)
    meet(double* matrices, int size, int block, int players, int round, const int32_t* skip,
         const int32_t* before, int32_t* far) {
  const int64_t module = blockIdx.x / (players / 2);
  if ((skip && skip[module] != 0) || (before && !before[module])) return;  // all threads alike
  const Meeting m = meeting(players, round, static_cast<int>(blockIdx.x % (players / 2)));
  double* shared = shared_memory<double>();
  double* matrix = matrices + module * size * size;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  // Row i of the first block, and of the second as row block + i; null beyond the matrix.
  const auto global_row = [&](int i) {
    const int64_t row = static_cast<int64_t>(i < block ? m.first : m.second) * block + i % block;
    return row < size ? matrix + row * size : nullptr;
  };
  const auto pair = [&](int i, int j) {
    if (!global_row(i) || !global_row(j)) return;
    double* x = shared + static_cast<int64_t>(i) * size;
    double* y = shared + static_cast<int64_t>(j) * size;
    if (orthogonalise(x, y, size) && lane == 0) atomicMax(far + module, 1);
  };

  for (int i = warp; i < 2 * block; i += kWarps)
    if (const double* row = global_row(i))
      for (int e = lane; e < size; e += kWarp) shared[static_cast<int64_t>(i) * size + e] = row[e];
  __syncthreads();
  if (round == 0)
    for (int turn = 0; turn < block - 1; ++turn) {
      for (int p = warp; p < block; p += kWarps) {
        const int half = p < block / 2 ? 0 : block;
        const Meeting own = meeting(block, turn, p % (block / 2));
        pair(half + own.first, half + own.second);
      }
      __syncthreads();
    }
  for (int turn = 0; turn < block; ++turn) {
    for (int p = warp; p < block; p += kWarps) pair(p, block + (p + turn) % block);
    __syncthreads();
  }
  for (int i = warp; i < 2 * block; i += kWarps)
    if (double* row = global_row(i))
      for (int e = lane; e < size; e += kWarp) row[e] = shared[static_cast<int64_t>(i) * size + e];
}

}  // namespace

void orthogonalise_large(const double* c, const double* scales, int64_t modules, int64_t size,
                         const int32_t* skip, double* vectors, Workspace& workspace,
                         Stream stream) {
  double* rows = workspace.take<double>(modules * size * size);
  double* norms2 = workspace.take<double>(modules * 2 * size);
  launch(load_rows, tiles(modules * size, kWarps), kThreads, 0, stream, c, scales, modules, size,
         skip, rows, norms2);
  for (int64_t k = 0; k < size; ++k)
    launch(take_out_longest, modules * tiles(size, kWarps), kThreads, 0, stream, rows, norms2,
           static_cast<int>(k), static_cast<int>(size), skip, vectors);

  const auto bytes = [&](int64_t block) {
    return 2 * block * size * static_cast<int64_t>(sizeof(double));
  };
  int64_t block = kMostRows;
  while (block > 1 && bytes(block) > limits().shared_bytes) block /= 2;
  const int64_t blocks = tiles(size, block);
  const int players = static_cast<int>(blocks + blocks % 2);
  int32_t* far = workspace.take<int32_t>(kMostSweeps * modules);
  zero(far, kMostSweeps * modules * static_cast<int64_t>(sizeof(int32_t)), stream);
  for (int sweep = 0; sweep < kMostSweeps; ++sweep)
    for (int round = 0; round < players - 1; ++round)
      launch(meet, modules * (players / 2), kThreads, bytes(block), stream, vectors,
             static_cast<int>(size), static_cast<int>(block), players, round, skip,
             sweep ? far + (sweep - 1) * modules : nullptr, far + sweep * modules);
}

}  // namespace fastagg::cuda
