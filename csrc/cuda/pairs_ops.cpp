// torch ops of the kernels on pairs; lossops/cuda.py calls them and allocates what they fill.
#include "cuda/logits_args.h"
#include "cuda/pairs.h"
#include "cuda/tensors.h"

namespace lossops {
namespace {

struct Out {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t stride = 0;
};

Out out_of(const MaybeTensor& out, const Tensor& r) {
  if (!out.has_value()) return {};
  check_rows("out", *out, r.size(0), r.size(1));
  const Dtype dtype = dtype_of("out", *out);
  STD_TORCH_CHECK(dtype != Dtype::kHalf, "out must be float32 or bfloat16");
  return {out->data_ptr(), dtype, out->stride(0)};
}

Logits products_of(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b) {
  STD_TORCH_CHECK(r.scalar_type() == ScalarType::Float, "products must be float32");
  return logits_of(r, scale, b, 0);
}

void binary_op(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b,
               const MaybeTensor& target, const MaybeTensor& weight, int64_t kind, double p,
               double q, bool detached, const MaybeTensor& factor, const Tensor& sums,
               const MaybeTensor& out) {
  STD_TORCH_CHECK(0 <= kind && kind < 4, "kind must be in [0, 4), got ", kind);
  const Out to = out_of(out, r);
  const BinaryCall call{.logits = products_of(r, scale, b),
                        .sides = sides_of(r, target, weight, std::nullopt),
                        .kind = static_cast<Binary>(kind),
                        .p = static_cast<float>(p),
                        .q = static_cast<float>(q),
                        .detached = detached,
                        .factor = floats("factor", factor, r.size(0)),
                        .sums = floats("sums", sums, r.size(0)),
                        .out = to.data,
                        .out_dtype = to.dtype,
                        .out_stride = to.stride};
  check_devices(r, scale, b, target, weight, factor, sums, out);
  const OnDevice device(r);
  binary(call, device.stream());
  check_launch("binary");
}

void pair_columns_op(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& target,
                     int64_t parts, const Tensor& shift, const Tensor& lse) {
  const PairColumnsCall call{products_of(r, scale, std::nullopt),
                             sides_of(r, target, std::nullopt, std::nullopt),
                             floats("shift", shift, parts * r.size(1)),
                             floats("lse", lse, parts * r.size(1)), checked_parts(parts)};
  check_devices(r, scale, target, shift, lse);
  const OnDevice device(r);
  pair_columns(call, device.stream());
  check_launch("pair_columns");
}

void pair_gradient_op(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& target,
                      const Tensor& row_shift, const Tensor& row_lse, const MaybeTensor& c_row,
                      const Tensor& column_shift, const Tensor& column_lse,
                      const MaybeTensor& c_column, const Tensor& out) {
  const Out to = out_of(out, r);
  const PairGradientCall call{.logits = products_of(r, scale, std::nullopt),
                              .sides = sides_of(r, target, std::nullopt, std::nullopt),
                              .row_shift = floats("row_shift", row_shift, r.size(0)),
                              .row_lse = floats("row_lse", row_lse, r.size(0)),
                              .c_row = floats("c_row", c_row, r.size(0)),
                              .column_shift = floats("column_shift", column_shift, r.size(1)),
                              .column_lse = floats("column_lse", column_lse, r.size(1)),
                              .c_column = floats("c_column", c_column, r.size(1)),
                              .out = to.data,
                              .out_dtype = to.dtype,
                              .out_stride = to.stride};
  check_devices(r, scale, target, row_shift, row_lse, c_row, column_shift, column_lse, c_column,
                out);
  const OnDevice device(r);
  pair_gradient(call, device.stream());
  check_launch("pair_gradient");
}

}  // namespace
}  // namespace lossops

STABLE_TORCH_LIBRARY_FRAGMENT(lossops_cuda, m) {
  m.def(
      "binary(Tensor r, Tensor? scale, Tensor? b, Tensor? target, Tensor? weight, int kind, "
      "float p, float q, bool detached, Tensor? factor, Tensor(a!) sums, Tensor(b!)? out) -> ()");
  m.def(
      "pair_columns(Tensor r, Tensor? scale, Tensor? target, int parts, Tensor(a!) shift, "
      "Tensor(b!) lse) -> ()");
  m.def(
      "pair_gradient(Tensor r, Tensor? scale, Tensor? target, Tensor row_shift, Tensor row_lse, "
      "Tensor? c_row, Tensor column_shift, Tensor column_lse, Tensor? c_column, Tensor(a!) out)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lossops_cuda, LOSSOPS_DEVICE, m) {
  m.impl("binary", TORCH_BOX(&lossops::binary_op));
  m.impl("pair_columns", TORCH_BOX(&lossops::pair_columns_op));
  m.impl("pair_gradient", TORCH_BOX(&lossops::pair_gradient_op));
}
