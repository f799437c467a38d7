// One-sided Jacobi SVD of small float32 matrices: arithmetic of one rotation and one reflector, which pairs of columns
// meet when, and when a pair is orthogonal. Host and device.
//
// A P = Q R by Householder reflectors with column pivoting, then the columns of R^T are made orthogonal by rotations:
// R^T W = Y diag(S), so A = (Q W) diag(S) (P Y)^T. Sources: Golub and Van Loan, "Matrix computations", 4th edition, 5.4.2
// and 8.6.3; Demmel and Veselic, SIAM J. Matrix Anal. Appl. 13 (1992): relative accuracy, the threshold; Drmac and Veselic,
// the same 29 (2008), part I: the pivoted factor first. Without it a 144 x 144 Gaussian matrix took 11 sweeps and a dense
// one of condition 1e7 over 20; with it, 9 and 9 (5 to 6 where columns are graded), and grading of columns is no loss.
//
// de Rijk's ordering (SIAM J. Sci. Stat. Comput. 10, 1989), the longer column of a pair to the front, was tried with the
// rounds below and left out: 17 sweeps in place of 11.
#pragma once
#include <cmath>

#include "common/bits.h"

namespace sculpt {

// A matrix of this size and its second factor take 204 KB of the 227 KB of shared memory of a block on Hopper.
constexpr int kJacobiMaxSize = 160;
// 5 to 9 are needed; this only ends what rounding might keep alive.
constexpr int kJacobiSweeps = 30;
// Squared column norms below it are zero, with the largest entry between 1/2 and 1: a length of 9e-16. Sums of squares
// and the products in the threshold stay far from float's underflow at 2^-126.
constexpr float kJacobiZero = 0x1p-100f;

// Two columns are orthogonal where |a.b| <= tolerance |a| |b|. A computed product is off by about sqrt(q) / 2 roundings
// at most (LAPACK's choice too); for few rows by some roundings all the same.
SCULPT_HOST_DEVICE inline float jacobi_tolerance(int q) { return 0x1p-24f * sqrtf(static_cast<float>(q < 16 ? 16 : q)); }

// [a b] -> [a b] [c s; -s c], kept as s and s / (1 + c).
struct JacobiRotation {
  float sine, ratio;
  bool turns;
};

// alpha = a.a, beta = b.b, gamma = a.b. The smaller of the two angles that make a.b zero.
SCULPT_HOST_DEVICE inline JacobiRotation jacobi_rotation(float alpha, float beta, float gamma, float tolerance) {
  if (!(alpha >= kJacobiZero && beta >= kJacobiZero && fabsf(gamma) > tolerance * (sqrtf(alpha) * sqrtf(beta))))
    return {0.0f, 0.0f, false};
  // Up to 2^79 in magnitude: its square would overflow from 2^64 on, and 1 adds nothing to it from 2^12 on.
  const float zeta = (beta - alpha) / (2.0f * gamma), size = fabsf(zeta);
  const float positive = size > 4096.0f ? 0.5f / size : 1.0f / (size + sqrtf(1.0f + size * size));
  const float tangent = zeta < 0.0f ? -positive : positive;
  const float sine = tangent / sqrtf(1.0f + tangent * tangent);
  // The cosine of the sine as rounded: c^2 + s^2 is then off by less than a rounding times 1 - c.
  return {sine, sine / (1.0f + sqrtf(1.0f - sine * sine)), true};
}

// Rutishauser's form: an error is in proportion to the angle. With c a - s b the second factor of a 144 x 144 matrix was
// orthonormal to 7e-5 only, with this to 7e-7.
SCULPT_HOST_DEVICE inline void jacobi_turn(float& a, float& b, const JacobiRotation& turn) {
  const float before = a;
  a -= turn.sine * (b + turn.ratio * a);
  b += turn.sine * (before - turn.ratio * b);
}

// Round robin by the circle method: the last of an even number of players stays, the others move on by one each round.
// Every pair meets once a sweep, and the pairs of a round have no column in common. For odd q one player is not there.
struct JacobiPair {
  int low, high;  // high == q: `low` has no partner
};
SCULPT_HOST_DEVICE inline int jacobi_pairs(int q) { return (q + 1) / 2; }
SCULPT_HOST_DEVICE inline int jacobi_rounds(int q) { return 2 * jacobi_pairs(q) - 1; }
SCULPT_HOST_DEVICE inline JacobiPair jacobi_pair(int q, int round, int k) {
  const int circle = jacobi_rounds(q);
  int a = round + k, b = round - k;
  if (a >= circle) a -= circle;
  if (b < 0) b += circle;
  if (k == 0) b = circle;
  return a < b ? JacobiPair{a, b} : JacobiPair{b, a};
}

// H = I - tau v v^T with v_1 = 1 takes a column x of which x_1 = alpha and x.x = square to (value, 0, ...): v = x inverse
// below x_1. `square` is above zero.
struct JacobiReflector {
  float value, tau, inverse;
};
SCULPT_HOST_DEVICE inline JacobiReflector jacobi_reflector(float alpha, float square) {
  const float norm = sqrtf(square), value = alpha > 0.0f ? -norm : norm;
  return {value, (value - alpha) / value, 1.0f / (alpha - value)};
}

// The power of two by which a matrix is divided, so that its largest entry is between 1/2 and 1.
SCULPT_HOST_DEVICE inline int jacobi_exponent(float largest) {
  int exponent = 0;
  if (largest > 0.0f) frexpf(largest, &exponent);
  return exponent;
}

}  // namespace sculpt
