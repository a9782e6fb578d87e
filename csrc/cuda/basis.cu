#include "basis.h"

#include <utility>

#include "../ragged/balance.h"
#include "device.h"

namespace fastagg::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kBasisTolerance = 1e-13;  // smaller pivots are noise of the fp32 columns

__device__ __forceinline__ int64_t element() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    identity_kernel(T* x, int64_t count, int64_t size, int64_t l) {
  const int64_t e = element();
  if (e < count) x[e] = e % (size * l) / l == e % l ? T(1) : T(0);
}

template <class T>
void fill_identity(T* x, int64_t modules, int64_t size, int64_t l, Stream stream) {
  const int64_t count = modules * size * l;
  launch(identity_kernel<T>, tiles(count, kThreads), kThreads, 0, stream, x, count, size, l);
}

// The powers of two that scale columns of Gram matrix g (modules, l, l) to about unit norm.
__global__ void __launch_bounds__(kThreads)
    column_scale_kernel(const double* g, int64_t count, int64_t l, double* scale) {
  const int64_t e = element();
  if (e >= count) return;
  const double norm = sqrt(g[e * l + e % l]);
  scale[e] = norm > 0 && isfinite(norm) ? ldexp(1.0, -nearest_exponent(norm)) : 0.0;
}

__global__ void __launch_bounds__(kThreads)
    minus_identity_kernel(double* g, int64_t count, int64_t r) {
  const int64_t e = element();
  if (e < count && e / r % r == e % r) g[e] -= 1.0;
}

// I - E / 2 + 3 E^2 / 8, in place of E^2.
__global__ void __launch_bounds__(kThreads)
    inverse_root_kernel(const double* error, double* squared, int64_t count, int64_t r) {
  const int64_t e = element();
  if (e >= count) return;
  const double identity = e / r % r == e % r ? 1.0 : 0.0;
  squared[e] = identity - 0.5 * error[e] + 0.375 * squared[e];
}

}  // namespace

template <class T>
void fill_identity(const Skinny<T>& x, Stream stream) {
  fill_identity(x.now, x.modules, x.size, x.l, stream);
}

template <class T>
Basis basis_of(const Skinny<T>& y, double tolerance, Workspace& workspace, Stream stream) {
  const int64_t modules = y.modules, l = y.l;
  Basis basis{workspace.take<double>(modules * l * l), workspace.take<double>(modules * l), {}};
  inner_products(y.operand().transposed(), basis.gram, modules, l, y.size, stream);
  launch(column_scale_kernel, tiles(modules * l, kThreads), kThreads, 0, stream, basis.gram,
         modules * l, l, basis.scale);
  basis.cholesky =
      pivoted_cholesky(basis.gram, basis.scale, modules, l, tolerance, workspace, stream);
  return basis;
}

template <class T>
void orthonormalise(Skinny<T>& y, Workspace& workspace, Stream stream) {
  const int64_t modules = y.modules, l = y.l;
  const Basis basis = basis_of(y, kBasisTolerance, workspace, stream);
  auto* identity = workspace.take<double>(modules * l * l);
  auto* x = workspace.take<double>(modules * l * l);
  fill_identity(identity, modules, l, l, stream);
  coordinates(basis.cholesky, basis.scale, identity, l, x, stream);
  multiply(y.operand(), row_major(x, l, l), {y.next, kDType<T>, y.size * l, l, 1},
           {modules, y.size, l, l}, nullptr, stream);
  std::swap(y.now, y.next);
}

// x0 (I - E / 2 + 3 E^2 / 8) with E = (Z x0)^T (Z x0) - I, which moves no column by more than its error.
template <class T>
double* polished(const Skinny<T>& z, const double* x0, int64_t r, Workspace& workspace,
                 Stream stream) {
  const int64_t modules = z.modules, l = z.l, count = modules * r * r;
  auto* vectors = workspace.take<double>(modules * z.size * r);
  auto* error = workspace.take<double>(count);
  auto* root = workspace.take<double>(count);
  auto* x = workspace.take<double>(modules * l * r);
  multiply(z.operand(), row_major(x0, l, r), row_major_result(vectors, z.size, r),
           {modules, z.size, r, l}, nullptr, stream);
  inner_products(row_major(vectors, z.size, r).transposed(), error, modules, r, z.size, stream);
  launch(minus_identity_kernel, tiles(count, kThreads), kThreads, 0, stream, error, count, r);
  multiply(row_major(error, r, r), row_major(error, r, r), row_major_result(root, r, r),
           {modules, r, r, r}, nullptr, stream);
  launch(inverse_root_kernel, tiles(count, kThreads), kThreads, 0, stream, error, root, count, r);
  multiply(row_major(x0, l, r), row_major(root, r, r), row_major_result(x, l, r),
           {modules, l, r, r}, nullptr, stream);
  return x;
}

template void fill_identity(const Skinny<float>&, Stream);
template void fill_identity(const Skinny<double>&, Stream);
template Basis basis_of(const Skinny<float>&, double, Workspace&, Stream);
template Basis basis_of(const Skinny<double>&, double, Workspace&, Stream);
template void orthonormalise(Skinny<float>&, Workspace&, Stream);
template void orthonormalise(Skinny<double>&, Workspace&, Stream);
template double* polished(const Skinny<float>&, const double*, int64_t, Workspace&, Stream);
template double* polished(const Skinny<double>&, const double*, int64_t, Workspace&, Stream);

}  // namespace fastagg::cuda
