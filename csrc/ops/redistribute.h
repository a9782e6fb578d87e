#pragma once

#include <cmath>
#include <vector>

#include "flats.h"
#include "results.h"
#include "tables.h"

namespace fastagg::ops {

inline void check_hand_out_slots(const char* op, const HandOutSlot* slots, int64_t count,
                                 const Flats<void*>& flats, int64_t modules, int64_t m, int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    const HandOutSlot& slot = slots[i];
    check(slot.module >= 0 && slot.module < modules, op, "slots", "row ", i,
          ": expected a module below ", modules, ", got ", slot.module);
    check(slot.rank >= 0, op, "slots", "row ", i, ": expected a rank of at least 0, got ",
          slot.rank);
    check(slot.flat >= 0 && slot.flat < flats.count(), op, "slots", "row ", i,
          ": expected a flat buffer below ", flats.count(), ", got ", slot.flat);
    check_range(op, "slots", i, "A", slot.a_offset, slot.rank, n, slot.a_dtype,
                flats.sizes[slot.flat]);
    check_range(op, "slots", i, "B", slot.b_offset, slot.rank, m, slot.b_dtype,
                flats.sizes[slot.flat]);
  }
}

// U (L, m, r), S (L, r), Vt (L, r, n) and where they go.
template <class Kernels>
void hand_out(const char* op, const Device& home, const std::vector<Tensor>& given, const Tensor& u,
              const Tensor& s, const Tensor& vt, const Tensor& slots, const Tensor& scalings) {
  check(u.dim() == 3, op, "U", "expected shape (modules, m, r), got ", shape_of(u));
  check(vt.dim() == 3, op, "Vt", "expected shape (modules, r, n), got ", shape_of(vt));
  const int64_t modules = u.size(0), m = u.size(1), r = u.size(2), n = vt.size(2);
  check_shape(op, "S", s, {modules, r});
  check_shape(op, "Vt", vt, {modules, r, n});
  for (const auto& [name, tensor] : {std::pair{"U", &u}, std::pair{"S", &s}, {"Vt", &vt}}) {
    check_device(op, name, *tensor, home);
    check(tensor->scalar_type() == ScalarType::Float, op, name, "expected dtype Float, got ",
          name_of(tensor->scalar_type()));
  }
  auto slot_table = rows_of<HandOutSlot>(op, "slots", slots, home);
  const int64_t count = slots.size(0);
  auto scaling_table = values_of<double>(op, "scalings", scalings, home, {count});
  const auto flats = flats_to_write(op, given, home);
  if (const HandOutSlot* rows = slot_table.on_host())
    check_hand_out_slots(op, rows, count, flats, modules, m, n);
  if (const double* scaling = scaling_table.on_host())
    for (int64_t i = 0; i < count; ++i)
      check(std::isfinite(scaling[i]) && scaling[i] != 0, op, "scalings", "row ", i,
            ": expected a finite scaling other than 0, got ", scaling[i]);

  Kernels kernels(home);
  const Tensor u_dense = as_contiguous(u), s_dense = as_contiguous(s), vt_dense = as_contiguous(vt);
  kernels.redistribute(static_cast<const float*>(u_dense.const_data_ptr()),
                       static_cast<const float*>(s_dense.const_data_ptr()),
                       static_cast<const float*>(vt_dense.const_data_ptr()), modules, m, n, r,
                       slot_table.on(home), scaling_table.on(home), count, flats);
}

template <class Kernels>
std::vector<Tensor> redistribute(const Tensor& u, const Tensor& s, const Tensor& vt,
                                 const Tensor& slots, const Tensor& scalings,
                                 const std::vector<int64_t>& sizes) {
  const char* op = "redistribute";
  const Device home = home_of(op, "U", u, Kernels::kDevice);
  std::vector<Tensor> flats;
  for (const int64_t size : sizes) {
    check(size >= 0, op, "sizes", "expected sizes of at least 0 bytes, got ", size);
    flats.push_back(empty_on(home, {size}, ScalarType::Byte));
    torch::stable::zero_(flats.back());
  }
  hand_out<Kernels>(op, home, flats, u, s, vt, slots, scalings);
  return flats;
}

template <class Kernels>
void redistribute_(const std::vector<Tensor>& flats, const Tensor& u, const Tensor& s,
                   const Tensor& vt, const Tensor& slots, const Tensor& scalings) {
  const char* op = "redistribute_";
  hand_out<Kernels>(op, home_of(op, "U", u, Kernels::kDevice), flats, u, s, vt, slots, scalings);
}

}  // namespace fastagg::ops
