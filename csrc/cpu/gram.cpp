// Gram matrices of a stack in fp64, and what only needs their entries: the inner products of the
// clients' updates and |dW|_F^2, without a dW and without an R x R matrix in memory.
#include <algorithm>
#include <unordered_map>

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

// Sums for each pair of the clients that own a tile's rows and columns.
struct OwnerSums {
  std::vector<int64_t> left, right;              // the clients that occur
  std::vector<int64_t> left_place, right_place;  // of each row and column, or -1: nobody's
  std::vector<double> sums;                      // (left, right)

  OwnerSums() = default;
  OwnerSums(const int64_t* row_owners, int64_t rows, const int64_t* col_owners, int64_t cols) {
    collect(row_owners, rows, left, left_place);
    collect(col_owners, cols, right, right_place);
    sums.assign(left.size() * right.size(), 0.0);
  }

  double& at(int64_t i, int64_t j) { return sums[static_cast<size_t>(i) * right.size() + j]; }

  static void collect(const int64_t* owners, int64_t count, std::vector<int64_t>& distinct,
                      std::vector<int64_t>& place) {
    std::unordered_map<int64_t, int64_t> known;
    for (int64_t i = 0; i < count; ++i) {
      if (owners[i] < 0) {
        place.push_back(-1);
        continue;
      }
      const auto [entry, added] =
          known.try_emplace(owners[i], static_cast<int64_t>(distinct.size()));
      if (added) distinct.push_back(owners[i]);
      place.push_back(entry->second);
    }
  }
};

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
  // Tiles of one module add to the same K x K matrix: each keeps the sums of its own clients, few
  // beside K, and they are added up in order.
  std::vector<OwnerSums> partial(pairs.size());
  for_each_tile(
      a, bt, pairs,
      [&](int64_t task, const TilePair& pair, const double* ga, const double* gb, int64_t stride) {
        const int64_t base = pair.module * rows;
        OwnerSums& sums = partial[task];
        sums =
            OwnerSums(owners + base + pair.i, pair.i_count, owners + base + pair.j, pair.j_count);
        for (int64_t r = 0; r < pair.i_count; ++r) {
          if (sums.left_place[r] < 0) continue;
          const double cr = coefficient(coefficients, base + pair.i + r);
          for (int64_t c = pair.i == pair.j ? r : 0; c < pair.j_count; ++c) {
            if (sums.right_place[c] < 0) continue;
            const int64_t e = r * stride + c;
            const double value = cr * coefficient(coefficients, base + pair.j + c) * ga[e] * gb[e];
            sums.at(sums.left_place[r], sums.right_place[c]) += value;
            if (pair.i == pair.j && c != r)
              sums.at(sums.left_place[c], sums.right_place[r]) += value;
          }
        }
      });
  const int64_t square = clients * clients;
  std::fill_n(out, modules * square, 0.0);
  for (size_t task = 0; task < pairs.size(); ++task) {
    const OwnerSums& sums = partial[task];
    double* matrix = out + pairs[task].module * square;
    for (size_t i = 0; i < sums.left.size(); ++i)
      for (size_t j = 0; j < sums.right.size(); ++j) {
        const double value = sums.sums[i * sums.right.size() + j];
        matrix[sums.left[i] * clients + sums.right[j]] += value;
        if (pairs[task].i != pairs[task].j) matrix[sums.right[j] * clients + sums.left[i]] += value;
      }
  }
  // Sums of (p, q) and (q, p) may differ in the last bit: return what is symmetric exactly.
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
