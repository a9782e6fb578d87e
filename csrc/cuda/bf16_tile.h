// One tile of a product of two matrices on the bf16 tensor cores, by one block: both operands pass
// through shared memory in steps of sixteen rows of k, split into terms on the way.
#pragma once

#include "tensor_core.h"
#include "terms.h"

namespace fastagg::cuda::bf16 {

constexpr int kStep = 16;     // of k, in one step
constexpr int kHeight = 128;  // of the tile; its width is 64 or 128

// A warp has 64 x 32 entries of the tile: 4 x 4 fragments.
constexpr int kWarpHeight = 64, kWarpWidth = 32;
using Accumulator = float[4][4][4];

template <int width>
constexpr int kThreads = kHeight / kWarpHeight * (width / kWarpWidth) * kWarp;

// What of its tile a warp has.
template <int width>
struct WarpTile {
  int lane, row, col;
  __device__ WarpTile() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = threadIdx.x % kWarp;
    row = warp / (width / kWarpWidth) * kWarpHeight;
    col = warp % (width / kWarpWidth) * kWarpWidth;
  }
};

struct Position {
  int64_t row, col;
};

// A matrix in global memory, of which a block wants the part of its tile that begins at `first`.
struct Panel {
  const void* data;
  DType dtype;
  int64_t rows, cols, first;
};

inline __device__ Panel panel_of(const Slab& slab, int64_t module, int64_t first) {
  return {slab.row(module, 0), slab.dtype, slab.rows, slab.cols, first};
}

// One step of an operand whose rows are k: `size` columns of the result. Sixteen rows of octets, which
// are permuted within a row so that eight octets of one column lie in different banks.
template <int size>
struct RowsAreK {
  static constexpr int kOctets = kStep * size / kOctet;
  static constexpr int kBytes = kOctets * 16;
  static constexpr int kUnits = size / kOctet;

  __device__ static Position position(int64_t first, int64_t k, int octet) {
    return {k + octet / kUnits, first + octet % kUnits * kOctet};
  }
  __device__ static Position end(const Panel& panel, int64_t k_end) { return {k_end, panel.cols}; }
  __device__ static int unit(int row, int col) { return row * kUnits + (col ^ (row & 7)); }
  __device__ static int unit(int octet) { return unit(octet / kUnits, octet % kUnits); }

  // Rows [row, row + 16) of the result's, of a left operand.
  __device__ static void load_left(uint32_t (&to)[4], const uint4* step, int row, int lane) {
    const int k = lane % 8 + lane / 16 * 8;
    load_matrices_transposed(to, step + unit(k, row / kOctet + lane / 8 % 2));
  }
  // Columns [col, col + 16), of a right operand: of the first eight in to[0], to[1].
  __device__ static void load_right(uint32_t (&to)[4], const uint4* step, int col, int lane) {
    const int k = lane % 8 + lane / 8 % 2 * 8;
    load_matrices_transposed(to, step + unit(k, col / kOctet + lane / 16));
  }
};

// The same of a left operand whose columns are k: two octets a row, exchanged in every other four rows.
struct ColumnsAreK {
  static constexpr int kOctets = kStep * kHeight / kOctet;
  static constexpr int kBytes = kOctets * 16;

  __device__ static Position position(int64_t first, int64_t k, int octet) {
    return {first + octet / 2, k + octet % 2 * kOctet};
  }
  __device__ static Position end(const Panel& panel, int64_t k_end) { return {panel.rows, k_end}; }
  __device__ static int unit(int row, int half) { return 2 * row + (half ^ (row >> 2 & 1)); }
  __device__ static int unit(int octet) { return unit(octet / 2, octet % 2); }

  __device__ static void load_left(uint32_t (&to)[4], const uint4* step, int row, int lane) {
    load_matrices(to, step + unit(row + lane % 16, lane / 16));
  }
};

// A panel's way to shared memory: fetch() asks for the values of k .. k + 15 that lie before k_end, for
// zeros beyond, and put() splits them into terms. `scale`, one value a row of the matrix, may be null.
// Between the two a step is multiplied: nothing in fetch() may use what it loads, or would wait for it.
template <class Layout, int threads, class Scale = float>
class Feed {
 public:
  static constexpr int kMine = Layout::kOctets / threads;

  __device__ void fetch(const Panel& panel, const Scale* scale, int64_t k, int64_t k_end) {
    const Position end = Layout::end(panel, k_end);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const auto [row, col] =
          Layout::position(panel.first, k, static_cast<int>(threadIdx.x) + i * threads);
      const int valid = row < end.row ? valid_values(col, end.col) : 0;
      const int64_t from = valid ? (row * panel.cols + col) * element_size(panel.dtype) : 0;
      octets_[i] = read_octet(static_cast<const char*>(panel.data) + from, panel.dtype, valid);
      scales_[i] = scale && valid ? scale[row] : Scale(1);
    }
  }

  // Has them brought into the L2 cache.
  __device__ void prefetch(const Panel& panel, int64_t k, int64_t k_end) const {
    const Position end = Layout::end(panel, k_end);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const auto [row, col] =
          Layout::position(panel.first, k, static_cast<int>(threadIdx.x) + i * threads);
      if (row < end.row && col < end.col)
        cuda::prefetch(static_cast<const char*>(panel.data) +
                       (row * panel.cols + col) * element_size(panel.dtype));
    }
  }

  __device__ void put(const Panel& panel, bool scaled, int terms, uint4* to) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      uint4* at = to + Layout::unit(static_cast<int>(threadIdx.x) + i * threads);
      const uint32_t* word = octets_[i].word;
      if (panel.dtype == DType::BFloat16 && !scaled && terms == 1) {
        *at = {word[0], word[1], word[2], word[3]};
        continue;
      }
      float values[kOctet];
      widen(octets_[i], panel.dtype, values);
#pragma unroll
      for (float& value : values) value *= static_cast<float>(scales_[i]);
#pragma unroll 1
      for (int term = 0; term < terms; ++term) at[term * Layout::kOctets] = take_term(values);
    }
  }

 private:
  Octet octets_[kMine];
  Scale scales_[kMine];
};

// acc += the step's product, small pairs of terms first: then an accumulator that began at zero loses
// no more by the cut-off additions of the tensor cores than if there were one pair.
template <int width, class Left>
__device__ __forceinline__ void multiply_step(Accumulator& acc, const uint4* left, int left_terms,
                                              const uint4* right, int right_terms) {
  using Right = RowsAreK<width>;
  const WarpTile<width> mine;
#pragma unroll 1
  for (int i = left_terms - 1; i >= 0; --i)
#pragma unroll 1
    for (int j = right_terms - 1; j >= 0; --j) {
      if (i + j >= kOrders) continue;
      uint32_t b[2][4];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        Right::load_right(b[pair], right + j * Right::kOctets, mine.col + 16 * pair, mine.lane);
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        uint32_t a[4];
        Left::load_left(a, left + i * Left::kOctets, mine.row + 16 * row, mine.lane);
#pragma unroll
        for (int col = 0; col < 4; ++col)
          mma_bf16(acc[row][col], a, {b[col / 2][col % 2 * 2], b[col / 2][col % 2 * 2 + 1]});
      }
    }
}

__device__ __forceinline__ void clear(Accumulator& acc) {
#pragma unroll
  for (auto& row : acc)
#pragma unroll
    for (auto& fragment : row)
#pragma unroll
      for (float& value : fragment) value = 0.0f;
}

// Tensor cores cut off what an fp32 sum cannot hold, always towards zero: over hundreds of steps it
// would shrink by as many half ulps. This sum rounds.
__device__ __forceinline__ void hand_on(Accumulator& acc, Accumulator& sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] += acc[i][j][e];
  clear(acc);
}

__device__ __forceinline__ void scale(Accumulator& acc, float by) {
#pragma unroll
  for (auto& row : acc)
#pragma unroll
    for (auto& fragment : row)
#pragma unroll
      for (float& value : fragment) value *= by;
}

// A lane's share of a tile, row by row of its warp's: octets of consecutive entries.
constexpr int kOctetsOfLane = 8;

template <int width>
__device__ __forceinline__ Position octet_position(int index) {
  const WarpTile<width> mine;
  return {mine.row + 8 * index + mine.lane / 4, mine.col + mine.lane % 4 * kOctet};
}

// The four lanes that share a row of four fragments transpose them: each gets a fragment's eight
// columns, in two exchanges of half of what it has.
__device__ __forceinline__ void read_octet(const Accumulator& acc, int index,
                                           float (&values)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = acc[index / 2][i / 2][index % 2 * 2 + i % 2];
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & static_cast<unsigned>(bit);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i / 2 & bit) continue;
      float &low = values[i], &high = values[i + 2 * bit];
      const float other = __shfl_xor_sync(kAllLanes, upper ? low : high, bit);
      low = upper ? other : low;
      high = upper ? high : other;
    }
  }
}

}  // namespace fastagg::cuda::bf16
