// The CUDA kernels, on raw device pointers and checked arguments: the twins of csrc/cpu/kernels.h and
// svd.h. Nothing here waits for the device; every launch is in the order of its stream, and decisions
// that depend on values are taken on the device. Tables and coefficients lie on the device too; only
// the lists of buffers (`flats`, `sizes`) are read on the host, before the call returns.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// A row of `spans` that does not lie within the buffer's `bytes` is not read: it counts -1.
void scan(const void* flat, int64_t bytes, const Span* spans, int64_t count, int64_t* nonfinite,
          double* sum_of_squares, Stream stream);

// A slot whose table row is impossible (outside its buffers or the slabs) is neither read nor
// written, and its non-finite counts are -1.
void stack(const void* const* flats, const int64_t* sizes, int64_t flat_count,
           const StackSlot* slots, int64_t count, const double* scale, const StackOut& out,
           Workspace& workspace, Stream stream);

// Impossible slots are not written.
void redistribute(const float* u, const float* s, const float* vt, int64_t modules, int64_t m,
                  int64_t n, int64_t r, const HandOutSlot* slots, const double* scalings,
                  int64_t count, void* const* flats, const int64_t* sizes, int64_t flat_count,
                  Stream stream);

// base += sum_r c_r bt_r^T a_r for every module; coefficients null means all one. `replace` starts
// from zero instead of from the base's values.
void reconstruct(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                 void* base, DType dtype, bool replace, Workspace& workspace, Stream stream);

void gram(const Slab& slab, int64_t modules, double* out, Stream stream);

// An owner outside of [0, clients) is nobody.
void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                 int64_t modules, int64_t clients, double* out, Workspace& workspace,
                 Stream stream);

void squared_norm(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                  double* out, Workspace& workspace, Stream stream);

template <class T>
void gram_svd(const Slab& a, const Slab& bt, const double* coefficients, const SvdOut<T>& out,
              Workspace& workspace, Stream stream);

template <class T>
void randomized_svd(const Slab& a, const Slab& bt, const double* coefficients, const Sketch& sketch,
                    const SvdOut<T>& out, Workspace& workspace, Stream stream);

template <class T>
void randomized_svd_dense(const Slab& w, const Sketch& sketch, const SvdOut<T>& out,
                          Workspace& workspace, Stream stream);

}  // namespace fastagg::cuda
