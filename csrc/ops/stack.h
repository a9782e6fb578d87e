#pragma once

#include <algorithm>
#include <vector>

#include "flats.h"
#include "results.h"
#include "slabs.h"
#include "tables.h"

namespace fastagg::ops {

struct StackShape {
  int64_t modules, rows, m, n;
};

inline void check_stack_slots(const char* op, const StackSlot* slots, int64_t count,
                              const Flats<const void*>& flats, const StackShape& shape) {
  std::vector<char> taken(static_cast<size_t>(shape.modules * shape.rows), 0);
  for (int64_t i = 0; i < count; ++i) {
    const StackSlot& slot = slots[i];
    check(slot.module >= 0 && slot.module < shape.modules, op, "slots", "row ", i,
          ": expected a module below ", shape.modules, ", got ", slot.module);
    check(slot.rank >= 0 && slot.row >= 0 && slot.row <= shape.rows &&
              slot.rank <= shape.rows - slot.row,
          op, "slots", "row ", i, ": expected rows within ", shape.rows, ", got rank ", slot.rank,
          " at row ", slot.row);
    for (const int64_t flat : {slot.a_flat, slot.b_flat})
      check(flat >= 0 && flat < flats.count(), op, "slots", "row ", i,
            ": expected a flat buffer below ", flats.count(), ", got ", flat);
    check_range(op, "slots", i, "A", slot.a_offset, slot.rank, shape.n, slot.a_dtype,
                flats.sizes[slot.a_flat]);
    check_range(op, "slots", i, "B", slot.b_offset, slot.rank, shape.m, slot.b_dtype,
                flats.sizes[slot.b_flat]);
    const auto first = taken.begin() + slot.module * shape.rows + slot.row;
    check(std::none_of(first, first + slot.rank, [](char used) { return used != 0; }), op, "slots",
          "row ", i, ": expected rows of its own, got rows that another slot fills too");
    std::fill_n(first, slot.rank, 1);
  }
}

// What a call of either op is told besides its slabs, checked.
class StackArguments {
 public:
  StackArguments(const char* op, const Device& home, const std::vector<Tensor>& given,
                 const Tensor& slots, const std::optional<Tensor>& scale, const StackShape& shape)
      : home_(home),
        shape_(shape),
        flats_(flats_to_read(op, given, home)),
        slots_(rows_of<StackSlot>(op, "slots", slots, home)),
        count_(slots.size(0)) {
    if (const StackSlot* rows = slots_.on_host())
      check_stack_slots(op, rows, count_, flats_, shape);
    if (scale) scale_.emplace(values_of<double>(op, "scale", *scale, home, {count_}));
  }

  // Fills the slabs and returns the non-finite counts and the sums of squares.
  template <class Kernels>
  std::tuple<Tensor, Tensor> fill(Kernels& kernels, const Tensor& a, const Tensor& bt) {
    Tensor nonfinite = empty_on(home_, {count_, 2}, ScalarType::Long);
    Tensor sums = empty_on(home_, {2, shape_.modules, shape_.rows}, ScalarType::Double);
    const StackOut out{a.mutable_data_ptr(),
                       bt.mutable_data_ptr(),
                       dtype_of(a),
                       shape_.modules,
                       shape_.rows,
                       shape_.m,
                       shape_.n,
                       data_of<int64_t>(nonfinite),
                       data_of<double>(sums)};
    const double* scale = scale_ ? scale_->on(home_) : nullptr;
    kernels.stack(flats_, slots_.on(home_), count_, scale, out);
    return {nonfinite, sums};
  }

 private:
  Device home_;
  StackShape shape_;
  Flats<const void*> flats_;
  Table<StackSlot> slots_;
  int64_t count_;
  std::optional<Table<double>> scale_;
};

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> stack(const std::vector<Tensor>& flats,
                                                 const Tensor& slots,
                                                 const std::optional<Tensor>& scale,
                                                 int64_t modules, int64_t rows, int64_t m,
                                                 int64_t n, ScalarType dtype) {
  const char* op = "stack";
  const Device home = flats.empty() ? home_of(op, "slots", slots, Kernels::kDevice)
                                    : home_of(op, "flats", flats[0], Kernels::kDevice);
  for (const auto& [name, size] :
       {std::pair{"modules", modules}, {"rows", rows}, {"m", m}, {"n", n}})
    check(size >= 0, op, name, "expected a size of at least 0, got ", size);
  check_countable(op, "rows", {modules, rows, std::max(m, n)});
  check(is_factor_dtype(dtype), op, "dtype", "expected Float, BFloat16 or Half, got ",
        name_of(dtype));
  StackArguments arguments(op, home, flats, slots, scale, {modules, rows, m, n});

  Kernels kernels(home);
  Tensor a = empty_on(home, {modules, rows, n}, dtype);
  Tensor bt = empty_on(home, {modules, rows, m}, dtype);
  auto [nonfinite, sums] = arguments.fill(kernels, a, bt);
  return {a, bt, nonfinite, sums};
}

template <class Kernels>
std::tuple<Tensor, Tensor> stack_(const Tensor& a, const Tensor& bt,
                                  const std::vector<Tensor>& flats, const Tensor& slots,
                                  const std::optional<Tensor>& scale) {
  const char* op = "stack_";
  const Stack slabs = stack_of(op, a, bt, Kernels::kDevice, false);
  check(a.scalar_type() == bt.scalar_type(), op, "Bt", "expected the dtype of A, ",
        name_of(a.scalar_type()), ", got ", name_of(bt.scalar_type()));
  for (const auto& [name, tensor] : {std::pair{"A", &a}, std::pair{"Bt", &bt}})
    check(tensor->is_contiguous(), op, name, "expected a contiguous slab to write into");
  StackArguments arguments(op, slabs.home, flats, slots, scale,
                           {slabs.modules, slabs.rows, slabs.m, slabs.n});

  Kernels kernels(slabs.home);
  return arguments.fill(kernels, a, bt);
}

}  // namespace fastagg::ops
