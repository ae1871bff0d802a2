// Passes over a part of a row of logits (1, n), the loops every statistic is made of.
//
// A tile of a row is some 8 KiB and stays in the first-level cache, so that each pass reads it anew
// and what counts is the arithmetic. Per logit on one core of a 2.4 GHz AVX2 processor: exponential
// with its sum 0.33 ns, maximum 0.07 ns, softplus 0.9 ns. A lane adds at most n / width terms;
// lanes are added in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "cpu/lanes.h"

namespace lossops {

// z = softcap(r + b), in place; the scale is on x already.
template <typename S>
inline void map_logits(S* z, int64_t n, const S* b, S cap) {
  if (b == nullptr && cap == 0) return;
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    Vec<S> v = load(z + i, count, S(0));
    if (b != nullptr) v = v + load(b + i, count, S(0));
    if (cap != 0) v = softcap(v, Vec<S>(cap));
    store(z + i, v, count);
  });
}

// The largest of n >= 1 values, NaN if there is one. Inlined into the statistics of a row it makes
// them 3 % slower (AVX-512, 8192 classes); by itself it raises a false alarm in gcc 12's headers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
template <typename S>
[[gnu::noinline]] inline S largest(const S* z, int64_t n) {
  constexpr int64_t width = Vec<S>::size();
  Vec<S> a(-kInf<S>), b = a, c = a, d = a;  // four chains hide the latency of the comparison
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    a = at::vec::maximum(a, Vec<S>::loadu(z + i));
    b = at::vec::maximum(b, Vec<S>::loadu(z + i + width));
    c = at::vec::maximum(c, Vec<S>::loadu(z + i + 2 * width));
    d = at::vec::maximum(d, Vec<S>::loadu(z + i + 3 * width));
  }
  for (; i < n; i += width) {
    a = at::vec::maximum(a, load(z + i, std::min(width, n - i), -kInf<S>));
  }
  a = at::vec::maximum(at::vec::maximum(a, b), at::vec::maximum(c, d));
  S lanes[width];
  a.store(lanes);
  S top = lanes[0];
  for (S lane : lanes) top = lane > top || std::isnan(lane) ? lane : top;
  return top;
}
#pragma GCC diagnostic pop

// The two largest, equal ones counted apart.
template <typename S>
inline std::pair<S, S> two_largest(const S* z, int64_t n) {
  Vec<S> first(-kInf<S>), second(-kInf<S>);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> v = load(z + i, count, -kInf<S>);
    second = at::vec::maximum(second, at::vec::minimum(first, v));
    first = at::vec::maximum(first, v);
  });
  S firsts[Vec<S>::size()], seconds[Vec<S>::size()];
  first.store(firsts);
  second.store(seconds);
  S a = -kInf<S>, b = -kInf<S>;
  for (const S* lanes : {firsts, seconds}) {
    for (int64_t j = 0; j < Vec<S>::size(); ++j) {
      const S v = lanes[j];
      if (v > a || std::isnan(v)) {
        b = a;
        a = v;
      } else if (v > b) {
        b = v;
      }
    }
  }
  return {a, b};
}

// The largest value not at or above `limit`.
template <typename S>
inline S largest_below(const S* z, int64_t n, S limit) {
  Vec<S> top(-kInf<S>);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> v = load(z + i, count, -kInf<S>);
    top = at::vec::maximum(top, Vec<S>::blendv(v, Vec<S>(-kInf<S>), v >= Vec<S>(limit)));
  });
  S lanes[Vec<S>::size()];
  top.store(lanes);
  return *std::max_element(lanes, lanes + Vec<S>::size());
}

// Where `value` first is from `start` on; -1 if nowhere.
template <typename S>
inline int64_t find(const S* z, int64_t n, S value, int64_t start = 0) {
  for (int64_t i = start; i < n; ++i) {
    if (z[i] == value) return i;
  }
  return -1;
}

// Σ e^{t rel} of rel = z - shift, with Σ e^{t rel} t rel where asked, and Σ e^{t rel} (t rel)².
template <bool kWeighted, bool kSquares = false, typename S>
inline SoftmaxSums exponentials(const S* z, int64_t n, S shift, S t) {
  using A = Lane<Vec<S>>;
  const Vec<S> shifts(shift), ts(t);
  Vec<S> sum(0), weighted(0), squares(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> rel = ts * (load(z + i, count, -kInf<S>) - shifts);
    const Vec<S> e = A::exp(rel);
    sum = sum + e;
    if constexpr (kWeighted) {
      const Vec<S> term = A::select(e == Vec<S>(0), Vec<S>(0), e * rel);
      weighted = weighted + term;
      if constexpr (kSquares) squares = squares + A::select(e == Vec<S>(0), Vec<S>(0), term * rel);
    }
  });
  return {sum_of_lanes(sum), kWeighted ? sum_of_lanes(weighted) : 0,
          kSquares ? sum_of_lanes(squares) : 0};
}

// Σ e^{f - shift}, f = z up to the limit, 0 above.
template <typename S>
inline double filtered_exponentials(const S* z, int64_t n, S shift, S limit) {
  using A = Lane<Vec<S>>;
  const Vec<S> shifts(shift), limits(limit);
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> v = load(z + i, count, -kInf<S>);
    sum = sum + A::exp(A::select(v > limits, Vec<S>(0), v) - shifts);
  });
  return sum_of_lanes(sum);
}

// The offset of exponentials that are kept: a number of powers of two in float, so that no
// difference is rounded and an offset that was badly chosen costs no accuracy; a logit in double,
// and in float where the powers of two would not be exact any more.
struct Offset {
  static constexpr double kUnit = 0.693147180559945309417;
  static constexpr double kLargest = 8192;  // logit

  bool powers = false;
  double count = 0;

  template <typename S>
  static Offset near(S top) {
    if (!std::is_same_v<S, float> || std::abs(top) > kLargest) return {false, top};
    return {true, std::nearbyint(top / kUnit)};
  }
  double logit() const { return powers ? count * kUnit : count; }
};

// E = e^{z - offset} in place of z, and their sum.
template <typename S>
inline double keep_exponentials(S* z, int64_t n, const Offset& offset) {
  const S logit = offset.powers ? S(0) : static_cast<S>(offset.count);
  const S k = offset.powers ? static_cast<S>(offset.count) : S(0);
  const Vec<S> logits(logit), ks(k), floor(static_cast<S>(k * Offset::kUnit - 88));
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    Vec<S> e = load(z + i, count, -kInf<S>);
    if constexpr (std::is_same_v<S, float>) {
      e = exp_float(e - logits, ks, floor);
    } else {
      e = (e - logits).exp();
    }
    sum = sum + e;
    store(z + i, e, count);
  });
  return sum_of_lanes(sum);
}

template <typename S>
inline double softplus_sum(const S* z, int64_t n) {
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    sum = sum + softplus(load(z + i, count, -kInf<S>));
  });
  return sum_of_lanes(sum);
}

template <typename S>
inline double stable_total(const S* z, int64_t n) {
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count)
                      LOSSOPS_INLINE_LAMBDA { sum = sum + stable(load(z + i, count, -kInf<S>)); });
  return sum_of_lanes(sum);
}

// Σ softplus(z), and with kGradient factor · σ(z) in place of z.
//
// One logarithm for 64 logits of a lane: with q = Π (1 + e) - 1 their sum is log1p(q), and q keeps
// the digits of tiny e, which the product itself would lose.
template <bool kGradient, typename S>
inline double sigmoid_pass(S* z, int64_t n, S factor) {
  using A = Lane<Vec<S>>;
  constexpr int64_t kBlock = 64 * Vec<S>::size();  // q < 2^64
  const Vec<S> one(1), none(0), factors(factor);
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    Vec<S> q(0), linear(0);
    for_lanes<S>(std::min(kBlock, n - block), [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
      const Vec<S> v = load(z + block + i, count, -kInf<S>);
      const Vec<S> e = A::exp(none - A::abs(v));
      linear = linear + A::at_least(v, none);
      q = A::fma(e, one + q, q);
      if constexpr (kGradient) {
        const Vec<S> sigmoid = A::select(v < none, e, one) / (one + e);
        store(z + block + i, factors * sigmoid, count);
      }
    });
    total += sum_of_lanes(linear) + sum_of_lanes(q.log1p());
  }
  return total;
}

// Σ a value(z) of a term of row.h, a = 1 where null, and with kGradient factor · a · slope(z) in
// place of z.
template <bool kGradient, typename S, typename Term>
inline double term_pass(const Term& term, S* z, int64_t n, const S* a, S factor) {
  Vec<S> total(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const auto found = term(load(z + i, count, -kInf<S>));
    const Vec<S> weight = a == nullptr ? Vec<S>(1) : load(a + i, count, S(0));
    total = Lane<Vec<S>>::fma(weight, found.value, total);
    if constexpr (kGradient) store(z + i, Vec<S>(factor) * weight * found.slope, count);
  });
  return sum_of_lanes(total);
}

// Σ a (z - pivot) and Σ a, where a = 0 counts 0 whatever z is if `kMasked`. The terms have either
// sign: a lane adds no more than 64, whose rounding stays near that of the terms.
template <bool kMasked, typename S>
inline std::pair<double, double> weighted_total(const S* z, const S* a, int64_t n, S pivot) {
  using A = Lane<Vec<S>>;
  constexpr int64_t kBlock = 64 * Vec<S>::size();
  const Vec<S> pivots(pivot);
  std::pair<double, double> totals;
  for (int64_t block = 0; block < n; block += kBlock) {
    Vec<S> total(0), sum(0);
    for_lanes<S>(std::min(kBlock, n - block), [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
      const Vec<S> weight = load(a + block + i, count, S(0));
      Vec<S> rel = load(z + block + i, count, pivot) - pivots;
      if constexpr (kMasked) rel = A::select(weight == Vec<S>(0), Vec<S>(0), rel);
      total = A::fma(weight, rel, total);
      sum = sum + weight;
    });
    totals.first += sum_of_lanes(total);
    totals.second += sum_of_lanes(sum);
  }
  return totals;
}

template <typename S>
inline double total(const S* z, int64_t n, S pivot) {
  const Vec<S> pivots(pivot);
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count)
                      LOSSOPS_INLINE_LAMBDA { sum = sum + (load(z + i, count, pivot) - pivots); });
  return sum_of_lanes(sum);
}

template <typename S>
inline double centred_squares(const S* z, int64_t n, S mean) {
  const Vec<S> means(mean);
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> rel = load(z + i, count, mean) - means;
    sum = Lane<Vec<S>>::fma(rel, rel, sum);
  });
  return sum_of_lanes(sum);
}

template <typename S>
inline void multiply(S* z, int64_t n, S factor) {
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    store(z + i, load(z + i, count, S(0)) * Vec<S>(factor), count);
  });
}

// What float16 does not reach is as far as it does; infinities and NaN stay.
inline float within_half(float value) {
  constexpr float kMost = 65504;
  return std::isfinite(value) ? std::clamp(value, -kMost, kMost) : value;
}
inline Vec<float> within_half(const Vec<float>& value) {
  using A = Lane<Vec<float>>;
  const Vec<float> most(65504), bounded = A::at_most(A::at_least(value, Vec<float>(-65504)), most);
  return A::select(A::abs(value) < Vec<float>(kInf<float>), bounded, value);
}

// to = z - by, rounded.
template <typename S>
inline void keep_differences(const S* z, int64_t n, S by, at::Half* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<S, float>) {
    constexpr int64_t width = Vec<float>::size();
    const Vec<float> bys(by);
    for (; i + 2 * width <= n; i += 2 * width) {
      store_pair(to + i, within_half(Vec<float>::loadu(z + i) - bys),
                 within_half(Vec<float>::loadu(z + i + width) - bys));
    }
  }
  for (; i < n; ++i) to[i] = within_half(static_cast<float>(z[i] - by));
}

// Of rounded values, which round once more.
inline void add(at::Half* z, int64_t n, float by) {
  for (int64_t i = 0; i < n; ++i) z[i] = within_half(static_cast<float>(z[i]) + by);
}

// Of rounded values; a power of two rounds nothing.
inline void multiply(at::BFloat16* z, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) z[i] = static_cast<float>(z[i]) * factor;
}

template <typename S>
inline void multiply(S* z, const S* by, int64_t n) {
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    store(z + i, load(z + i, count, S(0)) * load(by + i, count, S(0)), count);
  });
}

}  // namespace lossops
