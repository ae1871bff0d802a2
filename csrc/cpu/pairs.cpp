// The primitives of lossops/reference_pairs.py: losses over all pairs of rows of x and of w.
//
// linear_binary: no statistic stands between such a loss and its gradient, so each tile of logits
// is visited once: z by GEMM, one pass for the sums and dz, then dx and dw. 3 GEMMs of 2 N D V
// operations, and one tile of logits (16 MiB) is all that ever exists.
//
// linear_pair_statistics, linear_pair_gradient: the log-sums of rows and of columns from the same
// tiles, then dz_ij = c_i e^{z_ij - lse_i} + h_j e^{z_ij - lse_j} from tiles computed again. 1 and
// 3 GEMMs, one and two exponentials per logit.
//
// Verified by tests/test_pairs.py against the reference, with small tiles so that every boundary is
// crossed.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "cpu/tiles.h"

namespace lossops {
namespace {

// Classes of a tile in half precision, where both gradients take float32 accumulators as well:
// the scratch beside them should be small.
constexpr int64_t kHalfTile = 512;

// The sum of one row of a tile with -inf at the targets, and dz in its place.
template <bool kGradient, typename S>
double binary_row(const std::string& kind, const std::vector<double>& p, S* z, int64_t n,
                  const S* a, S factor) {
  using V = Vec<S>;
  const auto at = [&](size_t i) { return static_cast<S>(p[i]); };
  if (kind == "sigmoid") {
    if (a == nullptr) return sigmoid_pass<kGradient>(z, n, factor);
    return term_pass<kGradient>(SigmoidTerm<V>{}, z, n, a, factor);
  }
  if (kind == "gumbel") return term_pass<kGradient>(GumbelTerm<V>{V(at(0))}, z, n, a, factor);
  if (kind == "hinge") return term_pass<kGradient>(HingeTerm<V>{V(at(0))}, z, n, a, factor);
  return term_pass<kGradient>(AsymmetricTerm<V>{at(0), at(1), p[2] != 0}, z, n, a, factor);
}

void check_kind(const std::string& kind, const std::vector<double>& parameters) {
  const size_t expected = kind == "sigmoid" ? 0 : kind == "hinge" || kind == "gumbel" ? 1 : 3;
  TORCH_CHECK(kind == "sigmoid" || kind == "hinge" || kind == "gumbel" || kind == "asymmetric",
              "kind must be sigmoid, hinge, gumbel or asymmetric, got '", kind, "'");
  TORCH_CHECK(parameters.size() == expected, "parameters of '", kind, "' must be ", expected,
              " numbers, got ", parameters.size());
}

template <typename S>
void remove_targets(const Task<S>& task, int64_t row, S* z, int64_t first, int64_t n, S value) {
  for (int64_t k = 0; k < task.targets; ++k) {
    const int64_t j = task.target_row(row)[k] - first;
    if (j >= 0 && j < n) z[j] = value;
  }
}

template <typename S>
Tensor binary_of(const Head& head, const std::string& kind, const std::vector<double>& parameters,
                 const MaybeTensor& row_factor, const MaybeTensor& at_target, const MaybeTensor& dx,
                 const MaybeTensor& dw, const MaybeTensor& db, int64_t tile) {
  check_gradients(head, dx, dw, db, kDtype<S>);
  const Tensor sums = at::zeros({head.x.size(0)}, head.x.options().dtype(kDtype<S>));
  const bool gradient = dx || dw || db;
  if (at::isReducedFloatingType(head.x.scalar_type())) tile = std::min(tile, kHalfTile);
  if (head.x.size(0) == 0 || head.w.size(0) == 0) {
    trivial(head, dx, dw, db, false);
    return sums;
  }
  const Task<S> task = task_of<S>(head);
  const bool targets = head.target.has_value();
  const Fields<S> statistic(head.names, MaybeTensors(head.names.size() + 1));
  const Fields<S> coefficient(head.names, targets ? MaybeTensors{std::nullopt, at_target}
                                                  : MaybeTensors(head.names.size() + 1));
  const Chain<S> chain{task, statistic, coefficient};
  TORCH_CHECK(!row_factor || row_factor->numel() == task.rows, "row_factor must have shape (",
              task.rows, ",), got ", row_factor ? row_factor->sizes() : at::IntArrayRef());
  const Tensor factors = row_factor ? row_factor->to(kDtype<S>).contiguous() : Tensor();
  const S* f = row_factor ? factors.template const_data_ptr<S>() : nullptr;
  std::vector<double> totals(task.rows, 0);
  sweep_gradient<S>(
      head, chain, dx, dw, db, tile, [&](int64_t row, S* z, int64_t first, int64_t n, S*) {
        remove_targets(task, row, z, first, n, -kInf<S>);
        const S* a = task.class_vector ? task.class_vector + first : nullptr;
        const S factor = f == nullptr ? S(1) : f[row];
        totals[row] += gradient ? binary_row<true>(kind, parameters, z, n, a, factor)
                                : binary_row<false>(kind, parameters, z, n, a, factor);
      });
  S* out = sums.template data_ptr<S>();
  for (int64_t i = 0; i < task.rows; ++i) out[i] = static_cast<S>(totals[i]);
  return sums;
}

// Σ_i e^{z_ij} of each column, relative to its largest so far.
template <typename S>
class ColumnSums {
 public:
  explicit ColumnSums(int64_t columns) : top_(columns, -kInf<S>), sum_(columns, 0) {}

  // Adds the tile z (rows, n) of the columns from `first` on; every column belongs to one thread.
  void add(const Tensor& z, int64_t first) {
    const int64_t rows = z.size(0), n = z.size(1), stride = z.stride(0);
    const S* data = z.template const_data_ptr<S>();
    const int64_t grain = row_grain(2 * rows * kColumns);
    at::parallel_for(0, (n + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * kColumns; c < std::min(n, end * kColumns); c += kColumns) {
        strip(data + c, stride, rows, std::min(kColumns, n - c), first + c);
      }
    });
  }

  // Shift and log-sum relative to it, as those of rows.
  void finish(S* shift, S* lse) const {
    for (size_t j = 0; j < top_.size(); ++j) {
      const bool poisoned = !(top_[j] < kInf<S>);
      shift[j] = finite(top_[j]);
      lse[j] = poisoned ? top_[j] : static_cast<S>(std::log(sum_[j]));
    }
  }

 private:
  using V = Vec<S>;
  static constexpr int64_t kVectors = 4, kWidth = V::size(), kColumns = kVectors * kWidth;

  static S finite(S top) { return std::isfinite(top) ? top : S(0); }

  // f(v, at, count) for the vectors of a strip of `columns`.
  template <typename F>
  static LOSSOPS_LANE void vectors(int64_t columns, const F& f) {
    if (columns == kColumns) {
      for (int64_t v = 0; v < kVectors; ++v) f(v, std::integral_constant<int64_t, kWidth>{});
      return;
    }
    for (int64_t v = 0; v * kWidth < columns; ++v) f(v, std::min(kWidth, columns - v * kWidth));
  }

  void strip(const S* z, int64_t stride, int64_t rows, int64_t columns, int64_t at) {
    V tops[kVectors];
    for (V& top : tops) top = V(-kInf<S>);
    for (int64_t i = 0; i < rows; ++i) {
      vectors(columns, [&](int64_t v, auto count) LOSSOPS_INLINE_LAMBDA {
        const V zv = load(z + i * stride + v * kWidth, count, -kInf<S>);
        tops[v] = at::vec::maximum(tops[v], zv);
      });
    }
    S largest[kColumns], lanes[kColumns];
    for (int64_t v = 0; v < kVectors; ++v) tops[v].store(largest + v * kWidth);
    for (int64_t j = 0; j < columns; ++j) {
      S& top = top_[at + j];
      const S before = top;
      if (largest[j] > top || std::isnan(largest[j])) top = largest[j];
      if (sum_[at + j] != 0) sum_[at + j] *= std::exp(double{finite(before)} - finite(top));
      lanes[j] = finite(top);
    }
    V shifts[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      shifts[v] =
          load(lanes + v * kWidth, std::clamp<int64_t>(columns - v * kWidth, 0, kWidth), S(0));
    }
    for (int64_t block = 0; block < rows; block += 256) {
      V sums[kVectors];
      for (V& sum : sums) sum = V(0);
      for (int64_t i = block; i < std::min(rows, block + 256); ++i) {
        vectors(columns, [&](int64_t v, auto count) LOSSOPS_INLINE_LAMBDA {
          const V zv = load(z + i * stride + v * kWidth, count, -kInf<S>);
          sums[v] = sums[v] + Lane<V>::exp(zv - shifts[v]);
        });
      }
      for (int64_t v = 0; v < kVectors; ++v) sums[v].store(lanes + v * kWidth);
      for (int64_t j = 0; j < columns; ++j) sum_[at + j] += lanes[j];
    }
  }

  std::vector<S> top_;
  std::vector<double> sum_;
};

const Names kPairNames{"target", "lse"};

Head pair_head(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
               const MaybeTensor& target) {
  const Names names = target ? kPairNames : Names{"lse"};
  return {x, w, std::nullopt, scale, 0, target, std::nullopt, std::nullopt, names};
}

template <typename S>
Tensors pair_statistics_of(const Head& head, int64_t tile) {
  ColumnSums<S> columns(head.w.size(0));
  const Tensors tensors =
      statistics_of<S>(head, tile, [&](const Tensor& z, int64_t first) { columns.add(z, first); });
  const auto options = head.x.options().dtype(kDtype<S>);
  const Tensor shift = at::empty({head.w.size(0)}, options), lse = at::empty_like(shift);
  columns.finish(shift.template data_ptr<S>(), lse.template data_ptr<S>());
  // Of pairs the targets' logits are relative to the shift, too.
  const Tensor target = head.target ? tensors[1].sub_(tensors[0].unsqueeze(1))
                                    : at::empty({head.x.size(0), 0}, options);
  return {tensors[0], tensors.back(), shift, lse, target};
}

// (n,) of S, with 0 for the log-sum of nothing.
template <typename S>
Tensor finite_lse(const Tensor& lse) {
  return at::where(lse.to(kDtype<S>).eq(-kInf<double>), 0.0, lse.to(kDtype<S>)).contiguous();
}

template <typename S>
Tensor dense_or_zeros(const MaybeTensor& t, int64_t n, const Tensor& like) {
  return t ? t->to(kDtype<S>).contiguous() : at::zeros({n}, like.options().dtype(kDtype<S>));
}

template <typename S>
void pair_gradient_of(const Head& head, const Tensors& statistics, const MaybeTensors& coefficients,
                      const MaybeTensor& dx, const MaybeTensor& dw, int64_t tile) {
  check_gradients(head, dx, dw, std::nullopt, kDtype<S>);
  if (trivial(head, dx, dw, std::nullopt, false)) return;
  const Task<S> task = task_of<S>(head);
  const Tensor shift = statistics[0].to(kDtype<S>).contiguous();
  const Tensor lse = finite_lse<S>(statistics[1]);
  const Tensor column_shift = statistics[2].to(kDtype<S>).contiguous();
  const Tensor column_lse = finite_lse<S>(statistics[3]);
  const Tensor row_factor = dense_or_zeros<S>(coefficients[0], task.rows, head.x);
  const Tensor column_factor = dense_or_zeros<S>(coefficients[1], task.classes, head.x);
  MaybeTensors given(head.names.size() + 1);
  const Fields<S> statistic(head.names, given);
  if (head.target) given[1] = coefficients[2];
  const Fields<S> coefficient(head.names, given);
  const Chain<S> chain{task, statistic, coefficient};
  const S *m = shift.template const_data_ptr<S>(), *l = lse.template const_data_ptr<S>();
  const S* c = row_factor.template const_data_ptr<S>();
  const S* ms = column_shift.template const_data_ptr<S>();
  const S* ls = column_lse.template const_data_ptr<S>();
  const S* h = column_factor.template const_data_ptr<S>();
  sweep_gradient<S>(head, chain, dx, dw, std::nullopt, tile,
                    [&](int64_t row, S* z, int64_t first, int64_t n, S*) {
                      using A = Lane<Vec<S>>;
                      const Vec<S> mv(m[row]), lv(l[row]), cv(c[row]);
                      for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
                        const int64_t j = first + i;
                        const Vec<S> v = load(z + i, count, S(0));
                        const Vec<S> q = A::exp(v - mv - lv);
                        const Vec<S> r =
                            A::exp(v - load(ms + j, count, S(0)) - load(ls + j, count, S(0)));
                        store(z + i, A::fma(load(h + j, count, S(0)), r, cv * q), count);
                      });
                      remove_targets(task, row, z, first, n, S(0));
                    });
}

}  // namespace

Tensor linear_binary(const Tensor& x, const Tensor& w, const MaybeTensor& b,
                     const MaybeTensor& scale, const MaybeTensor& target, const MaybeTensor& weight,
                     const std::string& kind, const std::vector<double>& parameters,
                     const MaybeTensor& row_factor, const MaybeTensor& at_target,
                     const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                     int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_kind(kind, parameters);
  const Names names = target ? Names{"target"} : Names{};
  const Head head{x, w, b, scale, 0, target, weight, std::nullopt, names};
  check(head, tile);
  return (in_double(head) ? binary_of<double> : binary_of<float>)(head, kind, parameters,
                                                                  row_factor, at_target, dx, dw, db,
                                                                  tile);
}

Tensors linear_pair_statistics(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
                               const MaybeTensor& target, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Head head = pair_head(x, w, scale, target);
  check(head, tile);
  return (in_double(head) ? pair_statistics_of<double> : pair_statistics_of<float>)(head, tile);
}

void linear_pair_gradient(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
                          const MaybeTensor& target, const Tensors& statistics,
                          const MaybeTensors& coefficients, const MaybeTensor& dx,
                          const MaybeTensor& dw, int64_t tile) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Head head = pair_head(x, w, scale, target);
  check(head, tile);
  TORCH_CHECK(statistics.size() == 5 && coefficients.size() == 3,
              "expected 5 statistics and 3 coefficients, got ", statistics.size(), " and ",
              coefficients.size());
  (in_double(head) ? pair_gradient_of<double>
                   : pair_gradient_of<float>)(head, statistics, coefficients, dx, dw, tile);
}

}  // namespace lossops
