// The transposition of B into rows of Bt, through shared memory: a block has a tile of 128 of B's rows,
// so that Bt is written in runs of 256 bytes or more, and the columns that 64 rows of Bt need.
#pragma once

#include "reduce.h"
#include "stacking.h"

namespace fastagg::cuda {

constexpr int kTileThreads = 256;
constexpr int kLines = 128;
constexpr int kRows = 64;
constexpr int kVectorsPerRow = kLines * 2 / 16;  // of 16 bytes, of 16-bit elements
constexpr int kRowsPerPass = kTileThreads / kVectorsPerRow;
constexpr int kParts = kRows / kRowsPerPass;  // vectors of a thread under way

// What a row of Bt has in a tile: a column of a client's B, beside others of that client.
struct Column {
  const char* from;  // the first column's element in the tile's first row
  int64_t pitch;     // elements from one row of B to the next
  DType dtype;
  int32_t slot;   // -1: no client fills it
  int16_t first;  // row of the tile that the client's first column here becomes
  int16_t width;  // columns of the client here

  __device__ __forceinline__ int size() const { return static_cast<int>(element_size(dtype)); }
};

template <class T>
__device__ __forceinline__ T larger(T x, T y) {
  return x > y ? x : y;
}

template <class T>
__device__ __forceinline__ T smaller(T x, T y) {
  return x < y ? x : y;
}

__device__ __forceinline__ Column column_of(const Stacking& in, int64_t module, int64_t first_row,
                                            int j, int64_t first_line) {
  const StackOut& out = in.out;
  const int64_t row = first_row + j;
  const int32_t owner = row < out.rows ? in.owner[module * out.rows + row] : 0;
  if (owner == 0) return {nullptr, 0, DType::Float32, -1, static_cast<int16_t>(j), 0};
  const Source source = in.sources[owner - 1];
  const int64_t begin = source.first - module * out.rows - first_row;
  const int64_t first = larger<int64_t>(begin, 0);
  const int64_t end = smaller<int64_t>(begin + source.rank, kRows);
  const int64_t element = first_line * source.rank + (first - begin);
  return {source.b + element * element_size(source.b_dtype),
          source.rank,
          source.b_dtype,
          owner - 1,
          static_cast<int16_t>(first),
          static_cast<int16_t>(end - first)};
}

// Shared memory holds the tile as the clients have it, B's rows one after another. With a word left
// out after every 32, and one more after every 1024, neither a vector of every lane nor a column at
// a rank that is a power of two meets a bank twice; 31 and 62 are the ranks that this serves badly.
__device__ __forceinline__ int placed(int element) {
  return element + (element >> 5) + (element >> 10);
}

constexpr int kTileWords = kLines * kRows * 33 / 32 + kLines * kRows / 1024;
constexpr int64_t kTileBytes = kRows * static_cast<int64_t>(sizeof(Column)) +
                               kTileWords * static_cast<int64_t>(sizeof(uint32_t));

// How a client's part of the tile is cut into vectors of 16 bytes. All of B's columns together are
// one run of memory; some of them are a run in each row.
struct Runs {
  int count, length;
  int vectors;  // of a run

  __device__ __forceinline__ Runs(const Column& column, int lines) {
    const bool whole = column.pitch == column.width;
    const int vector = 16 / column.size();
    count = whole ? 1 : lines;
    length = whole ? lines * column.width : column.width;
    vectors = (length + vector - 1) / vector;
  }
};

struct Part {
  const char* from;
  int element;  // of the tile
  int count;    // elements; 0: there is no such vector
};

__device__ __forceinline__ Part part_of(const Column& column, const Runs& runs, int vector) {
  if (vector >= runs.count * runs.vectors) return {nullptr, 0, 0};
  const int size = column.size(), most = 16 / size;
  const int run = runs.count == 1 ? 0 : vector / runs.vectors;
  const int begin = (vector - run * runs.vectors) * most;
  return {column.from + (run * column.pitch + begin) * size,
          column.first * kLines + run * column.width + begin, smaller(most, runs.length - begin)};
}

template <int kSize>
__device__ __forceinline__ void place_words(const uint32_t (&word)[4], int element,
                                            uint32_t* tile) {
  constexpr int kCount = 16 / kSize;
  const bool together = element % kCount == 0;  // no word of the tile is left out inside
  uint32_t* to = tile + placed(element);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const uint32_t bits = kSize == 4 ? word[k] : word[k / 2] >> 16 * (k % 2) & 0xffffu;
    if (together)
      to[k] = bits;
    else
      tile[placed(element + k)] = bits;
  }
}

__device__ __forceinline__ void place_part(const Part& part, int size, const Packed<4, 4>& in,
                                           uint32_t* tile) {
  if (part.count * size < 16)  // the end of a run, or nothing
    for (int k = 0; k < part.count; ++k)
      tile[placed(part.element + k)] = load_bits(part.from + k * size, size);
  else if (size == 4)
    place_words<4>(in.word, part.element, tile);
  else
    place_words<2>(in.word, part.element, tile);
}

// In rounds of 16 vectors for each row of Bt: one for 16-bit columns that are one run, two for
// 32-bit ones, and a few where every run ends in part of a vector.
__device__ __forceinline__ void load_tile(const Column* columns, int lines, uint32_t* tile) {
  bool more = true;
  for (int round = 0; more; ++round) {
    more = false;
    Part part[kParts];
    Packed<4, 4> in[kParts];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int j = threadIdx.x / kVectorsPerRow + p * kRowsPerPass;
      const Column column = columns[j];
      const Runs runs(column, column.slot < 0 ? 0 : lines);
      const int vectors = column.width * kVectorsPerRow;  // of a round
      const int vector =
          (j - column.first) * kVectorsPerRow + threadIdx.x % kVectorsPerRow + round * vectors;
      part[p] = part_of(column, runs, vector);
      more |= vector + vectors < runs.count * runs.vectors;
      if (part[p].count * column.size() < 16) continue;
      if (is_aligned<16>(part[p].from))
        in[p].load<true>(part[p].from);
      else
        in[p].load<false>(part[p].from);
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int j = threadIdx.x / kVectorsPerRow + p * kRowsPerPass;
      place_part(part[p], columns[j].size(), in[p], tile);
    }
  }
}

// One warp: a row of Bt in this tile. Returns the lane's share of its sum of squares.
template <DType kSlab>
__device__ __forceinline__ double write_row(const Stacking& in, const Column& column, int j,
                                            int lines, const uint32_t* tile, char* to) {
  constexpr int kSize = kSizeOf<kSlab>, kPair = 4 / kSize;  // elements of a lane's 4 bytes
  const int lane = threadIdx.x % kWarp;
  const bool filled = column.slot >= 0;
  const Conversion conversion{column.dtype, column.dtype == kSlab, 1.0f};
  const int base = column.first * kLines + j - column.first;
  Moments moments;
#pragma unroll
  for (int i = lane * kPair; i < kLines; i += kWarp * kPair) {
    uint32_t word = 0;
#pragma unroll
    for (int p = 0; p < kPair; ++p) {
      if (!filled || i + p >= lines) continue;
      const uint32_t bits = tile[placed(base + (i + p) * column.width)];
      const float value[1] = {decoded(bits, column.dtype)};
      moments.add(value);
      word |= conversion(bits, value[0], kSlab) << 16 * p;
    }
    if (i + kPair <= lines)
      store32(to + i * kSize, word);
    else if (i < lines)
      store16(to + i * kSize, word);
  }
  if (__any_sync(kAllLanes, moments.nonfinite > 0)) {
    const int nonfinite = warp_sum(moments.nonfinite);
    if (lane == 0) count_nonfinite(in.out, column.slot, 1, nonfinite);
  }
  return moments.sum_of_squares;
}

// Eight sums over a warp for little more than the price of two: at each of the first steps a lane
// hands over one half of its values and keeps the other. Lane l ends with number l / 4.
__device__ __forceinline__ double warp_sums(double (&value)[8]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & 4 * half) != 0;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const double given = upper ? value[k] : value[k + half];
      const double kept = upper ? value[k + half] : value[k];
      value[k] = kept + __shfl_xor_sync(kAllLanes, given, 4 * half);
    }
  }
  value[0] += __shfl_xor_sync(kAllLanes, value[0], 2);
  return value[0] + __shfl_xor_sync(kAllLanes, value[0], 1);
}

// One block: rows [first_row, first_row + kRows) of a module's Bt, columns `tile_index` * kLines on.
template <DType kSlab>
__device__ __forceinline__ void transpose_b(const Stacking& in, int64_t module, int64_t first_row,
                                            int64_t tile_index) {
  constexpr int kRowsPerWarp = kRows * kWarp / kTileThreads;
  const StackOut& out = in.out;
  auto* columns = shared_memory<Column>();
  auto* tile = reinterpret_cast<uint32_t*>(columns + kRows);
  const int64_t first_line = tile_index * kLines;
  const int lines = static_cast<int>(smaller<int64_t>(out.m - first_line, kLines));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kRows) columns[thread] = column_of(in, module, first_row, thread, first_line);
  __syncthreads();
  load_tile(columns, lines, tile);
  __syncthreads();
  double sums[kRowsPerWarp];
#pragma unroll
  for (int k = 0; k < kRowsPerWarp; ++k) {
    const int j = thread / kWarp * kRowsPerWarp + k;
    const int64_t row = module * out.rows + first_row + j;
    sums[k] = first_row + j >= out.rows
                  ? 0.0
                  : write_row<kSlab>(
                        in, columns[j], j, lines, tile,
                        static_cast<char*>(out.bt) + (row * out.m + first_line) * kSizeOf<kSlab>);
  }
  const double sum = warp_sums(sums);
  const int64_t row = first_row + thread / 4;
  if (thread % 4 == 0 && row < out.rows)
    in.b_partials[(tile_index * out.modules + module) * out.rows + row] = sum;
}

}  // namespace fastagg::cuda
