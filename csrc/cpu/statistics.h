// Statistics of a row, from the tiles of its logits in the order of the classes.
//
// Verified by tests/test_cpu_backend.py: every statistic, ragged tiles, common offsets of 1e4,
// infinities and NaN, rows whose maximum comes last.
#pragma once

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/passes.h"
#include "cpu/task.h"

namespace lossops {

// How far above its offset a kept exponential may lie before the row is redone: e^40 times V terms
// is far from overflow, and 1 / e^40 on the rows of x is far from the denormals.
template <typename S>
constexpr double kHeadroom = std::is_same_v<S, float> ? 40 : 0;

// How far a row's largest negative may lie above the origin of kept logits: what a logit is rounded
// by grows with its distance from the origin.
constexpr double kOriginHeadroom = 1;

// What a sweep keeps of its rows: with `on` their exponentials, in place of the logits or rounded
// in a matrix of their own, or their logits rounded.
struct Kept {
  bool on = false;
  at::BFloat16* exponentials = nullptr;  // (R, V), or null
  at::Half* logits = nullptr;            // (R, V), or null
  int64_t stride = 0;
};

template <typename S>
struct RowState {
  S top = -kInf<S>;     // the largest negative so far, or NaN for good
  S second = -kInf<S>;  // the next
  int64_t top_index = -1, second_index = -1;
  bool seen = false;  // a finite negative: `shift` or `offset` is set
  double shift = 0;   // what the sums are relative to: the maximum, or the offset's logit
  Offset offset;      // that of exponentials which are kept
  bool placed = false;
  S origin = 0;  // what logits which are kept are relative to, once placed
  S first_target = -kInf<S>;
  bool knows_target = false;  // before its tile
  bool mistaken = false;      // and it turned out to be another
  S below = -kInf<S>;         // the largest negative below the first target so far
  int64_t below_index = -1;
  SoftmaxSums softmax;
  Moments moments;                            // all classes
  double vector_total = 0, vector_sum = 0;    // Σ a z, Σ a
  double teacher_total = 0, teacher_sum = 0;  // Σ t a z, Σ t a
  double softplus = 0, stable = 0;
  std::vector<SoftmaxSums> log_sums;

  explicit RowState(size_t log_sum_count) : log_sums(log_sum_count) {}
};

// What sums over a tile are relative to, so that they stay small whatever its logits have in
// common: the first of them, or the largest where that is far above it. Relative to the -1e9 of a
// class that is masked all others would be the same.
template <typename S>
inline S pivot_of(const S* z, int64_t n) {
  constexpr S kFar = 64;
  const S top = largest(z, n);
  if (!std::isfinite(top)) return 0;
  return top - z[0] <= kFar ? z[0] : top;
}

// Statistics over all classes of the tile: the targets are still in place.
template <typename S>
inline void collect_all(const Task<S>& task, const Fields<S>& out, RowState<S>& state, int64_t row,
                        const S* z, int64_t first, int64_t n, S* scratch) {
  const bool any = out.average != nullptr || out.moment != nullptr || out.weighted_sum != nullptr ||
                   out.teacher != nullptr;
  if (!any) return;
  const S pivot = pivot_of(z, n);
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
    task.load_teacher(row, first, n, scratch);
    const auto [sum, a] = weighted_total<true>(z, scratch, n, pivot);
    state.teacher_total += sum + a * pivot;
    state.teacher_sum += a;
  }
}

// Writes the targets' logits to `out` and -inf in their place, so that the negatives are the tile.
template <typename S>
inline void take_targets(const Task<S>& task, const Fields<S>& out, RowState<S>& state, int64_t row,
                         S* z, int64_t first, int64_t n) {
  if (task.targets == 0) return;
  const int64_t* ids = task.target_row(row);
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t j = ids[k] - first;
    if (j < 0 || j >= n) continue;
    if (out.target != nullptr) out.target[row * task.targets + k] = z[j];
    if (k == 0) {
      state.mistaken = state.knows_target && state.first_target != z[j];
      state.first_target = z[j];
    }
    z[j] = -kInf<S>;
  }
}

// -inf in place of the targets.
template <typename S>
inline void drop_targets(const Task<S>& task, int64_t row, S* z, int64_t first, int64_t n) {
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t j = task.target_row(row)[k] - first;
    if (j >= 0 && j < n) z[j] = -kInf<S>;
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

// Merges the largest negative below the first target, whose logit is known: z has no targets.
template <typename S>
inline void merge_below(RowState<S>& state, const S* z, int64_t first, int64_t n) {
  const S top = largest_below(z, n, state.first_target);
  if (!(top > state.below)) return;
  state.below = top;
  state.below_index = first + find(z, n, top);
}

// Moves the shift of a row up to the largest negative of its tile z; with `keep` only where the
// offset is too low, and then the exponentials of the earlier tiles, `before` values, go with it.
template <typename S>
inline void raise_shift(const Task<S>& task, RowState<S>& state, S top, const Kept& keep,
                        int64_t row, S* z, int64_t before) {
  if (top == -kInf<S>) return;
  if (state.seen && top - state.shift <= (keep.on ? kHeadroom<S> : 0)) return;
  const Offset offset = Offset::near(top);
  const double shift = keep.on ? offset.logit() : top;
  if (state.seen) {
    const double by = shift - state.shift;
    const S factor = static_cast<S>(std::exp(-by));
    if (keep.exponentials != nullptr) {
      multiply(keep.exponentials + row * keep.stride, before, static_cast<float>(factor));
    } else if (keep.on) {
      multiply(z - before, before, factor);
    }
    state.softmax.raise(by);
    for (size_t k = 0; k < task.log_sums.size(); ++k) {
      const LogSum<S>& kind = task.log_sums[k];
      state.log_sums[k].raise(kind.shift(shift) - kind.shift(state.shift), kind.temperature);
    }
  }
  state.seen = true;
  state.shift = shift;
  state.offset = offset;
}

// Rounds the tile z of a row to its place, relative to an origin where the gradient needs most
// digits: 0 for sums that read z itself; else the row's first finite maximum, moved up with what is
// there where a later one is too far above.
template <typename S>
inline void keep_logits(const Fields<S>& out, RowState<S>& state, const Kept& keep, int64_t row,
                        const S* z, int64_t first, int64_t n) {
  at::Half* to = keep.logits + row * keep.stride;
  const bool absolute = out.softplus != nullptr || out.stable_sum != nullptr;
  if (!absolute && std::isfinite(state.top) &&
      (!state.placed || state.top - state.origin > kOriginHeadroom)) {
    if (state.placed) add(to, first, static_cast<float>(state.origin - state.top));
    state.placed = true;
    state.origin = state.top;
  }
  keep_differences(z, n, state.origin, to + first);
}

// Adds the tile of one row that starts at class `first` to the row's state. The tile is used up: it
// holds z with -inf at the targets, or with `keep` their exponentials over the row's offset: where
// they are kept in place, those of earlier tiles lie before it in memory. `scratch`: n values, for
// a teacher.
template <typename S>
inline void collect(const Task<S>& task, const Fields<S>& out, RowState<S>& state, int64_t row,
                    S* z, int64_t first, int64_t n, const Kept& keep, S* scratch) {
  collect_all(task, out, state, row, z, first, n, scratch);
  take_targets(task, out, state, row, z, first, n);
  S top, second = -kInf<S>;
  if (out.runner_up != nullptr) {
    std::tie(top, second) = two_largest(z, n);
  } else {
    top = largest(z, n);
  }
  merge_extremes(state, out, z, first, n, top, second);
  if (state.knows_target) merge_below(state, z, first, n);
  if (out.softplus != nullptr) state.softplus += softplus_sum(z, n);
  if (out.stable_sum != nullptr) state.stable += stable_total(z, n);
  if (keep.logits != nullptr) keep_logits(out, state, keep, row, z, first, n);
  if (!(state.top < kInf<S>)) return;  // +inf or NaN: finish() poisons the row
  raise_shift(task, state, top, keep, row, z, first);
  if (keep.on) {
    state.softmax.sum += keep_exponentials(z, n, state.offset);
    if (keep.exponentials != nullptr) {
      narrow(z, 1, n, keep.exponentials + row * keep.stride + first);
    }
    return;
  }
  const S shift = static_cast<S>(state.shift);
  for (size_t k = 0; k < task.log_sums.size(); ++k) {
    const LogSum<S>& kind = task.log_sums[k];
    const S from = static_cast<S>(kind.shift(state.shift));
    state.log_sums[k].sum += kind.filters() ? filtered_exponentials(z, n, from, kind.limit)
                                            : exponentials<false>(z, n, from, kind.temperature).sum;
  }
  if (out.lse == nullptr) return;
  const SoftmaxSums tile = out.variance != nullptr ? exponentials<true, true>(z, n, shift, S(1))
                           : out.mean != nullptr   ? exponentials<true>(z, n, shift, S(1))
                                                   : exponentials<false>(z, n, shift, S(1));
  state.softmax.sum += tile.sum;
  state.softmax.weighted += tile.weighted;
  state.softmax.squares += tile.squares;
}

// Writes a row's statistics, relative to the largest negative m; the targets' logits, which may be
// so far above it that they would lose their digits, stay as they are.
template <typename S>
inline void finish(const Task<S>& task, const Fields<S>& out, const RowState<S>& state,
                   int64_t row) {
  const S m = std::isfinite(state.top) ? state.top : S(0);
  const bool poisoned = !(state.top < kInf<S>);  // +inf or NaN
  const double above = state.shift - m;
  auto put = [row](S* field, double value) {
    if (field != nullptr) field[row] = static_cast<S>(value);
  };
  put(out.shift, m);
  put(out.lse, poisoned ? state.top : std::log(state.softmax.sum) + above);
  const double mean = state.softmax.weighted / state.softmax.sum + above;
  const double within = state.softmax.weighted / state.softmax.sum;
  const double variance = state.softmax.squares / state.softmax.sum - within * within;
  put(out.variance, poisoned ? std::nan("") : state.softmax.sum == 0 ? 0 : std::max(variance, 0.0));
  put(out.mean, poisoned ? std::nan("") : state.softmax.sum == 0 ? 0 : mean);
  for (size_t k = 0; k < task.log_sums.size(); ++k) {
    const LogSum<S>& kind = task.log_sums[k];
    const double from = kind.shift(state.shift) - m;
    const double lse = std::log(state.log_sums[k].sum) + kind.temperature * from;
    put(out.log_sums[k], poisoned ? state.top : lse);
  }
  put(out.max, static_cast<double>(state.top) - m);
  put(out.below_target, static_cast<double>(state.below) - m);
  if (out.below_target_index != nullptr) out.below_target_index[row] = state.below_index;
  put(out.runner_up, static_cast<double>(state.second) - m);
  if (out.argmax != nullptr) out.argmax[row] = state.top_index;
  if (out.runner_up_index != nullptr) out.runner_up_index[row] = state.second_index;
  put(out.average, state.moments.total / task.classes - m);
  put(out.moment, state.moments.moment);
  put(out.softplus, state.softplus);
  put(out.stable_sum, state.stable);
  put(out.weighted_sum, state.vector_total - m * state.vector_sum);
  put(out.teacher, state.teacher_total - m * state.teacher_sum);
}

}  // namespace lossops
