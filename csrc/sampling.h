// Draws of class ids: the arithmetic of one draw, the same bits on every device.
//
// Only integers and IEEE sums and products of doubles, each rounded by itself; nothing of libm. The
// CPU files are compiled without contraction, and on a device times() and plus() are never fused.
// Letters as in lossops/reference_sampling.py, which makes the same draws in plain PyTorch:
//
//   word(key, t)   the t-th number of the stream `key` (SplitMix64)
//   permuted       π_key(k): an unbalanced Feistel network of 6 rounds on 2^b >= V values, walked
//                  along its cycle until it falls below V: fewer than 2 steps on average
//   log-uniform    floor(2^{u log2(V + 1)}) - 1, so that P(id <= k) = log(k + 2) / log(V + 1)
//   alias          id = floor(u V), or alias[id] where u' is not below threshold[id]
//
// Verified by tests/test_samplers.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOSSOPS_DRAW __host__ __device__ __forceinline__
#else
#define LOSSOPS_DRAW inline
#endif

namespace lossops {

LOSSOPS_DRAW double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

LOSSOPS_DRAW double plus(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

LOSSOPS_DRAW uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

LOSSOPS_DRAW uint64_t word(uint64_t key, uint64_t t) {
  return mix(key + (t + 1) * 0x9E3779B97F4A7C15u);
}

// Uniform in [0, 1), of 53 bits.
LOSSOPS_DRAW double uniform(uint64_t key, uint64_t t) {
  return times(static_cast<double>(word(key, t) >> 11), 0x1p-53);
}

// A permutation of [0, count) named by a key.
struct Permutation {
  static constexpr int kRounds = 6;
  uint64_t keys[kRounds];
  uint64_t count, low_mask, high_mask;
  int low_bits;

  LOSSOPS_DRAW Permutation(uint64_t key, uint64_t count) : count(count) {
    for (int r = 0; r < kRounds; ++r) keys[r] = word(key, r);
    int bits = 8;  // smaller networks are too few of the permutations
    while (bits < 63 && (uint64_t(1) << bits) < count) ++bits;
    low_bits = bits / 2;
    low_mask = (uint64_t(1) << low_bits) - 1;
    high_mask = (uint64_t(1) << (bits - low_bits)) - 1;
  }

  LOSSOPS_DRAW uint64_t operator()(uint64_t k) const {
    uint64_t low = k & low_mask, high = k >> low_bits;
    do {
      for (int r = 0; r < kRounds; r += 2) {
        high ^= mix(keys[r] + low) & high_mask;
        low ^= mix(keys[r + 1] + high) & low_mask;
      }
    } while (((high << low_bits) | low) >= count);
    return (high << low_bits) | low;
  }
};

// 2^x for 0 <= x < 62, within 3e-13.
LOSSOPS_DRAW double power_of_two(double x) {
  // (ln 2)^k / k!, k = 10 ... 0
  constexpr double kPower[] = {7.054911620801121e-09,
                               1.0178086009239696e-07,
                               1.3215486790144305e-06,
                               1.5252733804059838e-05,
                               0.00015403530393381606,
                               0.0013333558146428441,
                               0.009618129107628477,
                               0.055504108664821576,
                               0.2402265069591007,
                               0.6931471805599453,
                               1.0};
  const int64_t whole = static_cast<int64_t>(x);
  const double y = plus(plus(x, -static_cast<double>(whole)), -0.5);  // both sums are exact
  double p = kPower[0];
  for (int k = 1; k < 11; ++k) p = plus(times(p, y), kPower[k]);
  return times(times(p, 1.4142135623730951), static_cast<double>(int64_t(1) << whole));
}

// `log2` is log2(count + 1).
struct LogUniformDraw {
  uint64_t key;
  int64_t count;
  double log2;

  LOSSOPS_DRAW int64_t operator()(uint64_t t) const {
    const int64_t id = static_cast<int64_t>(power_of_two(times(uniform(key, t), log2))) - 1;
    return id < 0 ? 0 : (id < count ? id : count - 1);
  }
};

struct UniformDraw {
  uint64_t key;
  int64_t count;

  LOSSOPS_DRAW int64_t operator()(uint64_t t) const {
    const int64_t id = static_cast<int64_t>(times(uniform(key, t), static_cast<double>(count)));
    return id < count ? id : count - 1;
  }
};

struct AliasDraw {
  uint64_t key;
  int64_t count;
  const double* threshold;
  const int64_t* alias;

  LOSSOPS_DRAW int64_t operator()(uint64_t t) const {
    int64_t id = static_cast<int64_t>(times(uniform(key, 2 * t), static_cast<double>(count)));
    id = id < count ? id : count - 1;
    return uniform(key, 2 * t + 1) < threshold[id] ? id : alias[id];
  }
};

}  // namespace lossops
