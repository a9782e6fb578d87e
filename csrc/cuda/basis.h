// Skinny matrices (modules, size, l) of a randomized SVD, in fp32 or fp64, and orthonormal bases of their
// columns' span by an fp64 Gram matrix and a pivoted Cholesky: nothing in it can fail.
#pragma once

#include <cstdint>

#include "products.h"
#include "small.h"

namespace fastagg::cuda {

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::Float32 : DType::Float64;

// A skinny matrix that changes: what is made of it goes to the other of two buffers.
template <class T>
struct Skinny {
  T* now;
  T* next;
  int64_t modules, size, l;

  Skinny(int64_t modules, int64_t size, int64_t l, Workspace& workspace)
      : now(workspace.take<T>(modules * size * l)),
        next(workspace.take<T>(modules * size * l)),
        modules(modules),
        size(size),
        l(l) {}

  Operand operand() const { return {now, kDType<T>, size * l, l, 1}; }
};

// The first l columns of the identity.
template <class T>
void fill_identity(const Skinny<T>& x, Stream stream);

// The pivoted Cholesky of Y^T Y, after Y's columns are scaled to about unit norm by powers of two.
struct Basis {
  double* gram;   // (modules, l, l), of the columns as they are
  double* scale;  // (modules, l)
  Cholesky cholesky;
};

template <class T>
Basis basis_of(const Skinny<T>& y, double tolerance, Workspace& workspace, Stream stream);

// Replaces the columns by an orthonormal basis of their span, zeros after its dimension.
template <class T>
void orthonormalise(Skinny<T>& y, Workspace& workspace, Stream stream);

// x (modules, l, r) such that Z x is orthonormal where Z x0 nearly is, or zero in the same columns.
template <class T>
double* polished(const Skinny<T>& z, const double* x0, int64_t r, Workspace& workspace,
                 Stream stream);

}  // namespace fastagg::cuda
