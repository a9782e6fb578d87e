// Fused heterogeneous-rank stacking: every client's factors, of any rank and dtype, into the two
// slabs of a bucket in one pass that also scales, casts, transposes B, finds what is not finite and
// sums the squares of each row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "runtime.h"
#include "transpose.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kBlock = 2048;       // elements of a row handled at a time
constexpr int64_t kColumns = 64;       // rows of B transposed at a time: at rank 64, 16 KiB
constexpr int64_t kColumnTask = 2048;  // rows of B in one task
constexpr int64_t kCached = 8 << 20;   // bytes of a slab that caches may be expected to keep

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
        stream_(out.modules * out.rows * out.m * size_ > kCached) {}

  // Rows [begin, end) of A: contiguous in the source and in the slab.
  int64_t copy_a(const Task& task) const {
    const StackSlot& slot = slots_[task.slot];
    const float scale = scale_ ? static_cast<float>(scale_[task.slot]) : 1.0f;
    int64_t nonfinite = 0;
    float block[kBlock];
    for (int64_t row = task.begin; row < task.end; ++row) {
      const int64_t target = slot.module * out_.rows + slot.row + row;
      double sum = 0;
      for (int64_t j = 0; j < out_.n; j += kBlock) {
        const int64_t length = std::min(kBlock, out_.n - j);
        const void* from = at(flats_[slot.a_flat],
                              slot.a_offset + (row * out_.n + j) * element_size(slot.a_dtype));
        char* to = at(out_.a, (target * out_.n + j) * size_);
        // An fp32 slab is its own block: the element is converted in place of a copy.
        float* values = out_.dtype == DType::Float32 ? reinterpret_cast<float*>(to) : block;
        load(from, slot.a_dtype, length, 1.0f, values);
        const Moments found = moments(values, length);
        nonfinite += found.nonfinite;
        sum += found.sum_of_squares;
        if (scale_) load(values, DType::Float32, length, scale, values);
        if (values != block) continue;
        if (slot.a_dtype == out_.dtype && !scale_)
          memcpy(to, from, static_cast<size_t>(length * size_));
        else
          store(block, length, to, out_.dtype);
      }
      out_.sum_of_squares[target] = sum;
    }
    return nonfinite;
  }

  // Rows [begin, end) of B become columns of Bt. Returns whether any value is not finite.
  bool transpose_b(const Task& task, double* sums) const {
    const StackSlot& slot = slots_[task.slot];
    const int64_t first = slot.module * out_.rows + slot.row;
    const bool direct = out_.dtype == DType::Float32;
    Workspace<float> rows(kColumns * slot.rank);
    Workspace<float> columns(direct ? 0 : kColumns * slot.rank);
    for (int64_t i = task.begin; i < task.end; i += kColumns) {
      const int64_t length = std::min(kColumns, task.end - i);
      load(at(flats_[slot.b_flat], slot.b_offset + i * slot.rank * element_size(slot.b_dtype)),
           slot.b_dtype, length * slot.rank, 1.0f, rows.get());
      float* to = direct ? static_cast<float*>(out_.bt) + first * out_.m + i : columns.get();
      transpose(rows.get(), length, slot.rank, to, direct ? out_.m : kColumns, stream_ && direct,
                sums);
      for (int64_t j = 0; !direct && j < slot.rank; ++j)
        store(to + j * kColumns, length, at(out_.bt, ((first + j) * out_.m + i) * size_),
              out_.dtype);
    }
    double total = 0;
    for (int64_t j = 0; j < slot.rank; ++j) total += sums[j];
    return !std::isfinite(total);
  }

  // How many values of the task's rows of B are not finite: counted only where a sum says so.
  int64_t count_nonfinite_b(const Task& task) const {
    const StackSlot& slot = slots_[task.slot];
    int64_t nonfinite = 0;
    Workspace<float> row(slot.rank);
    for (int64_t i = task.begin; i < task.end; ++i) {
      load(at(flats_[slot.b_flat], slot.b_offset + i * slot.rank * element_size(slot.b_dtype)),
           slot.b_dtype, slot.rank, 1.0f, row.get());
      nonfinite += moments(row.get(), slot.rank).nonfinite;
    }
    return nonfinite;
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
    const Task& task = tasks[t];
    if (!task.is_b)
      nonfinite[t] = stacker.copy_a(task);
    else if (stacker.transpose_b(task, sums.data() + task.partial))
      nonfinite[t] = stacker.count_nonfinite_b(task);
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
