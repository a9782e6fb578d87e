#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../cpu/kernels.h"
#include "checks.h"

namespace fastagg::ops {
namespace {

void write(const char* op, const std::vector<Tensor>& flats, const Tensor& u, const Tensor& s,
           const Tensor& vt, const Tensor& slots, const Tensor& scalings) {
  check(u.dim() == 3, op, "U", "expected shape (modules, m, r), got ", shape_of(u));
  check(vt.dim() == 3, op, "Vt", "expected shape (modules, r, n), got ", shape_of(vt));
  const int64_t modules = u.size(0), m = u.size(1), r = u.size(2), n = vt.size(2);
  check_shape(op, "S", s, {modules, r});
  check_shape(op, "Vt", vt, {modules, r, n});
  for (const auto& [name, tensor] : {std::pair{"U", &u}, std::pair{"S", &s}, {"Vt", &vt}}) {
    check_cpu(op, name, *tensor);
    check(tensor->scalar_type() == ScalarType::Float, op, name, "expected dtype Float, got ",
          name_of(tensor->scalar_type()));
  }
  const auto slot_table = table<HandOutSlot>(op, "slots", slots);
  check_cpu(op, "scalings", scalings);
  check_shape(op, "scalings", scalings, {slot_table.count});
  check(scalings.scalar_type() == ScalarType::Double, op, "scalings", "expected dtype Double, got ",
        name_of(scalings.scalar_type()));
  const Tensor scaling_storage = as_contiguous(scalings);
  const auto* scaling_data = static_cast<const double*>(scaling_storage.const_data_ptr());

  std::vector<void*> pointers;
  for (const Tensor& flat : flats) {
    check_cpu(op, "flats", flat);
    check(flat.is_contiguous(), op, "flats", "expected contiguous buffers to write into");
    pointers.push_back(flat.mutable_data_ptr());
  }
  for (int64_t i = 0; i < slot_table.count; ++i) {
    const HandOutSlot& slot = slot_table[i];
    check(slot.module >= 0 && slot.module < modules, op, "slots", "row ", i,
          ": expected a module below ", modules, ", got ", slot.module);
    check(slot.rank >= 0, op, "slots", "row ", i, ": expected a rank of at least 0, got ",
          slot.rank);
    check(slot.flat >= 0 && slot.flat < static_cast<int64_t>(flats.size()), op, "slots", "row ", i,
          ": expected a flat buffer below ", flats.size(), ", got ", slot.flat);
    check_range(op, "slots", i, "A", slot.a_offset, slot.rank, n, slot.a_dtype,
                bytes_of(flats[slot.flat]));
    check_range(op, "slots", i, "B", slot.b_offset, slot.rank, m, slot.b_dtype,
                bytes_of(flats[slot.flat]));
    check(std::isfinite(scaling_data[i]) && scaling_data[i] != 0, op, "scalings", "row ", i,
          ": expected a finite scaling other than 0, got ", scaling_data[i]);
  }
  const Tensor u_dense = as_contiguous(u), s_dense = as_contiguous(s), vt_dense = as_contiguous(vt);
  cpu::redistribute(static_cast<const float*>(u_dense.const_data_ptr()),
                    static_cast<const float*>(s_dense.const_data_ptr()),
                    static_cast<const float*>(vt_dense.const_data_ptr()), m, n, r, slot_table.rows,
                    scaling_data, slot_table.count, pointers.data());
}

}  // namespace

std::vector<Tensor> redistribute(const Tensor& u, const Tensor& s, const Tensor& vt,
                                 const Tensor& slots, const Tensor& scalings,
                                 const std::vector<int64_t>& sizes) {
  std::vector<Tensor> flats;
  for (const int64_t size : sizes) {
    check(size >= 0, "redistribute", "sizes", "expected sizes of at least 0 bytes, got ", size);
    flats.push_back(empty_cpu({size}, ScalarType::Byte));
    torch::stable::zero_(flats.back());
  }
  write("redistribute", flats, u, s, vt, slots, scalings);
  return flats;
}

void redistribute_(const std::vector<Tensor>& flats, const Tensor& u, const Tensor& s,
                   const Tensor& vt, const Tensor& slots, const Tensor& scalings) {
  write("redistribute_", flats, u, s, vt, slots, scalings);
}

}  // namespace fastagg::ops

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) {
  m.def(
      "redistribute(Tensor U, Tensor S, Tensor Vt, Tensor slots, Tensor scalings, int[] sizes) "
      "-> Tensor[]");
  m.def(
      "redistribute_(Tensor(a!)[] flats, Tensor U, Tensor S, Tensor Vt, Tensor slots, "
      "Tensor scalings) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) {
  m.impl("redistribute", TORCH_BOX(&fastagg::ops::redistribute));
  m.impl("redistribute_", TORCH_BOX(&fastagg::ops::redistribute_));
}
