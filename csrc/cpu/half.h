// bfloat16 products with float32 results, for processors that multiply bfloat16 themselves.
//
// FLOPs: 2 M N K each, through the micro-kernels that ATen exposes (oneDNN's brgemm; AMX tiles
// where there are any). Bytes beside the operands: each packs its right-hand matrix once, K N
// values, and the products with dz round it first, R T values. Row sums are float32 throughout.
//
// Verified by tests/test_cpu_backend.py, on any processor with `portable_half_products`.
#pragma once

#include <ATen/core/Tensor.h>

namespace lossops {

using at::Tensor;

// Whether this processor multiplies x and w of this dtype and D as they are.
bool half_products(at::ScalarType x, at::ScalarType w, int64_t d);

// For tests: these products in plain loops, so that what is built on them runs on any processor.
void portable_half_products(bool on);

// z (R, T) = scale · x (R, D) wᵀ, w (T, D)
void half_logits(Tensor& z, const Tensor& x, const Tensor& w, float scale);

// z (R,): of each row of x the logit of its own class, ids (R,), with the bits that half_logits
// gives it: a sum over D has one order, whatever its row and column.
void half_row_logits(Tensor& z, const Tensor& x, const Tensor& w, const Tensor& ids, float scale);

// dx (R, D) (+)= dz (R, T) w, with dz rounded to bfloat16 where it is not yet
void half_dx(Tensor& dx, const Tensor& dz, const Tensor& w, bool accumulate);

// dw (T, D) (+)= dzᵀ x, with dz rounded to bfloat16
void half_dw(Tensor& dw, const Tensor& dz, const Tensor& x, bool accumulate);

}  // namespace lossops
