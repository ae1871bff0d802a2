// The arithmetic of one logit of a row, for any lane: a float, a double, a vector of either.
//
// Nothing here knows ATen, memory or threads: a CPU file instantiates it for vectors, a CUDA file
// for scalars, and both then compute the same thing. Letters as in lossops/reference.py:
//
//   rel = z - shift        q = e^{rel - lse}
//   dz  = c_lse q + c_mean q (1 + rel - mean) + t c_t e^{t rel - lse_t} + c_softplus σ(z)
//       + c_variance q ((rel - mean)² + 2 (rel - mean) - variance) + c_stable s'(z)
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

// What a lane type must know how to do, exp up to 88 and log1p within [0, 1]; vectors specialise it
// in cpu/lanes.h.
template <typename L>
struct Lane;

template <typename S>
struct ScalarLane {
  using Scalar = S;
  static LOSSOPS_LANE S select(bool mask, S yes, S no) { return mask ? yes : no; }
  static LOSSOPS_LANE S at_least(S x, S floor) { return x < floor ? floor : x; }  // keeps NaN
  static LOSSOPS_LANE S at_most(S x, S roof) { return x > roof ? roof : x; }
  static LOSSOPS_LANE S fma(S a, S b, S c) { return a * b + c; }
  static LOSSOPS_LANE S abs(S x) { return std::fabs(x); }
  static LOSSOPS_LANE S tanh(S x) { return std::tanh(x); }
  static LOSSOPS_LANE S log(S x) { return std::log(x); }
  static LOSSOPS_LANE S expm1(S x) { return std::expm1(x); }
  static LOSSOPS_LANE S pow(S x, S y) { return std::pow(x, y); }
};

// 2^{-k} e^x for a float x below (k + 127) ln 2, 0 at or below `floor` = k ln 2 - 88: relative
// error 1e-7 even where e^x would overflow, e^{-inf} = 0, NaN stays. No x - k ln 2 is ever rounded.
//
//   2^{-k} e^x = 2^{n - k} e^r,  n = round(x / ln 2),  |r| <= ln 2 / 2,  e^r = 1 + r + r² P(r)
//
// P is a minimax fit within 3e-9. At the floor n - k is -127, whose exponent bits are zero.
template <typename L>
LOSSOPS_LANE L exp_float(const L& x, const L& k, const L& floor) {
  using A = Lane<L>;
  // Adding 1.5·2^23 rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
  const L magic(12582912.0f + 127.0f);
  const L bounded = A::at_least(x, floor);
  const L t = A::fma(bounded, L(1.44269504f), magic);
  const L n = t - magic;
  L r = A::fma(n, L(-0.693359375f), bounded);  // exact: 9 bits times at most 14
  r = A::fma(n, L(2.12194440e-4f), r);
  L p = A::fma(L(1.3814598e-3f), r, L(8.368717e-3f));
  p = A::fma(p, r, L(4.166839e-2f));
  p = A::fma(p, r, L(1.6666521e-1f));
  p = A::fma(p, r, L(4.9999994e-1f));
  p = A::fma(p, r * r, r) + L(1.0f);
  return p * A::power_of_two(t - k);
}

// log(1 + e) for 0 <= e <= 1 (float): relative error 2e-7, the tiny e of far logits included.
//
//   log(1 + e) = 2 artanh(s) = 2 s (1 + s² Q(s²)),  s = e / (2 + e) <= 1/3,  within 5e-9
template <typename L>
LOSSOPS_LANE L log1p_float(const L& e) {
  using A = Lane<L>;
  const L s = e / (L(2.0f) + e), square = s * s;
  L q = A::fma(L(0.14006335f), square, L(0.14000839f));
  q = A::fma(q, square, L(0.20010768f));
  q = A::fma(q, square, L(0.3333321f));
  return L(2.0f) * A::fma(s * square, q, s);
}

// tanh(u) without a branch: u + u³ P(u²) below 0.6, within 3e-8, 1 - 2 / (1 + e^{2|u|}) above.
template <typename L>
LOSSOPS_LANE L tanh_float(const L& u) {
  using A = Lane<L>;
  const L size = A::abs(u), square = u * u;
  L p = A::fma(L(-0.00594624f), square, L(0.02089109f));
  p = A::fma(p, square, L(-0.05382805f));
  p = A::fma(p, square, L(0.13332617f));
  p = A::fma(p, square, L(-0.33333327f));
  const L far = L(1.0f) - L(2.0f) / (L(1.0f) + A::exp(L(2.0f) * size));
  const L signed_far = A::select(u < L(0.0f), L(0.0f) - far, far);
  return A::select(size < L(0.6f), A::fma(u * square, p, u), signed_far);
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
#if defined(__CUDA_ARCH__) || defined(LOSSOPS_EMULATE)
  // Seven instructions, one of them the special unit's; the polynomial takes thirteen.
  static LOSSOPS_LANE float exp(float x) { return ::expf(x); }
  static LOSSOPS_LANE float tanh(float u) { return tanh_float(u); }
  // For x > 0: powf is a call, which saves registers on the stack.
  static LOSSOPS_LANE float pow(float x, float y) { return ::expf(y * ::logf(x)); }
#else
  static LOSSOPS_LANE float exp(float x) { return exp_float(x, 0.0f, -88.0f); }
#endif
  static LOSSOPS_LANE float log1p(float e) { return log1p_float(e); }
};

template <>
struct Lane<double> : ScalarLane<double> {
  static LOSSOPS_LANE double exp(double x) { return std::exp(x); }
  static LOSSOPS_LANE double log1p(double e) { return std::log1p(e); }
};

template <typename S>
constexpr S kInf = std::numeric_limits<S>::infinity();

// z = cap tanh(r / cap) and dz/dr = 1 - (z / cap)²
template <typename L>
LOSSOPS_LANE L softcap(const L& r, const L& cap) {
  return cap * Lane<L>::tanh(r / cap);
}

template <typename L>
LOSSOPS_LANE L softcap_slope(const L& z, const L& cap) {
  const L ratio = z / cap;
  return L(1) - ratio * ratio;
}

// log(1 + e^z) and its derivative σ(z), neither of which overflows.
template <typename L>
LOSSOPS_LANE L softplus(const L& z) {
  return Lane<L>::at_least(z, L(0)) + Lane<L>::log1p(Lane<L>::exp(L(0) - Lane<L>::abs(z)));
}

template <typename L>
LOSSOPS_LANE L sigmoid(const L& z) {
  const L e = Lane<L>::exp(L(0) - Lane<L>::abs(z));
  return Lane<L>::select(z < L(0), e, L(1)) / (L(1) + e);
}

// s(z) = 1 + z for z >= 0, 1 / (1 - z) below, and its derivative 1 or s². A NaN stays.
template <typename L>
LOSSOPS_LANE L stable(const L& z) {
  const L below = L(1) / (L(1) - Lane<L>::at_most(z, L(0)));
  return Lane<L>::select(z < L(0), below, L(1) + z);
}

template <typename L>
LOSSOPS_LANE L stable_slope(const L& z) {
  const L s = stable(z);
  return Lane<L>::select(z < L(0), s * s, L(1));
}

// What one negative logit adds to a loss that is a sum over single logits, and the derivative.
template <typename L>
struct Addend {
  L value, slope;
};

// softplus(z), σ(z)
template <typename L>
struct SigmoidTerm {
  LOSSOPS_LANE Addend<L> operator()(const L& z) const {
    using A = Lane<L>;
    const L e = A::exp(L(0) - A::abs(z));
    return {A::at_least(z, L(0)) + A::log1p(e), A::select(z < L(0), e, L(1)) / (L(1) + e)};
  }
};

// max(z - margin, 0)
template <typename L>
struct HingeTerm {
  L margin;

  LOSSOPS_LANE Addend<L> operator()(const L& z) const {
    const L above = z - margin;
    return {
        Lane<L>::at_least(above, L(0)),
        Lane<L>::select(above > L(0), L(1), Lane<L>::at_least(above, L(0)) * L(0))};  // keeps NaN
  }
};

// -log(1 - η), η = exp(-e^{-z}), and e^{-z} η / (1 - η); z up to `most`, beyond which it is
// constant.
//
// With u = e^{-z} either branch of the logarithm is exact; below -7 η is 0.
template <typename L>
struct GumbelTerm {
  L most;

  LOSSOPS_LANE Addend<L> operator()(const L& z) const {
    using A = Lane<L>;
    const L u = A::exp(L(0) - A::at_most(A::at_least(z, L(-7)), most)), eta = A::exp(L(0) - u);
    const L rest = L(0) - A::expm1(L(0) - u);  // 1 - η
    const L odds = eta / rest;
    const L value = A::select(u < L(0.7), L(0) - A::log(rest), A::log1p(A::at_most(odds, L(1))));
    return {value, A::select(z > most, L(0), u * odds)};
  }
};

// -m^γ log(1 - m), m = max(σ(z) - clip, 0); with `detached` the factor m^γ is a constant.
template <typename L>
struct AsymmetricTerm {
  typename Lane<L>::Scalar gamma, clip;
  bool detached;

  LOSSOPS_LANE Addend<L> operator()(const L& z) const {
    using A = Lane<L>;
    const L e = A::exp(L(0) - A::abs(z)), both = L(1) / (L(1) + e);
    const L p = A::select(z < L(0), e, L(1)) * both, q = A::select(z < L(0), L(1), e) * both;
    const L m = p - L(clip), rest = A::at_most(q + L(clip), L(1));  // rest = 1 - m
    // The logarithm of q itself would underflow.
    const L log_rest = clip == 0 ? L(0) - (A::at_least(z, L(0)) + A::log1p(e)) : A::log(rest);
    const L safe = A::select(m > L(0), m, L(1)), focus = power(safe);
    L slope = clip == 0 ? focus * p : focus * p * q / rest;
    if (!detached && gamma != 0) slope = slope - L(gamma) * focus / safe * p * q * log_rest;
    const L none = m * L(0);  // NaN stays NaN
    return {A::select(m > L(0), (L(0) - focus) * log_rest, none), A::select(m > L(0), slope, none)};
  }

  LOSSOPS_LANE L power(const L& m) const {
    if (gamma != static_cast<int>(gamma) || gamma > 8) return Lane<L>::pow(m, L(gamma));
    L product(1);
    for (int i = 0; i < static_cast<int>(gamma); ++i) product = product * m;
    return product;
  }
};

// Σ e^{t rel} and, for t = 1, Σ e^{rel} rel and Σ e^{rel} rel² under a shift that grows: all are
// kept relative to it.
struct SoftmaxSums {
  double sum = 0;
  double weighted = 0;
  double squares = 0;

  // Follows the shift up by `by` >= 0. All terms of a sum have one sign: no cancellation.
  LOSSOPS_LANE void raise(double by, double t = 1) {
    const double factor = std::exp(-t * by);
    squares = factor * (squares - 2 * by * weighted + by * by * sum);
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
  kLogSums = 4,
  kSoftplus = 8,
  kAverage = 16,
  kMoment = 32,
  kVector = 64,
  kTeacher = 128,
  kVariance = 256,
  kStable = 512,
};

// What dz of one row is made of; `c_` are the coefficients ∂loss/∂statistic.
template <typename L>
struct RowBasis {
  L shift, lse, mean, variance, average;
  L c_lse, c_mean, c_variance, c_softplus, c_stable, c_vector, c_teacher;
  L constant;  // c_average / V
  L slope;     // 2 c_moment

  // The terms over all classes, the targets among them.
  LOSSOPS_LANE L dense(unsigned terms, const L& rel, const L& a, const L& t) const {
    L dz(0);
    if (terms & kAverage) dz = dz + constant;
    if (terms & kMoment) dz = Lane<L>::fma(slope, rel - average, dz);
    if (terms & kVector) dz = Lane<L>::fma(c_vector, a, dz);
    if (terms & kTeacher) dz = Lane<L>::fma(c_teacher, t, dz);
    return dz;
  }

  // The terms over the negatives but those of other log-sums; a is the class vector, t the teacher
  // times the class vector.
  LOSSOPS_LANE L negative(unsigned terms, const L& z, const L& a, const L& t) const {
    using A = Lane<L>;
    const L rel = z - shift;
    L dz = dense(terms, rel, a, t);
    if (terms & (kSoftmax | kEntropy | kVariance)) {
      const L q = A::exp(rel - lse);
      if (terms & kSoftmax) dz = A::fma(c_lse, q, dz);
      // 0 (-inf) counts 0.
      if (terms & kEntropy) {
        dz = A::fma(c_mean, A::select(q == L(0), L(0), q * (L(1) + rel - mean)), dz);
      }
      if (terms & kVariance) {
        const L away = rel - mean, slope = A::fma(away, away + L(2), L(0) - variance);
        dz = A::fma(c_variance, A::select(q == L(0), L(0), q * slope), dz);
      }
    }
    if (terms & kSoftplus) dz = A::fma(c_softplus, sigmoid(z), dz);
    if (terms & kStable) dz = A::fma(c_stable, stable_slope(z), dz);
    return dz;
  }
};

}  // namespace lossops
