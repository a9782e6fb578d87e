// The CPU kernels as the ops call them.
#pragma once

#include "../cpu/kernels.h"
#include "../cpu/svd.h"
#include "flats.h"
#include "reconstruct.h"

namespace fastagg::ops {

class CpuKernels {
 public:
  static constexpr DeviceType kDevice = DeviceType::CPU;

  explicit CpuKernels(const Device&) {}

  void scan(const void* flat, int64_t, const Span* spans, int64_t count, int64_t* nonfinite,
            double* sums) {
    cpu::scan(flat, spans, count, nonfinite, sums);
  }

  void stack(const Flats<const void*>& flats, const StackSlot* slots, int64_t count,
             const double* scale, const StackOut& out) {
    cpu::stack(flats.pointers.data(), slots, count, scale, out);
  }

  void redistribute(const float* u, const float* s, const float* vt, int64_t, int64_t m, int64_t n,
                    int64_t r, const HandOutSlot* slots, const double* scalings, int64_t count,
                    const Flats<void*>& flats) {
    cpu::redistribute(u, s, vt, m, n, r, slots, scalings, count, flats.pointers.data());
  }

  // The kernel's products are torch's BLAS: every route is this one.
  void reconstruct(const Stack& stack, const double* coefficients, const Tensor& base, bool replace,
                   Route) {
    cpu::reconstruct(slab_of(stack.a), slab_of(stack.bt), coefficients, stack.modules,
                     base.mutable_data_ptr(), dtype_of(base), replace);
  }

  void gram(const Slab& slab, int64_t modules, double* out) { cpu::gram(slab, modules, out); }

  void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                   int64_t modules, int64_t clients, double* out) {
    cpu::update_gram(a, bt, coefficients, owners, modules, clients, out);
  }

  template <class T>
  void gram_svd(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out) {
    cpu::gram_svd(a, bt, coefficients, out);
  }

  template <class T>
  void randomized_svd(const Slab& a, const Slab& bt, const double* coefficients,
                      const Sketch& sketch, const SvdOut<T>& out) {
    cpu::randomized_svd(a, bt, coefficients, sketch, out);
  }

  template <class T>
  void randomized_svd_dense(const Slab& w, const Sketch& sketch, const SvdOut<T>& out) {
    cpu::randomized_svd_dense(w, sketch, out);
  }
};

}  // namespace fastagg::ops
