// A slab times a skinny fp32 matrix. A sum of thousands of terms must not drift, unless the skinny
// operand is rounded to bf16, which is far worse: then registers are better spent on a second block.
#include "skinny.h"

#include "../ragged/philox.h"
#include "bf16_tile.h"

namespace fastagg::cuda {
namespace {

using namespace bf16;

// Steps between two sums that round: 64 additions a thread are half of what one pair of terms takes,
// and few beside what several take.
constexpr int kStepsOfOnePair = 4;

// Steps between asking the memory for values and loading them, of which registers hold one step's only:
// the H200 keeps 26 KB a multiprocessor under way (4.3 TB/s for 0.8 us), and a block's step has 4 to 16.
constexpr int kAhead = 4;

struct Product {
  Slab slab;
  const double* scale;  // of the slab's rows
  Slab skinny;          // (modules, k, l); without data where signs are made instead
  float* out;
  const double* after;
  int64_t down, across;  // tiles of a module's result
  int64_t rows, steps;   // of the result, and of k
  int terms;             // of the skinny operand
  const int32_t* skip;
  uint64_t seed;
  const int64_t* streams;
};

// The Rademacher matrix as a right operand. A row of a step's tile is a run of at most 128 signs, which
// two Philox blocks hold: the lanes of a warp make those of its rows for several steps at once, one
// block each, and hand each other the words.
template <int width, int threads>
class SignFeed {
  using Layout = RowsAreK<width>;
  static_assert(Layout::kOctets == threads, "an octet a thread");
  static constexpr int kRows = kWarp / Layout::kUnits;  // of a warp in one step
  static constexpr int kBatch = kWarp / (2 * kRows);    // steps

 public:
  __device__ void begin(const Product& work, int64_t module, int64_t first) {
    seed_ = work.seed;
    stream_ = static_cast<uint64_t>(work.streams ? work.streams[module] : module);
    l_ = work.skinny.cols;
    rows_ = work.skinny.rows;
    first_ = first;
  }

  __device__ void fetch(int64_t step) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const int row = thread / Layout::kUnits - lane / Layout::kUnits;  // the first of this warp
    if (step % kBatch == 0) {
      const int64_t k = (step + lane / (2 * kRows)) * kStep + row + lane / 2 % kRows;
      const int64_t block = (k * l_ + first_) / kSignsPerBlock + lane % 2;
      blocks_ = rademacher_block(seed_, stream_, static_cast<uint64_t>(block));
    }
    const auto [k, col] = Layout::position(first_, step * kStep, thread);
    const int64_t element = k * l_ + col;
    // Of the eight words of its row, the one of this octet's first sign and the next.
    const int word = static_cast<int>(element / 32 - (k * l_ + first_) / kSignsPerBlock * 4);
    const int source = static_cast<int>(step % kBatch) * 2 * kRows + lane / Layout::kUnits * 2;
    const uint64_t low = word_of(source, word), high = word_of(source, word < 7 ? word + 1 : 7);
    signs_ = static_cast<uint32_t>((high << 32 | low) >> (element % 32)) & 0xffu;
    valid_ = k < rows_ ? valid_values(col, l_) : 0;
  }

  __device__ void prefetch(int64_t) const {}

  __device__ void put(uint4* to) const {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = sign(2 * i) | sign(2 * i + 1) << 16;
    to[Layout::unit(static_cast<int>(threadIdx.x))] = {word[0], word[1], word[2], word[3]};
  }

 private:
  __device__ uint64_t word_of(int source, int word) const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t other = __shfl_sync(kAllLanes, blocks_.word[i], source + word / 4);
      if (word % 4 == i) found = other;
    }
    return found;
  }

  __device__ uint32_t sign(int i) const {
    return i >= valid_ ? 0u : (signs_ >> i & 1u) ? 0x3f80u : 0xbf80u;  // 1 and -1 in bf16
  }

  uint64_t seed_, stream_;
  int64_t l_, rows_, first_;
  Philox4 blocks_;
  uint32_t signs_;
  int valid_;
};

// The skinny matrix as it lies in memory.
template <int width, int threads>
class MatrixFeed {
 public:
  __device__ void begin(const Product& work, int64_t module, int64_t first) {
    panel_ = panel_of(work.skinny, module, first);
    terms_ = work.terms;
  }
  __device__ void fetch(int64_t step) { feed_.fetch(panel_, nullptr, step * kStep, panel_.rows); }
  __device__ void prefetch(int64_t step) const {
    feed_.prefetch(panel_, step * kStep, panel_.rows);
  }
  __device__ void put(uint4* to) const { feed_.put(panel_, false, terms_, to); }

 private:
  Panel panel_;
  int terms_;
  Feed<RowsAreK<width>, threads> feed_;
};

template <bool rounds, int width>
constexpr int kBlocks = (rounds ? 1 : 2) * 256 / kThreads<width>;

template <bool rounds, int width, class Left, class Right>
__global__ __launch_bounds__(kThreads<width>,
                             (kBlocks<rounds, width>)) void skinny_product(Product work) {
  if (!rounds) {  // known while compiling
    work.slab.dtype = DType::BFloat16;
    work.terms = 1;
  }
  const int64_t tile = blockIdx.x, l = work.skinny.cols;
  const int64_t module = tile / (work.down * work.across);
  if (work.skip && work.skip[module] != 0) return;  // the whole block
  const int64_t first_row = tile / work.across % work.down * kHeight;
  const int64_t first_col = tile % work.across * width;
  const Panel panel = panel_of(work.slab, module, first_row);
  const double* scale = work.scale ? work.scale + module * work.slab.rows : nullptr;
  const int slab_terms = terms_of(work.slab.dtype);
  Feed<Left, kThreads<width>, double> left;
  Right right;
  right.begin(work, module, first_col);

  uint4* const shared = shared_memory<uint4>();
  const int right_at = slab_terms * Left::kOctets;
  const int stage = right_at + work.terms * RowsAreK<width>::kOctets;
  const auto fetch = [&](int64_t step) {
    left.fetch(panel, scale, step * kStep, work.skinny.rows);
    right.fetch(step);
  };
  const auto prefetch = [&](int64_t step) {
    left.prefetch(panel, step * kStep, work.skinny.rows);
    right.prefetch(step);
  };
  const auto put = [&](int64_t step) {
    uint4* to = shared + step % 2 * stage;
    left.put(panel, scale != nullptr, slab_terms, to);
    right.put(to + right_at);
  };
  const int between = slab_terms * work.terms == 1 ? kStepsOfOnePair : 1;
  Accumulator acc, sum;
  Accumulator& total = rounds ? sum : acc;
  clear(acc);
  clear(sum);
  if (work.steps > 0) {
    fetch(0);
    for (int64_t step = 1; step <= kAhead; ++step) prefetch(step);
    put(0);
  }
  __syncthreads();
  for (int64_t step = 0; step < work.steps; ++step) {
    const bool more = step + 1 < work.steps;
    if (more) fetch(step + 1);
    prefetch(step + 1 + kAhead);
    const uint4* from = shared + step % 2 * stage;
    multiply_step<width, Left>(acc, from, slab_terms, from + right_at, work.terms);
    if (rounds && (step + 1) % between == 0) hand_on(acc, sum);
    if (more) put(step + 1);
    __syncthreads();
  }
  if (rounds) hand_on(acc, sum);

#pragma unroll
  for (int index = 0; index < kOctetsOfLane; ++index) {
    float values[kOctet];
    read_octet(total, index, values);
    const auto [row, col] = octet_position<width>(index);
    const int64_t i = first_row + row, j = first_col + col;
    const int valid = i < work.rows ? valid_values(j, l) : 0;
    if (valid == 0) continue;
    if (work.after) {
      const double after = work.after[module * work.rows + i];
#pragma unroll
      for (float& value : values) value = static_cast<float>(after * static_cast<double>(value));
    }
    write_octet(values, work.out + (module * work.rows + i) * l + j, DType::Float32, valid);
  }
}

template <bool rounds, int width, class Left, template <int, int> class Right>
void launch_tiles(Product work, int64_t modules, Stream stream) {
  constexpr int threads = kThreads<width>;
  work.down = tiles(work.rows, kHeight);
  work.across = tiles(work.skinny.cols, width);
  const int64_t stage =
      terms_of(work.slab.dtype) * Left::kBytes + work.terms * RowsAreK<width>::kBytes;
  launch(skinny_product<rounds, width, Left, Right<width, threads>>,
         modules * work.down * work.across, threads, 2 * stage, stream, work);
}

// Tiles as wide as the skinny matrix wants them: one of 64 columns does half of the work.
template <bool rounds, class Left, template <int, int> class Right>
void launch_product(const Product& work, int64_t modules, Stream stream) {
  if ((work.skinny.cols - 1) % 128 < 64)
    launch_tiles<rounds, 64, Left, Right>(work, modules, stream);
  else
    launch_tiles<rounds, 128, Left, Right>(work, modules, stream);
}

template <class Left>
void launch_matrix_product(const Product& work, int64_t modules, Stream stream) {
  if (work.terms == 1 && work.slab.dtype == DType::BFloat16)
    launch_product<false, Left, MatrixFeed>(work, modules, stream);
  else
    launch_product<true, Left, MatrixFeed>(work, modules, stream);
}

Product product_of(const Slab& slab, const double* scale, int64_t rows, const Slab& skinny,
                   float* out, int terms) {
  Product work{};
  work.slab = slab;
  work.scale = scale;
  work.skinny = skinny;
  work.out = out;
  work.rows = rows;
  work.steps = tiles(skinny.rows, kStep);
  work.terms = terms;
  return work;
}

}  // namespace

void contract(const Slab& slab, const double* scale, const double* after, const float* x,
              int64_t modules, int64_t l, float* out, int terms, const int32_t* skip,
              Stream stream) {
  Product work = product_of(slab, scale, slab.rows, {x, DType::Float32, slab.cols, l}, out, terms);
  work.after = after;
  work.skip = skip;
  launch_matrix_product<ColumnsAreK>(work, modules, stream);
}

void contract_signs(const Slab& slab, const double* scale, const double* after, uint64_t seed,
                    const int64_t* streams, int64_t modules, int64_t l, float* out, Stream stream) {
  Product work =
      product_of(slab, scale, slab.rows, {nullptr, DType::BFloat16, slab.cols, l}, out, 1);
  work.after = after;
  work.seed = seed;
  work.streams = streams;
  launch_product<true, ColumnsAreK, SignFeed>(work, modules, stream);
}

void expand(const Slab& slab, const double* scale, const float* x, int64_t modules, int64_t l,
            float* out, int terms, const int32_t* skip, Stream stream) {
  Product work = product_of(slab, scale, slab.cols, {x, DType::Float32, slab.rows, l}, out, terms);
  work.skip = skip;
  launch_matrix_product<RowsAreK<kHeight>>(work, modules, stream);
}

}  // namespace fastagg::cuda
