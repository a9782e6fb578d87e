// dW as a linear map of skinny matrices, from a stack's factors or dense, for every module of a batch:
// the twin of csrc/cpu/linear_maps.h. In fp32 the slabs' rows are scaled to unit norm and dW by
// 2^-exponent, so that nothing overflows or vanishes on the way.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// What becomes of a product decides how many bf16 terms of a skinny fp32 operand count (skinny.h). A
// basis that dW is applied to once more may be rounded to 16 bits, unless clients cancel each other, when
// rounding what they cancel would drown dW. Final are the products whose columns Q spans, and those with
// Q: what rounding adds to the first is outside of dW's range where but a part of dW's terms cancels, and
// takes the place of a part of it in Q.
enum class Pass { Power, Final };

// What is known of dW beside its products, each (modules).
struct MapNorms {
  double* squared;     // |dW|_F^2
  double* terms;       // the norm of what dW is a sum of: far above |dW| where clients cancel
  int32_t* exponents;  // forward() and adjoint() are those of dW 2^-exponent
};

// Skinny matrices are (modules, n or m, l) row-major; fp64 passes are all alike.
template <class T>
class FactoredMap {
 public:
  FactoredMap(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
              int64_t columns, Workspace& workspace, Stream stream);

  void forward(const T* x, int64_t l, T* y, Pass pass) const;
  void adjoint(const T* y, int64_t l, T* x, Pass pass) const;
  // forward() of each module's Rademacher test matrix (n x l).
  void sketch(uint64_t seed, const int64_t* streams, int64_t l, T* y, Pass pass,
              Workspace& workspace) const;
  const MapNorms& norms() const { return norms_; }

 private:
  void through(const Slab& first, const double* first_scale, const T* in, const Slab& second,
               const double* second_scale, T* out, int64_t l, Pass pass) const;
  template <class Product>
  void with_terms(Pass pass, const Product& product) const;

  Slab a_, bt_;
  int64_t modules_;
  MapNorms norms_;
  double* scale_a_;  // (modules, rows), like the next two
  double* scale_b_;
  double* middle_;
  int32_t* cancels_;  // (modules): whether clients cancel each other
  int32_t* adds_up_;  // (modules): the opposite
  T* inner_;          // (modules, rows, columns)
  Stream stream_;
};

template <class T>
class DenseMap {
 public:
  DenseMap(const Slab& w, int64_t modules, Workspace& workspace, Stream stream);

  void forward(const T* x, int64_t l, T* y, Pass pass) const;
  void adjoint(const T* y, int64_t l, T* x, Pass pass) const;
  void sketch(uint64_t seed, const int64_t* streams, int64_t l, T* y, Pass pass,
              Workspace& workspace) const;
  const MapNorms& norms() const { return norms_; }

 private:
  Slab w_;
  int64_t modules_;
  MapNorms norms_;
  double* scale_;  // (modules, rows): one number a module
  Stream stream_;
};

}  // namespace fastagg::cuda
