// The primitives on x and w: a tile of logits by GEMM, then the row passes while it is in
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
// so that dz is never formed. A row whose later maximum is too far above k is rescaled in place. A
// buffer of bfloat16 holds E as the products round it: half the bytes, and no pass that rounds.
//
// Where E does not suffice, a buffer of float16 may hold z - o, the origin o_i near the row's
// largest negative: a logit is off by (o - z) / 2048 at most, and a softmax of t z that is q by (t
// + ln(1 / q)) / 2048 of it, where o was not moved; each time it was rounds once more. For squares
// o_i is near the mean, for sums that read z itself it is 0. Statistics are those of z before it
// was rounded.
//
// Verified by tests/test_cpu_backend.py, with small tiles so that every boundary is crossed.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/ones.h>

#include <string>

#include "cpu/tiles.h"

namespace lossops {
namespace {

// Of a log-sum of logits that may be rounded.
constexpr double kLargestTemperature = 4;

void check_buffer(const Tensor& buffer, const Tensor& x, const Tensor& w, at::ScalarType dtype) {
  TORCH_CHECK(buffer.dim() == 2 && buffer.size(0) == x.size(0) && buffer.size(1) == w.size(0) &&
                  buffer.scalar_type() == dtype && (buffer.stride(1) == 1 || buffer.size(1) == 1),
              "buffer must be ", dtype, " of shape (", x.size(0), ", ", w.size(0),
              ") with dense rows, got ", buffer.scalar_type(), " ", buffer.sizes(), " of strides ",
              buffer.strides());
}

// Whether exponentials are all that the gradient of such a call needs.
bool exponentials_suffice(double softcap, const Names& names, const Names& wanted) {
  if (softcap != 0 || !contains(names, "lse")) return false;
  for (const auto& name : names) {  // those that take z a second time
    if (name == "entropy" || name == "variance" || name == "below_target" || is_log_sum(name))
      return false;
  }
  for (const auto& name : wanted) {
    if (name != "target" && name != "lse") return false;
  }
  return true;
}

// Whether the logits of a call may be rounded without changing the gradient by much more than the
// rounding of dz does. Not at the step of a limit, nor where a softcap saturates or a temperature
// multiplies the error; not where dz is a multiple of z, however small or far from the origin it
// is; and sums that read z itself want another origin than those that read z - shift.
bool logits_may_be_rounded(double softcap, const Names& names) {
  bool absolute = false, relative = false;
  for (const std::string& name : names) {
    if (name.starts_with("lse<") || name == "sumsq" || name == "variance") return false;
    if (name.starts_with("lse@") && std::stod(name.substr(4)) > kLargestTemperature) return false;
    absolute |= name == "softplus" || name == "stable_sum";
    relative |= is_log_sum(name) || name == "lse" || name == "entropy";
  }
  return softcap == 0 && !(absolute && relative);
}

// Where in a row of a buffer the sum of its exponentials lies, or the origin of its logits, in
// bytes: behind them.
template <typename S>
int64_t place_of_own(const Tensor& buffer) {
  const int64_t bytes = buffer.size(1) * buffer.element_size(), size = sizeof(S);
  return (bytes + size - 1) / size * size;
}

template <typename S>
S& own_of_row(const Tensor& buffer, int64_t row) {
  auto* data = static_cast<char*>(buffer.data_ptr());
  const int64_t bytes = row * buffer.stride(0) * buffer.element_size();
  return *reinterpret_cast<S*>(data + bytes + place_of_own<S>(buffer));
}

// Whether there is such a place in every row.
template <typename S>
bool has_room(const Tensor& buffer) {
  const int64_t rows = buffer.size(0), stride = buffer.stride(0) * buffer.element_size();
  const int64_t end = place_of_own<S>(buffer) + sizeof(S);
  if (rows == 0 || stride < end || stride % sizeof(S) != 0) return false;
  const int64_t last = buffer.storage_offset() * buffer.element_size() + (rows - 1) * stride;
  return last + end <= static_cast<int64_t>(buffer.storage().nbytes());
}

// Whether the buffer of such a call holds exponentials.
template <typename S>
bool keeps_exponentials(const Head& head, const Names& wanted, const Tensor& buffer) {
  return buffer.scalar_type() != at::kHalf &&
         exponentials_suffice(head.softcap, head.names, wanted) && has_room<S>(buffer);
}

template <typename S>
void check_chunk(const Head& head, const Names& wanted, const Tensor& buffer) {
  const auto dtype = buffer.scalar_type();
  const bool exponentials = dtype == at::kBFloat16, logits = dtype == at::kHalf;
  check_buffer(buffer, head.x, head.w, exponentials || logits ? dtype : kDtype<S>);
  if (!exponentials && !logits) return;
  const bool holds = exponentials ? exponentials_suffice(head.softcap, head.names, wanted)
                                  : logits_may_be_rounded(head.softcap, head.names);
  TORCH_CHECK(
      operand_dtype(head.x, head.w) == at::kBFloat16 && holds &&
          (buffer.size(0) == 0 || has_room<S>(buffer)),
      "a buffer of ", dtype, " needs products of bfloat16, ",
      exponentials ? "no more wanted than the targets and lse" : "logits that may be rounded",
      ", and room for 3 more values a row, got a row stride of ", buffer.stride(0), " for ",
      buffer.size(1), " classes, softcap ", head.softcap, " and names ",
      c10::Join(", ", head.names));
}

template <typename S>
Tensors chunk_statistics_of(const Head& head, const Names& wanted, const Tensor& buffer,
                            int64_t tile) {
  check_chunk<S>(head, wanted, buffer);
  const Task<S> task = task_of<S>(head);
  const Tensors tensors =
      allocate_statistics(head.names, task.rows, head.target, head.x.options().dtype(kDtype<S>));
  const Fields<S> out(head.names, {tensors.begin(), tensors.end()});
  std::vector<RowState<S>> states(task.rows, RowState<S>(task.log_sums.size()));
  const int64_t block = std::max<int64_t>(1, task.rows);
  const Operands operands(head);
  Rows x = operands.x(head, block), w = operands.w(head, tile);
  const bool rounded = buffer.scalar_type() != kDtype<S>;
  Kept keep{.on = keeps_exponentials<S>(head, wanted, buffer), .stride = buffer.stride(0)};
  if (buffer.scalar_type() == at::kBFloat16) {
    keep.exponentials = buffer.template data_ptr<at::BFloat16>();
  } else if (buffer.scalar_type() == at::kHalf) {
    keep.logits = buffer.template data_ptr<at::Half>();
  }
  const Tensor logits = rounded ? logits_scratch(task, block, tile, head.x) : buffer;
  const auto z_tile = [&](int64_t, int64_t, int64_t first, int64_t n) {
    return rounded ? logits.narrow(1, 0, n) : buffer.narrow(1, first, n);
  };
  sweep(task, x, w, operands.scale_of_z(), tile, block, z_tile, out, keep, states, kNothing,
        !rounded);
  for (int64_t i = 0; (keep.on || rounded) && i < task.rows; ++i) {
    own_of_row<S>(buffer, i) = keep.on ? static_cast<S>(states[i].softmax.sum) : states[i].origin;
  }
  return tensors;
}

// f (R,): dz = f E off the targets. A row with no finite lse is NaN, as its softmax is.
template <typename S>
Tensor row_factors(const Chain<S>& chain, const Tensor& buffer) {
  const Tensor factors = at::empty({chain.task.rows}, buffer.options().dtype(kDtype<S>));
  S* f = factors.template data_ptr<S>();
  for (int64_t i = 0; i < chain.task.rows; ++i) {
    const S c = chain.coefficient.lse == nullptr ? S(0) : chain.coefficient.lse[i];
    const S lse = chain.statistic.lse[i];
    if (lse == -kInf<S>) {
      f[i] = c * 0;
    } else if (std::isfinite(lse)) {
      f[i] = c / own_of_row<S>(buffer, i);
    } else {
      f[i] = std::numeric_limits<S>::quiet_NaN();
    }
  }
  return factors;
}

// dx, dw and db of a chunk from tiles of its buffer, which hold dz, or E with dz = f E where there
// are factors f (R,); prepare(tile, first, n) makes it so and gives what products take of it. The
// targets of the chain go to dw and db; those of dx are the caller's.
template <typename S, typename Prepare>
void chunk_products(const Head& head, const Chain<S>& chain, const Tensor& buffer,
                    const Tensor& factors, DenseRows& by_row, const MaybeTensor& dw,
                    const MaybeTensor& db, bool accumulate, int64_t tile, Prepare&& prepare) {
  const int64_t rows = buffer.size(0);
  const Operands operands(head);
  Rows w = operands.w(head, tile);
  Tensor x;
  if (dw && factors.defined()) {  // one rounding of f · scale · x
    const Tensor f = factors.mul(operands.scale.value_or(1.0)).unsqueeze(1);
    x = Rows(head.x, operands.dtype, std::nullopt, rows)(0, rows).mul(f).to(operands.dtype);
  } else if (dw) {
    x = operands.scaled_x(head, rows)(0, rows);
  }
  ClassGradient<S> by_class(chain, dw, db, accumulate, tile, head.x, factor(head.scale));
  each_part(buffer.size(1), tile, [&](int64_t first, int64_t n) {
    const Tensor z = buffer.narrow(1, first, n), dz = prepare(z, first, n);
    if (by_row) dx_tile(by_row.rows(), dz, w(first, n), first > 0);
    by_class.begin(first, n);
    const Tensor& exact = z.scalar_type() == kDtype<S> ? z : dz;
    by_class.add(dz, exact, x, factors.defined() ? factors.template const_data_ptr<S>() : nullptr);
    by_class.end();
  });
  if (by_row && factors.defined()) by_row.rows().mul_(factors.unsqueeze(1));
}

template <typename S>
void check_kept(const Chain<S>& chain, bool kept) {
  TORCH_CHECK(!kept || ((chain.terms & ~kSoftmax) == 0 && chain.coefficient.max == nullptr),
              "coefficients must be of the outputs in wanted, got others; name them in wanted when "
              "the statistics are collected");
}

template <typename S>
void chunk_gradient_of(const Head& head, const Names& wanted, const Tensor& buffer,
                       const MaybeTensors& statistics, const MaybeTensors& coefficients,
                       const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                       bool accumulate, int64_t tile) {
  check_chunk<S>(head, wanted, buffer);
  check_gradients(head, dx, dw, db, kDtype<S>);
  if (trivial(head, dx, dw, db, accumulate)) return;
  const Task<S> task = task_of<S>(head);
  const Fields<S> statistic(head.names, statistics), coefficient(head.names, coefficients);
  const Chain<S> chain{task, statistic, coefficient};
  const bool kept = keeps_exponentials<S>(head, wanted, buffer);
  check_kept(chain, kept);

  const Tensor factors = kept ? row_factors(chain, buffer) : Tensor();
  DenseRows by_row(dx);
  const bool half = Operands(head).half();
  RoundedTile<S> rounded(half && !kept, task.rows, std::min(task.classes, tile), head.x);
  chunk_products(head, chain, buffer, factors, by_row, dw, db, accumulate, tile,
                 [&](const Tensor& z, int64_t first, int64_t n) {
                   if (kept) return z;
                   if (z.scalar_type() == kDtype<S>) {
                     each_row<S>(z, [&](int64_t i, S* zi, S* scratch) {
                       gradient(chain, i, InPlace<S>{zi, chain.negligible}, first, n, scratch);
                       rounded.put(i, zi, n);
                     });
                   } else if constexpr (std::is_same_v<S, float>) {
                     each_row<at::Half, S>(z, [&](int64_t i, const at::Half* zi, S* scratch) {
                       const FromRounded place{zi, own_of_row<S>(buffer, i), rounded.row(i)};
                       gradient(chain, i, place, first, n, scratch);
                     });
                   }
                   return rounded(z);
                 });
  if (!by_row) return;
  add_targets_to_rows(chain, Operand(head.w), by_row.rows());
  by_row.finish();
}

template <typename S>
Tensor chunk_negatives_of(const Head& head, const Names& wanted, const Tensor& buffer,
                          const MaybeTensors& statistics, const MaybeTensors& coefficients,
                          int64_t tile) {
  check_buffer(buffer, head.x, head.w, kDtype<S>);
  const Task<S> task = task_of<S>(head);
  const Fields<S> statistic(head.names, statistics), coefficient(head.names, coefficients);
  const Chain<S> chain{task, statistic, coefficient};
  const bool kept = keeps_exponentials<S>(head, wanted, buffer);
  check_kept(chain, kept);
  if (kept) return row_factors(chain, buffer);
  each_part(task.classes, tile, [&](int64_t first, int64_t n) {
    each_row<S>(buffer.narrow(1, first, n), [&](int64_t i, S* z, S* scratch) {
      gradient(chain, i, InPlace<S>{z, chain.negligible}, first, n, scratch);
    });
  });
  return at::ones({task.rows}, buffer.options());
}

template <typename S>
void negatives_of(const Head& head, const MaybeTensors& statistics,
                  const MaybeTensors& coefficients, int64_t first, const Tensor& buffer) {
  const int64_t n = buffer.size(1);
  TORCH_CHECK(buffer.dim() == 2 && buffer.size(0) == head.x.size(0) && first >= 0 &&
                  first + n <= head.w.size(0) && buffer.scalar_type() == kDtype<S> &&
                  (buffer.stride(1) == 1 || n == 1),
              "buffer must be ", kDtype<S>, " of shape (", head.x.size(0),
              ", n) with dense rows, for n classes from ", first, " on, got ", buffer.scalar_type(),
              " ", buffer.sizes());
  const Task<S> task = task_of<S>(head);
  const Fields<S> statistic(head.names, statistics), coefficient(head.names, coefficients);
  const Chain<S> chain{task, statistic, coefficient};
  const Operands operands(head);
  const int64_t block = rows_in_flight(head, kRowBlock), tile = rows_in_flight(head, n);
  Rows x = operands.x(head, block), w = operands.w(head, std::max<int64_t>(1, tile));
  each_part(n, std::max<int64_t>(1, tile), [&](int64_t column, int64_t columns) {
    const Tensor wt = w(first + column, columns);
    each_part(task.rows, block, [&](int64_t row, int64_t rows) {
      const Tensor z = buffer.narrow(0, row, rows).narrow(1, column, columns);
      logits_tile(z, x(row, rows), wt, operands.scale_of_z());
      each_row<S>(z, [&](int64_t i, S* zi, S* scratch) {
        const int64_t at = first + column;
        map_logits(zi, columns, task.bias ? task.bias + at : nullptr, task.cap);
        gradient(chain, row + i, InPlace<S>{zi, chain.negligible}, at, columns, scratch);
      });
    });
  });
}

template <typename S>
void products_of(const Head& head, const Tensor& buffer, const Tensor& row_factor,
                 const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                 bool accumulate, int64_t tile) {
  check_buffer(buffer, head.x, head.w, kDtype<S>);
  check_gradients(head, dx, dw, db, kDtype<S>);
  if (trivial(head, dx, dw, db, accumulate)) return;
  const Task<S> task = task_of<S>(head);
  const Fields<S> none(head.names, MaybeTensors(1));
  const Chain<S> chain{task, none, none};
  DenseRows by_row(dx);
  chunk_products(head, chain, buffer, row_factor.to(kDtype<S>).contiguous(), by_row, dw, db,
                 accumulate, tile, [](const Tensor& dz, int64_t, int64_t) { return dz; });
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

  sweep_gradient(head, chain, dx, dw, db, tile,
                 [&](int64_t row, S* z, int64_t first, int64_t n, S* scratch) {
                   gradient(chain, row, InPlace<S>{z, chain.negligible}, first, n, scratch);
                 });
}

}  // namespace

Tensors linear_statistics(const Head& head, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  return in_double(head) ? statistics_of<double>(head, tile, kNothing)
                         : statistics_of<float>(head, tile, kNothing);
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

Tensor linear_chunk_negatives(const Head& head, const Names& wanted, const Tensor& buffer,
                              const MaybeTensors& statistics, const MaybeTensors& coefficients,
                              int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  return (in_double(head)
              ? chunk_negatives_of<double>
              : chunk_negatives_of<float>)(head, wanted, buffer, statistics, coefficients, tile);
}

void linear_negatives(const Head& head, const MaybeTensors& statistics,
                      const MaybeTensors& coefficients, int64_t first, const Tensor& buffer,
                      int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check(head, tile);
  (in_double(head) ? negatives_of<double> : negatives_of<float>)(head, statistics, coefficients,
                                                                 first, buffer);
}

void linear_products(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
                     const Tensor& buffer, const Tensor& row_factor, const MaybeTensor& dx,
                     const MaybeTensor& dw, const MaybeTensor& db, bool accumulate, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Head head{x, w, std::nullopt, scale, 0, std::nullopt, std::nullopt, std::nullopt, {}};
  check(head, tile);
  (in_double(head) ? products_of<double> : products_of<float>)(head, buffer, row_factor, dx, dw, db,
                                                               accumulate, tile);
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
