// Gram matrices of a stack in fp64, and what only needs their entries: the inner products of the
// clients' updates and |dW|_F^2, without a dW and without an R x R matrix in memory.
#include <algorithm>

#include "products.h"

namespace fastagg::cpu {
namespace {

struct TilePair {
  int64_t module, i, i_count, j, j_count;
};

std::vector<TilePair> upper_tiles(int64_t modules, int64_t rows, int64_t tile) {
  std::vector<TilePair> pairs;
  for (int64_t l = 0; l < modules; ++l)
    for (int64_t i = 0; i < rows; i += tile)
      for (int64_t j = i; j < rows; j += tile)
        pairs.push_back({l, i, std::min(tile, rows - i), j, std::min(tile, rows - j)});
  return pairs;
}

// Calls visit(task, pair, A A^T tile, B^T B tile, their row stride), tile by tile, in tasks.
template <class Visit>
void for_each_tile(const Slab& a, const Slab& bt, const std::vector<TilePair>& pairs,
                   const Visit& visit) {
  for_each_task(static_cast<int64_t>(pairs.size()), [&](int64_t task) {
    const TilePair& t = pairs[task];
    const Workspace<double> ga = gram_tile(a, t.module, t.i, t.i_count, t.j, t.j_count);
    const Workspace<double> gb = gram_tile(bt, t.module, t.i, t.i_count, t.j, t.j_count);
    visit(task, t, ga.get(), gb.get(), padded(t.j_count, kRowPadding));
  });
}

double coefficient(const double* coefficients, int64_t index) {
  return coefficients ? coefficients[index] : 1.0;
}

}  // namespace

void gram(const Slab& slab, int64_t modules, double* out) {
  const int64_t rows = slab.rows;
  const auto pairs = upper_tiles(modules, rows, kTile);
  for_each_task(static_cast<int64_t>(pairs.size()), [&](int64_t task) {
    const TilePair& t = pairs[task];
    double* matrix = out + t.module * rows * rows;
    const Workspace<double> tile = gram_tile(slab, t.module, t.i, t.i_count, t.j, t.j_count);
    const int64_t stride = padded(t.j_count, kRowPadding);
    for (int64_t r = 0; r < t.i_count; ++r)
      for (int64_t c = t.i == t.j ? r : 0; c < t.j_count; ++c) {
        const double value = tile[r * stride + c];
        matrix[(t.i + r) * rows + t.j + c] = value;
        matrix[(t.j + c) * rows + t.i + r] = value;
      }
  });
}

void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                 int64_t modules, int64_t clients, double* out) {
  const int64_t rows = a.rows;
  const auto pairs = upper_tiles(modules, rows, kTile);
  const int64_t square = clients * clients;
  // Tiles of one module add to the same K x K matrix: each task has its own, added up in order.
  std::vector<std::vector<double>> partial(pairs.size());
  for_each_tile(
      a, bt, pairs,
      [&](int64_t task, const TilePair& pair, const double* ga, const double* gb, int64_t stride) {
        partial[task].assign(static_cast<size_t>(square), 0.0);
        const int64_t base = pair.module * rows;
        for (int64_t r = 0; r < pair.i_count; ++r) {
          const int64_t p = owners[base + pair.i + r];
          if (p < 0) continue;
          const double cp = coefficient(coefficients, base + pair.i + r);
          for (int64_t c = pair.i == pair.j ? r : 0; c < pair.j_count; ++c) {
            const int64_t q = owners[base + pair.j + c];
            if (q < 0) continue;
            const int64_t e = r * stride + c;
            const double value = cp * coefficient(coefficients, base + pair.j + c) * ga[e] * gb[e];
            partial[task][p * clients + q] += value;
            if (pair.i + r != pair.j + c) partial[task][q * clients + p] += value;
          }
        }
      });
  std::fill_n(out, modules * square, 0.0);
  for (size_t task = 0; task < pairs.size(); ++task)
    for (int64_t e = 0; e < square; ++e) out[pairs[task].module * square + e] += partial[task][e];
  // A tile's sums of (p, q) and (q, p) may differ in the last bit: return what is symmetric
  // exactly.
  for (int64_t l = 0; l < modules; ++l)
    for (int64_t p = 0; p < clients; ++p)
      for (int64_t q = 0; q < p; ++q) {
        double& lower = out[l * square + p * clients + q];
        double& upper = out[l * square + q * clients + p];
        lower = upper = 0.5 * (lower + upper);
      }
}

void squared_norm(const Slab& a, const Slab& bt, const double* coefficients, int64_t modules,
                  double* out) {
  const int64_t rows = a.rows;
  const auto pairs = upper_tiles(modules, rows, kTile);
  std::vector<double> partial(pairs.size(), 0.0);
  for_each_tile(
      a, bt, pairs,
      [&](int64_t task, const TilePair& pair, const double* ga, const double* gb, int64_t stride) {
        const int64_t base = pair.module * rows;
        double sum = 0;
        for (int64_t r = 0; r < pair.i_count; ++r) {
          const bool diagonal = pair.i == pair.j;
          double line = 0;
          for (int64_t c = diagonal ? r : 0; c < pair.j_count; ++c) {
            const double both = diagonal && c == r ? 1.0 : 2.0;
            line += both * coefficient(coefficients, base + pair.j + c) * ga[r * stride + c] *
                    gb[r * stride + c];
          }
          sum += coefficient(coefficients, base + pair.i + r) * line;
        }
        partial[task] = sum;
      });
  std::fill_n(out, modules, 0.0);
  for (size_t task = 0; task < pairs.size(); ++task) out[pairs[task].module] += partial[task];
  for (int64_t l = 0; l < modules; ++l) out[l] = std::max(out[l], 0.0);
}

}  // namespace fastagg::cpu
