#include "householder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "runtime.h"
#include "vectorize.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kWidth = 32;  // columns between two updates by BLAS
constexpr int64_t kLanes = 8;

FASTAGG_VECTORIZE double dot(const double* a, const double* b, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  double total = 0;
  for (; i < count; ++i) total += a[i] * b[i];
  for (int64_t l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

FASTAGG_VECTORIZE void add_scaled(double* to, const double* from, double factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// Turns x into the reflector v (v[0] = 1) and returns tau: (I - tau v v^T) x = beta e_1.
double make_reflector(double* x, int64_t count, double* beta) {
  const double tail = dot(x + 1, x + 1, count - 1);
  *beta = x[0];
  x[0] = 1.0;
  if (tail == 0) return 0.0;
  const double head = *beta;
  *beta = -std::copysign(std::sqrt(head * head + tail), head);
  for (int64_t i = 1; i < count; ++i) x[i] /= head - *beta;
  return (*beta - head) / *beta;
}

std::vector<double> transposed(const double* a, int64_t rows, int64_t cols) {
  std::vector<double> out(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) out[j * rows + i] = a[i * cols + j];
  return out;
}

}  // namespace

HouseholderQr::HouseholderQr(std::vector<double> columns, int64_t size, int64_t cols)
    : columns_(std::move(columns)), size_(size), cols_(cols), rank_(std::min(size, cols)) {
  for (int64_t first = 0; first < rank_; first += kWidth) {
    blocks_.push_back(factor(first, std::min(kWidth, rank_ - first)));
    const int64_t next = first + blocks_.back().width;
    reflect(blocks_.back(), true, columns_.data() + next * size_, cols_ - next);
  }
}

HouseholderQr::Block HouseholderQr::factor(int64_t first, int64_t width) {
  const int64_t length = size_ - first;
  Block block{first, width, std::vector<double>(static_cast<size_t>(width * length), 0.0),
              std::vector<double>(static_cast<size_t>(width * width), 0.0)};
  for (int64_t j = 0; j < width; ++j) {
    double* column = columns_.data() + (first + j) * size_ + first;
    double* v = block.v.data() + j * length;
    std::copy(column + j, column + length, v + j);
    double beta = 0;
    const double tau = make_reflector(v + j, length - j, &beta);
    column[j] = beta;
    for (int64_t k = j + 1; k < width; ++k) {
      double* other = columns_.data() + (first + k) * size_ + first;
      add_scaled(other + j, v + j, -tau * dot(v + j, other + j, length - j), length - j);
    }
    // T grows by one column: T[:j, j] = -tau T (V^T v_j).
    double* t = block.t.data();
    for (int64_t i = 0; i < j; ++i)
      t[i * width + j] = -tau * dot(block.v.data() + i * length + j, v + j, length - j);
    for (int64_t i = 0; i < j; ++i) {
      double sum = 0;
      for (int64_t k = i; k < j; ++k) sum += t[i * width + k] * t[k * width + j];
      t[i * width + j] = sum;
    }
    t[j * width + j] = tau;
  }
  return block;
}

// columns = (I - V T V^T) columns, or its transpose, for `count` columns of the whole size.
void HouseholderQr::reflect(const Block& block, bool transposed, double* columns,
                            int64_t count) const {
  if (count <= 0) return;
  const int64_t length = size_ - block.first, width = block.width;
  const Matrix<double> rows{columns + block.first, count, length, size_, 1};
  const auto v = row_major(const_cast<double*>(block.v.data()), width, length);
  const auto t = row_major(const_cast<double*>(block.t.data()), width, width);
  Workspace<double> inner(count * width), scaled(count * width), update(count * length);
  multiply(rows, v.transposed(), row_major(inner.get(), count, width));
  multiply(row_major(inner.get(), count, width), transposed ? t : t.transposed(),
           row_major(scaled.get(), count, width));
  multiply(row_major(scaled.get(), count, width), v, row_major(update.get(), count, length));
  for (int64_t j = 0; j < count; ++j)
    add_scaled(rows.data + j * size_, update.get() + j * length, -1.0, length);
}

std::vector<double> HouseholderQr::upper() const {
  std::vector<double> r(static_cast<size_t>(rank_ * cols_), 0.0);
  for (int64_t j = 0; j < cols_; ++j)
    for (int64_t i = 0; i <= std::min(j, rank_ - 1); ++i)
      r[i * cols_ + j] = columns_[j * size_ + i];
  return r;
}

std::vector<double> HouseholderQr::times(const std::vector<double>& x, int64_t count) const {
  std::vector<double> out(static_cast<size_t>(count * size_), 0.0);
  for (int64_t j = 0; j < count; ++j)
    std::copy_n(x.data() + j * rank_, rank_, out.data() + j * size_);
  for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block)
    reflect(*block, false, out.data(), count);
  return out;
}

void svd(const double* a, int64_t p, int64_t q, double* u, double* s, double* vt) {
  if (p == q) return square_svd(a, p, u, s, vt);
  const int64_t k = std::min(p, q);
  // A wide matrix is the transposed of a tall one; a's rows are the transposed's columns.
  const bool wide = p < q;
  const HouseholderQr qr(wide ? std::vector<double>(a, a + p * q) : transposed(a, p, q),
                         std::max(p, q), k);
  std::vector<double> left(static_cast<size_t>(k * k)), right(left);
  square_svd(qr.upper().data(), k, left.data(), s, right.data());
  const std::vector<double> tall = qr.times(transposed(left.data(), k, k), k);
  if (wide) {
    std::copy(tall.begin(), tall.end(), vt);
    const std::vector<double> other = transposed(right.data(), k, k);
    std::copy(other.begin(), other.end(), u);
  } else {
    const std::vector<double> vectors = transposed(tall.data(), k, p);
    std::copy(vectors.begin(), vectors.end(), u);
    std::copy(right.begin(), right.end(), vt);
  }
}

}  // namespace fastagg::cpu
