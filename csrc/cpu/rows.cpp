// Rows of a table picked by id: normalised on the way out, updated in place on the way back.
//
// S rows of D values cost, in bytes, the table's dtype counted 4:
//
//   normalized_rows      read 4 S D, write 4 S D      normalized_rows_gradient   8 S D + 4 S D
//   sgd_rows             12 S D + 8 S D with momentum  adamw_rows                 16 S D + 12 S D
//
// One pass each: a row is loaded into float (double) scratch, worked on in cache and written once.
//
// Verified by tests/test_row_optim.py and tests/test_partial_fc.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/passes.h"
#include "cpu/primitives.h"
#include "update.h"

namespace lossops {
namespace {

template <typename F>
void in_accumulate_dtype(const Tensor& t, F&& f) {
  if (t.scalar_type() == at::kDouble) return f(double());
  f(float());
}

// f(row, id, scratch) for each id; `buffers` rows of scratch of D values for each thread.
template <typename S, typename F>
void each_id(const Tensor& ids, int64_t width, int64_t buffers, F&& f) {
  const int64_t* id = ids.const_data_ptr<int64_t>();
  at::parallel_for(0, ids.numel(), row_grain(width), [&](int64_t begin, int64_t end) {
    std::vector<S> scratch(buffers * width);
    for (int64_t row = begin; row < end; ++row) f(row, id[row], scratch.data());
  });
}

template <typename S>
double dot(const S* a, const S* b, int64_t n) {
  Vec<S> sum(0);
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    sum = Lane<Vec<S>>::fma(load(a + i, count, S(0)), load(b + i, count, S(0)), sum);
  });
  return sum_of_lanes(sum);
}

// ids (S,) dense, each within the table; `distinct` ones rise, so that no two threads share a row.
void check_ids(const Tensor& table, const Tensor& ids, bool distinct) {
  TORCH_CHECK(table.dim() == 2 && table.is_floating_point(),
              "the table must be floating of shape (V, D), got ", table.scalar_type(), " ",
              table.sizes());
  TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == at::kLong && ids.is_contiguous(),
              "ids must be dense int64 of shape (S,), got ", ids.scalar_type(), " ", ids.sizes());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    TORCH_CHECK_INDEX(0 <= id[i] && id[i] < table.size(0), "ids must be in [0, ", table.size(0),
                      "), got ", id[i]);
    TORCH_CHECK(!distinct || i == 0 || id[i - 1] < id[i], "ids must rise strictly, got ",
                id[i > 0 ? i - 1 : 0], " before ", id[i], "; coalesce the gradient");
  }
}

void check_like(const char* name, const Tensor& t, int64_t rows, const Tensor& table) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == table.size(1), name,
              " must have shape (", rows, ", ", table.size(1), "), got ", t.sizes());
}

}  // namespace

std::tuple<Tensor, Tensor> normalized_rows(const Tensor& table, const Tensor& ids, double eps) {
  check_ids(table, ids, false);
  const int64_t width = table.size(1);
  const Tensor rows = at::empty({ids.numel(), width}, table.options());
  Tensor norms;
  in_accumulate_dtype(table, [&](auto zero) {
    using S = decltype(zero);
    norms = at::empty({ids.numel()}, table.options().dtype(c10::CppTypeToScalarType<S>::value));
    S* norm = norms.template data_ptr<S>();
    const Operand from(table), to(rows);
    each_id<S>(ids, width, 1, [&](int64_t row, int64_t id, S* w) {
      from.load(id, 0, width, w);
      norm[row] = static_cast<S>(std::max(std::sqrt(dot(w, w, width)), eps));
      multiply(w, width, S(1) / norm[row]);
      to.store(row, 0, width, w);
    });
  });
  return {rows, norms};
}

Tensor normalized_rows_gradient(const Tensor& rows, const Tensor& norms, const Tensor& gradient) {
  check_like("gradient", gradient, rows.size(0), rows);
  const int64_t width = rows.size(1);
  const Tensor found = at::empty(rows.sizes(), rows.options());
  in_accumulate_dtype(rows, [&](auto zero) {
    using S = decltype(zero);
    const S* norm = norms.template const_data_ptr<S>();
    const Operand unit(rows), given(gradient), to(found);
    at::parallel_for(0, rows.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      std::vector<S> scratch(2 * width);
      S *w = scratch.data(), *g = w + width;
      for (int64_t row = begin; row < end; ++row) {
        unit.load(row, 0, width, w);
        given.load(row, 0, width, g);
        const S along = static_cast<S>(dot(w, g, width)), inverse = S(1) / norm[row];
        for (int64_t i = 0; i < width; ++i) g[i] = (g[i] - along * w[i]) * inverse;
        to.store(row, 0, width, g);
      }
    });
  });
  return found;
}

void sgd_rows(const Tensor& table, const MaybeTensor& velocity, const Tensor& ids,
              const Tensor& gradient, double lr, double momentum, double weight_decay) {
  check_ids(table, ids, true);
  check_like("gradient", gradient, ids.numel(), table);
  if (velocity) check_like("velocity", *velocity, table.size(0), table);
  const int64_t width = table.size(1);
  in_accumulate_dtype(table, [&](auto zero) {
    using S = decltype(zero);
    const SgdUpdate<S> update(lr, momentum, weight_decay);
    const Operand weights(table), gradients(gradient), moving(velocity ? *velocity : table);
    each_id<S>(ids, width, 3, [&](int64_t row, int64_t id, S* w) {
      S *g = w + width, *v = g + width;
      weights.load(id, 0, width, w);
      gradients.load(row, 0, width, g);
      if (velocity) {
        moving.load(id, 0, width, v);
      } else {
        std::fill(v, v + width, S(0));
      }
      for (int64_t i = 0; i < width; ++i) update(w[i], v[i], g[i]);
      if (velocity) moving.store(id, 0, width, v);
      weights.store(id, 0, width, w);
    });
  });
}

void adamw_rows(const Tensor& table, const Tensor& mean, const Tensor& square, const Tensor& count,
                const Tensor& ids, const Tensor& gradient, double lr, double beta1, double beta2,
                double eps, double weight_decay) {
  check_ids(table, ids, true);
  check_like("gradient", gradient, ids.numel(), table);
  check_like("mean", mean, table.size(0), table);
  check_like("square", square, table.size(0), table);
  TORCH_CHECK(count.dim() == 1 && count.size(0) == table.size(0) &&
                  count.scalar_type() == at::kInt && count.is_contiguous(),
              "count must be int32 of shape (", table.size(0), ",), got ", count.scalar_type(), " ",
              count.sizes());
  const int64_t width = table.size(1);
  int32_t* counts = count.data_ptr<int32_t>();
  in_accumulate_dtype(table, [&](auto zero) {
    using S = decltype(zero);
    const Operand weights(table), gradients(gradient), means(mean), squares(square);
    const AdamwUpdate<S> update(lr, beta1, beta2, eps, weight_decay);
    each_id<S>(ids, width, 4, [&](int64_t row, int64_t id, S* w) {
      S *g = w + width, *m = g + width, *v = m + width;
      const int32_t k = ++counts[id];
      const S rate = static_cast<S>(lr / (1 - std::pow(beta1, k)));
      const S whole = static_cast<S>(1 / std::sqrt(1 - std::pow(beta2, k)));
      weights.load(id, 0, width, w);
      gradients.load(row, 0, width, g);
      means.load(id, 0, width, m);
      squares.load(id, 0, width, v);
      for (int64_t i = 0; i < width; ++i) update(w[i], m[i], v[i], g[i], rate, whole);
      means.store(id, 0, width, m);
      squares.store(id, 0, width, v);
      weights.store(id, 0, width, w);
    });
  });
}

}  // namespace lossops
