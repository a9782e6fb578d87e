// Powers of two that keep Gram matrices and sketches away from the ends of the floating-point
// range.
#pragma once

#include <cmath>

#include "config.h"

namespace fastagg {

// The exponent nearest to log2 of a positive number.
FASTAGG_HD int nearest_exponent(double value) { return static_cast<int>(rint(log2(value))); }

// dW = sum_j c_j b_j a_j^T = sum_j (beta_j b_j) (alpha_j a_j)^T with |beta_j b_j| and |alpha_j a_j|
// equal within a factor of two. beta is a power of two and alpha = c / beta: both scalings are
// exact, and a gauge (B g, A / g) that would ruin the Gram matrices is undone.
struct Balance {
  double alpha;
  double beta;
};

FASTAGG_HD Balance balance(double coefficient, double norm_a, double norm_b) {
  if (coefficient == 0 || norm_a == 0 || norm_b == 0) return {0.0, 0.0};
  const int exponent = nearest_exponent(sqrt(fabs(coefficient) * norm_a) / sqrt(norm_b));
  return {ldexp(coefficient, -exponent), ldexp(1.0, exponent)};
}

// A factor's row scaled to a norm near one, as an fp32 power of two: clamped to what fp32 holds, so
// a subnormal row stays small, which its coefficient makes up for in fp64.
FASTAGG_HD double unit_scale(double norm) {
  if (norm == 0) return 0.0;
  const int exponent = -nearest_exponent(norm);
  return ldexp(1.0, exponent > 126 ? 126 : exponent < -126 ? -126 : exponent);
}

}  // namespace fastagg
