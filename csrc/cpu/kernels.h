// The CPU kernels, on raw pointers and checked arguments. Matrices are row-major and contiguous.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"

namespace fastagg::cpu {

void scan(const void* flat, const Span* spans, int64_t count, int64_t* nonfinite,
          double* sum_of_squares);

void stack(const void* const* flats, const StackSlot* slots, int64_t count, const double* scale,
           const StackOut& out);

void redistribute(const float* u, const float* s, const float* vt, int64_t m, int64_t n, int64_t r,
                  const HandOutSlot* slots, const double* scalings, int64_t count,
                  void* const* flats);

// base += sum_r c_r bt_r^T a_r for every module; coefficients null means all one. `replace` starts
// from zero instead of from the base's values.
void reconstruct(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                 void* base, DType dtype, bool replace);

void gram(const Slab& slab, int64_t modules, double* out);  // (modules, rows, rows)

// (modules, clients, clients): <dW_i, dW_j> = sum over rows a of i, b of j of
// c_a c_b (B^T B)_ab (A A^T)_ab, by tiles: no R x R matrix is held.
void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                 int64_t modules, int64_t clients, double* out);

// |dW|_F^2 of every module, the same sum over all rows.
void squared_norm(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                  double* out);

}  // namespace fastagg::cpu
