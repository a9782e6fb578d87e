// The small square problems, for the tests.
#include <cstdint>
#include <cstring>

#include "cuda/small.h"
#include "workspace.h"

using namespace fastagg::cuda;

extern "C" {

// Factors diag(d) G diag(d) and, where x is given, solves for w (modules, size, cols).
void small_cholesky(const double* g, const double* d, int64_t modules, int64_t size,
                    double tolerance, double* factor, int32_t* pivots, int32_t* rank,
                    double* smallest, double* dropped, const double* w, int64_t cols, double* x) {
  HeapWorkspace workspace;
  const Cholesky found = pivoted_cholesky(g, d, modules, size, tolerance, workspace, nullptr);
  const auto copy = [](auto* to, const auto* from, int64_t count) {
    if (count > 0) std::memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
  };
  copy(factor, found.factor, modules * size * size);
  copy(rank, found.rank, modules);
  copy(smallest, found.smallest, modules);
  copy(dropped, found.dropped, modules);
  for (int64_t l = 0; l < modules; ++l)
    copy(pivots + l * size, found.pivots + l * size, found.rank[l]);
  if (x) coordinates(found, d, w, cols, x, nullptr);
}

void small_core_svd(const double* c, int64_t modules, int64_t size, const int32_t* skip, double* u,
                    double* s, double* v) {
  HeapWorkspace workspace;
  core_svd(c, modules, size, skip, u, s, v, workspace, nullptr);
}
}
