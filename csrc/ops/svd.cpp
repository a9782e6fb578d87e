#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../cpu/svd.h"
#include "checks.h"
#include "slabs.h"

namespace fastagg::ops {
namespace {

using Decomposition = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Results are float32, or float64 where a factor is. `compute` gets a SvdOut of that type.
template <class Compute>
Decomposition decompose(bool wide, int64_t modules, int64_t m, int64_t n, int64_t r,
                        const Compute& compute) {
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor u = empty_cpu({modules, m, r}, dtype), s = empty_cpu({modules, r}, dtype);
  Tensor vt = empty_cpu({modules, r, n}, dtype);
  Tensor stats = empty_cpu({modules, kStats}, ScalarType::Double);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    compute(SvdOut<T>{static_cast<T*>(u.mutable_data_ptr()), static_cast<T*>(s.mutable_data_ptr()),
                      static_cast<T*>(vt.mutable_data_ptr()),
                      static_cast<double*>(stats.mutable_data_ptr()), modules, m, n, r});
  };
  wide ? run(0.0) : run(0.0f);
  return {u, s, vt, stats};
}

void check_rank(const char* op, int64_t rank, int64_t modules, int64_t m, int64_t n) {
  check(rank >= 0, op, "rank", "expected a rank of at least 0, got ", rank);
  check_countable(op, "rank", {modules, std::max(m, n), rank});
}

constexpr int64_t kSmallestSketched = 64;

struct SketchArguments {
  Sketch sketch;
  Tensor streams;
};

SketchArguments sketch_of(const char* op, int64_t modules, int64_t m, int64_t n, int64_t rank,
                          int64_t oversampling, int64_t power_iterations, int64_t seed,
                          const std::optional<Tensor>& streams, const Tensor& any) {
  check_rank(op, rank, modules, m, n);
  check(oversampling >= 0, op, "oversampling", "expected at least 0 columns, got ", oversampling);
  check(power_iterations >= 0, op, "power_iterations", "expected at least 0, got ",
        power_iterations);
  const int64_t most = std::min(m, n), first = std::min(rank, most);
  int64_t columns = first + std::min(oversampling, most - first);
  // A basis of the whole space costs less than power iterations of half its size, and leaves
  // nothing to chance where a few random signs are all too likely to repeat each other.
  if (most <= std::max(2 * columns, kSmallestSketched)) columns = most;
  check_countable(op, "oversampling", {modules, std::max(m, n), columns});
  SketchArguments out{{columns, power_iterations, static_cast<uint64_t>(seed), nullptr}, any};
  if (streams) {
    check_cpu(op, "streams", *streams);
    check_shape(op, "streams", *streams, {modules});
    check(streams->scalar_type() == ScalarType::Long, op, "streams", "expected dtype Long, got ",
          name_of(streams->scalar_type()));
    out.streams = as_contiguous(*streams);
    out.sketch.streams = static_cast<const int64_t*>(out.streams.const_data_ptr());
  }
  return out;
}

bool is_wide(const Stack& stack) {
  return stack.a.scalar_type() == ScalarType::Double ||
         stack.bt.scalar_type() == ScalarType::Double;
}

}  // namespace

Decomposition gram_svd(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                       int64_t rank) {
  const Stack stack = stack_of("gram_svd", a, bt, true);
  const auto c = coefficients("gram_svd", given, stack.modules, stack.rows);
  check_rank("gram_svd", rank, stack.modules, stack.m, stack.n);
  check_countable("gram_svd", "A", {stack.modules, stack.rows, stack.rows});
  return decompose(is_wide(stack), stack.modules, stack.m, stack.n, rank, [&](const auto& out) {
    cpu::gram_svd(slab_of(stack.a), slab_of(stack.bt), c.empty() ? nullptr : c.data(), out);
  });
}

Decomposition randomized_svd(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                             int64_t rank, int64_t oversampling, int64_t power_iterations,
                             int64_t seed, const std::optional<Tensor>& streams) {
  const Stack stack = stack_of("randomized_svd", a, bt, true);
  const auto c = coefficients("randomized_svd", given, stack.modules, stack.rows);
  const auto arguments = sketch_of("randomized_svd", stack.modules, stack.m, stack.n, rank,
                                   oversampling, power_iterations, seed, streams, a);
  return decompose(is_wide(stack), stack.modules, stack.m, stack.n, rank, [&](const auto& out) {
    cpu::randomized_svd(slab_of(stack.a), slab_of(stack.bt), c.empty() ? nullptr : c.data(),
                        arguments.sketch, out);
  });
}

Decomposition randomized_svd_dense(const Tensor& w, int64_t rank, int64_t oversampling,
                                   int64_t power_iterations, int64_t seed,
                                   const std::optional<Tensor>& streams) {
  const char* op = "randomized_svd_dense";
  check_cpu(op, "W", w);
  check(w.dim() == 3, op, "W", "expected shape (modules, m, n), got ", shape_of(w));
  const bool wide = w.scalar_type() == ScalarType::Double;
  check(wide || is_factor_dtype(w.scalar_type()), op, "W",
        "expected dtype Float, BFloat16, Half or Double, got ", name_of(w.scalar_type()));
  const Tensor dense = as_contiguous(w);
  const auto arguments = sketch_of(op, w.size(0), w.size(1), w.size(2), rank, oversampling,
                                   power_iterations, seed, streams, w);
  return decompose(wide, w.size(0), w.size(1), w.size(2), rank, [&](const auto& out) {
    cpu::randomized_svd_dense(slab_of(dense), arguments.sketch, out);
  });
}

}  // namespace fastagg::ops

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) {
  m.def(
      "gram_svd(Tensor A, Tensor Bt, Tensor? coefficients, int rank) "
      "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)");
  m.def(
      "randomized_svd(Tensor A, Tensor Bt, Tensor? coefficients, int rank, int oversampling, "
      "int power_iterations, int seed, Tensor? streams) "
      "-> (Tensor U, Tensor S, Tensor Vt, Tensor stats)");
  m.def(
      "randomized_svd_dense(Tensor W, int rank, int oversampling, int power_iterations, int seed, "
      "Tensor? streams) -> (Tensor U, Tensor S, Tensor Vt, Tensor stats)");
}

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) {
  m.impl("gram_svd", TORCH_BOX(&fastagg::ops::gram_svd));
  m.impl("randomized_svd", TORCH_BOX(&fastagg::ops::randomized_svd));
  m.impl("randomized_svd_dense", TORCH_BOX(&fastagg::ops::randomized_svd_dense));
}
