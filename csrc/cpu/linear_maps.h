// dW as a linear map of skinny matrices, from a stack's factors or dense, for every module of a
// bucket, scaled so that nothing overflows or vanishes in fp32 on the way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../ragged/balance.h"
#include "products.h"

namespace fastagg::cpu {

// A skinny matrix (size, l) for every module.
template <class T>
struct Skinny {
  Workspace<T> data;
  int64_t size, l;
  Skinny(int64_t modules, int64_t size, int64_t l) : data(modules * size * l), size(size), l(l) {}
  Matrix<T> rows(int64_t module, int64_t first, int64_t count) const {
    return row_major(data.get() + (module * size + first) * l, count, l);
  }
  Matrix<T> all(int64_t module) const { return rows(module, 0, size); }
};

// out = slab x for every module, by row tiles.
template <class T>
void contract(const Slab& slab, const std::vector<double>& scale, const Skinny<T>& x,
              int64_t modules, const Skinny<T>& out) {
  const int64_t count = tiles(slab.rows, kTile);
  for_each_task(modules * count, [&](int64_t task) {
    const int64_t l = task / count, row = task % count * kTile;
    const int64_t height = std::min(kTile, slab.rows - row);
    if (slab.cols == 0)
      std::fill_n(out.rows(l, row, height).data, height * out.l, T(0));
    else
      contract_rows(slab, l, scale.data() + l * slab.rows, x.all(l), row, height,
                    out.rows(l, row, height));
  });
}

// out = slab^T x for every module, by column panels.
template <class T>
void expand(const Slab& slab, const std::vector<double>& scale, const Skinny<T>& x, int64_t modules,
            const Skinny<T>& out) {
  const int64_t count = tiles(slab.cols, kPanel);
  for_each_task(modules * count, [&](int64_t task) {
    const int64_t l = task / count, col = task % count * kPanel;
    const int64_t width = std::min(kPanel, slab.cols - col);
    if (slab.rows == 0)
      std::fill_n(out.rows(l, col, width).data, width * out.l, T(0));
    else
      expand_panel(slab, l, scale.data() + l * slab.rows, x.all(l), col, width,
                   out.rows(l, col, width));
  });
}

inline std::vector<double> row_norms(const Slab& slab, int64_t modules) {
  std::vector<double> norms(static_cast<size_t>(modules * slab.rows));
  for_each_task(modules * slab.rows, [&](int64_t row) {
    Workspace<double> values(slab.cols);
    load(slab.row(0, row), slab.dtype, slab.cols, 1.0, values.get());
    double sum = 0;
    for (int64_t i = 0; i < slab.cols; ++i) sum += values[i] * values[i];
    norms[row] = std::sqrt(sum);
  });
  return norms;
}

// dW of a stack as a linear map, its factors' rows scaled to unit norm and dW by 2^-exponent, so
// that nothing overflows or vanishes in fp32 on the way.
template <class T>
class FactoredMap {
 public:
  FactoredMap(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules)
      : a_(a),
        bt_(bt),
        modules_(modules),
        middle_(static_cast<size_t>(modules * a.rows)),
        exponent_(static_cast<size_t>(modules), 0),
        terms_(static_cast<size_t>(modules), 0.0) {
    const int64_t rows = a.rows;
    scale_a_ = row_norms(a, modules);
    scale_b_ = row_norms(bt, modules);
    for (int64_t l = 0; l < modules; ++l) {
      double largest = 0;
      for (int64_t j = l * rows; j < (l + 1) * rows; ++j) {
        const double c = coefficients ? coefficients[j] : 1.0;
        // An infinite norm has no exponent: let NaN into the products instead.
        const double finite = 0.0 * (c + scale_a_[j] + scale_b_[j]);
        const double term = std::abs(c) * scale_a_[j] * scale_b_[j];
        largest = std::max(largest, term);
        terms_[l] = std::hypot(terms_[l], term);
        scale_a_[j] = finite == 0 ? unit_scale(scale_a_[j]) : finite;
        scale_b_[j] = finite == 0 ? unit_scale(scale_b_[j]) : finite;
        const double unscaled = scale_a_[j] * scale_b_[j];
        middle_[j] = unscaled == 0 ? 0.0 : c / unscaled;
      }
      if (largest > 0 && std::isfinite(largest)) exponent_[l] = nearest_exponent(largest);
      for (int64_t j = l * rows; j < (l + 1) * rows; ++j)
        middle_[j] = std::ldexp(middle_[j], -exponent_[l]);
    }
  }

  int exponent(int64_t module) const { return exponent_[module]; }
  // The norm of what dW is a sum of: far above |dW| where clients cancel each other.
  double terms(int64_t module) const { return terms_[module]; }

  void forward(const Skinny<T>& x, const Skinny<T>& y) const {
    through(a_, scale_a_, x, bt_, scale_b_, y);
  }
  void adjoint(const Skinny<T>& y, const Skinny<T>& x) const {
    through(bt_, scale_b_, y, a_, scale_a_, x);
  }

 private:
  void through(const Slab& first, const std::vector<double>& first_scale, const Skinny<T>& in,
               const Slab& second, const std::vector<double>& second_scale,
               const Skinny<T>& out) const {
    const Skinny<T> inner(modules_, first.rows, in.l);
    contract(first, first_scale, in, modules_, inner);
    for (int64_t j = 0; j < modules_ * first.rows; ++j)
      for (int64_t i = 0; i < in.l; ++i)
        inner.data[j * in.l + i] = static_cast<T>(inner.data[j * in.l + i] * middle_[j]);
    expand(second, second_scale, inner, modules_, out);
  }

  Slab a_, bt_;
  int64_t modules_;
  std::vector<double> scale_a_, scale_b_, middle_;
  std::vector<int> exponent_;
  std::vector<double> terms_;
};

// A dense dW (modules, m, n) as a linear map.
template <class T>
class DenseMap {
 public:
  DenseMap(const Slab& w, const std::vector<double>& squared_norms)
      : w_(w), modules_(static_cast<int64_t>(squared_norms.size())) {
    for (const double squared : squared_norms) {
      const bool usable = squared > 0 && std::isfinite(squared);
      const double scale = usable ? unit_scale(std::sqrt(squared)) : 1.0;
      scale_.insert(scale_.end(), static_cast<size_t>(w.rows), scale);
      exponent_.push_back(-nearest_exponent(scale));
      terms_.push_back(std::sqrt(squared));
    }
  }

  int exponent(int64_t module) const { return exponent_[module]; }
  double terms(int64_t module) const { return terms_[module]; }
  void forward(const Skinny<T>& x, const Skinny<T>& y) const {
    contract(w_, scale_, x, modules_, y);
  }
  void adjoint(const Skinny<T>& y, const Skinny<T>& x) const { expand(w_, scale_, y, modules_, x); }

 private:
  Slab w_;
  int64_t modules_;
  std::vector<double> scale_;
  std::vector<int> exponent_;
  std::vector<double> terms_;
};

}  // namespace fastagg::cpu
