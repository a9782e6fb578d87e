// The kernels' runtime without torch: naive products, a Jacobi SVD, and tasks in an order of
// choice.
#include "plain_runtime.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/runtime.h"

namespace fastagg::cpu {

Order order = Order::Forward;

void run_tasks(int64_t count, TaskFunction function, void* context) {
  if (count <= 0) return;
  if (order == Order::Threads) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t task; (task = next.fetch_add(1)) < count;) function(context, task);
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
    return;
  }
  std::vector<int64_t> tasks(static_cast<size_t>(count));
  std::iota(tasks.begin(), tasks.end(), 0);
  if (order == Order::Reverse) std::reverse(tasks.begin(), tasks.end());
  if (order == Order::Shuffled) std::shuffle(tasks.begin(), tasks.end(), std::mt19937(1));
  for (const int64_t task : tasks) function(context, task);
}

namespace {

template <class T>
void product(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out, bool add) {
  std::vector<T> line(static_cast<size_t>(out.cols));
  for (int64_t i = 0; i < out.rows; ++i) {
    std::fill(line.begin(), line.end(), T(0));
    for (int64_t k = 0; k < a.cols; ++k) {
      const T factor = a.data[i * a.row_stride + k * a.col_stride];
      const T* row = b.data + k * b.row_stride;
      for (int64_t j = 0; j < out.cols; ++j) line[j] += factor * row[j * b.col_stride];
    }
    T* to = out.data + i * out.row_stride;
    for (int64_t j = 0; j < out.cols; ++j) to[j] = (add ? to[j] : T(0)) + line[j];
  }
}

}  // namespace

void multiply(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out) {
  product(a, b, out, false);
}
void multiply(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out) {
  product(a, b, out, false);
}
void multiply_add(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out) {
  product(a, b, out, true);
}
void multiply_add(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out) {
  product(a, b, out, true);
}

// One-sided Jacobi on the columns of a (Hestenes): a V = U S.
void square_svd(const double* a, int64_t n, double* u, double* s, double* vt) {
  std::vector<std::vector<double>> w(n, std::vector<double>(n)), v(w);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < n; ++i) w[j][i] = a[i * n + j];
    v[j][j] = 1;
  }
  const auto dot = [](const std::vector<double>& x, const std::vector<double>& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  };
  for (int sweep = 0; sweep < 30; ++sweep)
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        const double alpha = dot(w[p], w[p]), beta = dot(w[q], w[q]), gamma = dot(w[p], w[q]);
        if (std::abs(gamma) <= 1e-16 * std::sqrt(alpha * beta)) continue;
        const double zeta = (beta - alpha) / (2 * gamma);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::sqrt(1 + zeta * zeta));
        const double c = 1 / std::sqrt(1 + t * t);
        for (auto* pair : {&w, &v})
          for (int64_t i = 0; i < n; ++i) {
            const double x = (*pair)[p][i], y = (*pair)[q][i];
            (*pair)[p][i] = c * (x - t * y);
            (*pair)[q][i] = c * (y + t * x);
          }
      }
  std::vector<int64_t> rank(n);
  std::iota(rank.begin(), rank.end(), 0);
  std::sort(rank.begin(), rank.end(),
            [&](int64_t x, int64_t y) { return dot(w[x], w[x]) > dot(w[y], w[y]); });
  for (int64_t k = 0; k < n; ++k) {
    s[k] = std::sqrt(dot(w[rank[k]], w[rank[k]]));
    for (int64_t i = 0; i < n; ++i) {
      u[i * n + k] = s[k] > 0 ? w[rank[k]][i] / s[k] : 0.0;
      vt[k * n + i] = v[rank[k]][i];
    }
  }
}

}  // namespace fastagg::cpu
