// dr of some classes of a row, in the registers of a thread: the formula of row.h.
#pragma once

#include "cuda/logits.h"
#include "cuda/state.h"
#include "cuda/vectors.h"
#include "row.h"

namespace lossops {

// What most losses have: softmax, and the constant of label smoothing.
constexpr unsigned kPlainTerms = kSoftmax | kAverage;

inline bool is_plain(const GradientCall& call) {
  bool extremes = false;
  for (const float* c : call.rows.c_extreme) extremes |= c != nullptr;
  return (call.terms & ~kPlainTerms) == 0 && call.log_sums.count == 0 && !extremes;
}

__device__ __forceinline__ float at_row(const float* field, int64_t row) {
  return field == nullptr ? 0.0f : field[row];
}

// Terms of a row; with kPlain those of kPlainTerms alone.
template <bool kPlain>
struct RowSlopes {
  const GradientCall& call;
  int64_t row;
  RowBasis<float> basis;
  LogitMap map;
  RowTargets targets;
  float unit;

  __device__ __forceinline__ RowSlopes(const GradientCall& call, int64_t row)
      : call(call),
        row(row),
        basis(),
        map(call.logits),
        targets(call.sides, row, call.first_class, call.logits.classes),
        unit(call.unit == nullptr ? 1.0f : *call.unit) {
    const GradientRows& from = call.rows;
    const float lse = at_row(from.lse, row);
    basis.shift = from.shift[row];
    basis.lse = lse == -kInf<float> ? 0.0f : lse;  // no negatives: q = 0, not 0 / 0
    basis.c_lse = at_row(from.c_lse, row);
    basis.constant = at_row(from.c_average, row) / static_cast<float>(call.num_classes);
    if constexpr (kPlain) return;
    basis.mean = at_row(from.mean, row);
    basis.variance = at_row(from.variance, row);
    basis.average = at_row(from.average, row);
    basis.c_mean = at_row(from.c_mean, row);
    basis.c_variance = at_row(from.c_variance, row);
    basis.c_softplus = at_row(from.c_softplus, row);
    basis.c_stable = at_row(from.c_stable, row);
    basis.c_vector = at_row(from.c_vector, row);
    basis.c_teacher = at_row(from.c_teacher, row);
    basis.slope = 2 * at_row(from.c_moment, row);
  }

  // The products of a tile become dr.
  template <int kTile, int kVector>
  __device__ __forceinline__ void apply(Tile<kTile, kVector>& tile) const {
    map.apply(tile);
    float dz[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if constexpr (kPlain) {
        dz[i] = basis.negative(kPlainTerms, tile.z[i], 0.0f, 0.0f);
      } else {
        dz[i] = of_class(tile.z[i], tile.id(i), tile.is_valid(i));
      }
    }
    if constexpr (!kPlain) {
      add_log_sums(tile, dz);
      add_extremes(tile, dz);
    }
    if (map.softcap != 0) {
      for (int i = 0; i < kTile; ++i) dz[i] *= softcap_slope(tile.z[i], map.softcap);
    }
    const float* given = call.at_target;
    targets.each(tile, [&](int i, int k) {
      dz[i] = given == nullptr ? 0.0f : given[row * targets.count + k];
    });
    for (int i = 0; i < kTile; ++i) tile.z[i] = dz[i] * unit;
  }

 private:
  __device__ __forceinline__ float of_class(float z, int id, bool valid) const {
    float a = 0, t = 0;
    if (valid && (call.terms & (kVector | kTeacher))) {
      a = call.sides.class_vector == nullptr ? 1.0f : call.sides.class_vector[id];
      if (call.terms & kTeacher) {
        t = a * element(call.sides.teacher, call.sides.teacher_dtype,
                        row * call.sides.teacher_stride + id);
      }
    }
    return basis.negative(call.terms, z, a, t);
  }

  // Other log-sums; what a row has of one is read once a tile.
  template <int kTile, int kVector>
  __device__ __forceinline__ void add_log_sums(const Tile<kTile, kVector>& tile, float* dz) const {
    for (int k = 0; k < call.log_sums.count; ++k) {
      const float temperature = call.log_sums.temperature[k], limit = call.log_sums.limit[k];
      const float found = call.log_sums.lse[k][row];
      const float lse = found == -kInf<float> ? 0.0f : found;
      const float c = temperature * call.log_sums.coefficient[k][row];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        const float z = tile.z[i], power = temperature * (z - basis.shift) - lse;
        dz[i] += c * (z > limit ? 0.0f : Lane<float>::exp(power));
      }
    }
  }

  // Coefficients of single classes: the largest, the next, the first below the target.
  template <int kTile, int kVector>
  __device__ __forceinline__ void add_extremes(const Tile<kTile, kVector>& tile, float* dz) const {
    for (int k = 0; k < 3; ++k) {
      if (call.rows.c_extreme[k] == nullptr) continue;
      const int64_t at = call.rows.extreme[k][row] - call.first_class;
      for (int i = 0; i < kTile; ++i) {
        if (tile.id(i) == at) dz[i] += call.rows.c_extreme[k][row];
      }
    }
  }
};

}  // namespace lossops
