#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../cpu/kernels.h"
#include "checks.h"

namespace fastagg::ops {
namespace {

void check_slots(const char* op, const Table<StackSlot>& slots, const std::vector<Tensor>& flats,
                 int64_t modules, int64_t rows, int64_t m, int64_t n) {
  const auto flat_count = static_cast<int64_t>(flats.size());
  std::vector<char> taken(static_cast<size_t>(modules * rows), 0);
  for (int64_t i = 0; i < slots.count; ++i) {
    const StackSlot& slot = slots[i];
    check(slot.module >= 0 && slot.module < modules, op, "slots", "row ", i,
          ": expected a module below ", modules, ", got ", slot.module);
    check(slot.rank >= 0 && slot.row >= 0 && slot.row <= rows && slot.rank <= rows - slot.row, op,
          "slots", "row ", i, ": expected rows within ", rows, ", got rank ", slot.rank, " at row ",
          slot.row);
    for (const int64_t flat : {slot.a_flat, slot.b_flat})
      check(flat >= 0 && flat < flat_count, op, "slots", "row ", i,
            ": expected a flat buffer below ", flat_count, ", got ", flat);
    check_range(op, "slots", i, "A", slot.a_offset, slot.rank, n, slot.a_dtype,
                bytes_of(flats[slot.a_flat]));
    check_range(op, "slots", i, "B", slot.b_offset, slot.rank, m, slot.b_dtype,
                bytes_of(flats[slot.b_flat]));
    const auto first = taken.begin() + slot.module * rows + slot.row;
    check(std::none_of(first, first + slot.rank, [](char used) { return used != 0; }), op, "slots",
          "row ", i, ": expected rows of its own, got rows that another slot fills too");
    std::fill_n(first, slot.rank, 1);
  }
}

// Fills the slabs and returns the non-finite counts and the sums of squares.
std::tuple<Tensor, Tensor> fill(const char* op, const Tensor& a, const Tensor& bt,
                                const std::vector<Tensor>& flats, const Tensor& slots,
                                const std::optional<Tensor>& scale) {
  const int64_t modules = a.size(0), rows = a.size(1), m = bt.size(2), n = a.size(2);
  std::vector<Tensor> buffers;
  std::vector<const void*> pointers;
  for (const Tensor& flat : flats) {
    check_cpu(op, "flats", flat);
    buffers.push_back(as_contiguous(flat));
    pointers.push_back(buffers.back().const_data_ptr());
  }
  const auto slot_table = table<StackSlot>(op, "slots", slots);
  check_slots(op, slot_table, buffers, modules, rows, m, n);
  Tensor scale_storage = slots;
  const double* scale_data = nullptr;
  if (scale) {
    check_cpu(op, "scale", *scale);
    check_shape(op, "scale", *scale, {slot_table.count});
    check(scale->scalar_type() == ScalarType::Double, op, "scale", "expected dtype Double, got ",
          name_of(scale->scalar_type()));
    scale_storage = as_contiguous(*scale);
    scale_data = static_cast<const double*>(scale_storage.const_data_ptr());
  }
  Tensor nonfinite = empty_cpu({slot_table.count, 2}, ScalarType::Long);
  Tensor sums = empty_cpu({2, modules, rows}, ScalarType::Double);
  cpu::stack(pointers.data(), slot_table.rows, slot_table.count, scale_data,
             {a.mutable_data_ptr(), bt.mutable_data_ptr(), dtype_of(a), modules, rows, m, n,
              static_cast<int64_t*>(nonfinite.mutable_data_ptr()),
              static_cast<double*>(sums.mutable_data_ptr())});
  return {nonfinite, sums};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> stack(const std::vector<Tensor>& flats,
                                                 const Tensor& slots,
                                                 const std::optional<Tensor>& scale,
                                                 int64_t modules, int64_t rows, int64_t m,
                                                 int64_t n, ScalarType dtype) {
  for (const auto& [name, size] :
       {std::pair{"modules", modules}, {"rows", rows}, {"m", m}, {"n", n}})
    check(size >= 0, "stack", name, "expected a size of at least 0, got ", size);
  check_countable("stack", "rows", {modules, rows, std::max(m, n)});
  check(is_factor_dtype(dtype), "stack", "dtype", "expected Float, BFloat16 or Half, got ",
        name_of(dtype));
  Tensor a = empty_cpu({modules, rows, n}, dtype);
  Tensor bt = empty_cpu({modules, rows, m}, dtype);
  auto [nonfinite, sums] = fill("stack", a, bt, flats, slots, scale);
  return {a, bt, nonfinite, sums};
}

std::tuple<Tensor, Tensor> stack_(const Tensor& a, const Tensor& bt,
                                  const std::vector<Tensor>& flats, const Tensor& slots,
                                  const std::optional<Tensor>& scale) {
  stack_of("stack_", a, bt, false);
  check(a.scalar_type() == bt.scalar_type(), "stack_", "Bt", "expected the dtype of A, ",
        name_of(a.scalar_type()), ", got ", name_of(bt.scalar_type()));
  for (const auto& [name, tensor] : {std::pair{"A", &a}, std::pair{"Bt", &bt}})
    check(tensor->is_contiguous(), "stack_", name, "expected a contiguous slab to write into");
  return fill("stack_", a, bt, flats, slots, scale);
}

}  // namespace fastagg::ops

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) {
  m.def(
      "stack(Tensor[] flats, Tensor slots, Tensor? scale, int modules, int rows, int m, int n, "
      "ScalarType dtype) -> (Tensor A, Tensor Bt, Tensor nonfinite, Tensor sum_of_squares)");
  m.def(
      "stack_(Tensor(a!) A, Tensor(b!) Bt, Tensor[] flats, Tensor slots, Tensor? scale) "
      "-> (Tensor nonfinite, Tensor sum_of_squares)");
}

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) {
  m.impl("stack", TORCH_BOX(&fastagg::ops::stack));
  m.impl("stack_", TORCH_BOX(&fastagg::ops::stack_));
}
