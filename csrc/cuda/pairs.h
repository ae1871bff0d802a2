// Launchers of pairs.cu: losses over all pairs of two sets of rows, on float32 products in memory.
#pragma once

#include "cuda/device.h"
#include "cuda/logits.h"

namespace lossops {

enum class Binary { kSigmoid, kHinge, kGumbel, kAsymmetric };

// sums (rows,) = Σ a φ(z) over the negatives of a row, and with `out` factor a φ'(z) there.
struct BinaryCall {
  Logits logits;
  Sides sides;  // a is the class vector
  Binary kind;
  float p, q;
  bool detached;
  const float* factor;  // (rows,)
  float* sums;
  void* out;
  Dtype out_dtype;  // kFloat, or kBFloat16 over the products
  int64_t out_stride;
};

void binary(const BinaryCall& call, cudaStream_t stream);

// Log-sums (parts, classes) of the negatives of every column, relative to their shifts.
struct PairColumnsCall {
  Logits logits;
  Sides sides;
  float* shift;
  float* lse;
  int parts = 1;  // of the rows, one after the other
};

void pair_columns(const PairColumnsCall& call, cudaStream_t stream);

// dz = c_i e^{z - lse_i} + h_j e^{z - lse_j}, 0 at the targets, into out.
struct PairGradientCall {
  Logits logits;
  Sides sides;
  const float *row_shift, *row_lse, *c_row;           // (rows,)
  const float *column_shift, *column_lse, *c_column;  // (classes,)
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
};

void pair_gradient(const PairGradientCall& call, cudaStream_t stream);

}  // namespace lossops
