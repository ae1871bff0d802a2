// The row passes: statistics of a tile of a row of logits, and dz in its place.
//
// A tile (1, n) of a row is some 8 KiB and stays in the first-level cache, so each pass below reads
// it anew; what counts is the arithmetic, and of that the exponential (measured figures: linear.cpp).
// A row's state is carried from tile to tile in the order of the classes. Sums run in lanes of at
// most tile / width terms and are added in double.
//
// Verified by tests/test_cpu_backend.py: every statistic and every term of dz, ragged sizes, common
// offsets of 1e4, infinities, rows whose maximum comes last.
#pragma once

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/task.h"

namespace lossops {

// How far above its offset a kept exponential e^{z - k} may lie before the row is redone: e^40 times
// V terms is far from overflow, and 1 / e^40 on the rows of x is far from the denormals.
constexpr double kHeadroom = 40;

template <typename S>
struct RowState {
  S top = -kInf<S>;     // the largest negative so far, or NaN for good
  S second = -kInf<S>;  // the next
  int64_t top_index = -1, second_index = -1;
  S shift = 0;         // what the sums are relative to: the maximum, or the offset k
  bool seen = false;   // a finite negative: `shift` is set
  S first_target = -kInf<S>;
  S below = -kInf<S>;  // the largest negative below it so far
  SoftmaxSums softmax;
  Moments moments;                           // all classes
  double vector_total = 0, vector_sum = 0;   // Σ a z, Σ a
  double teacher_total = 0, teacher_sum = 0;  // Σ t a z, Σ t a
  double softplus = 0;
  std::vector<SoftmaxSums> temperatures;
};

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

// The largest of n >= 1 values, NaN if there is one.
template <typename S>
inline S largest(const S* z, int64_t n) {
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

// Σ e^{t (z - shift)}, with Σ e^{rel} rel and with the exponentials left in place where asked.
template <bool kWeighted, bool kKeep, typename S>
inline SoftmaxSums exponentials(S* z, int64_t n, S shift, S t) {
  using A = Lane<Vec<S>>;
  const Vec<S> shifts(shift), ts(t);
  Vec<S> sum(0), weighted(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> rel = ts * (load(z + i, count, -kInf<S>) - shifts);
    const Vec<S> e = A::exp(rel);
    sum = sum + e;
    if constexpr (kWeighted) {
      weighted = weighted + A::select(e == Vec<S>(0), Vec<S>(0), e * rel);
    }
    if constexpr (kKeep) store(z + i, e, count);
  });
  return {sum_of_lanes(sum), kWeighted ? sum_of_lanes(weighted) : 0};
}

template <typename S>
inline double softplus_sum(const S* z, int64_t n) {
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    sum = sum + softplus(load(z + i, count, -kInf<S>));
  });
  return sum_of_lanes(sum);
}

// Σ a (z - pivot) and Σ a, where a = 0 counts 0 whatever z is if `kMasked`.
template <bool kMasked, typename S>
inline std::pair<double, double> weighted_total(const S* z, const S* a, int64_t n, S pivot) {
  using A = Lane<Vec<S>>;
  const Vec<S> pivots(pivot);
  Vec<S> total(0), sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> weight = load(a + i, count, S(0));
    Vec<S> rel = load(z + i, count, pivot) - pivots;
    if constexpr (kMasked) rel = A::select(weight == Vec<S>(0), Vec<S>(0), rel);
    total = A::fma(weight, rel, total);
    sum = sum + weight;
  });
  return {sum_of_lanes(total), sum_of_lanes(sum)};
}

template <typename S>
inline double total(const S* z, int64_t n, S pivot) {
  const Vec<S> pivots(pivot);
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    sum = sum + (load(z + i, count, pivot) - pivots);
  });
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

template <typename S>
inline void multiply(S* z, const S* by, int64_t n) {
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    store(z + i, load(z + i, count, S(0)) * load(by + i, count, S(0)), count);
  });
}

// t a of a tile of one row, into `to`.
template <typename S>
inline void load_teacher(const Task<S>& task, int64_t row, int64_t first, int64_t n, S* to) {
  task.teacher.load(row, first, n, to);
  if (task.class_vector != nullptr) multiply(to, task.class_vector + first, n);
}

// Statistics over all classes of the tile: the targets are still in place.
template <typename S>
inline void collect_all(const Task<S>& task, const Fields<S>& out, RowState<S>& state, int64_t row,
                        const S* z, int64_t first, int64_t n, S* scratch) {
  // Relative to one of its logits the sums of a tile stay small whatever they have in common.
  const S pivot = std::isfinite(z[0]) ? z[0] : S(0);
  if (out.average != nullptr || out.moment != nullptr) {
    const double tile_total = total(z, n, pivot) + static_cast<double>(pivot) * n;
    const S mean = static_cast<S>(tile_total / n);
    const double squares = out.moment != nullptr ? centred_squares(z, n, mean) : 0;
    state.moments.merge(static_cast<double>(n), tile_total, squares);
  }
  if (out.weighted_sum != nullptr) {
    const auto [sum, a] = weighted_total<false>(z, task.class_vector + first, n, pivot);
    state.vector_total += sum + a * pivot;
    state.vector_sum += a;
  }
  if (out.teacher != nullptr) {
    load_teacher(task, row, first, n, scratch);
    const auto [sum, a] = weighted_total<true>(z, scratch, n, pivot);
    state.teacher_total += sum + a * pivot;
    state.teacher_sum += a;
  }
}

// Writes the targets' logits to `out` and -inf in their place, so that the negatives are the tile.
template <typename S>
inline void take_targets(const Task<S>& task, const Fields<S>& out, RowState<S>& state,
                         int64_t row, S* z, int64_t first, int64_t n) {
  if (task.targets == 0) return;
  const int64_t* ids = task.target_row(row);
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t j = ids[k] - first;
    if (j < 0 || j >= n) continue;
    if (out.target != nullptr) out.target[row * task.targets + k] = z[j];
    if (k == 0) state.first_target = z[j];
    z[j] = -kInf<S>;
  }
}

// Merges the extremes of a tile; among equals the earlier class stays.
template <typename S>
inline void merge_extremes(RowState<S>& state, const Fields<S>& out, const S* z, int64_t first,
                           int64_t n, S top, S second) {
  if (top > state.top) {
    const int64_t at = out.argmax != nullptr || out.runner_up != nullptr ? find(z, n, top) : 0;
    if (state.top >= second) {
      state.second = state.top;
      state.second_index = state.top_index;
    } else {
      state.second = second;
      state.second_index = first + find(z, n, second, second == top ? at + 1 : 0);
    }
    state.top = top;
    state.top_index = first + at;
  } else if (out.runner_up != nullptr && top > state.second) {
    state.second = top;
    state.second_index = first + find(z, n, top);
  } else if (std::isnan(top)) {
    state.top = top;
  }
}

// Adds the tile of one row that starts at class `first` to the row's state. The tile is used up: it
// holds z with -inf at the targets, or with `keep` e^{z - k}, k the state's shift, whose earlier
// tiles lie before it in memory. `scratch`: n values, for a teacher.
template <typename S>
inline void collect(const Task<S>& task, const Fields<S>& out, RowState<S>& state, int64_t row,
                    S* z, int64_t first, int64_t n, bool keep, S* scratch) {
  collect_all(task, out, state, row, z, first, n, scratch);
  take_targets(task, out, state, row, z, first, n);
  S top, second = -kInf<S>;
  if (out.runner_up != nullptr) {
    std::tie(top, second) = two_largest(z, n);
  } else {
    top = largest(z, n);
  }
  merge_extremes(state, out, z, first, n, top, second);
  if (out.softplus != nullptr) state.softplus += softplus_sum(z, n);
  if (!(state.top < kInf<S>)) return;  // +inf or NaN: finish() poisons the row
  if (!state.seen) {
    state.shift = top == -kInf<S> ? S(0) : top;
    state.seen = top != -kInf<S>;
  } else if (const double by = static_cast<double>(top) - state.shift;
             by > (keep ? kHeadroom / task.largest_temperature : 0)) {
    if (keep) multiply(z - first, first, static_cast<S>(std::exp(-by)));
    state.softmax.raise(by);
    for (size_t k = 0; k < task.temperatures.size(); ++k) {
      state.temperatures[k].raise(by, task.temperatures[k]);
    }
    state.shift = top;
  }
  for (size_t k = 0; k < task.temperatures.size(); ++k) {
    state.temperatures[k].sum +=
        exponentials<false, false>(z, n, state.shift, task.temperatures[k]).sum;
  }
  if (out.lse == nullptr && !keep) return;
  SoftmaxSums tile;
  if (keep) {
    tile = out.mean != nullptr ? exponentials<true, true>(z, n, state.shift, S(1))
                               : exponentials<false, true>(z, n, state.shift, S(1));
  } else {
    tile = out.mean != nullptr ? exponentials<true, false>(z, n, state.shift, S(1))
                               : exponentials<false, false>(z, n, state.shift, S(1));
  }
  state.softmax.sum += tile.sum;
  state.softmax.weighted += tile.weighted;
}

// Writes a row's statistics, `below_target` as if there were none, relative to the largest negative m.
template <typename S>
inline void finish(const Task<S>& task, const Fields<S>& out, const RowState<S>& state,
                   int64_t row) {
  const S m = std::isfinite(state.top) ? state.top : S(0);
  const bool poisoned = !(state.top < kInf<S>);  // +inf or NaN
  const double above = static_cast<double>(state.shift) - m;
  auto put = [row](S* field, double value) {
    if (field != nullptr) field[row] = static_cast<S>(value);
  };
  put(out.shift, m);
  put(out.lse, poisoned ? state.top : std::log(state.softmax.sum) + above);
  const double mean = state.softmax.weighted / state.softmax.sum + above;
  put(out.mean, poisoned ? std::nan("") : state.softmax.sum == 0 ? 0 : mean);
  for (size_t k = 0; k < task.temperatures.size(); ++k) {
    const double lse = std::log(state.temperatures[k].sum) + task.temperatures[k] * above;
    put(out.temperatures[k], poisoned ? state.top : lse);
  }
  put(out.max, static_cast<double>(state.top) - m);
  put(out.below_target, -kInf<double>);
  if (out.below_target_index != nullptr) out.below_target_index[row] = -1;
  put(out.runner_up, static_cast<double>(state.second) - m);
  if (out.argmax != nullptr) out.argmax[row] = state.top_index;
  if (out.runner_up_index != nullptr) out.runner_up_index[row] = state.second_index;
  put(out.average, state.moments.total / task.classes - m);
  put(out.moment, state.moments.moment);
  put(out.softplus, state.softplus);
  put(out.weighted_sum, state.vector_total - m * state.vector_sum);
  put(out.teacher, state.teacher_total - m * state.teacher_sum);
  if (out.target == nullptr) return;
  for (int64_t k = 0; k < task.targets; ++k) {
    S& target = out.target[row * task.targets + k];
    target -= m;
  }
}

// The largest negative below the first target, from the tiles of a second sweep: the targets' logits
// are known and the row is finished. The tile holds z, with the targets or with -inf there.
template <typename S>
inline void collect_below(const Task<S>& task, const Fields<S>& out, RowState<S>& state,
                          int64_t row, S* z, int64_t first, int64_t n) {
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t j = task.target_row(row)[k] - first;
    if (j >= 0 && j < n) z[j] = -kInf<S>;
  }
  const S top = largest_below(z, n, state.first_target);
  if (!(top > state.below)) return;
  state.below = top;
  out.below_target[row] = top - out.shift[row];
  out.below_target_index[row] = first + find(z, n, top);
}

// The terms of dz that coefficients ask for.
template <typename S>
unsigned terms_of(const Fields<S>& coefficient) {
  return (coefficient.lse ? kSoftmax : 0u) | (coefficient.mean ? kEntropy : 0u) |
         (coefficient.softplus ? kSoftplus : 0u) | (coefficient.average ? kAverage : 0u) |
         (coefficient.moment ? kMoment : 0u) | (coefficient.weighted_sum ? kVector : 0u) |
         (coefficient.teacher ? kTeacher : 0u) |
         (std::any_of(coefficient.temperatures.begin(), coefficient.temperatures.end(),
                      [](const S* c) { return c != nullptr; })
              ? kTemperatures
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
        .average = at(statistic.average),
        .c_lse = at(coefficient.lse),
        .c_mean = at(coefficient.mean),
        .c_softplus = at(coefficient.softplus),
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
  return {V(r.shift),  V(r.lse),        V(r.mean),     V(r.average),   V(r.c_lse),   V(r.c_mean),
          V(r.c_softplus), V(r.c_vector), V(r.c_teacher), V(r.constant), V(r.slope)};
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
    if (terms & kTemperatures) {
      for (size_t k = 0; k < task.temperatures.size(); ++k) {
        if (chain.coefficient.temperatures[k] == nullptr) continue;
        const S lse = chain.statistic.temperatures[k][row], temperature = task.temperatures[k];
        const Vec<S> floor(lse == -kInf<S> ? S(0) : lse);
        const Vec<S> q = A::exp(Vec<S>(temperature) * (v - basis.shift) - floor);
        dz = A::fma(Vec<S>(temperature * chain.coefficient.temperatures[k][row]), q, dz);
      }
    }
    if (task.cap != 0) dz = dz * softcap_slope(v, Vec<S>(task.cap));
    store(z + i, dz, count);
  });
}

// dr in place of the tile z of one row from class `first` on, 0 at the targets. `scratch`: n values.
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
  if (chain.terms & kTeacher) load_teacher(task, row, first, n, scratch);
  negatives_gradient(chain, row, z, n, task.class_vector ? task.class_vector + first : nullptr,
                     scratch);
  for (int i = 0; i < count; ++i) z[extremes[i].at] += extremes[i].value;
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t at = task.target_row(row)[k] - first;
    if (at >= 0 && at < n) z[at] = 0;
  }
}

}  // namespace lossops
