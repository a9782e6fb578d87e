// The int64 tables that say where ragged data lies. A row of a table is one of these structs.
#pragma once

#include "dtype.h"

namespace fastagg {

// One tensor inside a client's flat buffer.
struct Span {
  int64_t offset;  // bytes
  int64_t count;   // elements
  DType dtype;
};

// One client's factors of one module, and the rows of the module's stack that they fill.
// A is (rank, n) and B is (m, rank), both row-major at their byte offset in a flat buffer.
struct StackSlot {
  int64_t module;
  int64_t row;
  int64_t rank;
  int64_t a_flat;
  int64_t a_offset;
  DType a_dtype;
  int64_t b_flat;
  int64_t b_offset;
  DType b_dtype;
};

// Where one client's next factors of one module are written: A (rank, n) and B (m, rank).
struct HandOutSlot {
  int64_t module;
  int64_t rank;
  int64_t flat;
  int64_t a_offset;
  DType a_dtype;
  int64_t b_offset;
  DType b_dtype;
};

static_assert(sizeof(Span) == 3 * sizeof(int64_t), "a row of the spans table");
static_assert(sizeof(StackSlot) == 9 * sizeof(int64_t), "a row of the stack table");
static_assert(sizeof(HandOutSlot) == 7 * sizeof(int64_t), "a row of the hand-out table");

}  // namespace fastagg
