#include "cpu/targets.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace lossops {
namespace {

template <typename S>
void add_scaled(S* to, const S* from, S factor, int64_t n) {
  for_lanes<S>(n, [&](int64_t i, auto count) LOSSOPS_INLINE_LAMBDA {
    const Vec<S> sum =
        Lane<Vec<S>>::fma(Vec<S>(factor), load(from + i, count, S(0)), load(to + i, count, S(0)));
    store(to + i, sum, count);
  });
}

}  // namespace

template <typename S>
S target_gradient(const Chain<S>& chain, int64_t row, int64_t k) {
  const Task<S>& task = chain.task;
  const RowBasis<S> basis = chain.basis(row);
  const S* logits = chain.statistic.target;
  TORCH_CHECK(logits != nullptr || (!(chain.terms & kMoment) && task.cap == 0),
              "this gradient needs the statistic 'target', got names without it; add it");
  const int64_t i = row * task.targets + k, y = task.target_row(row)[k];
  const S z = logits != nullptr ? logits[i] : S(0);
  const S a = task.class_vector != nullptr ? task.class_vector[y] : S(1);
  S t(0);
  if (chain.terms & kTeacher) task.teacher.load(row, y, 1, &t);
  S value = basis.dense(chain.terms, z - basis.shift, a, t * a);
  if (chain.coefficient.target != nullptr) value += chain.coefficient.target[i];
  if (task.cap != 0) value *= softcap_slope(z, task.cap);
  return value;
}

template <typename S>
std::vector<TargetEntry<S>> target_entries(const Chain<S>& chain) {
  const Task<S>& task = chain.task;
  std::vector<TargetEntry<S>> entries;
  entries.reserve(task.rows * task.targets);
  for (int64_t row = 0; row < task.rows; ++row) {
    for (int64_t k = 0; k < task.targets; ++k) {
      const int64_t y = task.target_row(row)[k];
      if (y < 0 || y >= task.classes) continue;
      entries.push_back({y, row, target_gradient(chain, row, k)});
    }
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const auto& a, const auto& b) { return a.id < b.id; });
  return entries;
}

template <typename S>
void add_targets_to_rows(const Chain<S>& chain, const Operand& w, Tensor& dx) {
  const Task<S>& task = chain.task;
  const int64_t width = dx.size(1), stride = dx.stride(0);
  S* data = dx.template data_ptr<S>();
  at::parallel_for(0, task.rows, row_grain(width), [&](int64_t begin, int64_t end) {
    std::vector<S> wy(width);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < task.targets; ++k) {
        const int64_t y = task.target_row(row)[k];
        if (y < 0 || y >= task.classes) continue;
        w.load(y, 0, width, wy.data());
        add_scaled(data + row * stride, wy.data(), target_gradient(chain, row, k), width);
      }
    }
  });
}

template <typename S>
void add_targets_to_classes(const std::vector<TargetEntry<S>>& entries, int64_t first, int64_t n,
                            const Operand& x, S scale, int64_t width, S* dw, int64_t dw_stride,
                            S* db) {
  const auto before = [](const TargetEntry<S>& e, int64_t id) { return e.id < id; };
  const auto from = std::lower_bound(entries.begin(), entries.end(), first, before);
  const auto to = std::lower_bound(from, entries.end(), first + n, before);
  std::vector<const TargetEntry<S>*> runs;  // where each id begins, and the end
  for (auto e = from; e != to; ++e) {
    if (e == from || e->id != (e - 1)->id) runs.push_back(&*e);
  }
  if (runs.empty()) return;
  const int64_t count = static_cast<int64_t>(runs.size());
  runs.push_back(&*from + (to - from));
  at::parallel_for(0, count, row_grain(width), [&](int64_t begin, int64_t end) {
    std::vector<S> row(width), sum(width);
    for (int64_t run = begin; run < end; ++run) {
      std::fill(sum.begin(), sum.end(), S(0));
      S bias = 0;
      for (const auto* e = runs[run]; e != runs[run + 1]; ++e) {
        bias += e->value;
        if (dw == nullptr) continue;
        x.load(e->row, 0, width, row.data());
        add_scaled(sum.data(), row.data(), e->value, width);
      }
      const int64_t at = runs[run]->id - first;
      if (dw != nullptr) add_scaled(dw + at * dw_stride, sum.data(), scale, width);
      if (db != nullptr) db[at] += bias;
    }
  });
}

#define LOSSOPS_INSTANTIATE(S)                                                               \
  template std::vector<TargetEntry<S>> target_entries(const Chain<S>&);                      \
  template S target_gradient(const Chain<S>&, int64_t, int64_t);                             \
  template void add_targets_to_rows(const Chain<S>&, const Operand&, Tensor&);               \
  template void add_targets_to_classes(const std::vector<TargetEntry<S>>&, int64_t, int64_t, \
                                       const Operand&, S, int64_t, S*, int64_t, S*);
LOSSOPS_INSTANTIATE(float)
LOSSOPS_INSTANTIATE(double)

}  // namespace lossops
