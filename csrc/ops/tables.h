// Arguments that tell a kernel what to do, value by value: tables of slots, owners, scalings, streams.
// They may lie on the op's device, or on the host, where each value is checked before all are
// uploaded. What lies on a device is never read here: it would have to be waited for.
#pragma once

#include <optional>

#include "../ragged/tables.h"
#include "checks.h"

namespace fastagg::ops {

template <class Row>
class Table {
 public:
  Table(const char* op, const char* argument, const Tensor& tensor, const Device& home)
      : storage_(tensor) {
    if (!tensor.is_cpu()) check_device(op, argument, tensor, home);
  }

  const Tensor& tensor() const { return storage_; }

  // The rows for the checks; null where they lie on a device.
  const Row* on_host() const { return storage_.is_cpu() ? rows() : nullptr; }

  // The rows for the kernel, as long as the table lives. The upload from pageable memory is staged
  // before the call returns; pinned memory is read later, in the order of the stream.
  const Row* on(const Device& home) {
    if (!is_on(storage_, home))
      storage_ = torch::stable::to(storage_, std::nullopt, std::nullopt, home, std::nullopt, true);
    return rows();
  }

  void make_contiguous() { storage_ = as_contiguous(storage_); }

 private:
  const Row* rows() const { return static_cast<const Row*>(storage_.const_data_ptr()); }

  Tensor storage_;
};

// int64 (rows, columns), a row being one struct.
template <class Row>
Table<Row> rows_of(const char* op, const char* argument, const Tensor& tensor, const Device& home) {
  constexpr int64_t columns = sizeof(Row) / sizeof(int64_t);
  Table<Row> table(op, argument, tensor, home);
  check(tensor.scalar_type() == ScalarType::Long, op, argument, "expected dtype Long, got ",
        name_of(tensor.scalar_type()));
  check(tensor.dim() == 2 && tensor.size(1) == columns, op, argument, "expected shape (rows, ",
        columns, "), got ", shape_of(tensor));
  table.make_contiguous();
  return table;
}

// int64 or float64 of one shape.
template <class Value>
Table<Value> values_of(const char* op, const char* argument, const Tensor& tensor,
                       const Device& home, std::initializer_list<int64_t> shape) {
  constexpr ScalarType dtype =
      std::is_same_v<Value, int64_t> ? ScalarType::Long : ScalarType::Double;
  Table<Value> table(op, argument, tensor, home);
  check_shape(op, argument, tensor, shape);
  check(tensor.scalar_type() == dtype, op, argument, "expected dtype ", name_of(dtype), ", got ",
        name_of(tensor.scalar_type()));
  table.make_contiguous();
  return table;
}

// Refuses (rows, cols) elements from byte `offset` on that are not inside a buffer of `bytes`
// bytes.
inline void check_range(const char* op, const char* argument, int64_t row, const char* field,
                        int64_t offset, int64_t rows, int64_t cols, DType dtype, int64_t bytes) {
  const auto code = static_cast<int64_t>(dtype);
  check(code >= 0 && code <= 2, op, argument, "row ", row, ", ", field,
        ": expected a dtype code of 0 (float32), 1 (bfloat16) or 2 (float16), got ", code);
  const int64_t size = element_size(dtype);
  check(offset >= 0 && rows >= 0 && offset <= bytes &&
            (cols == 0 || rows <= (bytes - offset) / size / cols),
        op, argument, "row ", row, ", ", field, ": expected a range inside the buffer of ", bytes,
        " bytes, got ", rows, " x ", cols, " elements of ", size, " bytes at byte ", offset);
}

}  // namespace fastagg::ops
