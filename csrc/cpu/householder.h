// Householder QR in fp64, and the thin SVD of a small matrix of any shape.
#pragma once

#include <cstdint>
#include <vector>

namespace fastagg::cpu {

// Q R of a factor (size, cols), blocked (Bischof and Van Loan's compact WY form, Q = I - V T V^T in
// each block). Own code: MKL's dgeqrf waits for ever for its team when it is called in a parallel
// region after torch.set_num_threads, also from inside dgesdd of a tall matrix.
class HouseholderQr {
 public:
  // `columns` holds the factor's columns one after the other: (cols, size) row-major.
  HouseholderQr(std::vector<double> columns, int64_t size, int64_t cols);

  int64_t rank() const { return rank_; }  // min(size, cols), whatever the values

  // R (rank, cols) row-major.
  std::vector<double> upper() const;

  // Q x for x (rank, count), given and returned by columns: (count, rank) in, (count, size) out.
  std::vector<double> times(const std::vector<double>& x, int64_t count) const;

 private:
  struct Block {
    int64_t first, width;
    std::vector<double> v;  // (width, size - first) row-major: the reflectors
    std::vector<double> t;  // (width, width), upper triangular
  };
  Block factor(int64_t first, int64_t width);
  void reflect(const Block& block, bool transposed, double* columns, int64_t count) const;

  std::vector<double> columns_;
  int64_t size_, cols_, rank_;
  std::vector<Block> blocks_;
};

// Thin SVD: a (p, q) = u (p, k) diag(s) vt (k, q), k = min(p, q); all row-major.
void svd(const double* a, int64_t p, int64_t q, double* u, double* s, double* vt);

}  // namespace fastagg::cpu
