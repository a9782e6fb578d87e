// The clients' flat buffers: addressed by byte, whatever dtype they are typed as.
#pragma once

#include <vector>

#include "checks.h"

namespace fastagg::ops {

inline int64_t bytes_of(const Tensor& flat) {
  return flat.numel() * static_cast<int64_t>(flat.element_size());
}

// Buffers on one device, as a kernel takes them.
template <class Pointer>
struct Flats {
  std::vector<Tensor> tensors;
  std::vector<Pointer> pointers;
  std::vector<int64_t> sizes;  // bytes

  int64_t count() const { return static_cast<int64_t>(pointers.size()); }

  void add(const Tensor& flat, Pointer pointer) {
    tensors.push_back(flat);
    pointers.push_back(pointer);
    sizes.push_back(bytes_of(flat));
  }
};

inline Flats<const void*> flats_to_read(const char* op, const std::vector<Tensor>& given,
                                        const Device& home) {
  Flats<const void*> flats;
  for (const Tensor& flat : given) {
    check_device(op, "flats", flat, home);
    const Tensor dense = as_contiguous(flat);
    flats.add(dense, dense.const_data_ptr());
  }
  return flats;
}

inline Flats<void*> flats_to_write(const char* op, const std::vector<Tensor>& given,
                                   const Device& home) {
  Flats<void*> flats;
  for (const Tensor& flat : given) {
    check_device(op, "flats", flat, home);
    check(flat.is_contiguous(), op, "flats", "expected contiguous buffers to write into");
    flats.add(flat, flat.mutable_data_ptr());
  }
  return flats;
}

}  // namespace fastagg::ops
