// One step of an optimizer on one element of a row; letters as in lossops/reference_rows.py.
//
// The CPU and CUDA files include it: S is float, or double for tables of double.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define LOSSOPS_UPDATE __host__ __device__ __forceinline__
#else
#define LOSSOPS_UPDATE __attribute__((always_inline)) inline
#endif

namespace lossops {

// g ← g + λ w      v ← μ v + g      w ← w - η v
template <typename S>
struct SgdUpdate {
  S rate, momentum, decay;

  LOSSOPS_UPDATE SgdUpdate(double lr, double momentum, double weight_decay)
      : rate(static_cast<S>(lr)),
        momentum(static_cast<S>(momentum)),
        decay(static_cast<S>(weight_decay)) {}

  LOSSOPS_UPDATE void operator()(S& w, S& v, S g) const {
    v = momentum * v + (g + decay * w);
    w -= rate * v;
  }
};

// m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²      w ← (1 - η λ) w - η m̂ / (√v̂ + ε)
//
// `rate` = η / (1 - β₁ᵏ) and `whole` = 1 / √(1 - β₂ᵏ) belong to the row, whose k-th step it is.
template <typename S>
struct AdamwUpdate {
  S keep1, new1, keep2, new2, left, epsilon;

  LOSSOPS_UPDATE AdamwUpdate(double lr, double beta1, double beta2, double eps, double weight_decay)
      : keep1(static_cast<S>(beta1)),
        new1(static_cast<S>(1 - beta1)),
        keep2(static_cast<S>(beta2)),
        new2(static_cast<S>(1 - beta2)),
        left(static_cast<S>(1 - lr * weight_decay)),
        epsilon(static_cast<S>(eps)) {}

  LOSSOPS_UPDATE void operator()(S& w, S& m, S& v, S g, S rate, S whole) const {
    m = keep1 * m + new1 * g;
    v = keep2 * v + new2 * (g * g);
    w = left * w - rate * m / (std::sqrt(v) * whole + epsilon);
  }
};

}  // namespace lossops
