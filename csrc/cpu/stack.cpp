// Fused heterogeneous-rank stacking: every client's factors, of any rank and dtype, into the two
// slabs of a bucket in one pass that also scales, casts, transposes B, finds what is not finite and
// sums the squares of each row.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "runtime.h"
#include "stack_rows.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kColumnTask = 2048;  // rows of B in one task
constexpr int64_t kCached = 8 << 20;   // bytes of slabs that caches may be expected to keep

struct Task {
  int64_t slot;
  bool is_b;
  int64_t begin, end;  // rows of A, or rows of B
  int64_t partial;     // where a B task keeps its sums of squares
};

class Stacker {
 public:
  Stacker(const void* const* flats, const StackSlot* slots, const double* scale,
          const StackOut& out)
      : flats_(flats),
        slots_(slots),
        scale_(scale),
        out_(out),
        size_(element_size(out.dtype)),
        stream_(out.modules * out.rows * (out.m + out.n) * size_ > kCached) {}

  // Moves a task's rows; a task of B leaves its sums of squares in `sums`. Returns how many of their
  // values are not finite.
  int64_t operator()(const Task& task, double* sums) const {
    const double total = task.is_b ? transpose_b(task, sums) : copy_a(task);
    // A sum of squares in double is finite unless an entry is not: to count is seldom worth a pass.
    if (std::isfinite(total)) return 0;
    const Source from = source(task);
    const int64_t width = task.is_b ? slots_[task.slot].rank : out_.n;
    return count_nonfinite(from.data, from.dtype, (task.end - task.begin) * width);
  }

  // Rows that no client fills are zero.
  void clear(int64_t row) const {
    // An empty slab has no address, and memset wants one even for nothing.
    if (out_.n > 0)
      memset(at(out_.a, row * out_.n * size_), 0, static_cast<size_t>(out_.n * size_));
    if (out_.m > 0)
      memset(at(out_.bt, row * out_.m * size_), 0, static_cast<size_t>(out_.m * size_));
    out_.sum_of_squares[row] = 0;
    out_.sum_of_squares[out_.modules * out_.rows + row] = 0;
  }

 private:
  // Both factors are contiguous from a task's first row on.
  Source source(const Task& task) const {
    const StackSlot& slot = slots_[task.slot];
    if (task.is_b)
      return {at(flats_[slot.b_flat],
                 slot.b_offset + task.begin * slot.rank * element_size(slot.b_dtype)),
              slot.b_dtype};
    return {
        at(flats_[slot.a_flat], slot.a_offset + task.begin * out_.n * element_size(slot.a_dtype)),
        slot.a_dtype};
  }

  // Rows of A are rows of the slab.
  double copy_a(const Task& task) const {
    const StackSlot& slot = slots_[task.slot];
    const int64_t first = slot.module * out_.rows + slot.row + task.begin;
    const int64_t rows = task.end - task.begin;
    const float scale = scale_ ? static_cast<float>(scale_[task.slot]) : 1.0f;
    double* sums = out_.sum_of_squares + first;
    copy_rows(source(task), rows, out_.n, scale_ ? &scale : nullptr,
              {at(out_.a, first * out_.n * size_), out_.dtype, stream_}, sums);
    return std::accumulate(sums, sums + rows, 0.0);
  }

  // Rows of B become columns of Bt.
  double transpose_b(const Task& task, double* sums) const {
    const StackSlot& slot = slots_[task.slot];
    const int64_t first = slot.module * out_.rows + slot.row;
    transpose_rows(source(task), task.end - task.begin, slot.rank,
                   {at(out_.bt, (first * out_.m + task.begin) * size_), out_.dtype, stream_},
                   out_.m, sums);
    return std::accumulate(sums, sums + slot.rank, 0.0);
  }

  const void* const* flats_;
  const StackSlot* slots_;
  const double* scale_;
  const StackOut& out_;
  int64_t size_;
  bool stream_;
};

}  // namespace

void stack(const void* const* flats, const StackSlot* slots, int64_t count, const double* scale,
           const StackOut& out) {
  const Stacker stacker(flats, slots, scale, out);
  std::vector<Task> tasks;
  std::vector<char> covered(static_cast<size_t>(out.modules * out.rows), 0);
  int64_t partials = 0;
  for (int64_t s = 0; s < count; ++s) {
    const StackSlot& slot = slots[s];
    const int64_t first = slot.module * out.rows + slot.row;
    std::fill_n(covered.begin() + first, slot.rank, 1);
    for (int64_t row = 0; row < slot.rank; row += 16)
      tasks.push_back({s, false, row, std::min(row + 16, slot.rank), 0});
    for (int64_t i = 0; i < out.m; i += kColumnTask) {
      tasks.push_back({s, true, i, std::min(i + kColumnTask, out.m), partials});
      partials += slot.rank;
    }
  }
  std::vector<double> sums(static_cast<size_t>(partials), 0.0);
  std::vector<int64_t> nonfinite(tasks.size(), 0);
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    nonfinite[t] = stacker(tasks[t], sums.data() + tasks[t].partial);
  });
  for (int64_t row = 0; row < out.modules * out.rows; ++row)
    if (!covered[row]) stacker.clear(row);

  std::fill_n(out.nonfinite, 2 * count, 0);
  double* b_sums = out.sum_of_squares + out.modules * out.rows;
  for (int64_t s = 0; s < count; ++s)
    std::fill_n(b_sums + slots[s].module * out.rows + slots[s].row, slots[s].rank, 0.0);
  for (size_t t = 0; t < tasks.size(); ++t) {
    const Task& task = tasks[t];
    const StackSlot& slot = slots[task.slot];
    out.nonfinite[2 * task.slot + task.is_b] += nonfinite[t];
    if (!task.is_b) continue;
    for (int64_t j = 0; j < slot.rank; ++j)
      b_sums[slot.module * out.rows + slot.row + j] += sums[task.partial + j];
  }
}

}  // namespace fastagg::cpu
