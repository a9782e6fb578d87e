// Memory for what an op returns.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

#include "checks.h"

namespace fastagg::ops {

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

inline Tensor empty_on(const Device& home, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  Tensor tensor = torch::stable::empty(sizes, dtype, std::nullopt, home);
  if (home.is_cpu()) advise_huge_pages(tensor);
  return tensor;
}

template <class T>
T* data_of(const Tensor& result) {
  return static_cast<T*>(result.mutable_data_ptr());
}

}  // namespace fastagg::ops
