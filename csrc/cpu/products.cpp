#include "cpu/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

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

void logits_tile(Tensor z, const Tensor& x, const Tensor& w) { product(z, x, w.t(), false); }

void dx_tile(Tensor dx, const Tensor& dz, const Tensor& w, bool accumulate) {
  product(dx, dz, w, accumulate);
}

void dw_tile(Tensor dw, const Tensor& dz, const Tensor& x, bool accumulate) {
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
