// Argument checks of the ops. Every message names the op, the argument, what was expected and what
// came. Kernels receive checked input and never check again.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ragged/tables.h"

namespace fastagg::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "fastagg::" << op << ": argument '" << argument << "': ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const char* op, const char* argument, const Parts&... parts) {
  if (!condition) fail(op, argument, parts...);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ')';
  return text.str();
}

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline bool is_factor_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      return DType::Float64;
  }
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A fresh result of megabytes costs more in page faults than in arithmetic: ask for huge pages, as
// NumPy does. Advice only: where the system knows none, nothing changes.
inline void advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthwhile = int64_t{4} << 20;
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes < kWorthwhile) return;
  const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor empty_cpu(std::initializer_list<int64_t> shape, ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  Tensor tensor = torch::stable::empty(sizes, dtype);
  advise_huge_pages(tensor);
  return tensor;
}

inline void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  check(tensor.is_cpu(), op, argument,
        "expected a CPU tensor like the other arguments, got one on "
        "another device; move all arguments to one device");
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) same = same && tensor.size(d++) == size;
  if (same) return;
  std::ostringstream expected;
  d = 0;
  for (const int64_t size : shape) expected << (d++ ? ", " : "") << size;
  fail(op, argument, "expected shape (", expected.str(), "), got ", shape_of(tensor));
}

// An int64 table with one struct a row, contiguous, on the CPU.
template <class Row>
struct Table {
  Tensor storage;
  const Row* rows;
  int64_t count;
  const Row& operator[](int64_t i) const { return rows[i]; }
};

template <class Row>
Table<Row> table(const char* op, const char* argument, const Tensor& tensor) {
  constexpr int64_t columns = sizeof(Row) / sizeof(int64_t);
  check_cpu(op, argument, tensor);
  check(tensor.scalar_type() == ScalarType::Long, op, argument, "expected dtype Long, got ",
        name_of(tensor.scalar_type()));
  check(tensor.dim() == 2 && tensor.size(1) == columns, op, argument, "expected shape (rows, ",
        columns, "), got ", shape_of(tensor));
  const Tensor dense = as_contiguous(tensor);
  return {dense, static_cast<const Row*>(dense.const_data_ptr()), dense.size(0)};
}

// Refuses a result whose bytes an int64 cannot count, before anything is computed from its sizes.
inline void check_countable(const char* op, const char* argument,
                            std::initializer_list<int64_t> shape) {
  int64_t bytes = 8;
  for (const int64_t size : shape)
    check(!__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes), op, argument,
          "expected a result of fewer than 2^63 bytes, got a size of ", size);
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

// Flat buffers are addressed by byte, whatever dtype they are typed as.
inline int64_t bytes_of(const Tensor& flat) {
  return flat.numel() * static_cast<int64_t>(flat.element_size());
}

// Coefficients as float64 (L, R), or empty where none are given: then all are one.
inline std::vector<double> coefficients(const char* op, const std::optional<Tensor>& given,
                                        int64_t modules, int64_t rows) {
  if (!given) return {};
  check_cpu(op, "coefficients", *given);
  check_shape(op, "coefficients", *given, {modules, rows});
  const ScalarType dtype = given->scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double, op, "coefficients",
        "expected dtype Float or Double, got ", name_of(dtype));
  const Tensor dense = as_contiguous(*given);
  if (dtype == ScalarType::Double) {
    const auto* data = static_cast<const double*>(dense.const_data_ptr());
    return {data, data + dense.numel()};
  }
  const auto* data = static_cast<const float*>(dense.const_data_ptr());
  return {data, data + dense.numel()};
}

// The two slabs of a stack, A (L, R, n) and Bt (L, R, m), checked against each other.
struct Stack {
  Tensor a;
  Tensor bt;
  int64_t modules, rows, m, n;
};

inline Stack stack_of(const char* op, const Tensor& a, const Tensor& bt, bool allow_float64) {
  for (const auto& [name, tensor] : {std::pair{"A", &a}, std::pair{"Bt", &bt}}) {
    check_cpu(op, name, *tensor);
    check(tensor->dim() == 3, op, name, "expected three dimensions (modules, rows, ",
          *name == 'A' ? "n" : "m", "), got shape ", shape_of(*tensor));
    const ScalarType dtype = tensor->scalar_type();
    check(is_factor_dtype(dtype) || (allow_float64 && dtype == ScalarType::Double), op, name,
          "expected dtype Float, BFloat16 or Half", allow_float64 ? " or Double" : "", ", got ",
          name_of(dtype));
  }
  check(a.size(0) == bt.size(0) && a.size(1) == bt.size(1), op, "Bt",
        "expected the modules and rows of A, ", shape_of(a), ", got ", shape_of(bt));
  return {as_contiguous(a), as_contiguous(bt), a.size(0), a.size(1), bt.size(2), a.size(2)};
}

}  // namespace fastagg::ops
