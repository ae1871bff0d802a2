// The three products of a tile and their operands: the one place that knows how a GEMM is done.
//
// FLOPs: 2 R D T each. Half-precision operands are upcast first, a tile of w or a block of x at a
// time: a float32 GEMM is exact on them but for its own rounding, and on a processor without bf16
// instructions it is several times faster than theirs. A processor that has them multiplies
// bfloat16 as it is (half.h), and dz is rounded for its two products.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace lossops {

using at::Tensor;

// The dtype in which products of x and w take their operands.
at::ScalarType operand_dtype(const Tensor& x, const Tensor& w);

// z (R, T) = scale · x (R, D) wᵀ, w (T, D); a float32 or float64 x has its scale already
void logits_tile(Tensor z, const Tensor& x, const Tensor& w, double scale);

// dx (R, D) (+)= dz (R, T) w
void dx_tile(Tensor dx, const Tensor& dz, const Tensor& w, bool accumulate);

// dw (T, D) (+)= dzᵀ x
void dw_tile(Tensor dw, const Tensor& dz, const Tensor& x, bool accumulate);

// Consecutive rows of a matrix in another dtype, times a factor: views of the matrix where it
// is so already, else of scratch (block, D), or of one copy of it all where that is small.
class Rows {
 public:
  Rows(const Tensor& matrix, at::ScalarType dtype, std::optional<double> factor, int64_t block);

  // Rows [first, first + n), n <= block; valid until the next call.
  Tensor operator()(int64_t first, int64_t n);
  const Tensor& matrix() const { return matrix_; }
  at::ScalarType dtype() const { return as_is_ ? matrix_.scalar_type() : scratch_.scalar_type(); }

 private:
  void convert(Tensor to, int64_t first, int64_t n) const;

  Tensor matrix_, scratch_;
  std::optional<double> factor_;
  bool as_is_, whole_ = false;
};

}  // namespace lossops
