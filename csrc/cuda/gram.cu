// Gram matrices, and what only needs their entries. With H = (A A^T) o (B^T B) weighted by c_a c_b, the
// squared norm of dW is the sum of H, and <dW_p, dW_q> its sum over the rows of p and the columns of
// q. H is symmetric: U, its upper triangle with half of its diagonal, says all.
#include "kernels.h"
#include "product_tile.h"
#include "reduce.h"

namespace fastagg::cuda {
namespace {

using product::kThreads;
using product::kTile;
using product::Lines;
using product::Sums;

constexpr int64_t kTileValues = kTile * kTile;
constexpr int64_t kQuarters = 4;
constexpr int64_t kStages = product::kDoubles<true, true>;
constexpr int64_t kSharedBytes = (kStages + kTileValues) * int64_t{sizeof(double)};

struct Stack {
  Operand a, bt;
  const double* coefficients;
  int64_t rows, n, m;
};

Stack stack_of(const Slab& a, const Slab& bt, const double* coefficients) {
  return {operand_of(a), operand_of(bt), coefficients, a.rows, a.cols, bt.cols};
}

// sums = a tile of U. `shared` holds the stages of a product and a tile.
__device__ __forceinline__ void upper_updates(const Stack& stack, int64_t module,
                                              const product::UpperTile& at, double* shared,
                                              Sums& sums) {
  const Lines a = product::lines_of<true>(stack.a, module, stack.rows, stack.n);
  const Lines bt = product::lines_of<true>(stack.bt, module, stack.rows, stack.m);
  const bool wanted = at.wanted(stack.rows);
  // Both tiles do not fit a thread's registers: the first waits in shared memory.
  double* const waiting = shared + kStages + threadIdx.x;
  product::tile<true, true>(a, a, at.i, at.j, wanted, shared, sums);
  int place = 0;
  sums.for_each([&](int, int, double value) { waiting[kThreads * place++] = value; });
  product::tile<true, true>(bt, bt, at.i, at.j, wanted, shared, sums);
  place = 0;
  sums.for_each([&](int row, int col, double& value) {
    const double other = waiting[kThreads * place++];
    const int64_t i = at.i + row, j = at.j + col;
    if (i > j || j >= stack.rows) {
      value = 0;
      return;
    }
    const double* c = stack.coefficients + module * stack.rows;
    if (stack.coefficients)
      value = (c[i] * other) * (c[j] * value);
    else
      value *= other;
    if (i == j) value *= 0.5;
  });
}

__global__ void __launch_bounds__(kThreads, 2)
    sum_quarters(Stack stack, int64_t side, int64_t count, double* partial) {
  Sums sums;
  upper_updates(stack, blockIdx.x / count, product::upper_tile(blockIdx.x % count, side),
                shared_memory<double>(), sums);
  double sum = 0;
  sums.for_each([&](int, int, double value) { sum += value; });
  sum = warp_sum(sum);
  const product::Quarter mine = product::quarter();
  const int place = (2 * mine.row + mine.col) / product::kWarpTile;
  if (threadIdx.x % kWarp == 0) partial[int64_t{blockIdx.x} * kQuarters + place] = sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_partials(const double* partial, int64_t count, double* out) {
  const double* mine = partial + blockIdx.x * count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += mine[i];
  sum = block_sum(sum, shared_memory<double>());
  // Of updates that cancel, rounding may leave less than nothing; a NaN stays.
  if (threadIdx.x == 0) out[blockIdx.x] = sum < 0 ? 0 : 2 * sum;
}

// Strips of kTile rows of U, first .. last - 1, of consecutive modules, and their sums over each
// client's columns.
struct Strips {
  int64_t first_module, modules, side, first, last;
  double* tiles;      // (modules, tiles, column of the tile, row of the tile)
  double* by_client;  // (modules, strips, clients, row of the strip)

  FASTAGG_MEMBER int64_t count() const { return last - first; }
  FASTAGG_MEMBER int64_t tiles_before(int64_t strip) const {
    return product::upper_tiles(side, first, strip);
  }
};

__global__ void __launch_bounds__(kThreads, 2) store_tiles(Stack stack, Strips strips) {
  const int64_t count = strips.tiles_before(strips.last);
  Sums sums;
  upper_updates(stack, strips.first_module + blockIdx.x / count,
                product::upper_tile(blockIdx.x % count, strips.side, strips.first),
                shared_memory<double>(), sums);
  double* const tile = strips.tiles + blockIdx.x * kTileValues;
  sums.for_each([&](int row, int col, double value) { tile[col * kTile + row] = value; });
}

struct Owners {
  const int64_t* of_row;  // (modules, rows)
  int64_t rows, clients;
};

// Sums over owners without atomics: owners are dealt to kGroups warps, and each warp goes through all
// lines in order for those of its own: add(owner, value(line)).
constexpr int kGroups = 16;

template <class Value, class Add>
__device__ __forceinline__ void add_by_owner(const int64_t* owners, int64_t count, int64_t clients,
                                             int group, const Value& value, const Add& add) {
  constexpr int kAtOnce = 4;  // loads under way, before the sums that wait for them
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = 0; first < count; first += kWarp) {
    const int64_t owner = first + lane < count ? owners[first + lane] : -1;
    const bool mine = owner >= 0 && owner < clients && owner % kGroups == group;
    unsigned left = __ballot_sync(kAllLanes, mine);
    while (left != 0) {
      int line[kAtOnce];
      double values[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        line[u] = __popc(~left & (left - 1));  // the lowest that is set; 32 if none is
        left &= left - 1;
        values[u] = line[u] < kWarp ? value(first + line[u]) : 0;
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t to = __shfl_sync(kAllLanes, owner, line[u] % kWarp);
        if (line[u] < kWarp) add(to, values[u]);
      }
    }
  }
}

// A lane is a row: by_client[client][row] += U[row][column] over the client's columns.
__global__ void __launch_bounds__(kThreads) add_columns(Strips strips, Owners owners) {
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  const int group = static_cast<int>(warp % kGroups);
  const int row = static_cast<int>(warp / kGroups % (kTile / kWarp) * kWarp + threadIdx.x % kWarp);
  const int64_t index = warp / kGroups / (kTile / kWarp);  // of a module and a strip
  const int64_t module = index / strips.count(), strip = strips.first + index % strips.count();
  const int64_t before = module * strips.tiles_before(strips.last) + strips.tiles_before(strip);
  const double* const from = strips.tiles + before * kTileValues + row;
  double* const to = strips.by_client + index * owners.clients * kTile + row;
  const int64_t first = strip * kTile;
  add_by_owner(
      owners.of_row + (strips.first_module + module) * owners.rows + first, owners.rows - first,
      owners.clients, group, [&](int64_t col) { return from[col * kTile]; },
      [&](int64_t owner, double value) { to[owner * kTile] += value; });
}

// A lane is a client q: out[p][q] += by_client[q][row] over the rows of p.
__global__ void __launch_bounds__(kThreads) add_rows(Strips strips, Owners owners, double* out) {
  const int64_t clients = owners.clients, blocks = tiles(clients, kWarp);
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  const int group = static_cast<int>(warp % kGroups);
  const int64_t q = warp / kGroups % blocks * kWarp + threadIdx.x % kWarp;
  const int64_t module = warp / kGroups / blocks;
  const double* const from = strips.by_client + module * strips.count() * clients * kTile;
  double* const to = out + (strips.first_module + module) * clients * clients;
  const int64_t first = strips.first * kTile, last = strips.last * kTile;
  add_by_owner(
      owners.of_row + (strips.first_module + module) * owners.rows + first,
      (last < owners.rows ? last : owners.rows) - first, clients, group,
      [&](int64_t row) {
        return q < clients ? from[(row / kTile * clients + q) * kTile + row % kTile] : 0;
      },
      [&](int64_t p, double value) {
        if (q < clients) to[p * clients + q] += value;
      });
}

// out = out + out^T.
__global__ void __launch_bounds__(kThreads)
    add_transpose(double* out, int64_t modules, int64_t clients) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t p = index / clients % clients, q = index % clients;
  double* const matrix = out + index / clients / clients * clients * clients;
  if (index >= modules * clients * clients || p > q) return;
  const double sum = matrix[p * clients + q] + matrix[q * clients + p];
  matrix[p * clients + q] = sum;
  matrix[q * clients + p] = sum;
}

}  // namespace

void gram(const Slab& slab, int64_t modules, double* out, Stream stream) {
  inner_products(operand_of(slab), out, modules, slab.rows, slab.cols, stream);
}

void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                 int64_t modules, int64_t clients, double* out, Workspace& workspace,
                 Stream stream) {
  const int64_t rows = a.rows, side = tiles(rows, kTile);
  if (modules == 0 || clients == 0) return;
  zero(out, modules * clients * clients * int64_t{sizeof(double)}, stream);
  if (rows == 0) return;
  const auto values = [&](int64_t first, int64_t last) {
    return product::upper_tiles(side, first, last) * kTileValues + (last - first) * kTile * clients;
  };
  // As many tiles at a time as keep the device busy, sixteen times over. How they are cut does not
  // change a sum: strips are whole, and follow each other.
  const int64_t limit = 32 * limits().multiprocessors * kTileValues;
  const int64_t most = limit > values(0, 1) ? limit : values(0, 1);
  const int64_t all = modules * values(0, side);
  double* const memory = workspace.take<double>(most < all ? most : all);
  const int64_t fitting = most / values(0, side);
  const int64_t at_once = fitting < 1 ? 1 : fitting < modules ? fitting : modules;
  const Owners of{owners, rows, clients};
  for (int64_t module = 0; module < modules; module += at_once)
    for (int64_t first = 0, last; first < side; first = last) {
      const int64_t count = modules - module < at_once ? modules - module : at_once;
      last = first + 1;
      while (last < side && count * values(first, last + 1) <= most) ++last;
      const int64_t blocks = count * product::upper_tiles(side, first, last);
      double* const by_client = memory + blocks * kTileValues;
      const Strips strips{module, count, side, first, last, memory, by_client};
      const int64_t strip_count = count * strips.count();
      zero(by_client, strip_count * clients * kTile * int64_t{sizeof(double)}, stream);
      launch(store_tiles, blocks, kThreads, kSharedBytes, stream, stack_of(a, bt, coefficients),
             strips);
      constexpr int kWarps = kThreads / kWarp;
      launch(add_columns, strip_count * (kTile / kWarp) * kGroups / kWarps, kThreads, 0, stream,
             strips, of);
      launch(add_rows, count * tiles(clients, kWarp) * kGroups / kWarps, kThreads, 0, stream,
             strips, of, out);
    }
  launch(add_transpose, tiles(modules * clients * clients, kThreads), kThreads, 0, stream, out,
         modules, clients);
}

void squared_norm(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                  double* out, Workspace& workspace, Stream stream) {
  const int64_t side = tiles(a.rows, kTile), count = product::upper_tiles(side, 0, side);
  double* const partial = workspace.take<double>(modules * count * kQuarters);
  launch(sum_quarters, modules * count, kThreads, kSharedBytes, stream,
         stack_of(a, bt, coefficients), side, count, partial);
  launch(sum_partials, modules, kThreads, int64_t{kThreads / kWarp * sizeof(double)}, stream,
         static_cast<const double*>(partial), count * kQuarters, out);
}

}  // namespace fastagg::cuda
