#pragma once

#include <algorithm>

#include "results.h"
#include "slabs.h"
#include "tables.h"

namespace fastagg::ops {

using Decomposition = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Results are float32, or float64 where a factor is. `compute` gets a SvdOut of that type.
template <class Compute>
Decomposition decompose(const Device& home, bool wide, int64_t modules, int64_t m, int64_t n,
                        int64_t r, const Compute& compute) {
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor u = empty_on(home, {modules, m, r}, dtype), s = empty_on(home, {modules, r}, dtype);
  Tensor vt = empty_on(home, {modules, r, n}, dtype);
  Tensor stats = empty_on(home, {modules, kStats}, ScalarType::Double);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    compute(SvdOut<T>{data_of<T>(u), data_of<T>(s), data_of<T>(vt), data_of<double>(stats), modules,
                      m, n, r});
  };
  wide ? run(0.0) : run(0.0f);
  return {u, s, vt, stats};
}

inline void check_rank(const char* op, int64_t rank, int64_t modules, int64_t m, int64_t n) {
  check(rank >= 0, op, "rank", "expected a rank of at least 0, got ", rank);
  check_countable(op, "rank", {modules, std::max(m, n), rank});
}

constexpr int64_t kSmallestSketched = 64;

// A sketch, and the memory of its streams.
class SketchArguments {
 public:
  SketchArguments(const char* op, const Device& home, int64_t modules, int64_t m, int64_t n,
                  int64_t rank, int64_t oversampling, int64_t power_iterations, int64_t seed,
                  const std::optional<Tensor>& streams)
      : home_(home) {
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
    if (streams) streams_.emplace(values_of<int64_t>(op, "streams", *streams, home, {modules}));
    sketch_ = {columns, power_iterations, static_cast<uint64_t>(seed), nullptr};
  }

  Sketch sketch() {
    if (streams_) sketch_.streams = streams_->on(home_);
    return sketch_;
  }

 private:
  Device home_;
  Sketch sketch_;
  std::optional<Table<int64_t>> streams_;
};

inline bool is_wide(const Stack& stack) {
  return stack.a.scalar_type() == ScalarType::Double ||
         stack.bt.scalar_type() == ScalarType::Double;
}

template <class Kernels>
Decomposition gram_svd(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                       int64_t rank) {
  const char* op = "gram_svd";
  const Stack stack = stack_of(op, a, bt, Kernels::kDevice, true);
  const Coefficients c(op, given, stack);
  check_rank(op, rank, stack.modules, stack.m, stack.n);
  check_countable(op, "A", {stack.modules, stack.rows, stack.rows});

  Kernels kernels(stack.home);
  return decompose(stack.home, is_wide(stack), stack.modules, stack.m, stack.n, rank,
                   [&](const auto& out) {
                     kernels.gram_svd(slab_of(stack.a), slab_of(stack.bt), c.data(), out);
                   });
}

template <class Kernels>
Decomposition randomized_svd(const Tensor& a, const Tensor& bt, const std::optional<Tensor>& given,
                             int64_t rank, int64_t oversampling, int64_t power_iterations,
                             int64_t seed, const std::optional<Tensor>& streams) {
  const char* op = "randomized_svd";
  const Stack stack = stack_of(op, a, bt, Kernels::kDevice, true);
  const Coefficients c(op, given, stack);
  SketchArguments arguments(op, stack.home, stack.modules, stack.m, stack.n, rank, oversampling,
                            power_iterations, seed, streams);

  Kernels kernels(stack.home);
  return decompose(stack.home, is_wide(stack), stack.modules, stack.m, stack.n, rank,
                   [&](const auto& out) {
                     kernels.randomized_svd(slab_of(stack.a), slab_of(stack.bt), c.data(),
                                            arguments.sketch(), out);
                   });
}

template <class Kernels>
Decomposition randomized_svd_dense(const Tensor& w, int64_t rank, int64_t oversampling,
                                   int64_t power_iterations, int64_t seed,
                                   const std::optional<Tensor>& streams) {
  const char* op = "randomized_svd_dense";
  const Device home = home_of(op, "W", w, Kernels::kDevice);
  check(w.dim() == 3, op, "W", "expected shape (modules, m, n), got ", shape_of(w));
  const bool wide = w.scalar_type() == ScalarType::Double;
  check(wide || is_factor_dtype(w.scalar_type()), op, "W",
        "expected dtype Float, BFloat16, Half or Double, got ", name_of(w.scalar_type()));
  const Tensor dense = as_contiguous(w);
  SketchArguments arguments(op, home, w.size(0), w.size(1), w.size(2), rank, oversampling,
                            power_iterations, seed, streams);

  Kernels kernels(home);
  return decompose(home, wide, w.size(0), w.size(1), w.size(2), rank, [&](const auto& out) {
    kernels.randomized_svd_dense(slab_of(dense), arguments.sketch(), out);
  });
}

}  // namespace fastagg::ops
