// What a kernel of any device is given: one slab of a stack, where a stack goes, and where the SVD of
// a bucket goes.
#pragma once

#include "tables.h"

namespace fastagg {

// A slab of a stack: (modules, rows, cols) of one dtype.
struct Slab {
  const void* data;
  DType dtype;
  int64_t rows;
  int64_t cols;

  FASTAGG_MEMBER const void* row(int64_t module, int64_t row) const {
    return static_cast<const char*>(data) + ((module * rows + row) * cols) * element_size(dtype);
  }
};

struct StackOut {
  void* a;   // (modules, rows, n)
  void* bt;  // (modules, rows, m)
  DType dtype;
  int64_t modules, rows, m, n;
  int64_t* nonfinite;      // (slots, 2)
  double* sum_of_squares;  // (2, modules, rows)
};

// Columns of the stats of a decomposition.
constexpr int64_t kSquaredNorm = 0;    // |dW|_F^2
constexpr int64_t kCertificate = 1;    // an upper bound of error^2 - optimal^2 at rank r
constexpr int64_t kNumericalRank = 2;  // singular values above rounding (randomized: among l)
constexpr int64_t kStats = 3;

// The promise of an exact route: error <= optimal error + kPromise |dW|.
constexpr double kPromise = 2e-6;

template <class T>
struct SvdOut {
  T* u;   // (modules, m, r)
  T* s;   // (modules, r)
  T* vt;  // (modules, r, n)
  double* stats;
  int64_t modules, m, n, r;
};

struct Sketch {
  int64_t columns;  // l
  int64_t power_iterations;
  uint64_t seed;
  const int64_t* streams;  // (modules), or null: the module's index
};

}  // namespace fastagg
