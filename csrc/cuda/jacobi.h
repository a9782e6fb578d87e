// One-sided Jacobi: plane rotations make the rows of a matrix orthogonal, whose norms then are its
// singular values (Hestenes). To converge in few sweeps on graded matrices it starts from the
// triangular factor of a pivoted Gram-Schmidt orthogonalisation (Drmac and Veselic): C = L Q has the
// left singular vectors of L, which are what the columns of L become over their norms. Gram-Schmidt's
// L is backward stable though its Q is not, and Q is never needed (Bjorck).
//
// The columns of L are kept as rows. Matrices have been scaled: their largest entry is in [1/2, 1).
#pragma once

#include <cstdint>

#include "device.h"

namespace fastagg::cuda {

// A pair is rotated until its cosine is down to this, and a sweep in which none was above kFar is the
// last. Convergence is quadratic except among columns of equal norms, which it leaves at kFar.
constexpr double kOrthogonal = 1e-14;
constexpr double kFar = 1e-10;

// Seven to ten sweeps in all that was tried, with spectra over 16 decades, clustered and deficient.
constexpr int kMostSweeps = 20;

// The norm of a row that is rounding: entries near one are known to 1e-16.
constexpr double kNoise = 3e-17;

// The squared norm of a row that has been a pivot of Gram-Schmidt.
constexpr double kChosen = -1;

// Who meets in place `pair` of round `round`, by the circle method: `players` is even, there are
// players - 1 rounds of players / 2 pairs, and every two meet once.
struct Meeting {
  int first, second;  // first < second
};

FASTAGG_HD Meeting meeting(int players, int round, int pair) {
  const int others = players - 1;
  int one = round + pair, two = round - pair;
  if (one >= others) one -= others;
  if (two < 0) two += others;
  if (pair == 0) two = others;
  return one < two ? Meeting{one, two} : Meeting{two, one};
}

// x' = c x - s y and y' = s x + c y are orthogonal.
struct Rotation {
  double c, s, t;  // t = s / c
  bool far;        // x and y were far from orthogonal
};

// For x, y of squared norms xx, yy and product xy: tan(2 angle) = 2 xy / (yy - xx). By the half-angle
// formulas two reciprocal roots do what would take two roots and two divisions one after the other,
// which every rotation waits for. A step of Newton's method then makes c^2 + s^2 one to the last bit: a
// row goes through a thousand rotations. |x'|^2 = xx - t xy and |y'|^2 = yy + t xy.
FASTAGG_HD Rotation rotation(double xx, double yy, double xy) {
  const double noise = kNoise * kNoise, both = xx * yy, cross = xy * xy;
  if (!(xx > noise && yy > noise && cross > kOrthogonal * kOrthogonal * both))
    return {1.0, 0.0, 0.0, false};
  const double difference = yy - xx;
  const double inverse = rsqrt(difference * difference + 4 * cross);
  const double cosine2 = 0.5 + 0.5 * fabs(difference) * inverse;
  const double inverse_cosine = rsqrt(cosine2);
  const double c = cosine2 * inverse_cosine;
  const double s = copysign(xy, xy * difference) * inverse * inverse_cosine;
  const double correction = 1 + 0.5 * (fma(-c, c, 1.0) - s * s);
  return {c * correction, s * correction, s * inverse_cosine, cross > kFar * kFar * both};
}

}  // namespace fastagg::cuda
