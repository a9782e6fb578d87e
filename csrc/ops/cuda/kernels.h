// The CUDA kernels as the ops call them: on the arguments' device and its current stream, with
// temporary memory of torch's allocator.
#pragma once

#include <vector>

#include "../../cuda/kernels.h"
#include "../flats.h"
#include "../reconstruct.h"
#include "current.h"
#include "reconstruct_route.h"

namespace fastagg::ops {

// Tensors that live as long as the call: what the caching allocator then takes back is used again in
// the order of the stream, after the kernels that still write to it.
class TensorWorkspace final : public cuda::Workspace {
 public:
  explicit TensorWorkspace(const Device& home) : home_(home) {}

  void* bytes(int64_t count) override {
    constexpr int64_t kAlignment = 256;
    const std::vector<int64_t> size{count + kAlignment - 1};
    pieces_.push_back(torch::stable::empty(size, ScalarType::Byte, std::nullopt, home_));
    const auto address = reinterpret_cast<uintptr_t>(pieces_.back().mutable_data_ptr());
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  Device home_;
  std::vector<Tensor> pieces_;
};

class CudaKernels {
 public:
  static constexpr DeviceType kDevice = kCudaDevice;

  explicit CudaKernels(const Device& home)
      : current_(home), stream_(current_.stream()), workspace_(home) {}

  void scan(const void* flat, int64_t bytes, const Span* spans, int64_t count, int64_t* nonfinite,
            double* sums) {
    cuda::scan(flat, bytes, spans, count, nonfinite, sums, stream_);
  }

  void stack(const Flats<const void*>& flats, const StackSlot* slots, int64_t count,
             const double* scale, const StackOut& out) {
    cuda::stack(flats.pointers.data(), flats.sizes.data(), flats.count(), slots, count, scale, out,
                workspace_, stream_);
  }

  void redistribute(const float* u, const float* s, const float* vt, int64_t modules, int64_t m,
                    int64_t n, int64_t r, const HandOutSlot* slots, const double* scalings,
                    int64_t count, const Flats<void*>& flats) {
    cuda::redistribute(u, s, vt, modules, m, n, r, slots, scalings, count, flats.pointers.data(),
                       flats.sizes.data(), flats.count(), stream_);
  }

  void reconstruct(const Stack& stack, const double* coefficients, const Tensor& base, bool replace,
                   Route route) {
    if (route == Route::Measured) route = measured_route(stack, coefficients, base.scalar_type());
    if (route == Route::Library)
      multiply_by_library(stack, base, replace);
    else
      cuda::reconstruct(slab_of(stack.a), slab_of(stack.bt), coefficients, stack.modules,
                        base.mutable_data_ptr(), dtype_of(base), replace, workspace_, stream_);
  }

  void gram(const Slab& slab, int64_t modules, double* out) {
    cuda::gram(slab, modules, out, stream_);
  }

  void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                   int64_t modules, int64_t clients, double* out) {
    cuda::update_gram(a, bt, coefficients, owners, modules, clients, out, workspace_, stream_);
  }

  template <class T>
  void gram_svd(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out) {
    cuda::gram_svd(a, bt, coefficients, out, workspace_, stream_);
  }

  template <class T>
  void randomized_svd(const Slab& a, const Slab& bt, const double* coefficients,
                      const Sketch& sketch, const SvdOut<T>& out) {
    cuda::randomized_svd(a, bt, coefficients, sketch, out, workspace_, stream_);
  }

  template <class T>
  void randomized_svd_dense(const Slab& w, const Sketch& sketch, const SvdOut<T>& out) {
    cuda::randomized_svd_dense(w, sketch, out, workspace_, stream_);
  }

 private:
  Current current_;
  cuda::Stream stream_;
  TensorWorkspace workspace_;
};

}  // namespace fastagg::ops
