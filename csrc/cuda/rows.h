// Rows of a table by id on a device: what the launches of rows.cu and scatter.cu take.
//
// Pointers are of the device and stay the caller's; a launch is put on `stream` and nothing is
// waited for. Ids outside [0, classes) touch no memory.
#pragma once

#include "cuda/device.h"
#include "update.h"

namespace lossops {

// Rows without holes, `stride` elements from one to the next.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

// rows = w / norms (count, width), norms = max(|w|, eps) (count,), w the rows `ids` of the table.
struct NormalizedRows {
  Dtype dtype;
  int64_t count, classes;
  int width;
  Rows table;          // (classes, width)
  const int64_t* ids;  // (count,); NaN rows for ids that are none
  float eps;
  Rows rows;
  float* norms;
};

void normalized_rows(const NormalizedRows& a, cudaStream_t stream);

// found = (g - (g·u) u) / norms, all (count, width), u the normalised rows.
struct NormalizedRowsGradient {
  Dtype dtype;
  int64_t count;
  int width;
  Rows rows, gradient, found;
  const float* norms;
};

void normalized_rows_gradient(const NormalizedRowsGradient& a, cudaStream_t stream);

// Pairs of a class and a row, sorted by class: what is to be added to the rows of a table.
//
//   sum of a class = Σ rows[pair], pair = order[p] (p without an order), over its p in a fixed
//   order weighted       = scale · Σ value[pair] · rows[pair / per_row]
struct Pairs {
  Dtype dtype;
  int64_t count, per_row, classes;
  int width;
  Rows rows;             // (count / per_row, width)
  const int64_t* ids;    // (count,) rising
  const int64_t* order;  // (count,) or null
  const float* value;    // (count,), where weighted
  const float* scale;    // () or null
};

// table[id] = the sum of the class, rounded once; other rows stay. The table has the pairs' dtype.
void scatter_rows(const Pairs& pairs, const Rows& table, cudaStream_t stream);

// dw[id] += the weighted sum; db[id] += Σ value, which no scale multiplies. Either may be null.
void add_to_classes(const Pairs& pairs, const Rows& dw, float* db, cudaStream_t stream);

// dx[i] += Σ_k value[i, k] · w[target[i, k]]
struct TargetRows {
  Dtype dtype;  // of w; dx is float
  int64_t count, per_row, classes;
  int width;
  Rows w, dx;
  const int64_t* target;  // (count, per_row)
  const float* value;     // (count, per_row)
};

void add_to_rows(const TargetRows& a, cudaStream_t stream);

// Steps of an optimizer with the sum of the class as gradient, on tables of the pairs' dtype.
void sgd_rows(const Pairs& gradient, const Rows& table, const Rows& velocity,
              const SgdUpdate<float>& update, cudaStream_t stream);

// Row statistics of AdamW: `count` (classes,) is one more after the step, for the classes touched.
struct AdamwRows {
  Rows table, mean, square;
  int32_t* count;
  AdamwUpdate<float> update;
  float lr;
  double log_beta1, log_beta2;
};

void adamw_rows(const Pairs& gradient, const AdamwRows& a, cudaStream_t stream);

}  // namespace lossops
