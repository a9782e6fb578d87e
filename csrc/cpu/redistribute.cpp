// Every client's next factors from one decomposition: A_k = V_r^T and B_k = U_r S_r / s_k, each at
// the client's own rank and dtype, straight into its flat buffer.
#include <algorithm>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "runtime.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kRows = 512;  // rows of a task

struct Task {
  int64_t slot;
  bool is_b;
  int64_t begin, end;
};

}  // namespace

void redistribute(const float* u, const float* s, const float* vt, int64_t m, int64_t n, int64_t r,
                  const HandOutSlot* slots, const double* scalings, int64_t count,
                  void* const* flats) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = 0; n > 0 && row < slots[i].rank; row += 16)
      tasks.push_back({i, false, row, std::min(row + 16, slots[i].rank)});
    for (int64_t row = 0; row < m; row += kRows)
      tasks.push_back({i, true, row, std::min(row + kRows, m)});
  }
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    const Task& task = tasks[t];
    const HandOutSlot& slot = slots[task.slot];
    const int64_t kept = std::min(slot.rank, r);
    if (!task.is_b) {
      const int64_t row_bytes = n * element_size(slot.a_dtype);
      for (int64_t row = task.begin; row < task.end; ++row) {
        char* to = at(flats[slot.flat], slot.a_offset + row * row_bytes);
        // A rank above the decomposition's has nothing to carry.
        if (row >= kept)
          memset(to, 0, static_cast<size_t>(row_bytes));
        else
          store(vt + (slot.module * r + row) * n, n, to, slot.a_dtype);
      }
      return;
    }
    std::vector<float> factor(static_cast<size_t>(kept));
    for (int64_t j = 0; j < kept; ++j)
      factor[j] = static_cast<float>(s[slot.module * r + j] / scalings[task.slot]);
    std::vector<float> line(static_cast<size_t>(slot.rank), 0.0f);
    const int64_t row_bytes = slot.rank * element_size(slot.b_dtype);
    for (int64_t row = task.begin; row < task.end; ++row) {
      const float* from = u + (slot.module * m + row) * r;
      for (int64_t j = 0; j < kept; ++j) line[j] = from[j] * factor[j];
      store(line.data(), slot.rank, at(flats[slot.flat], slot.b_offset + row * row_bytes),
            slot.b_dtype);
    }
  });
}

}  // namespace fastagg::cpu
