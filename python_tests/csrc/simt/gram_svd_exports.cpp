// The exact SVD route and its parts for Python.
#include "cuda/finish.h"
#include "cuda/gram_svd.h"
#include "cuda/kernels.h"
#include "cuda/qr_svd.h"
#include "workspace.h"

using namespace fastagg;

namespace {

// Calls `compute` with the results in fp32, or in fp64 where `wide`.
template <class Compute>
void with_out(int64_t wide, void* u, void* s, void* vt, double* stats, const int64_t* sizes,
              const Compute& compute) {
  const auto call = [&](auto zero) {
    using T = decltype(zero);
    compute(SvdOut<T>{static_cast<T*>(u), static_cast<T*>(s), static_cast<T*>(vt), stats, sizes[0],
                      sizes[2], sizes[3], sizes[4]});
  };
  wide ? call(0.0) : call(0.0f);
}

}  // namespace

extern "C" {

// sizes: modules, rows, m, n, r. dtypes: of a and of bt. A chunk of 0 modules: as many as it chooses.
void simt_gram_svd(const void* a, const void* bt, const int64_t* dtypes, const double* coefficients,
                   const int64_t* sizes, int64_t wide, void* u, void* s, void* vt, double* stats,
                   int64_t chunk) {
  HeapWorkspace workspace;
  with_out(wide, u, s, vt, stats, sizes, [&](const auto& out) {
    const Slab slab_a{a, DType(dtypes[0]), sizes[1], sizes[3]};
    const Slab slab_b{bt, DType(dtypes[1]), sizes[1], sizes[2]};
    if (chunk == 0)
      cuda::gram_svd(slab_a, slab_b, coefficients, out, workspace, nullptr);
    else
      cuda::gram_svd_by_chunks(slab_a, slab_b, coefficients, out, chunk, workspace, nullptr);
  });
}

void simt_qr_svd(const void* a, const void* bt, const int64_t* dtypes, const double* alpha,
                 const double* beta, const int32_t* lossy, const int64_t* sizes, int64_t wide,
                 void* u, void* s, void* vt, double* stats, int32_t* kept) {
  HeapWorkspace workspace;
  with_out(wide, u, s, vt, stats, sizes, [&](const auto& out) {
    cuda::qr_svd({a, DType(dtypes[0]), sizes[1], sizes[3]},
                 {bt, DType(dtypes[1]), sizes[1], sizes[2]}, alpha, beta, lossy, out, kept,
                 workspace, nullptr);
  });
}

void simt_finish(const int64_t* sizes, int64_t wide, const int32_t* kept, const int32_t* nonfinite,
                 void* u, void* s, void* vt, double* stats) {
  HeapWorkspace workspace;
  with_out(wide, u, s, vt, stats, sizes,
           [&](const auto& out) { cuda::finish(out, kept, nonfinite, workspace, nullptr); });
}
}
