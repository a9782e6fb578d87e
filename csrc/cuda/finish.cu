// Two passes, each value read and written once from main memory: u's columns decide the signs (a block
// takes up to 32 columns, whose rows it reads, and finds in the cache when it writes them), vt's rows
// follow them.
#include "finish.h"

#include "device.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMostColumns = 32;     // of u in one block: a full line of fp32
constexpr int64_t kRowPiece = 4096;  // entries of a row of vt in one block

// The entry of a column that decides its sign: the largest in magnitude, the first of equal ones.
template <class T>
struct Leader {
  T value;
  int64_t row;
};

template <class T>
__device__ __forceinline__ bool leads(const Leader<T>& a, const Leader<T>& b) {
  const T x = a.value < 0 ? -a.value : a.value, y = b.value < 0 ? -b.value : b.value;
  return x > y || (x == y && a.row < b.row);
}

template <class T>
__device__ __forceinline__ T nan_of() {
  return static_cast<T>(float_from_bits(0x7fc00000u));
}

// What becomes of an entry: -x, x, zero or NaN.
enum class Fate : int32_t { Keep, Negate, Zero, Nan };

template <class T>
__device__ __forceinline__ T after(Fate fate, T value) {
  return fate == Fate::Zero ? T(0) : fate == Fate::Nan ? nan_of<T>() : -value;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_columns(SvdOut<T> out, const int32_t* kept, const int32_t* nonfinite, int columns,
                   int64_t column_tiles, Fate* fates) {
  auto* leaders = shared_memory<Leader<T>>();
  const int64_t module = blockIdx.x / column_tiles, tile = blockIdx.x % column_tiles;
  const int thread = static_cast<int>(threadIdx.x), column = thread % columns;
  const int first = thread / columns, height = kThreads / columns;
  const int64_t j = tile * columns + column;
  const bool there = j < out.r, is_nan = nonfinite[module] != 0;
  const bool is_kept = there && j < kept[module] && !is_nan;
  T* u = out.u + module * out.m * out.r + j;

  Leader<T> mine{T(0), out.m};
  if (is_kept) {
    for (int64_t i = first; i < out.m; i += height) {
      const Leader<T> entry{u[i * out.r], i};
      if (leads(entry, mine)) mine = entry;
    }
  }
  leaders[thread] = mine;
  __syncthreads();
  for (int rows = height / 2; rows > 0; rows /= 2) {
    if (first < rows && leads(leaders[thread + rows * columns], leaders[thread]))
      leaders[thread] = leaders[thread + rows * columns];
    __syncthreads();
  }
  const Fate fate = is_nan                         ? Fate::Nan
                    : !is_kept                     ? Fate::Zero
                    : leaders[column].value < T(0) ? Fate::Negate
                                                   : Fate::Keep;
  if (there && first == 0) {
    fates[module * out.r + j] = fate;
    T* s = out.s + module * out.r + j;
    if (fate == Fate::Zero || fate == Fate::Nan) *s = after(fate, T(0));
  }
  if (there && fate != Fate::Keep)
    for (int64_t i = first; i < out.m; i += height) u[i * out.r] = after(fate, u[i * out.r]);
  if (is_nan && tile == 0 && thread < kStats)
    out.stats[module * kStats + thread] = nan_of<double>();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_rows(SvdOut<T> out, int64_t pieces, const Fate* fates) {
  const int64_t row = blockIdx.x / pieces, first = blockIdx.x % pieces * kRowPiece;
  const Fate fate = fates[row];
  if (fate == Fate::Keep) return;
  const int64_t end = first + kRowPiece < out.n ? first + kRowPiece : out.n;
  T* vt = out.vt + row * out.n;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) vt[i] = after(fate, vt[i]);
}

}  // namespace

template <class T>
void finish(const SvdOut<T>& out, const int32_t* kept, const int32_t* nonfinite,
            Workspace& workspace, Stream stream) {
  auto* fates = workspace.take<Fate>(out.modules * out.r);
  int columns = 1;
  while (columns < kMostColumns && columns < out.r) columns *= 2;
  // With r = 0 the stats are left, which still say what is not finite.
  const int64_t column_tiles = out.r > 0 ? tiles(out.r, columns) : 1;
  launch(finish_columns<T>, out.modules * column_tiles, kThreads, kThreads * sizeof(Leader<T>),
         stream, out, kept, nonfinite, columns, column_tiles, fates);
  const int64_t pieces = tiles(out.n, kRowPiece);
  launch(finish_rows<T>, out.modules * out.r * pieces, kThreads, 0, stream, out, pieces,
         static_cast<const Fate*>(fates));
}

template void finish(const SvdOut<float>&, const int32_t*, const int32_t*, Workspace&, Stream);
template void finish(const SvdOut<double>&, const int32_t*, const int32_t*, Workspace&, Stream);

}  // namespace fastagg::cuda
