// Pivoted Cholesky of small Gram matrices, and the triangular solve with its factor.
//
// Panels of columns: within a panel a column is brought up to date from the panel's earlier columns
// when it is chosen (only the diagonal must always be current), then the panel's product is
// subtracted from all that is left. Nothing is permuted. The work matrix is the packed lower triangle:
// in shared memory where it fits, with one block a matrix for all of it; beyond, in global memory,
// with a launch of one block a matrix for every panel and one of many blocks for its product.
#include <cstdint>
#include <limits>

#include "device.h"
#include "pivot.h"
#include "reduce.h"
#include "small.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPanelThreads = 1024;
constexpr int kSharedPanel = 8;  // columns: two 160 x 160 matrices then share a multiprocessor
constexpr int kWidestPanel = 16;
constexpr double kChosen = -std::numeric_limits<double>::infinity();  // the diagonal of a used row

FASTAGG_HD int64_t packed(int64_t i, int64_t j) {
  return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i;
}

// How far a factorisation has come, the same in all threads.
struct Progress {
  double first, smallest;
  int32_t rank, done;
};

// Up to `width` more columns of L into panel (width, size), one barrier each: the warps that are still
// looking for the pivot read diagonal[k % 2] while others write diagonal[(k + 1) % 2]. Returns the
// number of columns; the caller has a barrier before.
__device__ int factor_panel(const double* work, double* panel, int width, double* diagonal,
                            int32_t* pivots, int size, double tolerance, Progress& progress) {
  int count = 0;
  for (; count < width; ++count) {
    const double* now = diagonal + progress.rank % 2 * size;
    double* next = diagonal + (progress.rank + 1) % 2 * size;
    const Pivot pivot = largest(now, size);
    if (progress.rank == 0) progress.first = pivot.value;
    progress.done =
        progress.rank == size || !(pivot.value > tolerance * progress.first) || !(pivot.value > 0);
    if (progress.done) break;

    const double root = sqrt(pivot.value), inverse = 1.0 / root;
    double* column = panel + static_cast<int64_t>(count) * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const bool chosen = now[i] == kChosen;
      double value = 0;
      if (!chosen && i != pivot.row) {
        value = work[packed(i, pivot.row)];
        for (const double* earlier = panel; earlier < column; earlier += size)
          value -= earlier[i] * earlier[pivot.row];
        value *= inverse;
      }
      next[i] = chosen || i == pivot.row ? kChosen : now[i] - value * value;
      column[i] = i == pivot.row ? root : value;
    }
    if (threadIdx.x == 0) pivots[progress.rank] = pivot.row;
    progress.smallest = pivot.value;
    ++progress.rank;
    __syncthreads();
  }
  return count;
}

// The panel's columns as columns [first, first + count) of the factor's rows.
__device__ void write_panel(const double* panel, int first, int count, int size, double* factor) {
  for (int64_t e = threadIdx.x; e < static_cast<int64_t>(size) * count; e += blockDim.x)
    factor[e / count * size + first + e % count] = panel[e % count * size + e / count];
}

__device__ void write_outcome(const double* diagonal, int size, const Progress& progress,
                              int64_t module, const Cholesky& out, double* scratch) {
  double left = 0;
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    left += fmax(diagonal[progress.rank % 2 * size + i], 0.0);
  left = block_sum(left, scratch);
  if (threadIdx.x != 0) return;
  out.rank[module] = progress.rank;
  out.smallest[module] = progress.smallest;
  out.dropped[module] = left;
}

// work -= panel^T panel: a lane has two rows, 32 apart, in registers, against one column at a time, so
// a broadcast of the panel serves 64 elements. Triangular numbers of 16 rows are distinct modulo 16:
// the packed rows do not meet in a bank.
__device__ void subtract_panel(double* work, const double* panel, const double* diagonal,
                               int size) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int top = 0; top < size; top += 2 * kWarp) {
    double rows[2][kSharedPanel];
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int b = 0; b < kSharedPanel; ++b) {
        const int i = top + half * kWarp + lane;
        rows[half][b] = i < size ? panel[b * size + i] : 0.0;
      }
    const int last = size < top + 2 * kWarp ? size : top + 2 * kWarp;
    for (int j = warp; j < last; j += warps) {
      if (diagonal[j] == kChosen) continue;
      double sums[2] = {0, 0};
#pragma unroll
      for (int b = 0; b < kSharedPanel; ++b) {
        const double other = panel[b * size + j];
        sums[0] += rows[0][b] * other;
        sums[1] += rows[1][b] * other;
      }
      for (int half = 0; half < 2; ++half) {
        const int i = top + half * kWarp + lane;
        if (i < size && i >= j) work[packed(i, j)] -= sums[half];
      }
    }
  }
}

int64_t shared_work_bytes(int64_t size) {
  return (size * (size + 1) / 2 + (kSharedPanel + 2) * size + kWarp) *
         static_cast<int64_t>(sizeof(double));
}

__global__ void __launch_bounds__(kThreads, 2)
    factor_in_shared(const double* __restrict__ g, const double* __restrict__ d, double tolerance,
                     Cholesky out) {
  const int size = static_cast<int>(out.size);
  const int64_t module = blockIdx.x;
  double* work = shared_memory<double>();
  double* panel = work + packed(size, 0);
  double* diagonal = panel + kSharedPanel * size;
  double* scratch = diagonal + 2 * size;
  g += module * size * size;
  d += module * size;
  double* factor = out.factor + module * size * size;

  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  for (int i = warp; i < size; i += static_cast<int>(blockDim.x) / kWarp)
    for (int j = lane; j <= i; j += kWarp) {
      const double value = d[i] * d[j] * g[static_cast<int64_t>(i) * size + j];
      work[packed(i, j)] = value;
      if (i == j) diagonal[i] = value;
    }
  __syncthreads();

  Progress progress{};
  while (!progress.done) {
    const int first = progress.rank;
    const int count = factor_panel(work, panel, kSharedPanel, diagonal, out.pivots + module * size,
                                   size, tolerance, progress);
    write_panel(panel, first, count, size, factor);
    if (!progress.done) subtract_panel(work, panel, diagonal + progress.rank % 2 * size, size);
    __syncthreads();
  }
  for (int64_t e = threadIdx.x; e < static_cast<int64_t>(size) * size; e += blockDim.x)
    if (e % size >= progress.rank) factor[e] = 0;
  write_outcome(diagonal, size, progress, module, out, scratch);
}

struct GlobalWork {
  double* packed;    // (modules, size (size + 1) / 2)
  double* diagonal;  // (modules, 2, size)
  Progress* progress;
};

__global__ void __launch_bounds__(kThreads)
    pack(const double* __restrict__ g, const double* __restrict__ d, int64_t size, int64_t modules,
         GlobalWork to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) % size, module = blockIdx.x / size;
  g += (module * size + row) * size;
  d += module * size;
  double* work = to.packed + module * packed(size, 0);
  for (int64_t j = threadIdx.x; j <= row; j += blockDim.x) {
    const double value = d[row] * d[j] * g[j];
    work[packed(row, j)] = value;
    if (j == row) to.diagonal[2 * module * size + row] = value;
  }
  if (row == 0 && threadIdx.x == 0) to.progress[module] = {};
}

__global__ void __launch_bounds__(kPanelThreads)
    factor_next_panel(GlobalWork from, int width, double tolerance, Cholesky out) {
  const int size = static_cast<int>(out.size);
  const int64_t module = blockIdx.x;
  double* panel = shared_memory<double>();
  double* diagonal = panel + static_cast<int64_t>(width) * size;
  double* scratch = diagonal + 2 * size;
  double* kept = from.diagonal + 2 * module * size;
  Progress progress = from.progress[module];
  if (progress.done) return;  // all threads alike
  const int first = progress.rank;
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    diagonal[first % 2 * size + i] = kept[first % 2 * size + i];
  __syncthreads();
  const int count = factor_panel(from.packed + module * packed(size, 0), panel, width, diagonal,
                                 out.pivots + module * size, size, tolerance, progress);
  write_panel(panel, first, count, size, out.factor + module * size * size);
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    kept[progress.rank % 2 * size + i] = diagonal[progress.rank % 2 * size + i];
  write_outcome(diagonal, size, progress, module, out, scratch);
  if (threadIdx.x == 0) from.progress[module] = progress;
}

// packed -= L L^T for the columns [first, first + width) of the factor, a tile of 64 x 64 a block.
constexpr int kTile = 64;
constexpr int kTileStride = kTile + 1;

__global__ void __launch_bounds__(kThreads)
    subtract_columns(GlobalWork work, int first, int width, int64_t size, int64_t side,
                     const double* __restrict__ factor) {
  const int64_t module = blockIdx.x / (side * side), tile = blockIdx.x % (side * side);
  const int64_t top = tile / side * kTile, left = tile % side * kTile;
  if (left > top || work.progress[module].done) return;  // all threads alike
  double* rows = shared_memory<double>();
  double* columns = rows + kWidestPanel * kTileStride;
  factor += module * size * size;
  for (int e = threadIdx.x; e < kTile * width; e += kThreads) {
    const int i = e / width, b = e % width;
    rows[b * kTileStride + i] = top + i < size ? factor[(top + i) * size + first + b] : 0.0;
    columns[b * kTileStride + i] = left + i < size ? factor[(left + i) * size + first + b] : 0.0;
  }
  __syncthreads();

  constexpr int kStep = 16;  // a thread's rows and columns are so far apart
  const int y = threadIdx.x / kStep, x = threadIdx.x % kStep;
  double sums[kTile / kStep][kTile / kStep] = {};
  for (int b = 0; b < width; ++b) {
    double row[kTile / kStep], column[kTile / kStep];
#pragma unroll
    for (int t = 0; t < kTile / kStep; ++t) {
      row[t] = rows[b * kTileStride + y + t * kStep];
      column[t] = columns[b * kTileStride + x + t * kStep];
    }
#pragma unroll
    for (int r = 0; r < kTile / kStep; ++r)
#pragma unroll
      for (int c = 0; c < kTile / kStep; ++c) sums[r][c] += row[r] * column[c];
  }
  double* to = work.packed + module * packed(size, 0);
#pragma unroll
  for (int r = 0; r < kTile / kStep; ++r)
#pragma unroll
    for (int c = 0; c < kTile / kStep; ++c) {
      const int64_t i = top + y + r * kStep, j = left + x + c * kStep;
      if (i < size && j <= i) to[packed(i, j)] -= sums[r][c];
    }
}

void factor_in_global(const double* g, const double* d, double tolerance, const Cholesky& out,
                      Workspace& workspace, Stream stream) {
  const int64_t modules = out.modules, size = out.size;
  const GlobalWork work{workspace.take<double>(modules * packed(size, 0)),
                        workspace.take<double>(modules * 2 * size),
                        workspace.take<Progress>(modules)};
  const auto panel_bytes = [&](int64_t width) {
    return ((width + 2) * size + kWarp) * static_cast<int64_t>(sizeof(double));
  };
  int width = kWidestPanel;
  while (width > 1 && panel_bytes(width) > limits().shared_bytes) width /= 2;

  zero(out.factor, modules * size * size * static_cast<int64_t>(sizeof(double)), stream);
  launch(pack, modules * size, kThreads, 0, stream, g, d, size, modules, work);
  const int64_t side = tiles(size, kTile);
  for (int64_t first = 0; first < size; first += width) {
    launch(factor_next_panel, modules, kPanelThreads, panel_bytes(width), stream, work, width,
           tolerance, out);
    if (first + width < size)
      launch(subtract_columns, modules * side * side, kThreads,
             2 * kWidestPanel * kTileStride * static_cast<int64_t>(sizeof(double)), stream, work,
             static_cast<int>(first), width, size, side, out.factor);
  }
}

}  // namespace

Cholesky pivoted_cholesky(const double* g, const double* d, int64_t modules, int64_t size,
                          double tolerance, Workspace& workspace, Stream stream) {
  const Cholesky out{modules,
                     size,
                     workspace.take<double>(modules * size * size),
                     workspace.take<int32_t>(modules * size),
                     workspace.take<int32_t>(modules),
                     workspace.take<double>(modules),
                     workspace.take<double>(modules)};
  const int64_t bytes = shared_work_bytes(size);
  if (bytes <= limits().shared_bytes)
    launch(factor_in_shared, modules, size <= kWarp ? kWarp : kThreads, bytes, stream, g, d,
           tolerance, out);
  else
    factor_in_global(g, d, tolerance, out, workspace, stream);
  return out;
}

namespace {

constexpr int kBlock = 32;     // unknowns solved for between two updates of the others
constexpr int kChunk = 16;     // right-hand sides of a block
constexpr int kPerThread = 8;  // of these

// Back substitution by blocks of 32 unknowns, in the rows of x that the pivots name: shared memory
// holds the diagonal block and its unknowns only, so any size will do.
__global__ void __launch_bounds__(kThreads)
    solve(Cholesky cholesky, const double* __restrict__ d, const double* __restrict__ w,
          int64_t cols, double* x) {
  double* triangle = shared_memory<double>();           // [k][i]: L_ki of the diagonal block
  double* unknowns = triangle + kBlock * (kBlock + 1);  // [k][column]
  const int64_t chunks = (cols + kChunk - 1) / kChunk;
  const int64_t module = blockIdx.x / chunks, left = blockIdx.x % chunks * kChunk;
  const int64_t size = cholesky.size;
  const int count = cols - left < kChunk ? static_cast<int>(cols - left) : kChunk;
  const int rank = cholesky.rank[module];
  const double* factor = cholesky.factor + module * size * size;
  const int32_t* pivots = cholesky.pivots + module * size;
  d += module * size;
  w += module * size * cols + left;
  x += module * size * cols + left;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;

  for (int64_t e = threadIdx.x; e < size * kChunk; e += kThreads)
    if (e % kChunk < count) x[e / kChunk * cols + e % kChunk] = 0;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < static_cast<int64_t>(rank) * kChunk; e += kThreads)
    if (e % kChunk < count)
      x[pivots[e / kChunk] * cols + e % kChunk] = w[e / kChunk * cols + e % kChunk];
  __syncthreads();

  for (int start = (rank - 1) / kBlock * kBlock; start >= 0 && rank > 0; start -= kBlock) {
    const int block = rank - start < kBlock ? rank - start : kBlock;
    for (int e = threadIdx.x; e < kBlock * kBlock; e += kThreads) {
      const int k = e / kBlock, i = e % kBlock;
      if (k < block && i < block)
        triangle[k * (kBlock + 1) + i] = factor[pivots[start + k] * size + start + i];
    }
    for (int e = threadIdx.x; e < kBlock * kChunk; e += kThreads) {
      const int k = e / kChunk, c = e % kChunk;
      unknowns[e] = k < block && c < count ? x[pivots[start + k] * cols + c] : 0.0;
    }
    __syncthreads();

    for (int c = warp; c < count; c += kThreads / kWarp) {  // a lane an unknown
      double value = lane < block ? unknowns[lane * kChunk + c] : 0.0;
      const double inverse = lane < block ? 1.0 / triangle[lane * (kBlock + 1) + lane] : 0.0;
      for (int k = block - 1; k >= 0; --k) {
        const double found = __shfl_sync(kAllLanes, value * inverse, k);
        if (lane == k) value = found;
        if (lane < k) value -= triangle[k * (kBlock + 1) + lane] * found;
      }
      if (lane < block) {
        const int64_t row = pivots[start + lane];
        unknowns[lane * kChunk + c] = value;
        x[row * cols + c] = d[row] * value;
      }
    }
    __syncthreads();

    constexpr int kParts = kChunk / kPerThread;
    for (int e = threadIdx.x; e < start * kParts; e += kThreads) {
      const int i = e % start, c0 = e / start * kPerThread;
      double* row = x + pivots[i] * cols + c0;
      double values[kPerThread];
#pragma unroll
      for (int c = 0; c < kPerThread; ++c) values[c] = c0 + c < count ? row[c] : 0.0;
      for (int k = 0; k < block; ++k) {
        const double entry = factor[pivots[start + k] * size + i];
#pragma unroll
        for (int c = 0; c < kPerThread; ++c) values[c] -= entry * unknowns[k * kChunk + c0 + c];
      }
#pragma unroll
      for (int c = 0; c < kPerThread; ++c)
        if (c0 + c < count) row[c] = values[c];
    }
    __syncthreads();
  }
}

}  // namespace

void coordinates(const Cholesky& cholesky, const double* d, const double* w, int64_t cols,
                 double* x, Stream stream) {
  const int64_t bytes = kBlock * (kBlock + 1 + kChunk) * static_cast<int64_t>(sizeof(double));
  launch(solve, cholesky.modules * tiles(cols, kChunk), kThreads, bytes, stream, cholesky, d, w,
         cols, x);
}

}  // namespace fastagg::cuda
