// The core SVD of one matrix by one thread block, in shared memory: Gram-Schmidt, then sweeps of Jacobi
// rotations until one finds nothing to do.
#include <cstdint>

#include "device.h"
#include "jacobi.h"
#include "orthogonalise.h"
#include "pivot.h"

namespace fastagg::cuda {
namespace {

// A row in the registers of eight lanes, which read 128 contiguous bytes of it at a time: all that
// shared memory gives in a cycle, wherever the rows of the warp's other lanes lie.
constexpr int kLanes = 8;
constexpr int kSegment = 2 * kLanes;  // doubles

template <int held>
struct Row {
  double2 part[held];

  __device__ __forceinline__ void load(const double* row) {
    const auto* parts = reinterpret_cast<const double2*>(row) + threadIdx.x % kLanes;
#pragma unroll
    for (int t = 0; t < held; ++t) part[t] = parts[t * kLanes];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < held; ++t) part[t] = {0, 0};
  }

  __device__ __forceinline__ void store(double* row) const {
    auto* parts = reinterpret_cast<double2*>(row) + threadIdx.x % kLanes;
#pragma unroll
    for (int t = 0; t < held; ++t) parts[t * kLanes] = part[t];
  }

  // This lane's share of the product.
  __device__ __forceinline__ double times(const Row& other) const {
    double sums[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < held; ++t) {
      sums[0] += part[t].x * other.part[t].x;
      sums[1] += part[t].y * other.part[t].y;
    }
    return sums[0] + sums[1];
  }

  __device__ __forceinline__ void subtract(double factor, const Row& other) {
#pragma unroll
    for (int t = 0; t < held; ++t) {
      part[t].x -= factor * other.part[t].x;
      part[t].y -= factor * other.part[t].y;
    }
  }
};

template <int held>
__device__ __forceinline__ void rotate(Row<held>& x, Row<held>& y, const Rotation& r) {
  if (r.s == 0) return;
#pragma unroll
  for (int t = 0; t < held; ++t) {
    const double2 a = x.part[t], b = y.part[t];
    x.part[t] = {r.c * a.x - r.s * b.x, r.c * a.y - r.s * b.y};
    y.part[t] = {r.s * a.x + r.c * b.x, r.s * a.y + r.c * b.y};
  }
}

__device__ __forceinline__ double group_sum(double value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// A matrix in shared memory, its rows padded with zeros to what a group of lanes holds.
template <int held>
struct SharedCore {
  static constexpr int kStride = held * kSegment;

  double norms2[2][kStride];
  double components[kStride];  // of all rows along the pivot
  int32_t order[kStride];      // the pivots
  int32_t far[kMostSweeps];    // whether a sweep found rows far from orthogonal
  int32_t rank[4];             // one number; here, since the rows take all registers

  static int64_t bytes(int64_t size) {
    return static_cast<int64_t>(sizeof(SharedCore)) +
           size * kStride * static_cast<int64_t>(sizeof(double));
  }

  __device__ __forceinline__ double* row(int i) {
    static_assert(sizeof(SharedCore) % alignof(double2) == 0);
    return reinterpret_cast<double*>(this + 1) + i * kStride;
  }
};

// The threads of a block: 16 held rows are 8 held blocks of two, which make 4 held meetings a round, a
// group of lanes each.
template <int held>
constexpr int kGroups = 4 * held;

__device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / kLanes; }
__device__ __forceinline__ bool leads() { return threadIdx.x % kLanes == 0; }

template <int held>
__device__ void load_core(SharedCore<held>& core, const double* __restrict__ c, double scale,
                          int size) {
  for (int e = threadIdx.x; e < size * SharedCore<held>::kStride; e += kLanes * kGroups<held>) {
    const int i = e / SharedCore<held>::kStride, j = e % SharedCore<held>::kStride;
    core.row(i)[j] = j < size ? scale * c[i * size + j] : 0.0;
  }
  for (int e = threadIdx.x; e < kMostSweeps; e += kLanes * kGroups<held>) core.far[e] = 0;
  __syncthreads();
  for (int first = 0; first < size; first += kGroups<held>) {
    const int j = first + group();
    Row<held> row;
    row.load(core.row(j < size ? j : 0));
    const double sum = group_sum(row.times(row));
    if (leads() && j < size) core.norms2[0][j] = sum;
  }
  __syncthreads();
}

// Pivoted Gram-Schmidt in place: row order[k] becomes the components of all rows along the k-th pivot.
// Sets the rank.
template <int held>
__device__ void take_out_pivots(SharedCore<held>& core, int size) {
  for (int k = 0; k < size; ++k) {
    const double* now = core.norms2[k % 2];
    double* next = core.norms2[(k + 1) % 2];
    const Pivot pivot = largest(now, size);
    if (threadIdx.x == 0) core.rank[0] = k;
    if (!(pivot.value > kNoise * kNoise)) return;
    const double inverse = 1 / sqrt(pivot.value);
    Row<held> along;
    along.load(core.row(pivot.row));
    for (int first = 0; first < size; first += kGroups<held>) {
      const int j = first + group();
      const bool left_out = j >= size || now[j] == kChosen || j == pivot.row;
      double* to = core.row(left_out ? pivot.row : j);
      Row<held> row;
      row.load(to);
      const double component = group_sum(row.times(along)) * inverse;
      row.subtract(component * inverse, along);
      const double rest = group_sum(row.times(row));
      if (!left_out) row.store(to);
      if (!leads() || j >= size) continue;
      core.components[j] = j == pivot.row ? sqrt(pivot.value) : left_out ? 0.0 : component;
      next[j] = left_out ? kChosen : rest;
    }
    __syncthreads();  // nobody reads the pivot's row any more
    for (int i = threadIdx.x; i < size; i += kLanes * kGroups<held>)
      core.row(pivot.row)[i] = core.components[i];
    if (threadIdx.x == 0) core.order[k] = pivot.row;
    __syncthreads();
  }
  if (threadIdx.x == 0) core.rank[0] = size;
}

// One sweep, the index-th, over the rows in order. Two by two they are blocks; the rows of one block are
// made orthogonal first, then every two blocks meet: two rows are kept in registers for four rotations,
// which halves what shared memory must carry. Norms follow the rotations by their formula until the next
// sweep, which is as good as new where no angle is large: the last sweeps.
template <int held>
__device__ void sweep(SharedCore<held>& core, int index) {
  const int rank = core.rank[0];
  // A row that is not there is zero: nothing turns it, and nothing of it is stored.
  const auto norm2 = [&](int k) { return k < rank ? core.norms2[0][k] : 0.0; };
  const auto take = [&](Row<held>& x, int k) {
    if (k < rank)
      x.load(core.row(core.order[k]));
    else
      x.clear();
  };
  const auto keep = [&](const Row<held>& x, double xx, int k) {
    x.store(core.row(core.order[k]));
    if (leads()) core.norms2[0][k] = xx;
  };
  bool far = false;
  const auto turn = [&](Row<held>& x, Row<held>& y, double& xx, double& yy) {
    const double xy = group_sum(x.times(y));
    const Rotation r = rotation(xx, yy, xy);
    xx -= r.t * xy;
    yy += r.t * xy;
    far |= r.far;
    rotate(x, y, r);
    return r.s != 0;
  };

  const int blocks = (rank + 1) / 2;
  for (int first = 0; first < blocks; first += kGroups<held>) {
    const int k = first + group() < blocks ? 2 * (first + group()) : rank;
    Row<held> x, y;
    take(x, k);
    take(y, k + 1);
    double xx = group_sum(x.times(x)), yy = group_sum(y.times(y));
    turn(x, y, xx, yy);
    if (k < rank) keep(x, xx, k);
    if (k + 1 < rank) keep(y, yy, k + 1);
  }
  __syncthreads();

  const int players = blocks + blocks % 2;
  for (int round = 0; round < players - 1; ++round) {
    const bool invited = group() < players / 2;
    const Meeting m = meeting(players, round, invited ? group() : 0);
    const bool meets = invited && m.second < blocks;
    const int top = meets ? 2 * m.first : rank, left = meets ? 2 * m.second : rank;
    Row<held> w, x;
    take(w, top);
    take(x, top + 1);
    double ww = norm2(top), xx = norm2(top + 1);
    bool turned = false;
#pragma unroll 1
    for (int k = left; k < left + 2; ++k) {
      Row<held> y;
      take(y, k);
      double yy = norm2(k);
      turned |= turn(w, y, ww, yy);
      turned |= turn(x, y, xx, yy);
      if (turned && k < rank) keep(y, yy, k);
    }
    if (turned) keep(w, ww, top);
    if (turned && top + 1 < rank) keep(x, xx, top + 1);
    __syncthreads();
  }
  if (far && leads()) atomicMax(&core.far[index], 1);
  __syncthreads();
}

template <int held>
__global__ void __launch_bounds__(kLanes* kGroups<held>, 1)
    orthogonalise_core(const double* __restrict__ c, const double* __restrict__ scales, int size,
                       const int32_t* skip, double* vectors) {
  if (skip && skip[blockIdx.x] != 0) return;
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * size * size;
  SharedCore<held>& core = *shared_memory<SharedCore<held>>();
  load_core<held>(core, c + offset, scales[blockIdx.x], size);
  take_out_pivots<held>(core, size);
  __syncthreads();  // the last look for a pivot is over
  for (int i = 0; i < kMostSweeps; ++i) {
    sweep<held>(core, i);
    if (!core.far[i]) break;
  }
  for (int e = threadIdx.x; e < size * size; e += kLanes * kGroups<held>)
    vectors[offset + e] = e / size < core.rank[0] ? core.row(core.order[e / size])[e % size] : 0.0;
}

// True if the shared memory holds a matrix of this size in rows of `held` segments: then it is done.
template <int held>
bool done_in_shared(const double* c, const double* scales, int64_t modules, int64_t size,
                    const int32_t* skip, double* vectors, Stream stream) {
  const int64_t bytes = SharedCore<held>::bytes(size);
  if (size > held * kSegment || bytes > limits().shared_bytes) return false;
  launch(orthogonalise_core<held>, modules, kLanes * kGroups<held>, bytes, stream, c, scales,
         static_cast<int>(size), skip, vectors);
  return true;
}

}  // namespace

bool orthogonalise_in_shared(const double* c, const double* scales, int64_t modules, int64_t size,
                             const int32_t* skip, double* vectors, Stream stream) {
  return done_in_shared<2>(c, scales, modules, size, skip, vectors, stream) ||
         done_in_shared<4>(c, scales, modules, size, skip, vectors, stream) ||
         done_in_shared<6>(c, scales, modules, size, skip, vectors, stream) ||
         done_in_shared<8>(c, scales, modules, size, skip, vectors, stream) ||
         done_in_shared<10>(c, scales, modules, size, skip, vectors, stream);
}

}  // namespace fastagg::cuda
