// Householder's QR of one factor in fp64 by one block, sixteen columns at a time. Applied in turn, the
// reflectors of a panel take f_k = tau_k (v_k^T x - sum of f_i v_k^T v_i over those before) times v_k
// from x: with V^T V known, a panel is two products on the tensor cores and a short recurrence.
#pragma once

#include "reduce.h"
#include "tensor_core.h"

namespace fastagg::cuda {

constexpr int kQrThreads = 512;
constexpr int kQrWarps = kQrThreads / kWarp;
constexpr int kPanel = 16;  // reflectors
constexpr int kGroup = 8;   // columns that a warp applies a panel to

// What a block needs of shared memory: a panel's f for a group of columns of every warp.
constexpr int64_t kQrShared = kQrWarps * kPanel * kGroup * static_cast<int64_t>(sizeof(double));

// A factor (size, rows) by columns, which become R on the diagonal and above it and the reflectors
// below, whose diagonal entry is one. tau (rows); inner (panels, kPanel, kPanel) is V^T V.
struct Qr {
  double *columns, *tau, *inner;
  int64_t size, rows;

  FASTAGG_MEMBER int64_t rank() const { return rows < size ? rows : size; }
  FASTAGG_MEMBER static int64_t inner_size(int64_t rows) {
    return tiles(rows, kPanel) * kPanel * kPanel;
  }
};

// Entry i of reflector j, of the first `last` reflectors.
__device__ __forceinline__ double reflector_entry(const Qr& qr, int64_t last, int64_t j,
                                                  int64_t i) {
  if (j >= last || i >= qr.size || i < j) return 0.0;
  return i == j ? 1.0 : qr.columns[j * qr.size + i];
}

// By one warp: the panel that begins with reflector `first` applied to up to kGroup columns x (count,
// size), `up` in rising order of its reflectors, as for Q^T x, else in falling order, as for Q x.
__device__ inline void reflect_group(const Qr& qr, int64_t first, bool up, double* x, int64_t count,
                                     double* f) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, eighth = lane / 4, quarter = lane % 4;
  const int64_t size = qr.size;
  const int64_t last = first + kPanel < qr.rank() ? first + kPanel : qr.rank();
  double* column = x + eighth * size;
  const bool there = eighth < count;

  double upper[2] = {}, lower[2] = {};
#pragma unroll 4
  for (int64_t i = first + quarter; i < size + quarter; i += 4) {
    const double value = there && i < size ? column[i] : 0.0;
    mma_f64(upper, reflector_entry(qr, last, first + eighth, i), value);
    mma_f64(lower, reflector_entry(qr, last, first + kPanel / 2 + eighth, i), value);
  }
  for (int c = 0; c < 2; ++c) {
    f[eighth * kGroup + 2 * quarter + c] = upper[c];
    f[(kPanel / 2 + eighth) * kGroup + 2 * quarter + c] = lower[c];
  }
  __syncwarp();
  if (lane < kGroup) {
    const double* inner = qr.inner + first * kPanel;
    for (int step = 0; step < kPanel; ++step) {
      const int k = up ? step : kPanel - 1 - step;
      double sum = f[k * kGroup + lane];
      for (int i = up ? 0 : k + 1; i < (up ? k : kPanel); ++i)
        sum -= f[i * kGroup + lane] * inner[k * kPanel + i];
      f[k * kGroup + lane] = first + k < last ? qr.tau[first + k] * sum : 0.0;
    }
  }
  __syncwarp();

  double taken[kPanel / 4];
#pragma unroll
  for (int q = 0; q < kPanel / 4; ++q) taken[q] = -f[(4 * q + quarter) * kGroup + eighth];
#pragma unroll 2
  for (int64_t top = first; top < size; top += 8) {
    const int64_t i = top + 2 * quarter;
    double rest[2] = {there && i < size ? column[i] : 0.0,
                      there && i + 1 < size ? column[i + 1] : 0.0};
#pragma unroll
    for (int q = 0; q < kPanel / 4; ++q)
      mma_f64(rest, taken[q], reflector_entry(qr, last, first + 4 * q + quarter, top + eighth));
    if (there && i < size) column[i] = rest[0];
    if (there && i + 1 < size) column[i + 1] = rest[1];
  }
  __syncwarp();  // f is written for the next group
}

// x -= tau v (v^T x) by one warp, for reflector j.
__device__ __forceinline__ void reflect(const Qr& qr, int64_t j, double tau, double* x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const double* v = qr.columns + j * qr.size;
  double dot = lane == 0 ? x[j] : 0.0;
#pragma unroll 4
  for (int64_t i = j + 1 + lane; i < qr.size; i += kWarp) dot += v[i] * x[i];
  const double factor = tau * warp_sum(dot);
  if (lane == 0) x[j] -= factor;
#pragma unroll 4
  for (int64_t i = j + 1 + lane; i < qr.size; i += kWarp) x[i] -= factor * v[i];
}

// The reflectors of one panel, and their inner products.
__device__ inline void factor_panel(const Qr& qr, int64_t first, int64_t last) {
  auto* sums = shared_memory<double>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t size = qr.size;
  for (int64_t j = first; j < last; ++j) {
    double* v = qr.columns + j * size;
    double tail = 0;
    for (int64_t i = j + 1 + threadIdx.x; i < size; i += kQrThreads) tail += v[i] * v[i];
    tail = block_sum(tail, sums);
    const double head = v[j];
    double beta = head, tau = 0;
    if (tail != 0) {
      beta = -copysign(sqrt(head * head + tail), head);
      tau = (beta - head) / beta;
      const double scale = 1.0 / (head - beta);
      for (int64_t i = j + 1 + threadIdx.x; i < size; i += kQrThreads) v[i] *= scale;
    }
    __syncthreads();  // every thread has read the head
    if (threadIdx.x == 0) {
      v[j] = beta;
      qr.tau[j] = tau;
    }
    for (int64_t k = j + 1 + warp; k < last; k += kQrWarps)
      reflect(qr, j, tau, qr.columns + k * size);
    __syncthreads();
  }
  double* inner = qr.inner + first * kPanel;
  for (int pair = warp; pair < kPanel * kPanel; pair += kQrWarps) {
    const int one = pair / kPanel, two = pair % kPanel;
    if (one >= two) continue;
    double dot = 0;
#pragma unroll 2
    for (int64_t i = first + two + lane; i < size; i += kWarp)
      dot += reflector_entry(qr, last, first + one, i) * reflector_entry(qr, last, first + two, i);
    dot = warp_sum(dot);
    if (lane == 0) inner[one * kPanel + two] = inner[two * kPanel + one] = dot;
  }
  __syncthreads();
}

// The QR of the columns.
__device__ inline void factorise(const Qr& qr) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  double* f = shared_memory<double>() + warp * kPanel * kGroup;
  for (int64_t first = 0; first < qr.rank(); first += kPanel) {
    const int64_t last = first + kPanel < qr.rank() ? first + kPanel : qr.rank();
    factor_panel(qr, first, last);
    for (int64_t k = last + warp * kGroup; k < qr.rows; k += kQrWarps * kGroup)
      reflect_group(qr, first, true, qr.columns + k * qr.size,
                    qr.rows - k < kGroup ? qr.rows - k : kGroup, f);
    __syncthreads();
  }
}

// x = Q x for the columns of x (count, size), a group of them a warp.
__device__ inline void apply_q(const Qr& qr, double* x, int64_t count) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  double* f = shared_memory<double>() + warp * kPanel * kGroup;
  const int64_t panels = tiles(qr.rank(), kPanel);
  for (int64_t k = warp * kGroup; k < count; k += kQrWarps * kGroup)
    for (int64_t panel = panels - 1; panel >= 0; --panel)
      reflect_group(qr, panel * kPanel, false, x + k * qr.size,
                    count - k < kGroup ? count - k : kGroup, f);
}

}  // namespace fastagg::cuda
