// What the CPU kernels ask of their host: threads, matrix products and a small dense SVD. Declared
// here on raw pointers, implemented by csrc/ops/runtime.cpp with torch's own pool and BLAS, so that
// no kernel includes a torch header.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace fastagg::cpu {

using TaskFunction = void (*)(void* context, int64_t task);

// Runs the tasks 0 .. count-1, each once, on torch's threads; the first exception is rethrown.
// Matrix products inside a task use one thread whatever the number of tasks: the bits of a result
// depend neither on the number of threads nor on how modules are grouped into calls.
void run_tasks(int64_t count, TaskFunction function, void* context);

template <class F>
void for_each_task(int64_t count, F&& function) {
  using Function = std::remove_reference_t<F>;
  run_tasks(
      count, [](void* context, int64_t task) { (*static_cast<Function*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

// A strided view; element (i, j) is data[i * row_stride + j * col_stride].
template <class T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

template <class T>
Matrix<T> row_major(T* data, int64_t rows, int64_t cols) {
  return {data, rows, cols, cols, 1};
}

// out = a b, or out += a b. The out matrix has unit column stride.
void multiply(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out);
void multiply(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out);
void multiply_add(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out);
void multiply_add(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out);

// SVD by LAPACK: a = u diag(s) vt, all (n, n) row-major. Only square: see householder.h.
void square_svd(const double* a, int64_t n, double* u, double* s, double* vt);

// An aligned, uninitialised workspace. 64 bytes: a cache line, and the alignment at which BLAS
// results do not depend on the address.
template <class T>
class Workspace {
 public:
  explicit Workspace(int64_t count) {
    if (count == 0) return;
    constexpr int64_t kMost = (INT64_MAX - 63) / static_cast<int64_t>(sizeof(T));
    if (count > 0 && count <= kMost)
      data_.reset(static_cast<T*>(
          std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace fastagg::cpu
