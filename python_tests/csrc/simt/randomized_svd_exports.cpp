#include "cuda/kernels.h"
#include "workspace.h"

using namespace fastagg;

namespace {

template <class T>
SvdOut<T> out_of(void* u, void* s, void* vt, double* stats, int64_t modules, int64_t m, int64_t n,
                 int64_t r) {
  return {static_cast<T*>(u), static_cast<T*>(s), static_cast<T*>(vt), stats, modules, m, n, r};
}

// Float64 results where a factor is float64.
template <class Run>
void with_type(bool wide, const Run& run) {
  wide ? run(0.0) : run(0.0f);
}

}  // namespace

extern "C" {

void simt_randomized_svd(const void* a, int64_t a_dtype, const void* bt, int64_t bt_dtype,
                         const double* coefficients, int64_t rows, int64_t columns,
                         int64_t power_iterations, uint64_t seed, const int64_t* streams, void* u,
                         void* s, void* vt, double* stats, int64_t modules, int64_t m, int64_t n,
                         int64_t r) {
  HeapWorkspace workspace;
  const auto of_a = static_cast<DType>(a_dtype), of_bt = static_cast<DType>(bt_dtype);
  with_type(of_a == DType::Float64 || of_bt == DType::Float64, [&](auto zero) {
    using T = decltype(zero);
    cuda::randomized_svd({a, of_a, rows, n}, {bt, of_bt, rows, m}, coefficients,
                         {columns, power_iterations, seed, streams},
                         out_of<T>(u, s, vt, stats, modules, m, n, r), workspace, nullptr);
  });
}

void simt_randomized_svd_dense(const void* w, int64_t dtype, int64_t columns,
                               int64_t power_iterations, uint64_t seed, const int64_t* streams,
                               void* u, void* s, void* vt, double* stats, int64_t modules,
                               int64_t m, int64_t n, int64_t r) {
  HeapWorkspace workspace;
  const auto of_w = static_cast<DType>(dtype);
  with_type(of_w == DType::Float64, [&](auto zero) {
    using T = decltype(zero);
    cuda::randomized_svd_dense({w, of_w, m, n}, {columns, power_iterations, seed, streams},
                               out_of<T>(u, s, vt, stats, modules, m, n, r), workspace, nullptr);
  });
}

}  // extern "C"
