// The arithmetic of one logit of a row, for any lane: a float, a double, a vector of either.
//
// Nothing here knows ATen, memory or threads: a CPU file instantiates it for vectors, a CUDA file
// for scalars, and both then compute the same thing. Letters as in lossops/reference.py:
//
//   rel = z - shift        q = e^{rel - lse}
//   dz  = c_lse q + c_mean q (rel - mean) + t c_t e^{t rel - lse_t} + c_softplus σ(z)
//       + c_average / V + 2 c_moment (rel - average) + c_vector a + c_teacher t a
//
// Verified by tests/test_cpu_backend.py against the reference in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define LOSSOPS_LANE __host__ __device__ __forceinline__
#else
#define LOSSOPS_LANE __attribute__((always_inline)) inline
#endif

namespace lossops {

// What a lane type must know how to do; vectors specialise it in cpu/lanes.h.
template <typename L>
struct Lane;

template <typename S>
struct ScalarLane {
  using Scalar = S;
  static LOSSOPS_LANE S select(bool mask, S yes, S no) { return mask ? yes : no; }
  static LOSSOPS_LANE S at_least(S x, S floor) { return x < floor ? floor : x; }  // keeps NaN
  static LOSSOPS_LANE S fma(S a, S b, S c) { return a * b + c; }
  static LOSSOPS_LANE S abs(S x) { return std::fabs(x); }
  static LOSSOPS_LANE S log1p(S x) { return std::log1p(x); }
  static LOSSOPS_LANE S tanh(S x) { return std::tanh(x); }
};

// e^x for x <= 88 (float): relative error 1e-7, e^{-inf} = 0, NaN stays. A fifth of the work of the
// library's, since arguments are relative to a maximum and need no guard above.
//
//   e^x = 2^n e^r,  n = round(x / ln 2),  |r| <= ln 2 / 2,  e^r = 1 + r + r² P(r) within 3e-9
//
// Below -88 n is -127, whose exponent bits are zero: the result is exactly 0.
template <typename L>
LOSSOPS_LANE L exp_float(L x) {
  using A = Lane<L>;
  // Adding 1.5·2^23 rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
  const L magic(12582912.0f + 127.0f);
  const L bounded = A::at_least(x, -88.0f);
  const L t = A::fma(bounded, L(1.44269504f), magic);
  const L n = t - magic;
  L r = A::fma(n, L(-0.693359375f), bounded);  // exact: 9 bits times at most 8
  r = A::fma(n, L(2.12194440e-4f), r);
  L p = A::fma(L(1.3814598e-3f), r, L(8.368717e-3f));
  p = A::fma(p, r, L(4.166839e-2f));
  p = A::fma(p, r, L(1.6666521e-1f));
  p = A::fma(p, r, L(4.9999994e-1f));
  p = A::fma(p, r * r, r) + L(1.0f);
  return p * A::power_of_two(t);
}

template <>
struct Lane<float> : ScalarLane<float> {
  // The float whose exponent field is the low byte of the bits of t.
  static LOSSOPS_LANE float power_of_two(float t) {
    std::uint32_t bits;
    std::memcpy(&bits, &t, sizeof bits);
    bits <<= 23;
    std::memcpy(&t, &bits, sizeof bits);
    return t;
  }
  static LOSSOPS_LANE float exp(float x) { return exp_float(x); }
};

template <>
struct Lane<double> : ScalarLane<double> {
  static LOSSOPS_LANE double exp(double x) { return std::exp(x); }
};

template <typename S>
constexpr S kInf = std::numeric_limits<S>::infinity();

// z = cap tanh(r / cap) and dz/dr = 1 - (z / cap)²
template <typename L>
LOSSOPS_LANE L softcap(L r, L cap) {
  return cap * Lane<L>::tanh(r / cap);
}

template <typename L>
LOSSOPS_LANE L softcap_slope(L z, L cap) {
  const L ratio = z / cap;
  return L(1) - ratio * ratio;
}

// log(1 + e^z) and its derivative σ(z), neither of which overflows.
template <typename L>
LOSSOPS_LANE L softplus(L z) {
  return Lane<L>::at_least(z, 0) + Lane<L>::log1p(Lane<L>::exp(L(0) - Lane<L>::abs(z)));
}

template <typename L>
LOSSOPS_LANE L sigmoid(L z) {
  const L e = Lane<L>::exp(L(0) - Lane<L>::abs(z));
  return Lane<L>::select(z < L(0), e, L(1)) / (L(1) + e);
}

// Σ e^{t rel} and, for t = 1, Σ e^{rel} rel under a shift that grows: both are kept relative to it.
struct SoftmaxSums {
  double sum = 0;
  double weighted = 0;

  // Follows the shift up by `by` >= 0. Both terms of `weighted` have one sign: no cancellation.
  LOSSOPS_LANE void raise(double by, double t = 1) {
    const double factor = std::exp(-t * by);
    weighted = factor * (weighted - by * sum);
    sum *= factor;
  }
};

// The mean and centred second moment of a row, by Chan's merge of its tiles.
struct Moments {
  double count = 0;
  double total = 0;
  double moment = 0;

  LOSSOPS_LANE void merge(double n, double tile_total, double tile_moment) {
    if (count > 0) {
      const double delta = tile_total / n - total / count;
      moment += tile_moment + delta * delta * (count * n / (count + n));
    } else {
      moment = tile_moment;
    }
    count += n;
    total += tile_total;
  }
};

// Which terms of dz a call has; only their members of RowBasis are read.
enum Term : unsigned {
  kSoftmax = 1,
  kEntropy = 2,
  kTemperatures = 4,
  kSoftplus = 8,
  kAverage = 16,
  kMoment = 32,
  kVector = 64,
  kTeacher = 128,
};

// What dz of one row is made of; `c_` are the coefficients ∂loss/∂statistic.
template <typename L>
struct RowBasis {
  L shift, lse, mean, average;
  L c_lse, c_mean, c_softplus, c_vector, c_teacher;
  L constant;  // c_average / V
  L slope;     // 2 c_moment

  // The terms over all classes, the targets among them.
  LOSSOPS_LANE L dense(unsigned terms, L rel, L a, L t) const {
    L dz(0);
    if (terms & kAverage) dz = dz + constant;
    if (terms & kMoment) dz = Lane<L>::fma(slope, rel - average, dz);
    if (terms & kVector) dz = Lane<L>::fma(c_vector, a, dz);
    if (terms & kTeacher) dz = Lane<L>::fma(c_teacher, t, dz);
    return dz;
  }

  // The terms over the negatives but those of temperatures; a is the class vector, t the teacher
  // times the class vector.
  LOSSOPS_LANE L negative(unsigned terms, L z, L a, L t) const {
    using A = Lane<L>;
    const L rel = z - shift;
    L dz = dense(terms, rel, a, t);
    if (terms & (kSoftmax | kEntropy)) {
      const L q = A::exp(rel - lse);
      if (terms & kSoftmax) dz = A::fma(c_lse, q, dz);
      // 0 (-inf) counts 0.
      if (terms & kEntropy) {
        dz = A::fma(c_mean, A::select(q == L(0), L(0), q * (rel - mean)), dz);
      }
    }
    if (terms & kSoftplus) dz = A::fma(c_softplus, sigmoid(z), dz);
    return dz;
  }
};

}  // namespace lossops
