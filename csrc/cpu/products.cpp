#include "cpu/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "cpu/half.h"

namespace lossops {
namespace {

// A copy of x of at most this size is kept for the whole call instead of being made tile by tile.
constexpr int64_t kWholeBytes = 16 << 20;

void product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    at::addmm_out(out, out, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

}  // namespace

at::ScalarType operand_dtype(const Tensor& x, const Tensor& w) {
  if (x.scalar_type() == at::kDouble) return at::kDouble;
  return half_products(x.scalar_type(), w.scalar_type(), x.size(1)) ? at::kBFloat16 : at::kFloat;
}

void logits_tile(Tensor z, const Tensor& x, const Tensor& w, double scale) {
  if (x.scalar_type() == at::kBFloat16) return half_logits(z, x, w, static_cast<float>(scale));
  product(z, x, w.t(), false);
}

void dx_tile(Tensor dx, const Tensor& dz, const Tensor& w, bool accumulate) {
  if (w.scalar_type() == at::kBFloat16) return half_dx(dx, dz, w, accumulate);
  product(dx, dz, w, accumulate);
}

void dw_tile(Tensor dw, const Tensor& dz, const Tensor& x, bool accumulate) {
  if (x.scalar_type() == at::kBFloat16) return half_dw(dw, dz, x, accumulate);
  product(dw, dz.t(), x, accumulate);
}

Rows::Rows(const Tensor& matrix, at::ScalarType dtype, std::optional<double> factor, int64_t block)
    : matrix_(matrix), factor_(factor), as_is_(matrix.scalar_type() == dtype && !factor) {
  if (as_is_) return;
  const int64_t rows = matrix.size(0), width = matrix.size(1);
  const auto options = matrix.options().dtype(dtype);
  whole_ = rows <= block || rows * width * c10::elementSize(dtype) <= kWholeBytes;
  scratch_ = at::empty({whole_ ? rows : block, width}, options);
  if (whole_) convert(scratch_, 0, rows);
}

void Rows::convert(Tensor to, int64_t first, int64_t n) const {
  to.copy_(matrix_.narrow(0, first, n));
  if (factor_) to.mul_(*factor_);
}

Tensor Rows::operator()(int64_t first, int64_t n) {
  if (as_is_) return matrix_.narrow(0, first, n);
  if (whole_) return scratch_.narrow(0, first, n);
  const Tensor part = scratch_.narrow(0, 0, n);
  convert(part, first, n);
  return part;
}

}  // namespace lossops
