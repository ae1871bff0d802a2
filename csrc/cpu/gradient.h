// dz of a tile of a row from its logits; the formula is that of row.h.
//
// Cost: one pass with an exponential, 0.5 ns per logit on one core of a 2.4 GHz AVX2 processor.
// Verified by tests/test_cpu_backend.py: every term against the reference in float64.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/passes.h"
#include "cpu/task.h"

namespace lossops {

// The terms of dz that coefficients ask for.
template <typename S>
unsigned terms_of(const Fields<S>& coefficient) {
  return (coefficient.lse ? kSoftmax : 0u) | (coefficient.mean ? kEntropy : 0u) |
         (coefficient.variance ? kVariance : 0u) | (coefficient.stable_sum ? kStable : 0u) |
         (coefficient.softplus ? kSoftplus : 0u) | (coefficient.average ? kAverage : 0u) |
         (coefficient.moment ? kMoment : 0u) | (coefficient.weighted_sum ? kVector : 0u) |
         (coefficient.teacher ? kTeacher : 0u) |
         (std::any_of(coefficient.log_sums.begin(), coefficient.log_sums.end(),
                      [](const S* c) { return c != nullptr; })
              ? kLogSums
              : 0u);
}

// A dz that is smaller goes into products as 0. Times a weight it would be subnormal, and products
// full of those take 1.3 times as long (Intel, AVX-512); a loss that weights rows by a power of
// 1 - p makes rows of them. At most 2^-100, and 2^-90 of the largest coefficient; 0 with terms that
// are on a scale of their own.
template <typename S>
S negligible_of(const Fields<S>& c, int64_t rows) {
  if (!std::is_same_v<S, float> || c.weighted_sum || c.teacher || c.moment) return 0;
  S largest = 0;
  const auto see = [&](const S* field) {
    for (int64_t i = 0; field != nullptr && i < rows; ++i) {
      if (std::isfinite(field[i])) largest = std::max(largest, std::abs(field[i]));
    }
  };
  for (const S* field : {c.lse, c.mean, c.variance, c.average, c.softplus, c.stable_sum}) {
    see(field);
  }
  for (const S* field : c.log_sums) see(field);
  return static_cast<S>(std::min(0x1p-100, 0x1p-90 * largest));
}

// What the gradient of a call reads: statistics and coefficients.
template <typename S>
struct Chain {
  const Task<S>& task;
  const Fields<S>& statistic;
  const Fields<S>& coefficient;
  unsigned terms = terms_of(coefficient);
  S negligible = negligible_of(coefficient, task.rows);

  RowBasis<S> basis(int64_t row) const {
    auto at = [row](const S* field) { return field == nullptr ? S(0) : field[row]; };
    const S lse = at(statistic.lse);
    return {
        .shift = at(statistic.shift),
        .lse = lse == -kInf<S> ? S(0) : lse,  // no negatives: q = 0, not 0 / 0
        .mean = at(statistic.mean),
        .variance = at(statistic.variance),
        .average = at(statistic.average),
        .c_lse = at(coefficient.lse),
        .c_mean = at(coefficient.mean),
        .c_variance = at(coefficient.variance),
        .c_softplus = at(coefficient.softplus),
        .c_stable = at(coefficient.stable_sum),
        .c_vector = at(coefficient.weighted_sum),
        .c_teacher = at(coefficient.teacher),
        .constant = at(coefficient.average) / static_cast<S>(task.classes),
        .slope = 2 * at(coefficient.moment),
    };
  }
};

template <typename S>
inline RowBasis<Vec<S>> broadcast(const RowBasis<S>& r) {
  using V = Vec<S>;
  return {V(r.shift),    V(r.lse),       V(r.mean),       V(r.variance),   V(r.average),
          V(r.c_lse),    V(r.c_mean),    V(r.c_variance), V(r.c_softplus), V(r.c_stable),
          V(r.c_vector), V(r.c_teacher), V(r.constant),   V(r.slope)};
}

// Where a pass reads the logits of a tile of one row and puts dz: both in one place,
template <typename S>
struct InPlace {
  S* z;
  S negligible = 0;  // a smaller |dz| is put as 0

  S logit(int64_t j) const { return z[j]; }
  void add(int64_t j, S value) const { z[j] += value; }
  void clear(int64_t j) const { z[j] = 0; }
  // dz = f(z, j, count), `count` values of a vector from j on.
  template <typename F>
  LOSSOPS_LANE void map(int64_t n, const F& f) const {
    for_lanes<S>(n, [&](int64_t j, auto count) LOSSOPS_INLINE_LAMBDA {
      const Vec<S> dz = f(load(z + j, count, S(0)), j, count);
      const auto small = dz.abs() < Vec<S>(negligible);
      store(z + j, Lane<Vec<S>>::select(small, Vec<S>(0), dz), count);
    });
  }
};

// or logits rounded relative to an origin, which stay, and dz as the products round it.
struct FromRounded {
  const at::Half* z;
  float origin;
  at::BFloat16* dz;

  float logit(int64_t j) const { return static_cast<float>(z[j]) + origin; }
  void add(int64_t j, float value) const { dz[j] = static_cast<float>(dz[j]) + value; }
  void clear(int64_t j) const { dz[j] = 0; }
  template <typename F>
  LOSSOPS_LANE void map(int64_t n, const F& f) const {
    constexpr int64_t width = Vec<float>::size();
    constexpr std::integral_constant<int64_t, width> whole;
    const Vec<float> origins(origin);
    int64_t j = 0;
    for (; j + 2 * width <= n; j += 2 * width) {
      Vec<float> low, high;
      load_pair(z + j, low, high);
      store_pair(dz + j, f(low + origins, j, whole), f(high + origins, j + width, whole));
    }
    if (j == n) return;
    float rest[2 * width] = {};
    widen(z + j, 1, n - j, rest);
    for (int64_t k = 0; k < n - j; k += width) {
      f(Vec<float>::loadu(rest + k) + origins, j + k, std::min(width, n - j - k)).store(rest + k);
    }
    narrow(rest, 1, n - j, dz + j);
  }
};

// What dz takes from one log-sum of a row.
template <typename L>
struct LogSumBasis {
  L temperature, lse, factor, limit;
  bool filters;

  template <bool kFilters>
  LOSSOPS_LANE L add_to(const L& dz, const L& z, const L& shift) const {
    using A = Lane<L>;
    L q = A::exp(temperature * (z - shift) - lse);
    if constexpr (kFilters) q = A::select(z > limit, L(0), q);
    return A::fma(factor, q, dz);
  }
};

template <typename S>
inline LogSumBasis<Vec<S>> broadcast(const LogSumBasis<S>& sum) {
  using V = Vec<S>;
  return {V(sum.temperature), V(sum.lse), V(sum.factor), V(sum.limit), sum.filters};
}

// f(std::integral_constant) of the terms: one that is known for those a loss mostly has, whose loop
// then holds nothing else, or of all there are.
template <typename F>
LOSSOPS_LANE void with_terms(unsigned terms, F&& f) {
  constexpr unsigned kBoth = kSoftmax | kAverage;  // an average without a coefficient adds 0
  using Known = std::integer_sequence<unsigned, 0, kBoth, kBoth | kMoment, kBoth | kEntropy,
                                      kBoth | kLogSums, kLogSums, kSoftplus, kStable>;
  const unsigned wanted = terms & kSoftmax ? terms | kAverage : terms;
  const auto try_each = [&]<unsigned... kKnown>(std::integer_sequence<unsigned, kKnown...>) {
    return ((wanted == kKnown && (f(std::integral_constant<unsigned, kKnown>{}), true)) || ...);
  };
  if (!try_each(Known{})) f(terms);
}

// dz of the negatives of a tile (1, n); `a` and `t` as in RowBasis, null where not used.
template <typename S, typename Place>
inline void negatives_gradient(const Chain<S>& chain, int64_t row, const Place& place, int64_t n,
                               const S* a, const S* t) {
  const Task<S>& task = chain.task;
  const RowBasis<Vec<S>> basis = broadcast(chain.basis(row));
  c10::SmallVector<LogSumBasis<S>, 2> sums;
  for (size_t k = 0; k < task.log_sums.size(); ++k) {
    if (chain.coefficient.log_sums[k] == nullptr) continue;
    const LogSum<S>& kind = task.log_sums[k];
    const S lse = chain.statistic.log_sums[k][row];
    sums.push_back({kind.temperature, lse == -kInf<S> ? S(0) : lse,
                    kind.temperature * chain.coefficient.log_sums[k][row], kind.limit,
                    kind.filters()});
  }
  // Straight loops for one log-sum without a limit and no softcap, one for everything else.
  const bool plain = task.cap == 0 && (sums.empty() || (sums.size() == 1 && !sums[0].filters));
  if (plain) {
    bool done = true;
    with_terms(chain.terms, [&](auto terms) LOSSOPS_INLINE_LAMBDA {
      if constexpr (std::is_same_v<decltype(terms), unsigned>) {
        done = false;
      } else {
        constexpr unsigned kTerms = terms();
        const auto sum = broadcast(kTerms & kLogSums ? sums[0] : LogSumBasis<S>());
        place.map(n, [&](const Vec<S>& z, int64_t, auto) LOSSOPS_INLINE_LAMBDA {
          const Vec<S> none(0);
          Vec<S> dz = basis.negative(kTerms, z, none, none);
          if constexpr (kTerms & kLogSums) dz = sum.template add_to<false>(dz, z, basis.shift);
          return dz;
        });
      }
    });
    if (done) return;
  }
  const unsigned terms = chain.terms;
  place.map(n, [&](const Vec<S>& z, int64_t j, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> as = terms & kVector ? load(a + j, count, S(0)) : Vec<S>(0);
    const Vec<S> ts = terms & kTeacher ? load(t + j, count, S(0)) : Vec<S>(0);
    Vec<S> dz = basis.negative(terms, z, as, ts);
    for (const LogSumBasis<S>& kind : sums) {
      const auto sum = broadcast(kind);
      dz = sum.filters ? sum.template add_to<true>(dz, z, basis.shift)
                       : sum.template add_to<false>(dz, z, basis.shift);
    }
    return task.cap == 0 ? dz : dz * softcap_slope(z, Vec<S>(task.cap));
  });
}

// dr of the tile of one row from class `first` on, 0 at the targets. `scratch`: n values.
template <typename S, typename Place>
inline void gradient(const Chain<S>& chain, int64_t row, const Place& place, int64_t first,
                     int64_t n, S* scratch) {
  const Task<S>& task = chain.task;
  const Fields<S>&c = chain.coefficient, &s = chain.statistic;
  // The extremes are single classes: added after the pass, with the slope their logit had before.
  struct Extreme {
    int64_t at;
    S value;
  } extremes[3];
  int count = 0;
  auto note = [&](const S* coefficient, const int64_t* index) {
    if (coefficient == nullptr) return;
    const int64_t at = index[row] - first;
    if (at < 0 || at >= n || index[row] < 0) return;
    const S slope = task.cap != 0 ? softcap_slope(place.logit(at), task.cap) : S(1);
    extremes[count++] = {at, coefficient[row] * slope};
  };
  note(c.max, s.argmax);
  note(c.runner_up, s.runner_up_index);
  note(c.below_target, s.below_target_index);
  if (chain.terms & kTeacher) task.load_teacher(row, first, n, scratch);
  const S* a = task.class_vector ? task.class_vector + first : nullptr;
  negatives_gradient(chain, row, place, n, a, scratch);
  for (int i = 0; i < count; ++i) place.add(extremes[i].at, extremes[i].value);
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t at = task.target_row(row)[k] - first;
    if (at >= 0 && at < n) place.clear(at);
  }
}

}  // namespace lossops
