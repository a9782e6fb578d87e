// Fused heterogeneous-rank stacking: every client's factors, of any rank and dtype, into the two
// slabs of a bucket in one pass that also scales, casts, transposes B, finds what is not finite and
// sums the squares of each row. Small kernels before it find out whose each row is; one after it
// adds up the sums of the pieces that the rows are cut into, in the order of the pieces.
#include "flats.h"
#include "kernels.h"
#include "stack_rows.h"
#include "stack_tile.h"
#include "values.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kWarps = kThreads / kWarp;

struct Flat {
  const char* data;
  int64_t bytes;
};

__global__ __launch_bounds__(kThreads) void keep(Window<const char> window, Flat* flats) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < window.count) flats[window.first + i] = {window.data[i], window.bytes[i]};
}

struct Table {
  const StackSlot* slots;
  int64_t count;
  const double* scale;
  const Flat* flats;
  int64_t flat_count;
};

__device__ __forceinline__ Flat flat_of(const Table& table, int64_t flat) {
  return flat >= 0 && flat < table.flat_count ? table.flats[flat] : Flat{nullptr, kNoBuffer};
}

// One warp a slot. Of slots that want the same row the last in the table gets it.
__global__ __launch_bounds__(kThreads) void claim(Table table, StackOut out, int32_t* owner) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (index >= table.count) return;
  const StackSlot slot = table.slots[index];
  const bool possible =
      is_possible(slot, out.modules, out.rows, out.m, out.n, flat_of(table, slot.a_flat).bytes,
                  flat_of(table, slot.b_flat).bytes);
  if (lane < 2) out.nonfinite[2 * index + lane] = possible ? 0 : -1;
  if (!possible) return;
  int32_t* rows = owner + slot.module * out.rows + slot.row;
  for (int64_t row = lane; row < slot.rank; row += kWarp)
    atomicMax(rows + row, static_cast<int32_t>(index + 1));
}

// A slot that got all of its rows is stacked; another loses the rest too.
__global__ __launch_bounds__(kThreads) void confirm(Table table, StackOut out, int32_t* owner,
                                                    Source* sources) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (index >= table.count || out.nonfinite[2 * index] < 0) return;
  const StackSlot slot = table.slots[index];
  const auto mine = static_cast<int32_t>(index + 1);
  const int64_t first = slot.module * out.rows + slot.row;
  bool lost = false;
  for (int64_t row = lane; row < slot.rank; row += kWarp) lost |= owner[first + row] != mine;
  if (__any_sync(kAllLanes, lost)) {
    for (int64_t row = lane; row < slot.rank; row += kWarp)
      if (owner[first + row] == mine) owner[first + row] = 0;
    if (lane < 2) out.nonfinite[2 * index + lane] = -1;
    return;
  }
  if (lane == 0)
    sources[index] = {flat_of(table, slot.a_flat).data + slot.a_offset,
                      flat_of(table, slot.b_flat).data + slot.b_offset,
                      slot.a_dtype,
                      slot.b_dtype,
                      first,
                      slot.rank,
                      table.scale ? static_cast<float>(table.scale[index]) : 1.0f};
}

// Block b < a_blocks: a piece of a row of A for each of its warps. The others: a tile of B.
template <DType kSlab>
__global__ __launch_bounds__(kThreads, 4) void fill(Stacking in, uint32_t a_blocks, uint32_t pieces,
                                                    uint32_t row_tiles, uint32_t tiles_of_b) {
  if (blockIdx.x < a_blocks) {
    const int64_t row = static_cast<int64_t>(blockIdx.x / pieces) * kWarps + threadIdx.x / kWarp;
    if (row < in.out.modules * in.out.rows) copy_a<kSlab>(in, row, blockIdx.x % pieces);
  } else {
    // Tiles that share B's rows follow one another: what one leaves of a cache line, the next takes.
    const uint32_t index = blockIdx.x - a_blocks, column = index / row_tiles;
    transpose_b<kSlab>(in, column / tiles_of_b, static_cast<int64_t>(index % row_tiles) * kRows,
                       column % tiles_of_b);
  }
}

__global__ __launch_bounds__(kThreads) void add_partials(const double* a_partials, int64_t pieces,
                                                         const double* b_partials,
                                                         int64_t tiles_of_b, int64_t rows,
                                                         double* sum_of_squares) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= 2 * rows) return;
  const bool is_b = index >= rows;
  const double* partials = is_b ? b_partials + (index - rows) : a_partials + index;
  double sum = 0;
  for (int64_t p = 0; p < (is_b ? tiles_of_b : pieces); ++p) sum += partials[p * rows];
  sum_of_squares[index] = sum;
}

}  // namespace

void stack(const void* const* flats, const int64_t* sizes, int64_t flat_count,
           const StackSlot* slots, int64_t count, const double* scale, const StackOut& out,
           Workspace& workspace, Stream stream) {
  const int64_t rows = out.modules * out.rows;
  auto* kept = workspace.take<Flat>(flat_count);
  for_each_window(flats, sizes, flat_count, Window<const char>{},
                  [&](const Window<const char>& window) {
                    launch(keep, 1, kThreads, 0, stream, window, kept);
                  });

  const Table table{slots, count, scale, kept, flat_count};
  auto* owner = workspace.take<int32_t>(rows);
  auto* sources = workspace.take<Source>(count);
  zero(owner, rows * static_cast<int64_t>(sizeof(int32_t)), stream);
  launch(claim, tiles(count, kWarps), kThreads, 0, stream, table, out, owner);
  launch(confirm, tiles(count, kWarps), kThreads, 0, stream, table, out, owner, sources);

  const int64_t pieces = tiles(out.n, kPiece), tiles_of_b = tiles(out.m, kLines);
  const int64_t row_tiles = tiles(out.rows, kRows);
  const int64_t a_blocks = tiles(rows, kWarps) * pieces;
  const int64_t b_blocks = out.modules * tiles_of_b * row_tiles;
  const int64_t row_bytes = out.n * element_size(out.dtype);
  const Stacking in{
      out,
      sources,
      owner,
      scale != nullptr,
      (reinterpret_cast<uintptr_t>(out.a) | static_cast<uintptr_t>(row_bytes)) % 16 == 0,
      workspace.take<double>(pieces * rows),
      workspace.take<double>(tiles_of_b * rows)};
  with_dtype(out.dtype, [&](auto slab) {
    if constexpr (slab() != DType::Float64)
      launch(fill<slab()>, a_blocks + b_blocks, kThreads, kTileBytes, stream, in,
             static_cast<uint32_t>(a_blocks), static_cast<uint32_t>(pieces),
             static_cast<uint32_t>(row_tiles), static_cast<uint32_t>(tiles_of_b));
  });
  launch(add_partials, tiles(2 * rows, kThreads), kThreads, 0, stream, in.a_partials, pieces,
         in.b_partials, tiles_of_b, rows, out.sum_of_squares);
}

}  // namespace fastagg::cuda
