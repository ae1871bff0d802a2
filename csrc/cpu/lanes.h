// Lanes of the CPU: at::vec vectors of whatever width the module is compiled for, how they are
// loaded and stored, and the conversion of rows of any dtype to and from float or double.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

#include "row.h"

// After the parameters of a lambda: the passes are only fast with their bodies in the loop.
#define LOSSOPS_INLINE_LAMBDA __attribute__((always_inline))

namespace lossops {

template <typename S>
using Vec = at::vec::Vectorized<S>;

template <typename S>
struct Lane<Vec<S>> {
  using Scalar = S;
  using L = Vec<S>;
  static LOSSOPS_LANE L select(const L& mask, const L& yes, const L& no) {
    return L::blendv(no, yes, mask);
  }
  static LOSSOPS_LANE L at_least(const L& x, const L& floor) {
    return at::vec::clamp_min(x, floor);
  }
  static LOSSOPS_LANE L at_most(const L& x, const L& roof) { return at::vec::clamp_max(x, roof); }
  static LOSSOPS_LANE L fma(const L& a, const L& b, const L& c) { return at::vec::fmadd(a, b, c); }
  static LOSSOPS_LANE L abs(const L& x) { return x.abs(); }
  static LOSSOPS_LANE L tanh(const L& x) { return x.tanh(); }
  static LOSSOPS_LANE L log(const L& x) { return x.log(); }
  static LOSSOPS_LANE L expm1(const L& x) { return x.expm1(); }
  static LOSSOPS_LANE L pow(const L& x, const L& y) { return x.pow(y); }
  static LOSSOPS_LANE L power_of_two(const L& t) {
    const auto bits = at::vec::cast<std::int32_t>(t);
    return at::vec::cast<S>(bits << Vec<std::int32_t>(23));
  }
  static LOSSOPS_LANE L exp(const L& x) {
    if constexpr (std::is_same_v<S, float>) {
      return exp_float(x, L(0), L(-88.0f));
    } else {
      return x.exp();
    }
  }
  static LOSSOPS_LANE L log1p(const L& e) {
    if constexpr (std::is_same_v<S, float>) {
      return log1p_float(e);
    } else {
      return e.log1p();
    }
  }
};

// Calls f(i, count) for the vectors of n elements: count is a constant but for a last short one.
template <typename S, typename F>
LOSSOPS_LANE void for_lanes(int64_t n, const F& f) {
  constexpr int64_t width = Vec<S>::size();
  int64_t i = 0;
  for (; i + width <= n; i += width) f(i, std::integral_constant<int64_t, width>{});
  if (i < n) f(i, n - i);
}

// The first `count` lanes from memory, `fill` in the rest.
template <typename S>
LOSSOPS_LANE Vec<S> load(const S* p, int64_t count, S fill) {
  if (count == Vec<S>::size()) return Vec<S>::loadu(p);
  return Vec<S>::set(Vec<S>(fill), Vec<S>::loadu(p, count), count);
}

template <typename S>
LOSSOPS_LANE void store(S* p, const Vec<S>& v, int64_t count) {
  if (count == Vec<S>::size()) {
    v.store(p);
  } else {
    v.store(p, static_cast<int>(count));
  }
}

template <typename S>
inline double sum_of_lanes(const Vec<S>& v) {
  S lanes[Vec<S>::size()];
  v.store(lanes);
  double sum = 0;
  for (S lane : lanes) sum += lane;
  return sum;
}

// Two vectors of half precision from memory and to it.
inline void load_pair(const at::BFloat16* p, Vec<float>& low, Vec<float>& high) {
  at::vec::load_fp32_from_bf16(p, low, high);
}
inline void load_pair(const at::Half* p, Vec<float>& low, Vec<float>& high) {
  at::vec::load_fp32_from_fp16(p, low, high);
}
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // a false alarm in gcc 12's headers
inline void store_pair(at::BFloat16* p, const Vec<float>& low, const Vec<float>& high) {
  at::vec::convert_float_bfloat16(low, high).store(p);
}
#pragma GCC diagnostic pop
inline void store_pair(at::Half* p, const Vec<float>& low, const Vec<float>& high) {
  at::vec::convert_float_half(low, high).store(p);
}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, at::BFloat16> || std::is_same_v<T, at::Half>;

// (n,) of dtype T, `stride` apart, to and from (n,) of S, a vector at a time where both lie dense.
template <typename T, typename S>
inline void widen(const T* from, int64_t stride, int64_t n, S* to) {
  int64_t i = 0;
  if constexpr (kIsHalf<T> && std::is_same_v<S, float>) {
    constexpr int64_t width = Vec<float>::size();
    for (; stride == 1 && i + 2 * width <= n; i += 2 * width) {
      Vec<float> low, high;
      load_pair(from + i, low, high);
      low.store(to + i);
      high.store(to + i + width);
    }
  }
  if (stride == 1) {
    for (; i < n; ++i) to[i] = static_cast<S>(from[i]);
  } else {
    for (; i < n; ++i) to[i] = static_cast<S>(from[i * stride]);
  }
}

template <typename S, typename T>
inline void narrow(const S* from, int64_t stride, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (kIsHalf<T> && std::is_same_v<S, float>) {
    constexpr int64_t width = Vec<float>::size();
    for (; stride == 1 && i + 2 * width <= n; i += 2 * width) {
      store_pair(to + i, Vec<float>::loadu(from + i), Vec<float>::loadu(from + i + width));
    }
  }
  if (stride == 1) {
    for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (; i < n; ++i) to[i * stride] = static_cast<T>(from[i]);
  }
}

}  // namespace lossops
