#include "cuda/kernels.h"
#include "workspace.h"

using namespace fastagg;

extern "C" void simt_reconstruct(const void* a, int64_t a_dtype, const void* bt, int64_t bt_dtype,
                                 const double* coefficients, int64_t modules, int64_t rows,
                                 int64_t m, int64_t n, void* base, int64_t dtype, bool replace) {
  HeapWorkspace workspace;
  cuda::reconstruct({a, static_cast<DType>(a_dtype), rows, n},
                    {bt, static_cast<DType>(bt_dtype), rows, m}, coefficients, modules, base,
                    static_cast<DType>(dtype), replace, workspace, nullptr);
}
