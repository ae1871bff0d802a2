// Sums of rows by class, in a fixed order, and what is made of them: rows of a gradient, the
// targets' part of dx, dw and db, steps of an optimizer.
//
// Pairs come sorted by class, stably. A warp looks at each pair and at 32 vectors of features;
// where the pair is the first of its class the warp adds up the class and has its row of the table
// to itself: no atomics, the same bits every time. Lanes read 32 pairs at a time, then 4 rows are
// on their way at once. A class of many pairs (it fills a block of 8 and goes on for 64) is shared
// by the 8 warps of the block where it begins: warp k takes the k-th of every 8 runs of 32 pairs.
// Every 32 pairs are summed apart, which also bounds the rounding of a long sum.
//
// P pairs of U classes, D features of T bytes; ids, order and value are read once for each part:
//
//   scatter_rows     read P D T, write U D T (the table is zero before)
//   add_to_classes   read P D T + 4 U D, write 4 U D
//   add_to_rows      read P D T + 4 N D, write 4 N D
//   sgd_rows         read P D T + 2 U D T, write 2 U D T (1 and 1 without momentum)
//   adamw_rows       read P D T + 3 U D T, write 3 U D T
//
// each the minimum for rows that do not fit the cache. Launch: 256 threads; grid (P / 8, parts).
//
// Verified by tests/emulator/test_rows.py on a CPU; has not run on a GPU.
#include "cuda/features.h"

namespace lossops {
namespace {

constexpr int kWarps = 8;
constexpr int kMany = 64;
constexpr unsigned kAll = 0xffffffffu;

// What a lane knows of a pair: whether it is of the run that is being summed, its row (-1 for none)
// and its factor, where there are factors.
struct Pair {
  bool follows = false;
  int64_t row = -1;
  float value = 0.0f;
};

// Adds the rows of the run that begins at `begin`, times their values if kWeighs, to `sum`; 32
// pairs of every `step`. at(p) is pair p; kFlying rows are loaded before one is added. Returns this
// lane's part of the sum of the values.
template <typename T, int kFlying, bool kWeighs, typename At>
__device__ __forceinline__ float add_run(const Rows& rows, const Features<T>& features,
                                         int64_t begin, int64_t step, const At& at,
                                         Floats<T>& sum) {
  constexpr int kSize = Features<T>::kSize;
  const int lane = threadIdx.x % 32;
  float values = 0.0f;
  for (;; begin += step) {
    const Pair mine = at(begin + lane);
    values += mine.value;
    const int run = __popc(__ballot_sync(kAll, mine.follows));
    Floats<T> part{};
    for (int first = 0; first < run; first += kFlying) {
      Elements<T, kSize> flying[kFlying];
      float value[kFlying];
#pragma unroll
      for (int k = 0; k < kFlying; ++k) {
        const int64_t at_row = __shfl_sync(kAll, mine.row, first + k);
        value[k] = kWeighs ? __shfl_sync(kAll, mine.value, first + k) : 1.0f;
        flying[k] = features.load(at_row < 0 ? nullptr : row<const T>(rows, at_row));
      }
#pragma unroll
      for (int k = 0; k < kFlying; ++k) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) part[i] += value[k] * flying[k][i];
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] += part[i];
    if (run < 32) return values;
  }
}

// `sink.open(id, features)` reads what a class has before, while its pairs are being summed;
// `sink.close(id, features, before, sum, values)` is called once, by the lanes of one warp.
template <typename T, typename Sink>
__global__ void __launch_bounds__(32 * kWarps, 3) classes_kernel(Pairs a, Sink sink, bool vectors) {
  constexpr int kSize = Features<T>::kSize;
  constexpr bool kWeighs = Sink::kWeighs;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Features<T> features(static_cast<int>(blockIdx.y), lane, a.width, vectors);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps;
  const int64_t last = first + kWarps < a.count ? first + kWarps - 1 : a.count - 1;

  // Only the class of the last pair can go on far beyond the block.
  const int64_t long_id = a.ids[last];
  const bool is_long = last + kMany < a.count && a.ids[last + kMany] == long_id;
  LOSSOPS_SHARED(float, sums, kWarps * 32 * kSize);
  LOSSOPS_SHARED(float, sums_of_values, kWarps);

  // First every warp by itself, then all together; one loop, since the code of the two is the same.
#pragma unroll 1
  for (int together = 0; together < 2; ++together) {
    int64_t begin = together ? last : first + warp;
    if (together) {
      if (!is_long || (first > 0 && a.ids[first - 1] == long_id)) return;  // all of the block
      while (begin > first && a.ids[begin - 1] == long_id) --begin;
    } else if (begin > last || (begin > 0 && a.ids[begin - 1] == a.ids[begin])) {
      continue;
    }
    const int64_t id = a.ids[begin];
    if (id < 0 || id >= a.classes || (is_long && id == long_id && !together)) continue;

    decltype(sink.open(id, features)) before{};
    if (!together || warp == 0) before = sink.open(id, features);  // by the warp that closes
    const auto at = [&](int64_t p) {
      if (p >= a.count || a.ids[p] != id) return Pair{};
      const int64_t pair = a.order == nullptr ? p : a.order[p];
      if constexpr (!kWeighs) return Pair{true, pair};
      return Pair{true, a.per_row == 1 ? pair : pair / a.per_row, a.value[pair]};
    };
    Floats<T> sum{};
    const int64_t share = together ? 32 * warp : 0, step = together ? 32 * kWarps : 32;
    float values =
        add_run<T, Sink::kFlying, kWeighs>(a.rows, features, begin + share, step, at, sum);
    if constexpr (kWeighs) values = sum_of_warp(values);
    if (together) {
      // Neighbouring lanes side by side: no two of an access share a bank.
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[(warp * kSize + i) * 32 + lane] = sum[i];
      if (kWeighs && lane == 0) sums_of_values[warp] = values;
      __syncthreads();
      if (warp > 0) return;
      for (int other = 1; other < kWarps; ++other) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += sums[(other * kSize + i) * 32 + lane];
        if (kWeighs) values += sums_of_values[other];
      }
    }
    if (kWeighs && a.scale != nullptr) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[i] *= *a.scale;
    }
    sink.close(id, features, before, sum, values);
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 3) rows_kernel(TargetRows a, bool vectors) {
  constexpr int kSize = Features<T>::kSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= a.count) return;  // whole warps
  const Features<T> features(static_cast<int>(blockIdx.y), threadIdx.x % 32, a.width, vectors);
  const int64_t end = (i + 1) * a.per_row;
  const auto at = [&](int64_t p) {
    if (p >= end) return Pair{};
    const int64_t id = a.target[p];
    const bool known = 0 <= id && id < a.classes;
    return Pair{true, known ? id : -1, known ? a.value[p] : 0.0f};
  };
  float* dx = row<float>(a.dx, i);
  Elements<float, kSize> before = features.load(dx);
  Floats<T> sum{};
  add_run<T, 4, true>(a.w, features, i * a.per_row, 32, at, sum);
#pragma unroll
  for (int k = 0; k < kSize; ++k) before.set(k, before[k] + sum[k]);
  features.store(dx, before);
}

template <typename T>
struct Store {
  static constexpr int kSize = Features<T>::kSize, kFlying = 4;
  static constexpr bool kWeighs = false;
  Rows table;

  struct Nothing {};
  __device__ __forceinline__ Nothing open(int64_t, const Features<T>&) const { return {}; }

  __device__ __forceinline__ void close(int64_t id, const Features<T>& features, Nothing,
                                        const Floats<T>& sum, float) const {
    Elements<T, kSize> found{};
#pragma unroll
    for (int k = 0; k < kSize; ++k) found.set(k, sum[k]);
    features.store(row<T>(table, id), found);
  }
};

template <typename T>
struct Add {
  static constexpr int kSize = Features<T>::kSize, kFlying = 4;
  static constexpr bool kWeighs = true;
  Rows dw;
  float* db;

  __device__ __forceinline__ Elements<float, kSize> open(int64_t id,
                                                         const Features<T>& features) const {
    return features.load(dw.data == nullptr ? nullptr : row<const float>(dw, id));
  }

  __device__ __forceinline__ void close(int64_t id, const Features<T>& features,
                                        Elements<float, kSize> before, const Floats<T>& sum,
                                        float values) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) before.set(k, before[k] + sum[k]);
    if (dw.data != nullptr) features.store(row<float>(dw, id), before);
    if (db != nullptr && blockIdx.y == 0 && threadIdx.x % 32 == 0) db[id] += values;
  }
};

template <typename T>
struct Sgd {
  static constexpr int kSize = Features<T>::kSize, kFlying = 2;
  static constexpr bool kWeighs = false;
  Rows table, velocity;
  SgdUpdate<float> update;

  struct Before {
    Elements<T, kSize> w, v;
  };
  __device__ __forceinline__ Before open(int64_t id, const Features<T>& features) const {
    const bool moves = velocity.data != nullptr;
    return {features.load(row<const T>(table, id)),
            features.load(moves ? row<const T>(velocity, id) : nullptr)};
  }

  __device__ __forceinline__ void close(int64_t id, const Features<T>& features, Before t,
                                        const Floats<T>& sum, float) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      float w = t.w[k], v = t.v[k];
      update(w, v, sum[k]);
      t.w.set(k, w), t.v.set(k, v);
    }
    features.store(row<T>(table, id), t.w);
    if (velocity.data != nullptr) features.store(row<T>(velocity, id), t.v);
  }
};

template <typename T>
struct Adamw {
  static constexpr int kSize = Features<T>::kSize, kFlying = 2;
  static constexpr bool kWeighs = false;
  AdamwRows a;

  struct Before {
    Elements<T, kSize> w, m, v;
    int32_t step;
  };
  __device__ __forceinline__ Before open(int64_t id, const Features<T>& features) const {
    return {features.load(row<const T>(a.table, id)), features.load(row<const T>(a.mean, id)),
            features.load(row<const T>(a.square, id)), a.count[id]};
  }

  __device__ __forceinline__ void close(int64_t id, const Features<T>& features, Before t,
                                        const Floats<T>& sum, float) const {
    // 1 - βᵏ = -expm1(k log β) has all its digits in float where k log β is rounded once.
    const float rate = a.lr / -expm1f(static_cast<float>(t.step * a.log_beta1));
    const float whole = 1.0f / sqrtf(-expm1f(static_cast<float>(t.step * a.log_beta2)));
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      float w = t.w[k], m = t.m[k], v = t.v[k];
      a.update(w, m, v, sum[k], rate, whole);
      t.w.set(k, w), t.m.set(k, m), t.v.set(k, v);
    }
    features.store(row<T>(a.table, id), t.w);
    features.store(row<T>(a.mean, id), t.m);
    features.store(row<T>(a.square, id), t.v);
  }
};

// One more step for every class that has a pair; before the step itself, which all parts read.
__global__ void __launch_bounds__(256)
    count_kernel(const int64_t* ids, int64_t pairs, int64_t classes, int32_t* count) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (p >= pairs) return;
  const int64_t id = ids[p];
  if (0 <= id && id < classes && (p == 0 || ids[p - 1] != id)) ++count[id];
}

template <typename T, typename Sink>
void launch(const Pairs& a, const Sink& sink, bool vectors, cudaStream_t stream) {
  vectors = vectors && a.width % Vector<T>::kSize == 0 && is_aligned<T>(a.rows);
  const int64_t parts = ceil_div(a.width, Features<T>::kPart);
  const dim3 grid(ceil_div(a.count, kWarps), parts > 0 ? parts : 1);
  LOSSOPS_LAUNCH((classes_kernel<T, Sink>), grid, 32 * kWarps, stream, a, sink, vectors);
}

}  // namespace

void scatter_rows(const Pairs& pairs, const Rows& table, cudaStream_t stream) {
  if (pairs.count == 0) return;
  with_type(pairs.dtype, [&](auto element) {
    using T = decltype(element);
    launch<T>(pairs, Store<T>{table}, is_aligned<T>(table), stream);
  });
}

void add_to_classes(const Pairs& pairs, const Rows& dw, float* db, cudaStream_t stream) {
  if (pairs.count == 0) return;
  with_type(pairs.dtype, [&](auto element) {
    using T = decltype(element);
    launch<T>(pairs, Add<T>{dw, db}, is_aligned<float>(dw), stream);
  });
}

void add_to_rows(const TargetRows& a, cudaStream_t stream) {
  if (a.count == 0 || a.width == 0) return;
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors =
        a.width % Vector<T>::kSize == 0 && is_aligned<T>(a.w) && is_aligned<float>(a.dx);
    const dim3 grid(ceil_div(a.count, kWarps), ceil_div(a.width, Features<T>::kPart));
    LOSSOPS_LAUNCH((rows_kernel<T>), grid, 32 * kWarps, stream, a, vectors);
  });
}

void sgd_rows(const Pairs& gradient, const Rows& table, const Rows& velocity,
              const SgdUpdate<float>& update, cudaStream_t stream) {
  if (gradient.count == 0) return;
  with_type(gradient.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = is_aligned<T>(table) && is_aligned<T>(velocity);
    launch<T>(gradient, Sgd<T>{table, velocity, update}, vectors, stream);
  });
}

void adamw_rows(const Pairs& gradient, const AdamwRows& a, cudaStream_t stream) {
  if (gradient.count == 0) return;
  LOSSOPS_LAUNCH(count_kernel, ceil_div(gradient.count, 256), 256, stream, gradient.ids,
                 gradient.count, gradient.classes, a.count);
  with_type(gradient.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = is_aligned<T>(a.table) && is_aligned<T>(a.mean) && is_aligned<T>(a.square);
    launch<T>(gradient, Adamw<T>{a}, vectors, stream);
  });
}

}  // namespace lossops
