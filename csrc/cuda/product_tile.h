// One tile of x y^T in fp64, by one block: operands of any dtype are converted on their way to shared
// memory, exactly, and multiplied on the tensor cores. A sum over k has one order, that of its index,
// whatever the grid.
#pragma once

#include "../ragged/dtype.h"
#include "products.h"
#include "tensor_core.h"

namespace fastagg::cuda::product {

constexpr int kTile = 64;      // lines of each operand
constexpr int kDepth = 16;     // of k, at a time: that of mma_f64_deep
constexpr int kThreads = 128;  // four warps of 32 x 32 each
constexpr int kWarpTile = 32;

// An operand of one module as lines of `depth` values: x's rows, y's columns. Neighbours in memory are
// a line's values, or (`along` false) the lines' values of one depth; `pitch` is the other stride.
struct Lines {
  const void* data;
  DType dtype;
  int64_t count, depth, pitch;
};

template <bool along>
__device__ __forceinline__ Lines lines_of(const Operand& x, int64_t module, int64_t count,
                                          int64_t depth) {
  const int64_t begin = module * x.module_stride * element_size(x.dtype);
  return {static_cast<const char*>(x.data) + begin, x.dtype, count, depth,
          along ? x.row_stride : x.col_stride};
}

// Where a panel of kTile lines and kDepth depths keeps a value in shared memory. Eight lanes move 128
// bytes a cycle if their 16-byte words lie in different banks, sixteen lanes if their 8-byte words do.
// Both layouts have that for Share::store(), whose lanes write 2, 4 or 8 neighbours each, and for
// multiply(), whose lane 4 g + t reads depth t of line g.
template <bool along>
struct Panel;

template <>
struct Panel<true> {
  static constexpr int kDoubles = kTile * kDepth;

  static __device__ __forceinline__ int at(int line, int depth) {
    const int swizzle = (5 * (line & 1)) ^ (line & 2);
    return line * kDepth + 2 * ((depth / 2) ^ swizzle) + depth % 2;
  }
};

template <>
struct Panel<false> {
  static constexpr int kPitch = kTile + 4;
  static constexpr int kDoubles = kPitch * kDepth;

  static __device__ __forceinline__ int at(int line, int depth) {
    return depth * kPitch + 2 * ((line / 2) ^ (line / 16 % 4)) + line % 2;
  }
};

// 16 bytes of elements that need not be aligned to 16: the first `count` exist, the others are zeros.
template <class Bits>
__device__ __forceinline__ uint4 gathered(const char* from, int count) {
  Bits values[16 / sizeof(Bits)];
#pragma unroll
  for (int e = 0; e < int{16 / sizeof(Bits)}; ++e)
    values[e] = e < count ? reinterpret_cast<const Bits*>(from)[e] : Bits{0};
  uint4 chunk;
  memcpy(&chunk, values, sizeof chunk);
  return chunk;
}

__device__ __forceinline__ uint4 gathered(const char* from, int count, int size) {
  if (size == 2) return gathered<uint16_t>(from, count);
  return size == 4 ? gathered<uint32_t>(from, count) : gathered<uint64_t>(from, count);
}

// Value `index` of a chunk.
template <DType dtype>
__device__ __forceinline__ double value_of(const uint4& chunk, int index) {
  if constexpr (dtype == DType::Float64) {
    double values[2];
    memcpy(values, &chunk, sizeof values);
    return values[index];
  } else {
    uint32_t words[4];
    memcpy(words, &chunk, sizeof words);
    if constexpr (dtype == DType::Float32) return float_from_bits(words[index]);
    const auto bits = static_cast<uint16_t>(words[index / 2] >> (16 * (index % 2)));
    return dtype == DType::BFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
  }
}

// A thread's share of a panel on the way from global to shared memory, in the operand's dtype: as many
// 16-byte chunks as half the bytes of an element, all at one place along what is contiguous ("near").
template <bool along>
class Share {
 public:
  __device__ __forceinline__ Share(const Lines& lines, int64_t first_line)
      : dtype_(lines.dtype),
        pitch_(lines.pitch * element_size(lines.dtype)),
        lines_(
            static_cast<int>(lines.count - first_line < kTile ? lines.count - first_line : kTile)) {
    const Place place(size());
    const int64_t near = (along ? 0 : first_line) + place.near;
    const int64_t far = (along ? first_line : 0) + place.far;
    from_ = static_cast<const char*>(lines.data) + far * pitch_ + near * size();
  }

  // The next panel, of which `depths` exist.
  __device__ __forceinline__ void load(int depths) {
    const Place place(size());
    const int nears = along ? depths : lines_, fars = along ? lines_ : depths;
    const int count = nears - place.near;
    const bool whole =
        count * size() >= 16 &&
        (reinterpret_cast<uintptr_t>(from_) | static_cast<uintptr_t>(pitch_)) % 16 == 0;
    const char* from = from_;
#pragma unroll
    for (int i = 0; i < kMostChunks; ++i) {
      if (i >= size() / 2) break;
      const bool exists = place.far + i * place.hop < fars;
      chunks_[i] = exists && whole ? __ldg(reinterpret_cast<const uint4*>(from))
                                   : gathered(from, exists ? count : 0, size());
      from += place.hop * pitch_;
    }
    from_ += kDepth * (along ? size() : pitch_);
  }

  __device__ __forceinline__ void store(double* panel) const {
    switch (dtype_) {
      case DType::Float32:
        return store_as<DType::Float32>(panel);
      case DType::BFloat16:
        return store_as<DType::BFloat16>(panel);
      case DType::Float16:
        return store_as<DType::Float16>(panel);
      case DType::Float64:
        return store_as<DType::Float64>(panel);
    }
  }

 private:
  static constexpr int kMostChunks = 4;

  // Of the first value of this thread's first chunk; the next chunk is `hop` farther. Sizes of elements
  // are powers of two, and shifts are cheap where divisions are not.
  struct Place {
    int near, far, hop;

    __device__ __forceinline__ explicit Place(int size) {
      const int thread = static_cast<int>(threadIdx.x);
      const int chunks = (along ? kDepth : kTile) / 16 * size;
      near = (thread & (chunks - 1)) * 16 >> log2(size);
      far = thread >> log2(chunks);
      hop = kThreads >> log2(chunks);
    }

    static __device__ __forceinline__ int log2(int power) {
      return __popc(static_cast<unsigned>(power - 1));
    }
  };

  template <DType dtype>
  __device__ __forceinline__ void store_as(double* panel) const {
    constexpr int kSize = dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
    const Place place(kSize);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i)
#pragma unroll
      for (int e = 0; e < 16 / kSize; e += 2) {
        const int near = place.near + e, far = place.far + i * place.hop;
        const int at = along ? Panel<along>::at(far, near) : Panel<along>::at(near, far);
        *reinterpret_cast<double2*>(panel + at) = {value_of<dtype>(chunks_[i], e),
                                                   value_of<dtype>(chunks_[i], e + 1)};
      }
  }

  __device__ __forceinline__ int size() const { return static_cast<int>(element_size(dtype_)); }

  DType dtype_;
  int64_t pitch_;  // bytes
  int lines_;
  const char* from_;
  uint4 chunks_[kMostChunks];
};

// Where a warp's quarter of the tile begins. Warp w of any block uses tensor core w % 4 of its
// multiprocessor, and quarters outside of the matrix, or below the diagonal of a symmetric one, cost
// nothing: the golden ratio deals the quarters evenly, whatever the number of multiprocessors.
struct Quarter {
  int row, col;
};

__device__ __forceinline__ Quarter quarter() {
  const unsigned which = (threadIdx.x / kWarp + (blockIdx.x * 0x9e3779b9u >> 30)) % 4;
  return {static_cast<int>(which / 2) * kWarpTile, static_cast<int>(which % 2) * kWarpTile};
}

// A thread's values of a tile: 32 of its warp's quarter.
struct Sums {
  double of[2][4][2][2];  // sixteen rows, eight columns, half of the rows, column

  __device__ __forceinline__ void clear() {
    for_each([](int, int, double& value) { value = 0; });
  }

  // visit(row, column, value) with row and column of the tile.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) {
    const int lane = threadIdx.x % kWarp;
    const int row = quarter().row + lane / 4, col = quarter().col + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            visit(row + 16 * i + 8 * half, col + 8 * j + c, of[i][j][half][c]);
  }
};

// sums += x y^T of two panels, for this warp's quarter.
template <bool x_along, bool y_along>
__device__ __forceinline__ void multiply(const double* x, const double* y, Sums& sums) {
  const int lane = threadIdx.x % kWarp, depth = lane % 4;
  const int x_line = quarter().row + lane / 4, y_line = quarter().col + lane / 4;
  double a[2][4][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[i][step][half] = x[Panel<x_along>::at(x_line + 16 * i + 8 * half, 4 * step + depth)];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    double b[4];
#pragma unroll
    for (int step = 0; step < 4; ++step)
      b[step] = y[Panel<y_along>::at(y_line + 8 * j, 4 * step + depth)];
#pragma unroll
    for (int i = 0; i < 2; ++i) mma_f64_deep(sums.of[i][j], a[i], b);
  }
}

template <bool x_along, bool y_along>
constexpr int kDoubles = 2 * (Panel<x_along>::kDoubles + Panel<y_along>::kDoubles);  // two stages

// sums = the tile at (first_x, first_y) of x y^T, zeros in a quarter that is not `wanted`. `shared` holds
// kDoubles<x_along, y_along>; all of the block calls.
template <bool x_along, bool y_along>
__device__ __forceinline__ void tile(const Lines& x, const Lines& y, int64_t first_x,
                                     int64_t first_y, bool wanted, double* shared, Sums& sums) {
  constexpr int kPanel = Panel<x_along>::kDoubles;
  constexpr int kStage = kPanel + Panel<y_along>::kDoubles;
  Share<x_along> share_x(x, first_x);
  Share<y_along> share_y(y, first_y);
  const auto load = [&](int64_t depth) {
    const int depths = static_cast<int>(x.depth - depth < kDepth ? x.depth - depth : kDepth);
    share_x.load(depths);
    share_y.load(depths);
  };
  sums.clear();
  __syncthreads();  // a slower warp may still read what an earlier tile left
  if (x.depth > 0) load(0);
  double* stage = shared;
  for (int64_t depth = 0; depth < x.depth; depth += kDepth) {
    share_x.store(stage);
    share_y.store(stage + kPanel);
    // One barrier a step is enough: who writes a stage again has passed the barrier between, at which
    // all had done with it.
    __syncthreads();
    if (depth + kDepth < x.depth) load(depth + kDepth);
    if (wanted) multiply<x_along, y_along>(stage, stage + kPanel, sums);
    stage = stage == shared ? shared + kStage : shared;
  }
}

// The tile at (i, j) of a symmetric matrix, on or above its diagonal.
struct UpperTile {
  int64_t i, j;

  // Whether this warp's quarter has an element of the upper triangle of `size` rows.
  __device__ __forceinline__ bool wanted(int64_t size) const {
    return i + quarter().row <= j + quarter().col && j + quarter().col < size;
  }
};

// Number `index` of a square of `side` tiles, row by row from row `first` of tiles.
__device__ __forceinline__ UpperTile upper_tile(int64_t index, int64_t side, int64_t first = 0) {
  int64_t i = first;
  while (index >= side - i) index -= side - i++;
  return {i * kTile, (i + index) * kTile};
}

// How many of them lie in rows first .. last - 1.
FASTAGG_HD int64_t upper_tiles(int64_t side, int64_t first, int64_t last) {
  return (last - first) * (2 * side - first - last + 1) / 2;
}

}  // namespace fastagg::cuda::product
