// Whether a row of a table can be true. A table on the device is first looked at by the kernel that
// reads it, and any int64 may stand there: nothing is computed from a field before it is bounded.
#pragma once

#include "tables.h"

namespace fastagg {

constexpr int64_t kNoBuffer = -1;  // the size of a buffer that is not in the list

// (rows, cols) elements from byte `offset` on, inside a buffer of `bytes` bytes.
FASTAGG_HD bool lies_within(int64_t offset, int64_t rows, int64_t cols, DType dtype,
                            int64_t bytes) {
  const auto code = static_cast<int64_t>(dtype);
  if (code < 0 || code > 2 || offset < 0 || offset > bytes || rows < 0) return false;
  return cols == 0 || rows <= (bytes - offset) / element_size(dtype) / cols;
}

FASTAGG_HD bool is_possible(const Span& span, int64_t bytes) {
  return lies_within(span.offset, span.count, 1, span.dtype, bytes);
}

FASTAGG_HD bool is_possible(const StackSlot& slot, int64_t modules, int64_t rows, int64_t m,
                            int64_t n, int64_t a_bytes, int64_t b_bytes) {
  return slot.module >= 0 && slot.module < modules && slot.rank >= 0 && slot.row >= 0 &&
         slot.row <= rows && slot.rank <= rows - slot.row &&
         lies_within(slot.a_offset, slot.rank, n, slot.a_dtype, a_bytes) &&
         lies_within(slot.b_offset, slot.rank, m, slot.b_dtype, b_bytes);
}

FASTAGG_HD bool is_possible(const HandOutSlot& slot, int64_t modules, int64_t m, int64_t n,
                            int64_t bytes) {
  return slot.module >= 0 && slot.module < modules &&
         lies_within(slot.a_offset, slot.rank, n, slot.a_dtype, bytes) &&
         lies_within(slot.b_offset, slot.rank, m, slot.b_dtype, bytes);
}

}  // namespace fastagg
