// The four primitives on x and w: a tile of logits by GEMM, then the row passes while it is in
// cache.
//
// GEMMs of 2 N D V operations: statistics 1, chunk gradient 2, two-sweep gradient 3. Bytes beyond
// the operands': each logit is written once and read by the pass that follows it, from the
// last-level cache for a tile of 2048 classes by 1024 rows (8 MiB).
//
// A chunk's buffer holds z with -inf at the targets, or, where off the targets dz_ij is f_i
// e^{z_ij} with one factor a row (coefficients of `target` and `lse` alone, no softcap),
//
//   E = e^{z - k}, k_i near the largest negative of the first tile, f_i = c_i / Σ_j E_ij
//   dx = f (E w)     dw = Eᵀ (f x)     db = Eᵀ f
//
// so that dz is never formed. A row whose later maximum is too far above k is rescaled in place.
//
// Verified by tests/test_cpu_backend.py, with small tiles so that every boundary is crossed.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "cpu/columns.h"
#include "cpu/primitives.h"
#include "cpu/products.h"
#include "cpu/statistics.h"

namespace lossops {
namespace {

// Rows in flight at once where a call is not a chunk: with 2048 classes 16 MiB of logits.
constexpr int64_t kRowBlock = 2048;

// What half-precision rows of x, of w and of dw may each take in float32. With the logits that is
// all the scratch there is: 64 MiB.
constexpr int64_t kUpcastBytes = 16 << 20;

template <typename S>
constexpr auto kDtype = c10::CppTypeToScalarType<S>::value;

// f(first, n) for the parts of [0, total).
template <typename F>
void each_part(int64_t total, int64_t part, F&& f) {
  for (int64_t first = 0; first < total; first += part) f(first, std::min(part, total - first));
}

// How many of at most `count` rows of D values are worked on at once.
int64_t rows_in_flight(const Head& head, int64_t count) {
  if (!at::isReducedFloatingType(head.x.scalar_type())) return count;
  const int64_t fit = kUpcastBytes / (4 * std::max<int64_t>(1, head.x.size(1)));
  return std::min(count, std::max<int64_t>(256, fit / 64 * 64));
}

std::optional<double> factor(const MaybeTensor& scale) {
  if (!scale) return std::nullopt;
  return scale->item().toDouble();
}

// Scratch for the logits of a block of rows and a tile of classes. Its row stride is no power of
// two: the rows of a column would share a cache set.
template <typename S>
Tensor logits_scratch(const Task<S>& task, int64_t block, int64_t tile, const Tensor& like) {
  const int64_t stride = (std::min(task.classes, tile) + 31) / 16 * 16;
  return at::empty({std::min(task.rows, block), stride}, like.options().dtype(kDtype<S>));
}

// pass(row, z, scratch) for each row of the tile z (rows, n); scratch (n,) is the thread's.
template <typename S, typename F>
void each_row(const Tensor& z, F&& pass) {
  const int64_t n = z.size(1), stride = z.stride(0);
  S* data = z.template data_ptr<S>();
  at::parallel_for(0, z.size(0), row_grain(n), [&](int64_t begin, int64_t end) {
    std::vector<S> scratch(n);
    for (int64_t row = begin; row < end; ++row) pass(row, data + row * stride, scratch.data());
  });
}

// Statistics by tiles z_tile(row, rows, class, classes): class tiles outside, so that a tile of w
// serves all rows.
template <typename S, typename F>
void sweep(const Task<S>& task, Rows& x, Rows& w, double scale, int64_t tile, int64_t row_block,
           F&& z_tile, const Fields<S>& out, bool keep, std::vector<RowState<S>>& states) {
  const auto each_tile = [&](auto&& pass) {
    each_part(task.classes, tile, [&](int64_t first, int64_t n) {
      const Tensor wt = w(first, n);
      each_part(task.rows, row_block, [&](int64_t row, int64_t rows) {
        const Tensor z = z_tile(row, rows, first, n);
        logits_tile(z, x(row, rows), wt, scale);
        each_row<S>(z, [&](int64_t i, S* zi, S* scratch) {
          map_logits(zi, n, task.bias ? task.bias + first : nullptr, task.cap);
          pass(row + i, zi, first, n, scratch);
        });
      });
    });
  };
  each_tile([&](int64_t row, S* z, int64_t first, int64_t n, S* scratch) {
    collect(task, out, states[row], row, z, first, n, keep, scratch);
  });
  for (int64_t row = 0; row < task.rows; ++row) finish(task, out, states[row], row);
  if (out.below_target == nullptr) return;
  // The same products again have the same bits, so ties with the target are ties here too.
  each_tile([&](int64_t row, S* z, int64_t first, int64_t n, S*) {
    collect_below(task, out, states[row], row, z, first, n);
  });
}

template <typename S>
Task<S> task_of(const Head& head) {
  return Task<S>(head.x.size(0), head.w.size(0), head.target, head.class_vector, head.teacher,
                 head.b, head.softcap, head.names);
}

// How a call's products take x and w. Operands that are upcast carry the scale of the logits; the
// product of bfloat16 ones applies it to z, where it is not rounded.
struct Operands {
  at::ScalarType dtype;
  std::optional<double> scale;

  explicit Operands(const Head& head)
      : dtype(operand_dtype(head.x, head.w)), scale(factor(head.scale)) {}

  bool half() const { return dtype == at::kBFloat16; }
  double scale_of_z() const { return half() ? scale.value_or(1.0) : 1.0; }
  Rows x(const Head& head, int64_t block) const {
    return Rows(head.x, dtype, half() ? std::nullopt : scale, block);
  }
  Rows scaled_x(const Head& head, int64_t block) const { return Rows(head.x, dtype, scale, block); }
  Rows w(const Head& head, int64_t tile) const { return Rows(head.w, dtype, std::nullopt, tile); }
};

template <typename S>
Tensors statistics_of(const Head& head, int64_t tile) {
  const Task<S> task = task_of<S>(head);
  const Tensors tensors =
      allocate_statistics(head.names, task.rows, head.target, head.x.options().dtype(kDtype<S>));
  const Fields<S> out(head.names, {tensors.begin(), tensors.end()});
  std::vector<RowState<S>> states(task.rows, RowState<S>(task.temperatures.size()));
  const Operands operands(head);
  const int64_t block = rows_in_flight(head, kRowBlock);
  tile = rows_in_flight(head, tile);
  Rows x = operands.x(head, block), w = operands.w(head, tile);
  const Tensor scratch = logits_scratch(task, block, tile, head.x);
  const auto z_tile = [&](int64_t, int64_t rows, int64_t, int64_t n) {
    return scratch.narrow(0, 0, rows).narrow(1, 0, n);
  };
  sweep(task, x, w, operands.scale_of_z(), tile, block, z_tile, out, false, states);
  return tensors;
}

void check_buffer(const Tensor& buffer, const Tensor& x, const Tensor& w, at::ScalarType dtype) {
  TORCH_CHECK(buffer.dim() == 2 && buffer.size(0) == x.size(0) && buffer.size(1) == w.size(0) &&
                  buffer.scalar_type() == dtype && (buffer.stride(1) == 1 || buffer.size(1) == 1),
              "buffer must be ", dtype, " of shape (", x.size(0), ", ", w.size(0),
              ") with dense rows, got ", buffer.scalar_type(), " ", buffer.sizes(), " of strides ",
              buffer.strides());
}

// Whether the buffer of such a call holds exponentials; their row sums lie in its column V.
bool keeps_exponentials(const Head& head, const Names& wanted, const Tensor& buffer) {
  if (head.softcap != 0 || !contains(head.names, "lse")) return false;
  for (const auto& name : head.names) {  // those that take z a second time
    if (name == "entropy" || name == "below_target" || is_temperature(name)) return false;
  }
  for (const auto& name : wanted) {
    if (name != "target" && name != "lse") return false;
  }
  const int64_t rows = buffer.size(0), classes = buffer.size(1), stride = buffer.stride(0);
  if (rows == 0 || stride <= classes) return false;
  const int64_t last = buffer.storage_offset() + (rows - 1) * stride + classes;
  return (last + 1) * buffer.element_size() <= static_cast<int64_t>(buffer.storage().nbytes());
}

template <typename S>
Tensors chunk_statistics_of(const Head& head, const Names& wanted, const Tensor& buffer,
                            int64_t tile) {
  check_buffer(buffer, head.x, head.w, kDtype<S>);
  const Task<S> task = task_of<S>(head);
  const Tensors tensors =
      allocate_statistics(head.names, task.rows, head.target, head.x.options().dtype(kDtype<S>));
  const Fields<S> out(head.names, {tensors.begin(), tensors.end()});
  std::vector<RowState<S>> states(task.rows, RowState<S>(task.temperatures.size()));
  const int64_t block = std::max<int64_t>(1, task.rows);
  const Operands operands(head);
  Rows x = operands.x(head, block), w = operands.w(head, tile);
  const bool keep = keeps_exponentials(head, wanted, buffer);
  const auto z_tile = [&](int64_t, int64_t, int64_t first, int64_t n) {
    return buffer.narrow(1, first, n);
  };
  sweep(task, x, w, operands.scale_of_z(), tile, block, z_tile, out, keep, states);
  if (keep) {
    S* sums = buffer.template data_ptr<S>() + task.classes;
    for (int64_t i = 0; i < task.rows; ++i) {
      sums[i * buffer.stride(0)] = static_cast<S>(states[i].softmax.sum);
    }
  }
  return tensors;
}

// f (R,): dz = f E off the targets. A row with no finite lse is NaN, as its softmax is.
template <typename S>
Tensor row_factors(const Chain<S>& chain, const Tensor& buffer) {
  const Tensor factors = at::empty({chain.task.rows}, buffer.options());
  const S* sums = buffer.template const_data_ptr<S>() + chain.task.classes;
  S* f = factors.template data_ptr<S>();
  for (int64_t i = 0; i < chain.task.rows; ++i) {
    const S c = chain.coefficient.lse == nullptr ? S(0) : chain.coefficient.lse[i];
    const S lse = chain.statistic.lse[i];
    if (lse == -kInf<S>) {
      f[i] = c * 0;
    } else if (std::isfinite(lse)) {
      f[i] = c / sums[i * buffer.stride(0)];
    } else {
      f[i] = std::numeric_limits<S>::quiet_NaN();
    }
  }
  return factors;
}

// The caller's dx, or dense rows in its stead that finish() copies into it.
class DenseRows {
 public:
  explicit DenseRows(const MaybeTensor& dx) : dx_(dx) {
    if (!dx) return;
    const bool dense = dx->stride(1) == 1 || dx->size(1) == 1;
    rows_ = dense ? *dx : at::empty(dx->sizes(), dx->options());
  }
  explicit operator bool() const { return dx_.has_value(); }
  Tensor& rows() { return rows_; }
  void finish() const {
    if (dx_ && !rows_.is_same(*dx_)) dx_->copy_(rows_);
  }

 private:
  MaybeTensor dx_;
  Tensor rows_;
};

void check_gradients(const Head& head, const MaybeTensor& dx, const MaybeTensor& dw,
                     const MaybeTensor& db, at::ScalarType dtype) {
  const Tensor &x = head.x, &w = head.w;
  TORCH_CHECK(!dx || (dx->sizes() == x.sizes() && dx->scalar_type() == dtype), "dx must be ", dtype,
              " of shape ", x.sizes(), ", got ", dx ? dx->sizes() : at::IntArrayRef(), " of ",
              dx ? dx->scalar_type() : dtype);
  TORCH_CHECK(!dw || dw->sizes() == w.sizes(), "dw must have shape ", w.sizes(), ", got ",
              dw ? dw->sizes() : at::IntArrayRef());
  TORCH_CHECK(!db || (db->dim() == 1 && db->size(0) == w.size(0)), "db must have shape (",
              w.size(0), ",), got ", db ? db->sizes() : at::IntArrayRef());
}

// Gradients of no rows or no classes; true when there is nothing else to do.
bool trivial(const Head& head, const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
             bool accumulate) {
  if (head.x.size(0) != 0 && head.w.size(0) != 0) return !dx && !dw && !db;
  if (dx) dx->zero_();
  if (dw && !accumulate) dw->zero_();
  if (db && !accumulate) db->zero_();
  return true;
}

template <typename S>
void chunk_gradient_of(const Head& head, const Names& wanted, const Tensor& buffer,
                       const MaybeTensors& statistics, const MaybeTensors& coefficients,
                       const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                       bool accumulate, int64_t tile) {
  check_buffer(buffer, head.x, head.w, kDtype<S>);
  check_gradients(head, dx, dw, db, kDtype<S>);
  if (trivial(head, dx, dw, db, accumulate)) return;
  const Task<S> task = task_of<S>(head);
  const Fields<S> statistic(head.names, statistics), coefficient(head.names, coefficients);
  const Chain<S> chain{task, statistic, coefficient};
  const bool kept = keeps_exponentials(head, wanted, buffer);
  TORCH_CHECK(!kept || ((chain.terms & ~kSoftmax) == 0 && coefficient.max == nullptr),
              "coefficients must be of the outputs in wanted, got others; name them in wanted when "
              "the statistics are collected");

  const Operands operands(head);
  Rows w = operands.w(head, tile);
  Tensor factors, x;
  if (kept) factors = row_factors(chain, buffer);
  if (dw && kept) {  // one rounding of f · scale · x
    const Tensor f = factors.mul(operands.scale.value_or(1.0)).unsqueeze(1);
    x = Rows(head.x, operands.dtype, std::nullopt, task.rows)(0, task.rows)
            .mul(f)
            .to(operands.dtype);
  } else if (dw) {
    x = operands.scaled_x(head, task.rows)(0, task.rows);
  }
  DenseRows by_row(dx);
  ClassGradient<S> by_class(chain, dw, db, accumulate, tile, head.x, factor(head.scale));
  each_part(task.classes, tile, [&](int64_t first, int64_t n) {
    const Tensor dz = buffer.narrow(1, first, n);
    if (!kept) {
      each_row<S>(dz,
                  [&](int64_t i, S* z, S* scratch) { gradient(chain, i, z, first, n, scratch); });
    }
    if (by_row) dx_tile(by_row.rows(), dz, w(first, n), first > 0);
    by_class.begin(first, n);
    by_class.add(dz, x, kept ? factors.template const_data_ptr<S>() : nullptr);
    by_class.end();
  });
  if (!by_row) return;
  if (kept) by_row.rows().mul_(factors.unsqueeze(1));
  add_targets_to_rows(chain, Operand(head.w), by_row.rows());
  by_row.finish();
}

template <typename S>
void gradient_of(const Head& head, const MaybeTensors& statistics, const MaybeTensors& coefficients,
                 const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                 int64_t tile) {
  check_gradients(head, dx, dw, db, kDtype<S>);
  if (trivial(head, dx, dw, db, false)) return;
  const Task<S> task = task_of<S>(head);
  const Fields<S> statistic(head.names, statistics), coefficient(head.names, coefficients);
  const Chain<S> chain{task, statistic, coefficient};

  const Operands operands(head);
  const int64_t block = rows_in_flight(head, kRowBlock);
  tile = rows_in_flight(head, tile);
  Rows x = operands.x(head, block), w = operands.w(head, tile);
  const bool apart = operands.half() && operands.scale.has_value();
  Rows scaled_x = apart ? operands.scaled_x(head, block) : x;
  const Tensor scratch = logits_scratch(task, block, tile, head.x);
  DenseRows by_row(dx);
  ClassGradient<S> by_class(chain, dw, db, false, tile, head.x, factor(head.scale));
  each_part(task.classes, tile, [&](int64_t first, int64_t n) {
    const Tensor wt = w(first, n);
    by_class.begin(first, n);
    each_part(task.rows, block, [&](int64_t row, int64_t rows) {
      const Tensor z = scratch.narrow(0, 0, rows).narrow(1, 0, n), part = x(row, rows);
      logits_tile(z, part, wt, operands.scale_of_z());
      each_row<S>(z, [&](int64_t i, S* zi, S* taught) {
        map_logits(zi, n, task.bias ? task.bias + first : nullptr, task.cap);
        gradient(chain, row + i, zi, first, n, taught);
      });
      if (by_row) dx_tile(by_row.rows().narrow(0, row, rows), z, wt, first > 0);
      by_class.add(z, apart ? scaled_x(row, rows) : part, nullptr);
    });
    by_class.end();
  });
  if (!by_row) return;
  add_targets_to_rows(chain, Operand(head.w), by_row.rows());
  by_row.finish();
}

void check(const Head& head, int64_t tile) {
  const Tensor &x = head.x, &w = head.w;
  TORCH_CHECK(x.dim() == 2 && x.is_floating_point(), "x must be floating of shape (N, D), got ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(w.dim() == 2 && w.size(1) == x.size(1), "w must have shape (V, ", x.size(1),
              "), as x is ", x.sizes(), ", got ", w.sizes());
  TORCH_CHECK(!head.b || (head.b->dim() == 1 && head.b->size(0) == w.size(0)),
              "b must have shape (", w.size(0), ",), as w is ", w.sizes(), ", got ",
              head.b ? head.b->sizes() : at::IntArrayRef());
  TORCH_CHECK(!head.scale || head.scale->numel() == 1, "scale must have one element, got ",
              head.scale ? head.scale->sizes() : at::IntArrayRef());
  TORCH_CHECK(tile > 0, "tile must be at least 1 class, got ", tile);
}

bool in_double(const Head& head) { return head.x.scalar_type() == at::kDouble; }

}  // namespace

Tensors linear_statistics(const Head& head, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  return (in_double(head) ? statistics_of<double> : statistics_of<float>)(head, tile);
}

Tensors linear_chunk_statistics(const Head& head, const Names& wanted, const Tensor& buffer,
                                int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  return (in_double(head) ? chunk_statistics_of<double> : chunk_statistics_of<float>)(head, wanted,
                                                                                      buffer, tile);
}

void linear_chunk_gradient(const Head& head, const Names& wanted, const Tensor& buffer,
                           const MaybeTensors& statistics, const MaybeTensors& coefficients,
                           const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                           bool accumulate, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  (in_double(head) ? chunk_gradient_of<double>
                   : chunk_gradient_of<float>)(head, wanted, buffer, statistics, coefficients, dx,
                                               dw, db, accumulate, tile);
}

void linear_gradient(const Head& head, const MaybeTensors& statistics,
                     const MaybeTensors& coefficients, const MaybeTensor& dx, const MaybeTensor& dw,
                     const MaybeTensor& db, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  (in_double(head) ? gradient_of<double> : gradient_of<float>)(head, statistics, coefficients, dx,
                                                               dw, db, tile);
}

}  // namespace lossops
