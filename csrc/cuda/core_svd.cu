// The SVD of small square matrices: one-sided Jacobi gives the left singular vectors times the singular
// values, whose norms are sorted here, and v_j = C^T u_j / s_j.
#include <cstdint>
#include <limits>

#include "device.h"
#include "orthogonalise.h"
#include "products.h"
#include "reduce.h"
#include "small.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kTile = 32;     // transposed at a time, by
constexpr int kTileRows = 8;  // rows of threads
constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kLeast = std::numeric_limits<double>::min();
constexpr double kMost = std::numeric_limits<double>::max();

constexpr int kLeastExponent = -1000;  // its power of two has a finite inverse

// The power of two that brings the largest entry of every matrix into [1/2, 1).
__global__ void __launch_bounds__(kThreads)
    find_scales(const double* __restrict__ c, int64_t count, const int32_t* skip, double* scales) {
  if (skip && skip[blockIdx.x] != 0) return;
  double* scratch = shared_memory<double>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  c += blockIdx.x * count;
  double largest = 0;
  for (int64_t e = threadIdx.x; e < count; e += kThreads) largest = fmax(largest, fabs(c[e]));
  largest = warp_max(largest);
  if (lane == 0) scratch[warp] = largest;
  __syncthreads();
  if (warp != 0) return;
  largest = warp_max(lane < kThreads / kWarp ? scratch[lane] : 0.0);
  int exponent = 0;
  if (largest > 0 && largest <= kMost) frexp(largest, &exponent);
  if (exponent < kLeastExponent) exponent = kLeastExponent;
  if (lane == 0) scales[blockIdx.x] = ldexp(1.0, -exponent);
}

// s, and which vector has which place in decreasing order. A NaN counts as -1: places stay distinct.
__global__ void __launch_bounds__(kThreads)
    order_vectors(const double* vectors, const double* scales, int size, const int32_t* skip,
                  double* s, int32_t* order) {
  if (skip && skip[blockIdx.x] != 0) return;
  double* norms = shared_memory<double>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  vectors += static_cast<int64_t>(blockIdx.x) * size * size;
  for (int j = warp; j < size; j += kThreads / kWarp) {
    double sum = 0;
    for (int i = lane; i < size; i += kWarp) {
      const double value = vectors[static_cast<int64_t>(j) * size + i];
      sum += value * value;
    }
    sum = warp_sum(sum);
    if (lane == 0) norms[j] = sum >= 0 ? sqrt(sum) : -1.0;
  }
  __syncthreads();
  for (int j = threadIdx.x; j < size; j += kThreads) {
    int place = 0;
    for (int i = 0; i < size; ++i) place += norms[i] > norms[j] || (norms[i] == norms[j] && i < j);
    s[static_cast<int64_t>(blockIdx.x) * size + place] = norms[j] / scales[blockIdx.x];
    order[static_cast<int64_t>(blockIdx.x) * size + place] = j;
  }
}

// Columns of u and of u / s, from rows u s: zero where s is rounding.
__global__ void __launch_bounds__(kTile* kTileRows)
    write_vectors(const double* vectors, const double* scales, const double* s,
                  const int32_t* order, int64_t size, int64_t side, const int32_t* skip, double* u,
                  double* over_s) {
  double* tile = shared_memory<double>();
  const int64_t module = blockIdx.x / (side * side), which = blockIdx.x % (side * side);
  if (skip && skip[module] != 0) return;
  const int64_t top = which / side * kTile, left = which % side * kTile;
  vectors += module * size * size;
  s += module * size;
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const double least = static_cast<double>(size) * kEps * s[0];
  for (int j = y; j < kTile && left + j < size; j += kTileRows)
    if (top + x < size)
      tile[j * (kTile + 1) + x] = vectors[order[module * size + left + j] * size + top + x];
  __syncthreads();
  if (left + x >= size) return;
  const double value = s[left + x];
  const bool kept = value > least && value >= kLeast;
  const double inverse = kept ? 1 / value : 0.0;
  for (int i = y; i < kTile && top + i < size; i += kTileRows) {
    const int64_t to = (module * size + top + i) * size + left + x;
    const double vector = kept ? tile[x * (kTile + 1) + i] * (inverse / scales[module]) : 0.0;
    u[to] = vector;
    over_s[to] = vector * inverse;
  }
}

}  // namespace

void core_svd(const double* c, int64_t modules, int64_t size, const int32_t* skip, double* u,
              double* s, double* v, Workspace& workspace, Stream stream) {
  double* scales = workspace.take<double>(modules);
  double* vectors = workspace.take<double>(modules * size * size);
  double* over_s = workspace.take<double>(modules * size * size);
  int32_t* order = workspace.take<int32_t>(modules * size);
  if (size == 0) return;
  launch(find_scales, modules, kThreads, kThreads / kWarp * static_cast<int64_t>(sizeof(double)),
         stream, c, size * size, skip, scales);
  if (!orthogonalise_in_shared(c, scales, modules, size, skip, vectors, stream))
    orthogonalise_large(c, scales, modules, size, skip, vectors, workspace, stream);
  launch(order_vectors, modules, kThreads, size * static_cast<int64_t>(sizeof(double)), stream,
         vectors, scales, static_cast<int>(size), skip, s, order);
  const int64_t side = tiles(size, kTile);
  launch(write_vectors, modules * side * side, kTile * kTileRows,
         kTile * (kTile + 1) * static_cast<int64_t>(sizeof(double)), stream, vectors, scales, s,
         order, size, side, skip, u, over_s);
  // v = C^T u / s
  multiply(row_major(c, size, size).transposed(), row_major(over_s, size, size),
           row_major_result(v, size, size), {modules, size, size, size}, skip, stream);
}

}  // namespace fastagg::cuda
