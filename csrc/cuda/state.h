// What a thread keeps of a row of logits, and how two such states merge.
//
// A state is that of a set of classes, relative to its own shift: the largest of its negatives, 0
// where that is not finite. Sums over all classes are relative to one logit of the row instead, its
// pivot, so that no merge has to move them. `state_of` makes one of the logits in a thread's
// registers, `merge` joins two: those of a thread's tiles, of the lanes of a warp, the warps of a
// block, and the parts of a row that blocks of their own have read. What is not in the set `kKept`
// costs nothing.
//
// An exponential a logit for any of sum, mean and spread, one a merge, one a logit and log-sum at a
// temperature or with a limit. Second moments are centred, merged by Chan's rule: no cancellation.
// Verified by tests/emulator/test_logits.py.
#pragma once

#include <climits>

#include "cuda/device.h"
#include "row.h"

namespace lossops {

// Sets of statistics; a statistic needs those named after it.
namespace keep {
enum : unsigned {
  kLse = 1,
  kEntropy = 2,   // kLse
  kVariance = 4,  // kEntropy
  kMax = 8,
  kRunnerUp = 16,  // kMax
  kBelowTarget = 32,
  kSum = 64,
  kSumsq = 128,  // kSum
  kSoftplus = 256,
  kStableSum = 512,
  kWeightedSum = 1024,
  kTeacher = 2048,
  kOneLogSum = 4096,
  kFourLogSums = 8192,
};
}  // namespace keep

constexpr int kNoId = INT_MAX;
constexpr int kMostLogSums = 4;

// log Σ e^{t z} without a limit, log Σ e^{f}, f = z up to the limit and 0 above, with one (t = 1).
struct LogSums {
  int count = 0;
  float temperature[kMostLogSums] = {};
  float limit[kMostLogSums] = {};
};

// What rows may be relative to: top, 0 where it is infinite or NaN.
LOSSOPS_LANE float finite(float top) { return std::fabs(top) < kInf<float> ? top : 0.0f; }

// The larger and its id, the lower id where they are equal: an order without ties.
struct Largest {
  float value = -kInf<float>;
  int id = kNoId;

  LOSSOPS_LANE bool before(const Largest& other) const {
    return value > other.value || (value == other.value && id < other.id);
  }
};

LOSSOPS_LANE Largest larger(const Largest& x, const Largest& y) { return y.before(x) ? y : x; }

// A sum with what its roundings left over: what is added up relative to a pivot is moved to the
// row's shift at the end, which may cost it its leading digits.
struct Sum {
  float high = 0, low = 0;

  LOSSOPS_LANE Sum operator+(const Sum& other) const {
    const float sum = high + other.high, from = sum - high;
    const float lost = (high - (sum - from)) + (other.high - from);
    return {sum, low + other.low + lost};
  }
  // What was lost of an infinite sum is NaN.
  LOSSOPS_LANE double value() const {
    return std::fabs(high) < kInf<float> ? static_cast<double>(high) + low : high;
  }
};

template <unsigned kKept>
struct State {
  static LOSSOPS_LANE constexpr bool has(unsigned set) { return (kKept & set) != 0; }
  static constexpr int kSums = has(keep::kFourLogSums) ? 4 : has(keep::kOneLogSum) ? 1 : 0;

  float top = -kInf<float>;  // the largest negative
  int best = kNoId;          // its id
  float count = 0;           // classes
  float sum = 0;             // Σ e^rel over the negatives
  float mean = 0;            // Σ e^rel rel / sum
  float spread = 0;          // Σ e^rel (rel - mean)²
  Largest second, below;     // negatives: the second, the first below the target
  float average = 0;         // Σ (z - pivot) / count
  float moment = 0;          // Σ (z - pivot - average)²
  float softplus = 0, stable = 0;
  Sum weighted, weights;     // Σ a (z - pivot), Σ a
  Sum taught, teacher;       // Σ t a (z - pivot), Σ t a
  float largest[kSums + 1];  // of a log-sum's terms, where it has a limit
  float power[kSums + 1];    // Σ e^{t rel}, or relative to `largest`

  LOSSOPS_LANE State() {
    for (int k = 0; k < kSums; ++k) largest[k] = -kInf<float>, power[k] = 0;
  }

  LOSSOPS_LANE float shift() const { return finite(top); }

  // f(word) for every float and int that is kept.
  template <typename F>
  LOSSOPS_LANE void each(F f) {
    f(top);
    if constexpr (has(keep::kMax)) f(best);
    if constexpr (has(keep::kLse)) f(sum);
    if constexpr (has(keep::kEntropy)) f(mean);
    if constexpr (has(keep::kVariance)) f(spread);
    if constexpr (has(keep::kRunnerUp)) f(second.value), f(second.id);
    if constexpr (has(keep::kBelowTarget)) f(below.value), f(below.id);
    if constexpr (has(keep::kSum)) f(count), f(average);
    if constexpr (has(keep::kSumsq)) f(moment);
    if constexpr (has(keep::kSoftplus)) f(softplus);
    if constexpr (has(keep::kStableSum)) f(stable);
    if constexpr (has(keep::kWeightedSum)) each_of(f, weighted, weights);
    if constexpr (has(keep::kTeacher)) each_of(f, taught, teacher);
    for (int k = 0; k < kSums; ++k) f(largest[k]), f(power[k]);
  }

  template <typename F>
  static LOSSOPS_LANE void each_of(F& f, Sum& x, Sum& y) {
    f(x.high), f(x.low), f(y.high), f(y.low);
  }

  // As many as `each` visits.
  static constexpr int kWords = 1 + has(keep::kMax) + has(keep::kLse) + has(keep::kEntropy) +
                                has(keep::kVariance) + 2 * has(keep::kRunnerUp) +
                                2 * has(keep::kBelowTarget) + 2 * has(keep::kSum) +
                                has(keep::kSumsq) + has(keep::kSoftplus) + has(keep::kStableSum) +
                                4 * has(keep::kWeightedSum) + 4 * has(keep::kTeacher) + 2 * kSums;
};

// Some classes of a row in the registers of a thread: vectors of kVector classes, `hop` classes
// apart; z is anything where a bit of `valid` is 0.
template <int kTile, int kVector>
struct Tile {
  static constexpr unsigned kAll = (1u << kTile) - 1;
  float z[kTile];
  float a[kTile];         // class vector; read where it is given
  float t[kTile];         // teacher times class vector
  unsigned valid = kAll;  // bits: classes
  unsigned targets = 0;
  int first = 0, hop = 0;

  LOSSOPS_LANE int id(int i) const { return first + i / kVector * hop + i % kVector; }
  LOSSOPS_LANE bool is_valid(int i) const { return valid >> i & 1; }
};

// The state of a tile; `at_target`: the first target's logit, for kBelowTarget.
template <unsigned kKept, int kTile, int kVector>
__device__ __forceinline__ State<kKept> state_of(const Tile<kTile, kVector>& tile, float at_target,
                                                 float pivot, const LogSums& log_sums) {
  using S = State<kKept>;
  using A = Lane<float>;
  S s;
  float negative[kTile];
  for (int i = 0; i < kTile; ++i) negative[i] = tile.z[i];
  const unsigned negatives = tile.valid & ~tile.targets;
  if (negatives != tile.kAll) {  // rare
    for (int i = 0; i < kTile; ++i) {
      if (!(negatives >> i & 1)) negative[i] = -kInf<float>;
    }
  }
  for (int i = 0; i < kTile; ++i) s.top = fmaxf(s.top, negative[i]);
  const float shift = s.shift();
  if constexpr (S::has(keep::kMax)) {
    for (int i = kTile; i-- > 0;) {
      if (negative[i] == s.top && s.top > -kInf<float>) s.best = tile.id(i);
    }
  }
  if constexpr (S::has(keep::kRunnerUp)) {
    for (int i = 0; i < kTile; ++i) {
      const Largest one{negative[i], tile.id(i)};
      if (one.id != s.best && one.value > -kInf<float>) s.second = larger(s.second, one);
    }
  }
  if constexpr (S::has(keep::kBelowTarget)) {
    for (int i = 0; i < kTile; ++i) {
      const Largest one{negative[i], tile.id(i)};
      if (one.value < at_target && one.value > -kInf<float>) s.below = larger(s.below, one);
    }
  }
  if constexpr (S::has(keep::kLse)) {
    float e[kTile], weighted = 0;
    for (int i = 0; i < kTile; ++i) {
      const float far = negative[i] - shift;
      e[i] = A::exp(far);
      s.sum += e[i];
      if constexpr (S::has(keep::kEntropy)) weighted += e[i] == 0 ? 0 : e[i] * far;
    }
    if constexpr (S::has(keep::kEntropy)) s.mean = weighted / (s.sum == 0 ? 1 : s.sum);
    if constexpr (S::has(keep::kVariance)) {
      for (int i = 0; i < kTile; ++i) {
        const float away = negative[i] - shift - s.mean;
        s.spread += e[i] == 0 ? 0 : e[i] * away * away;
      }
    }
  }
  if constexpr (S::has(keep::kSum)) {
    s.count = static_cast<float>(__popc(tile.valid));
    float total = 0;
    for (int i = 0; i < kTile; ++i) total += tile.is_valid(i) ? tile.z[i] - pivot : 0;
    s.average = total / (s.count == 0 ? 1 : s.count);
    if constexpr (S::has(keep::kSumsq)) {
      for (int i = 0; i < kTile; ++i) {
        const float away = tile.is_valid(i) ? tile.z[i] - pivot - s.average : 0;
        s.moment += away * away;
      }
    }
  }
  for (int i = 0; i < kTile; ++i) {
    if constexpr (S::has(keep::kSoftplus)) s.softplus += softplus(negative[i]);
    if constexpr (S::has(keep::kStableSum)) s.stable += stable(negative[i]);
    const float rel = tile.z[i] - pivot;
    if constexpr (S::has(keep::kWeightedSum)) {
      s.weighted.high += tile.is_valid(i) ? rel * tile.a[i] : 0;
      s.weights.high += tile.is_valid(i) ? tile.a[i] : 0;
    }
    if constexpr (S::has(keep::kTeacher)) {
      const bool counts = tile.is_valid(i) && (tile.t[i] != 0 || rel != -kInf<float>);
      s.taught.high += counts ? rel * tile.t[i] : 0;
      s.teacher.high += tile.is_valid(i) ? tile.t[i] : 0;
    }
  }
  for (int k = 0; k < S::kSums; ++k) {
    const float t = log_sums.temperature[k], limit = log_sums.limit[k];
    if (k >= log_sums.count) continue;
    float from = shift;
    if (limit < kInf<float>) {
      for (int i = 0; i < kTile; ++i) {
        const float z = negative[i];
        s.largest[k] = fmaxf(s.largest[k], z > limit ? 0 : z);
      }
      from = finite(s.largest[k]);
    }
    for (int i = 0; i < kTile; ++i) {
      const float z = negative[i];
      s.power[k] += A::exp(t * ((z > limit ? 0 : z) - from));
    }
  }
  return s;
}

// The state of the classes of both.
template <unsigned kKept>
__device__ __forceinline__ State<kKept> merge(const State<kKept>& p, const State<kKept>& q,
                                              const LogSums& log_sums) {
  using S = State<kKept>;
  using A = Lane<float>;
  constexpr float kLeast = -kInf<float>;
  S s;
  s.top = fmaxf(p.top, q.top);
  const float shift = s.shift();
  const float p_down = p.shift() - shift, q_down = q.shift() - shift;
  // Only the lower one is scaled. What has no negatives has nothing to scale: its shift of 0 may be
  // far above all others.
  const float p_far = p.top == kLeast ? 0 : p_down, q_far = q.top == kLeast ? 0 : q_down;
  if constexpr (S::has(keep::kLse)) {
    const float lower = A::exp(p_far + q_far);
    const float p_scale = p_far == 0 ? 1 : lower, q_scale = q_far == 0 ? 1 : lower;
    const float p_sum = p.sum * p_scale, q_sum = q.sum * q_scale;
    s.sum = p_sum + q_sum;
    if constexpr (S::has(keep::kEntropy)) {
      const float inverse = 1 / (s.sum == 0 ? 1 : s.sum);
      const float p_part = p_sum * inverse, q_part = q_sum * inverse;
      const float p_mean = p_part == 0 ? 0 : p.mean + p_down;
      const float q_mean = q_part == 0 ? 0 : q.mean + q_down;
      s.mean = p_part * p_mean + q_part * q_mean;
      if constexpr (S::has(keep::kVariance)) {
        const float apart = q_mean - p_mean;
        s.spread = p.spread * p_scale + q.spread * q_scale + apart * apart * p_part * q_sum;
      }
    }
  }
  if constexpr (S::has(keep::kMax)) {
    const Largest x{p.top, p.best}, y{q.top, q.best};
    s.best = larger(x, y).id;
    // The loser of the two firsts, or the second of the winner.
    if constexpr (S::has(keep::kRunnerUp)) {
      s.second = y.before(x) ? larger(x, q.second) : larger(y, p.second);
    }
  }
  if constexpr (S::has(keep::kBelowTarget)) s.below = larger(p.below, q.below);
  if constexpr (S::has(keep::kSum)) {
    s.count = p.count + q.count;
    const float inverse = 1 / (s.count > 0 ? s.count : 1);
    const float p_weight = p.count * inverse, q_weight = q.count * inverse;
    s.average = p_weight * p.average + q_weight * q.average;
    if constexpr (S::has(keep::kSumsq)) {
      const float apart = p_weight * q_weight == 0 ? 0 : q.average - p.average;
      s.moment = p.moment + q.moment + apart * apart * (p_weight * q.count);
    }
  }
  s.softplus = p.softplus + q.softplus;
  s.stable = p.stable + q.stable;
  s.weighted = p.weighted + q.weighted;
  s.weights = p.weights + q.weights;
  s.taught = p.taught + q.taught;
  s.teacher = p.teacher + q.teacher;
  for (int k = 0; k < S::kSums; ++k) {
    float x_down = log_sums.temperature[k] * p_far, y_down = log_sums.temperature[k] * q_far;
    if (log_sums.limit[k] < kInf<float>) {
      s.largest[k] = fmaxf(p.largest[k], q.largest[k]);
      x_down = p.largest[k] == kLeast ? 0 : finite(p.largest[k]) - finite(s.largest[k]);
      y_down = q.largest[k] == kLeast ? 0 : finite(q.largest[k]) - finite(s.largest[k]);
    }
    const float x = x_down == 0 ? p.power[k] : p.power[k] * A::exp(x_down);
    s.power[k] = x + (y_down == 0 ? q.power[k] : q.power[k] * A::exp(y_down));
  }
  return s;
}

}  // namespace lossops
