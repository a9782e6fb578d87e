// The CPU kernels without torch, on buffers of exactly their size, so that the sanitizers see every
// byte beyond; each result against a plain loop in double, and equal bits in every order of tasks.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/svd.h"
#include "plain_runtime.h"

using namespace fastagg;

namespace {

std::mt19937_64 engine;

int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "kernels: %s\n", what);
  std::exit(1);
}

void near(double found, double expected, double allowed, const char* what) {
  if (std::abs(found - expected) <= allowed) return;
  std::fprintf(stderr, "kernels: %s: %.17g instead of %.17g\n", what, found, expected);
  std::exit(1);
}

DType random_dtype() { return static_cast<DType>(integer(0, 2)); }

// Values of one dtype at any alignment, in a buffer without a byte to spare.
struct Values {
  std::vector<char> bytes;
  std::vector<double> exact;
  DType dtype;
  int64_t offset;

  Values(int64_t count, DType dtype, int64_t offset) : dtype(dtype), offset(offset) {
    std::normal_distribution<float> normal;
    std::vector<float> floats(static_cast<size_t>(count));
    for (float& value : floats) value = normal(engine);
    bytes.resize(static_cast<size_t>(offset + count * element_size(dtype)));
    cpu::store(floats.data(), count, bytes.data() + offset, dtype);
    exact.resize(static_cast<size_t>(count));
    cpu::load(bytes.data() + offset, dtype, count, 1.0, exact.data());
  }
};

// Everything a kernel wrote, to be compared between orders.
using Bytes = std::vector<char>;

template <class T>
void append(Bytes& bytes, const std::vector<T>& values) {
  const char* from = reinterpret_cast<const char*>(values.data());
  bytes.insert(bytes.end(), from, from + values.size() * sizeof(T));
}

std::vector<double> widened(const Bytes& bytes, DType dtype) {
  const auto count = static_cast<int64_t>(bytes.size()) / element_size(dtype);
  std::vector<double> out(static_cast<size_t>(count));
  cpu::load(bytes.data(), dtype, count, 1.0, out.data());
  return out;
}

// A value that fp32 holds, rounded once.
double rounded(double value, DType dtype) {
  const auto single = static_cast<float>(value);
  Bytes bytes(element_size(dtype));
  cpu::store(&single, 1, bytes.data(), dtype);
  return widened(bytes, dtype)[0];
}

Bytes stack_and_hand_out() {
  Bytes result;
  const int64_t m = integer(0, 200), n = integer(0, 90), clients = integer(1, 4);
  const int64_t modules = integer(1, 3);
  std::vector<Values> values;
  std::vector<StackSlot> slots;
  std::vector<double> scales;
  int64_t rows = 0;
  for (int64_t k = 0; k < clients; ++k) {
    const int64_t rank = integer(0, 40), module = integer(0, modules - 1);
    const Values a(rank * n, random_dtype(), integer(0, 3)),
        b(m * rank, random_dtype(), integer(0, 3));
    const auto flat = static_cast<int64_t>(values.size());
    slots.push_back({module, rows, rank, flat, a.offset, a.dtype, flat + 1, b.offset, b.dtype});
    scales.push_back(std::ldexp(1.0, static_cast<int>(integer(-3, 3))));
    values.push_back(a);
    values.push_back(b);
    rows += rank;
  }
  rows += integer(0, 3);
  std::vector<const void*> flats;
  for (const Values& value : values) flats.push_back(value.bytes.data());
  const DType dtype = random_dtype();
  Bytes a(modules * rows * n * element_size(dtype), 77);
  Bytes bt(modules * rows * m * element_size(dtype), 77);
  std::vector<int64_t> nonfinite(2 * slots.size(), -1);
  std::vector<double> sums(2 * modules * rows, -1.0);
  cpu::stack(flats.data(), slots.data(), clients, scales.data(),
             {a.data(), bt.data(), dtype, modules, rows, m, n, nonfinite.data(), sums.data()});
  const auto wide_a = widened(a, dtype), wide_bt = widened(bt, dtype);
  std::vector<char> covered(modules * rows, 0);
  for (size_t k = 0; k < slots.size(); ++k) {
    const StackSlot& slot = slots[k];
    for (int64_t r = 0; r < slot.rank; ++r) {
      const int64_t row = slot.module * rows + slot.row + r;
      covered[row] = 1;
      for (int64_t j = 0; j < n; ++j)
        near(wide_a[row * n + j], rounded(scales[k] * values[2 * k].exact[r * n + j], dtype), 0,
             "stacked A");
      for (int64_t i = 0; i < m; ++i)
        near(wide_bt[row * m + i], rounded(values[2 * k + 1].exact[i * slot.rank + r], dtype), 0,
             "stacked B");
    }
  }
  for (int64_t row = 0; row < modules * rows; ++row)
    for (int64_t j = 0; !covered[row] && j < n; ++j) near(wide_a[row * n + j], 0, 0, "padding");
  for (const int64_t count : nonfinite) require(count == 0, "non-finite values seen");
  append(result, a);
  append(result, bt);
  append(result, sums);

  const int64_t r = integer(0, 20), rank = integer(0, 30);
  std::normal_distribution<float> normal;
  std::vector<float> u(modules * m * r), s(modules * r), vt(modules * r * n);
  for (auto* all : {&u, &s, &vt})
    for (float& value : *all) value = normal(engine);
  const DType a_dtype = random_dtype(), b_dtype = random_dtype();
  const int64_t gap = integer(0, 3), a_bytes = rank * n * element_size(a_dtype);
  Bytes flat(gap + a_bytes + gap + m * rank * element_size(b_dtype), 77);
  const HandOutSlot slot{modules - 1, rank, 0, gap, a_dtype, 2 * gap + a_bytes, b_dtype};
  const double scaling = 2.0;
  void* target = flat.data();
  cpu::redistribute(u.data(), s.data(), vt.data(), m, n, r, &slot, &scaling, 1, &target);
  const auto b = widened({flat.begin() + slot.b_offset, flat.end()}, b_dtype);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      const double expected =
          j < r ? double(u[((modules - 1) * m + i) * r + j]) * s[(modules - 1) * r + j] / 2 : 0;
      near(b[i * rank + j], expected, 0.01 * std::abs(expected) + 1e-6, "handed-out B");
    }
  append(result, flat);
  return result;
}

Bytes scan() {
  Bytes result;
  for (const int64_t count : {integer(0, 100), integer(4090, 4100), integer(262140, 262150)}) {
    const Values values(count, random_dtype(), integer(0, 7));
    const Span span{values.offset, count, values.dtype};
    std::vector<int64_t> nonfinite(1, -1);
    std::vector<double> sum(1, -1.0);
    cpu::scan(values.bytes.data(), &span, 1, nonfinite.data(), sum.data());
    double expected = 0;
    for (const double value : values.exact) expected += value * value;
    require(nonfinite[0] == 0, "scan saw a non-finite value");
    near(sum[0], expected, 1e-12 * expected, "scan's sum of squares");
    append(result, sum);
  }
  return result;
}

// A stack, its coefficients and its product in double.
struct Problem {
  int64_t modules, rows, m, n;
  Values a, bt;
  std::vector<double> c, product;

  Problem(int64_t modules, int64_t rows, int64_t m, int64_t n)
      : modules(modules),
        rows(rows),
        m(m),
        n(n),
        a(modules * rows * n, random_dtype(), 0),
        bt(modules * rows * m, random_dtype(), 0),
        c(modules * rows),
        product(modules * m * n, 0.0) {
    std::normal_distribution<double> normal;
    for (double& value : c) value = normal(engine);
    for (int64_t row = 0; row < modules * rows; ++row)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j)
          product[(row / rows * m + i) * n + j] +=
              c[row] * bt.exact[row * m + i] * a.exact[row * n + j];
  }
  Slab slab_a() const { return {a.bytes.data(), a.dtype, rows, n}; }
  Slab slab_bt() const { return {bt.bytes.data(), bt.dtype, rows, m}; }
};

Bytes products(const Problem& p) {
  Bytes result;
  const DType dtype = random_dtype();
  const double rounding = dtype == DType::Float32 ? 1e-4 : 0.1;
  Bytes out(p.modules * p.m * p.n * element_size(dtype), 0);
  cpu::reconstruct(p.slab_a(), p.slab_bt(), p.c.data(), p.modules, out.data(), dtype, true);
  cpu::reconstruct(p.slab_a(), p.slab_bt(), p.c.data(), p.modules, out.data(), dtype, false);
  const auto found = widened(out, dtype);
  for (size_t i = 0; i < found.size(); ++i)
    near(found[i], 2 * p.product[i], rounding * (1 + std::abs(p.product[i])), "reconstruct");
  append(result, out);

  std::vector<double> gram(p.modules * p.rows * p.rows, -1.0), norms(p.modules, -1.0);
  cpu::gram(p.slab_a(), p.modules, gram.data());
  for (int64_t i = 0; i < p.rows && p.modules > 0; ++i)
    for (int64_t j = 0; j < p.rows; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < p.n; ++k) sum += p.a.exact[i * p.n + k] * p.a.exact[j * p.n + k];
      near(gram[i * p.rows + j], sum, 1e-11 * (1 + std::abs(sum)), "gram");
    }
  cpu::squared_norm(p.slab_a(), p.slab_bt(), p.c.data(), p.modules, norms.data());
  std::vector<int64_t> owners(p.modules * p.rows);
  for (size_t i = 0; i < owners.size(); ++i) owners[i] = static_cast<int64_t>(i % 3) - 1;
  std::vector<double> inner(p.modules * 4, -1.0), one(p.modules, -1.0);
  cpu::update_gram(p.slab_a(), p.slab_bt(), p.c.data(), owners.data(), p.modules, 2, inner.data());
  std::fill(owners.begin(), owners.end(), 0);
  cpu::update_gram(p.slab_a(), p.slab_bt(), p.c.data(), owners.data(), p.modules, 1, one.data());
  for (int64_t l = 0; l < p.modules; ++l) {
    double expected = 0;
    for (int64_t i = 0; i < p.m * p.n; ++i)
      expected += p.product[l * p.m * p.n + i] * p.product[l * p.m * p.n + i];
    near(norms[l], expected, 1e-9 * (1 + expected), "squared norm");
    near(one[l], expected, 1e-9 * (1 + expected), "the only client's update");
    near(inner[4 * l + 1], inner[4 * l + 2], 0, "symmetry of the updates' products");
  }
  append(result, gram);
  append(result, norms);
  append(result, inner);
  return result;
}

template <class T>
Bytes decompose(const Problem& p, int route, double allowed) {
  const int64_t r = integer(0, 12);
  std::vector<T> u(p.modules * p.m * r, T(9)), s(p.modules * r, T(9)),
      vt(p.modules * r * p.n, T(9));
  std::vector<double> stats(p.modules * kStats, 9.0);
  const SvdOut<T> out{u.data(), s.data(), vt.data(), stats.data(), p.modules, p.m, p.n, r};
  const Sketch sketch{std::min({2 * r, p.m, p.n}), 2, 5, nullptr};
  std::vector<float> dense(p.product.begin(), p.product.end());
  if (route == 0) cpu::gram_svd(p.slab_a(), p.slab_bt(), p.c.data(), out);
  if (route == 1) cpu::randomized_svd(p.slab_a(), p.slab_bt(), p.c.data(), sketch, out);
  if (route == 2) cpu::randomized_svd_dense({dense.data(), DType::Float32, p.m, p.n}, sketch, out);
  for (int64_t l = 0; l < p.modules; ++l) {
    double norm2 = 0, error2 = 0, kept2 = 0;
    for (int64_t i = 0; i < p.m; ++i)
      for (int64_t j = 0; j < p.n; ++j) {
        double value = 0;
        for (int64_t k = 0; k < r; ++k)
          value += double(u[(l * p.m + i) * r + k]) * s[l * r + k] * vt[(l * r + k) * p.n + j];
        const double exact = p.product[(l * p.m + i) * p.n + j];
        norm2 += exact * exact;
        error2 += (exact - value) * (exact - value);
      }
    for (int64_t k = 0; k < r; ++k) kept2 += double(s[l * r + k]) * s[l * r + k];
    // Orthonormal factors: what is kept and what is missed make up the whole.
    near(kept2 + error2, norm2, allowed * (1 + norm2), "energy of a decomposition");
    near(stats[l * kStats], norm2, allowed * (1 + norm2), "norm of a decomposition");
  }
  Bytes result;
  append(result, u);
  append(result, s);
  append(result, vt);
  append(result, stats);
  return result;
}

Bytes everything(uint64_t seed) {
  engine.seed(seed);
  Bytes result = stack_and_hand_out();
  append(result, scan());
  Problem p(integer(1, 2), integer(0, 50), integer(0, 70), integer(0, 70));
  append(result, products(p));
  if (p.rows > 9 && seed % 2 == 0) {
    // Half of the clients cancel the other half but for one row: the way by QR.
    const int64_t half = (p.rows - 1) / 2;
    Problem q(1, 2 * half + 1, p.m, p.n);
    std::vector<double> c(q.c.size(), 1.0);
    const auto row_bytes = [&](const Values& v, int64_t cols) {
      return cols * element_size(v.dtype);
    };
    for (int64_t i = 0; i < half; ++i) {
      for (auto [v, cols] : {std::pair{&q.a, q.n}, std::pair{&q.bt, q.m}}) {
        const char* from = v->bytes.data() + i * row_bytes(*v, cols);
        std::copy_n(from, row_bytes(*v, cols), v->bytes.data() + (half + i) * row_bytes(*v, cols));
      }
      c[half + i] = -1.0;
    }
    const int64_t last = 2 * half;
    for (int64_t i = 0; i < q.m; ++i)
      for (int64_t j = 0; j < q.n; ++j)
        q.product[i * q.n + j] = q.bt.exact[last * q.m + i] * q.a.exact[last * q.n + j];
    q.c = c;
    append(result, decompose<float>(q, 0, 1e-5));
    append(result, decompose<double>(q, 0, 1e-10));
  }
  append(result, decompose<float>(p, 0, 1e-5));
  append(result, decompose<double>(p, 0, 1e-10));
  append(result, decompose<float>(p, 1, 1e-4));
  append(result, decompose<float>(p, 2, 1e-4));
  return result;
}

}  // namespace

// kernels SEED ROUNDS [threads]
int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t rounds = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const bool threads = argc > 3;
  for (uint64_t round = 0; round < rounds; ++round) {
    cpu::order = cpu::Order::Forward;
    const Bytes expected = everything(seed + round);
    using cpu::Order;
    for (const Order order : {Order::Reverse, Order::Shuffled, Order::Threads}) {
      if ((order == Order::Threads) != threads) continue;
      cpu::order = order;
      const Bytes found = everything(seed + round);
      require(found == expected, "the order of tasks changed the bits of a result");
    }
  }
  return 0;
}
