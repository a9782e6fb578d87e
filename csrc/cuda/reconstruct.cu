// W (+)= sum_r c_r b_r a_r^T by tiles of W on the tensor cores, dW never in memory.
//
// A coefficient is a power of two, which the bf16 values of b take exactly, times sigma in [1, 2). The
// accumulator holds the sum over sigma, which is one for all rows of a client: when sigma changes, the
// accumulator is multiplied by the quotient, in fp32. Hence the rows are cut into chunks of one sigma,
// sixteen rows or what is left of a client. Where three clients meet within sixteen rows, three chunks
// would cost more than one in which sigma is one and c b, rounded to fp32, is split into three terms;
// so would two where b takes two or three terms anyway.
#include <algorithm>

#include "bf16_tile.h"
#include "kernels.h"

namespace fastagg::cuda {
namespace {

using namespace bf16;

constexpr int kTile = 128;
constexpr int kThreadsOfBlock = kThreads<kTile>;

// Two blocks of a multiprocessor, one computing while the other waits for W, leave no registers for a
// second sum: there W has eight or eleven bits of its own, and b and a eight.
template <bool rounds>
constexpr int kBlocks = rounds ? 1 : 2;

constexpr int kGroup = 16;  // rows of tiles whose panels stay in the L2 cache together
constexpr int kMostTerms = 3;
constexpr int64_t kReserved = 1 << 10;  // bytes of shared memory a block that are the system's
constexpr int kWaves = 8;               // blocks for every multiprocessor, so that the last are few

using Layout = RowsAreK<kTile>;

struct alignas(16) Chunk {  // read in one piece
  int32_t row, rows;
  float rescale;  // of the accumulator, before the chunk is added
  int32_t terms;  // of b's side
};

// The chunks of one module, after which comes one that only rescales, back to a sigma of one.
struct Plan {
  int32_t chunks, terms;
};

// Two chunks that follow each other have sixteen rows at least.
inline int64_t most_chunks(int64_t rows) { return 2 * tiles(rows, kStep) + 1; }

// c = sigma power, with a power of zero, infinity or NaN where c is that.
struct Split {
  double sigma, power;
};

__device__ __forceinline__ Split split(double c) {
  if (c == 0 || !isfinite(c)) return {1.0, c};
  int exponent;
  const double half = frexp(c, &exponent);
  return {2 * fabs(half), ldexp(half < 0 ? -0.5 : 0.5, exponent)};
}

// One warp a module. `factors` are those of b's rows.
__global__ __launch_bounds__(kWarp) void plan_chunks(const double* coefficients, int64_t rows,
                                                     int64_t most, int native, Chunk* chunks,
                                                     float* factors, Plan* plans) {
  const int64_t module = blockIdx.x;
  const int lane = threadIdx.x;
  const double* c = coefficients + module * rows;
  Chunk* out = chunks + module * (most + 1);
  Plan plan{0, 0};
  double before = 1.0;
  for (int64_t row = 0; row < rows;) {
    const int count = rows - row < kStep ? static_cast<int>(rows - row) : kStep;
    const double mine = lane < count ? c[row + lane] : 0.0;
    const Split parts = split(mine);
    const bool changes = parts.sigma != __shfl_up_sync(kAllLanes, parts.sigma, 1);
    const unsigned ends = __ballot_sync(kAllLanes, changes && lane > 0 && lane < count);
    const int first_end = ends ? __popc((ends & (~ends + 1)) - 1) : count;
    const bool mixed = __popc(ends) > (native == 1 ? 1 : 0);
    const int taken = mixed ? count : first_end;
    const double sigma = mixed ? 1.0 : __shfl_sync(kAllLanes, parts.sigma, 0);
    if (lane < taken)
      factors[module * rows + row + lane] = static_cast<float>(mixed ? mine : parts.power);
    const int terms = mixed ? kMostTerms : native;
    if (lane == 0)
      out[plan.chunks] = {static_cast<int32_t>(row), taken,
                          plan.chunks > 0 ? static_cast<float>(before / sigma) : 1.0f, terms};
    plan = {plan.chunks + 1, plan.terms + terms};
    before = sigma;
    row += taken;
  }
  if (lane == 0) {
    out[plan.chunks] = {0, 0, static_cast<float>(before), 0};
    plans[module] = plan;
  }
}

struct Reconstruction {
  Slab a, bt;
  char* base;
  DType dtype;
  bool replace;
  const Chunk* chunks;    // (modules, most + 1), or null without coefficients
  const float* factors;   // (modules, rows)
  const Plan* plans;      // (modules)
  int64_t most;           // chunks
  int64_t down, across;   // tiles of W
  int64_t span;           // tiles that a block makes, one beside the other
  int most_terms, slots;  // of b in a chunk; that shared memory holds
  bool prefetch;          // W's tile too
};

// Tiles that run at the same time lie in a near square of W, which has the fewest panels.
struct Place {
  int64_t module, row, col;
};

__device__ __forceinline__ Place place_of(const Reconstruction& work, int64_t block) {
  const int64_t spans = tiles(work.across, work.span), all = work.down * spans;
  const int64_t in_module = block % all, first = in_module / (kGroup * spans) * kGroup;
  const int64_t height = work.down - first < kGroup ? work.down - first : kGroup;
  const int64_t in_group = in_module - first * spans;
  return {block / all, first + in_group % height, in_group / height * work.span};
}

// One tile of W, which a thread reads ahead into 16-byte pieces of shared memory of its own.
class Target {
 public:
  __device__ Target(const Reconstruction& work, int64_t module, int64_t row, uint4* pieces)
      : base_(work.base + module * work.bt.cols * work.a.cols * element_size(work.dtype)),
        dtype_(work.dtype),
        replace_(work.replace),
        prefetch_(work.prefetch),
        rows_(work.bt.cols),
        cols_(work.a.cols),
        row_(row * kTile),
        pieces_(pieces + threadIdx.x) {}

  __device__ void read_ahead(int64_t col) {
    if (!prefetch_) return;
#pragma unroll 1
    for (int index = 0; index < kOctetsOfLane; ++index) {
      const Octets at = octets(index, col);
      if (!at.whole) continue;
      copy_async(piece(index, 0), at.data);
      if (dtype_ == DType::Float32) copy_async(piece(index, 1), at.data + 16);
    }
    copy_async_commit();
  }

  __device__ void add(const Accumulator& acc, int64_t col) {
    copy_async_wait<0>();
#pragma unroll
    for (int index = 0; index < kOctetsOfLane; ++index) {
      float values[kOctet];
      bf16::read_octet(acc, index, values);
      const Octets at = octets(index, col);
      if (at.valid == 0) continue;
      if (!replace_) {
        Octet octet;
        if (prefetch_ && at.whole) {
          copy_words(octet.word, piece(index, 0));
          if (dtype_ == DType::Float32) copy_words(octet.word + 4, piece(index, 1));
        } else {
          octet = bf16::read_octet(at.data, dtype_, at.valid);
        }
        float before[kOctet];
        widen(octet, dtype_, before);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) values[i] += before[i];
      }
      write_octet(values, at.data, dtype_, at.valid);
    }
  }

 private:
  struct Octets {
    char* data;
    int valid;
    bool whole;  // and aligned
  };

  __device__ Octets octets(int index, int64_t col) const {
    const Position in_tile = octet_position<kTile>(index);
    const int64_t i = row_ + in_tile.row, j = col * kTile + in_tile.col;
    const int valid = i < rows_ ? valid_values(j, cols_) : 0;
    char* data = base_ + (valid ? (i * cols_ + j) * element_size(dtype_) : 0);
    return {data, valid, valid == kOctet && aligned(data)};
  }
  __device__ uint4* piece(int index, int half) const {
    return pieces_ + (half * kOctetsOfLane + index) * kThreadsOfBlock;
  }

  char* base_;
  DType dtype_;
  bool replace_, prefetch_;
  int64_t rows_, cols_, row_;
  uint4* pieces_;
};

template <bool rounds>
__global__ __launch_bounds__(kThreadsOfBlock,
                             kBlocks<rounds>) void add_product(Reconstruction work) {
  const Place place = place_of(work, blockIdx.x);
  const int64_t last = place.col + work.span < work.across ? place.col + work.span : work.across;
  if (!rounds) work.a.dtype = work.bt.dtype = DType::BFloat16;  // known while compiling
  const int a_terms = terms_of(work.a.dtype), bt_terms = terms_of(work.bt.dtype);
  const Chunk* chunks = work.chunks ? work.chunks + place.module * (work.most + 1) : nullptr;
  const float* factors = chunks ? work.factors + place.module * work.bt.rows : nullptr;
  const auto steps = static_cast<int>(tiles(work.bt.rows, kStep));
  const Plan plan = chunks ? work.plans[place.module] : Plan{steps, steps * bt_terms};
  const auto chunk_of = [&](int step) {
    return chunks ? chunks[step] : Chunk{step * kStep, kStep, 1.0f, bt_terms};
  };
  // Where all of b's panel fits, it stays in shared memory for all of the block's tiles.
  const bool stays = plan.terms <= work.slots;

  uint4* const a_stages = shared_memory<uint4>();
  uint4* const bt_slots = a_stages + 2 * a_terms * Layout::kOctets;
  Target target(work, place.module, place.row, bt_slots + work.slots * Layout::kOctets);

  const Panel bt = panel_of(work.bt, place.module, place.row * kTile);
  Panel a = panel_of(work.a, place.module, place.col * kTile);
  Feed<Layout, kThreadsOfBlock> a_feed, bt_feed;
  int turn = 0, slot = 0;  // of the chunk that is multiplied
  Chunk chunk = chunk_of(0);
  const auto fetch = [&](int64_t col, const Chunk& from) {
    const int64_t end = from.row + from.rows;
    a.first = col * kTile;
    a_feed.fetch(a, nullptr, from.row, end < a.rows ? end : a.rows);
    if (!stays || col == place.col)
      bt_feed.fetch(bt, factors, from.row, end < bt.rows ? end : bt.rows);
  };
  const auto put = [&](int64_t col, int terms) {
    a_feed.put(a, false, a_terms, a_stages + turn * a_terms * Layout::kOctets);
    if (!stays || col == place.col)
      bt_feed.put(bt, factors != nullptr, terms, bt_slots + slot * Layout::kOctets);
  };

  Accumulator acc, sum;
  Accumulator& total = rounds ? sum : acc;
  clear(acc);
  clear(sum);
  target.read_ahead(place.col);
  if (plan.chunks > 0) {
    fetch(place.col, chunk);
    put(place.col, chunk.terms);
  }
  __syncthreads();
  for (int64_t col = place.col; col < last; ++col) {
    for (int step = 1; step <= plan.chunks; ++step) {
      const bool turns = step == plan.chunks;
      const int64_t next_col = turns ? col + 1 : col;
      const Chunk next = chunk_of(turns ? 0 : step);
      if (next_col < last) fetch(next_col, next);
      if (chunk.rescale != 1.0f) scale(total, chunk.rescale);
      multiply_step<kTile, Layout>(acc, bt_slots + slot * Layout::kOctets, chunk.terms,
                                   a_stages + turn * a_terms * Layout::kOctets, a_terms);
      if (rounds) hand_on(acc, sum);
      turn ^= 1;
      slot = !stays ? turn * work.most_terms : turns ? 0 : slot + chunk.terms;
      chunk = next;
      if (next_col < last) put(next_col, chunk.terms);
      __syncthreads();
    }
    if (chunks) scale(total, chunks[plan.chunks].rescale);
    target.add(total, col);
    clear(total);
    if (col + 1 < last) target.read_ahead(col + 1);
  }
}

// Shared memory is given, in this order, to two steps of both operands, W's tile, and b's panel.
template <bool rounds>
void launch_tiles(Reconstruction work, int64_t modules, Stream stream) {
  const Limits device = limits();
  const int64_t budget = (device.shared_bytes + kReserved) / kBlocks<rounds> - kReserved;
  const int64_t step = Layout::kBytes, pieces = kTile * kTile * element_size(work.dtype);
  const int native = terms_of(work.bt.dtype);
  work.most_terms = work.chunks ? kMostTerms : native;
  work.slots = 2 * work.most_terms;
  int64_t bytes = (2 * terms_of(work.a.dtype) + work.slots) * step;
  work.prefetch = !work.replace && bytes + pieces <= budget;
  if (work.prefetch) bytes += pieces;

  // A block makes several tiles of a row if b's panel can stay and there are blocks enough.
  const int64_t room = work.slots + (budget - bytes) / step;
  work.span = 1;
  const int64_t steps = tiles(work.a.rows, kStep);
  if (steps * native <= room) {
    const int64_t rows = modules * work.down, wanted = kWaves * device.multiprocessors;
    work.span = tiles(work.across, tiles(wanted, rows));
  }
  const int64_t slots = std::min(steps * work.most_terms, room);
  if (work.span > 1 && slots > work.slots) {
    bytes += (slots - work.slots) * step;
    work.slots = static_cast<int>(slots);
  }
  launch(add_product<rounds>, modules * work.down * tiles(work.across, work.span), kThreadsOfBlock,
         bytes, stream, work);
}

}  // namespace

void reconstruct(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                 void* base, DType dtype, bool replace, Workspace& workspace, Stream stream) {
  const int64_t m = bt.cols, n = a.cols, rows = a.rows;
  if (modules == 0 || m == 0 || n == 0 || (rows == 0 && !replace)) return;
  Reconstruction work{};
  work.a = a;
  work.bt = bt;
  work.base = static_cast<char*>(base);
  work.dtype = dtype;
  work.replace = replace;
  work.down = tiles(m, kTile);
  work.across = tiles(n, kTile);
  if (coefficients) {
    work.most = most_chunks(rows);
    auto* chunks = workspace.take<Chunk>(modules * (work.most + 1));
    auto* factors = workspace.take<float>(modules * rows);
    auto* plans = workspace.take<Plan>(modules);
    launch(plan_chunks, modules, kWarp, 0, stream, coefficients, rows, work.most,
           terms_of(bt.dtype), chunks, factors, plans);
    work.chunks = chunks;
    work.factors = factors;
    work.plans = plans;
  }

  const bool one_term = a.dtype == DType::BFloat16 && bt.dtype == DType::BFloat16;
  if (one_term && dtype != DType::Float32)
    launch_tiles<false>(work, modules, stream);
  else
    launch_tiles<true>(work, modules, stream);
}

}  // namespace fastagg::cuda
