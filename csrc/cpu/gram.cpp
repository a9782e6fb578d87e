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

// Calls visit(pair, (A A^T) tile, (B^T B) tile) for the tiles on and above the diagonal, in tasks.
template <class T, class Visit>
void for_each_tile(const Slab& a, const Slab& bt, const std::vector<TilePair>& pairs,
                   const Visit& visit) {
  for_each_task(static_cast<int64_t>(pairs.size()), [&](int64_t task) {
    const TilePair& pair = pairs[task];
    Workspace<double> ga(pair.i_count * pair.j_count);
    Workspace<double> gb(pair.i_count * pair.j_count);
    gram_tile<T>(a, pair.module, pair.i, pair.i_count, pair.j, pair.j_count,
                 row_major(ga.get(), pair.i_count, pair.j_count));
    gram_tile<T>(bt, pair.module, pair.i, pair.i_count, pair.j, pair.j_count,
                 row_major(gb.get(), pair.i_count, pair.j_count));
    visit(task, pair, ga.get(), gb.get());
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
    const TilePair& pair = pairs[task];
    double* matrix = out + pair.module * rows * rows;
    gram_tile<double>(slab, pair.module, pair.i, pair.i_count, pair.j, pair.j_count,
                      {matrix + pair.i * rows + pair.j, pair.i_count, pair.j_count, rows, 1});
    for (int64_t r = 0; r < pair.i_count; ++r)
      for (int64_t c = 0; c < pair.j_count; ++c)
        matrix[(pair.j + c) * rows + pair.i + r] = matrix[(pair.i + r) * rows + pair.j + c];
  });
}

void update_gram(const Slab& a, const Slab& bt, const double* coefficients, const int64_t* owners,
                 int64_t modules, int64_t clients, double* out) {
  const int64_t rows = a.rows;
  const auto pairs = upper_tiles(modules, rows, kTile);
  const int64_t square = clients * clients;
  // Tiles of one module add to the same K x K matrix: each task has its own, added up in order.
  std::vector<std::vector<double>> partial(pairs.size());
  for_each_tile<double>(
      a, bt, pairs, [&](int64_t task, const TilePair& pair, const double* ga, const double* gb) {
        partial[task].assign(static_cast<size_t>(square), 0.0);
        const int64_t base = pair.module * rows;
        for (int64_t r = 0; r < pair.i_count; ++r) {
          const int64_t p = owners[base + pair.i + r];
          if (p < 0) continue;
          const double cp = coefficient(coefficients, base + pair.i + r);
          for (int64_t c = 0; c < pair.j_count; ++c) {
            const int64_t q = owners[base + pair.j + c];
            if (q < 0) continue;
            const int64_t e = r * pair.j_count + c;
            const double value =
                cp * coefficient(coefficients, base + pair.j + c) * ga[e] * gb[e];
            partial[task][p * clients + q] += value;
            if (pair.i != pair.j) partial[task][q * clients + p] += value;
          }
        }
      });
  std::fill_n(out, modules * square, 0.0);
  for (size_t task = 0; task < pairs.size(); ++task)
    for (int64_t e = 0; e < square; ++e) out[pairs[task].module * square + e] += partial[task][e];
  // A tile's sums of (p, q) and (q, p) may differ in the last bit: return what is symmetric exactly.
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
  for_each_tile<double>(
      a, bt, pairs, [&](int64_t task, const TilePair& pair, const double* ga, const double* gb) {
        const double both = pair.i == pair.j ? 1.0 : 2.0;
        const int64_t base = pair.module * rows;
        double sum = 0;
        for (int64_t r = 0; r < pair.i_count; ++r) {
          const double cr = both * coefficient(coefficients, base + pair.i + r);
          double line = 0;
          for (int64_t c = 0; c < pair.j_count; ++c)
            line += coefficient(coefficients, base + pair.j + c) * ga[r * pair.j_count + c] *
                    gb[r * pair.j_count + c];
          sum += cr * line;
        }
        partial[task] = sum;
      });
  std::fill_n(out, modules, 0.0);
  for (size_t task = 0; task < pairs.size(); ++task) out[pairs[task].module] += partial[task];
  for (int64_t l = 0; l < modules; ++l) out[l] = std::max(out[l], 0.0);
}

}  // namespace fastagg::cpu
