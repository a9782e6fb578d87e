// gram, update_gram and squared_norm of csrc/cuda/kernels.h for Python.
#include "cuda/kernels.h"
#include "workspace.h"

using namespace fastagg;

namespace {

Slab slab(const void* data, int64_t dtype, int64_t rows, int64_t cols) {
  return {data, static_cast<DType>(dtype), rows, cols};
}

}  // namespace

extern "C" {

void gram_f64(const void* a, int64_t dtype, int64_t modules, int64_t rows, int64_t n, double* out) {
  cuda::gram(slab(a, dtype, rows, n), modules, out, nullptr);
}

void update_gram_f64(const void* a, int64_t a_dtype, const void* bt, int64_t bt_dtype,
                     int64_t modules, int64_t rows, int64_t n, int64_t m,
                     const double* coefficients, const int64_t* owners, int64_t clients,
                     double* out) {
  HeapWorkspace workspace;
  cuda::update_gram(slab(a, a_dtype, rows, n), slab(bt, bt_dtype, rows, m), coefficients, owners,
                    modules, clients, out, workspace, nullptr);
}

void squared_norm_f64(const void* a, int64_t a_dtype, const void* bt, int64_t bt_dtype,
                      int64_t modules, int64_t rows, int64_t n, int64_t m,
                      const double* coefficients, double* out) {
  HeapWorkspace workspace;
  cuda::squared_norm(slab(a, a_dtype, rows, n), slab(bt, bt_dtype, rows, m), coefficients, modules,
                     out, workspace, nullptr);
}
}
