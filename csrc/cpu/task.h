// What a call asks for: its statistics by name, their tensors, and its operands beside the logits.
// Cost: nothing per logit. The order of names and outputs is that of lossops/statistics.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/lanes.h"

namespace lossops {

using at::Tensor;
using Names = std::vector<std::string>;
using MaybeTensor = std::optional<Tensor>;

// A matrix in memory of any floating dtype and any strides, read and written by parts of rows.
struct Operand {
  void* data = nullptr;
  at::ScalarType dtype = at::kFloat;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  Operand() = default;
  explicit Operand(const Tensor& matrix);
  explicit operator bool() const { return data != nullptr; }

  template <typename S>
  void load(int64_t row, int64_t column, int64_t n, S* to) const;
  template <typename S>
  void store(int64_t row, int64_t column, int64_t n, const S* from) const;
};

// One pointer per output of the table, null where a call does not have it. Serves the statistics
// that are written, those that are read back, and their coefficients.
template <typename S>
struct Fields {
  S *shift{}, *target{}, *lse{}, *mean{}, *variance{}, *max{}, *runner_up{}, *below_target{};
  S *average{}, *moment{}, *softplus{}, *stable_sum{}, *weighted_sum{}, *teacher{};
  int64_t *argmax{}, *runner_up_index{}, *below_target_index{};
  std::vector<S*> log_sums;
  std::vector<Tensor> owners;  // keeps copies that had to be made alive

  Fields(const Names& names, const std::vector<MaybeTensor>& tensors);
};

// The statistics of `names`, not yet filled but for `target`, which is -inf where there is none.
std::vector<Tensor> allocate_statistics(const Names& names, int64_t rows, const MaybeTensor& target,
                                        const at::TensorOptions& options);

// log Σ e^{t f(z)}, f(z) = z up to the limit, 0 above.
template <typename S>
struct LogSum {
  S temperature, limit;

  bool filters() const { return limit < kInf<S>; }
  // Where the sum's shift lies for a row of this shift, the largest negative: no f(z) is above it.
  double shift(double largest) const {
    return filters() ? std::min(largest, std::max<double>(limit, 0)) : largest;
  }
};

// The call's operands in the form the row passes read.
template <typename S>
struct Task {
  int64_t rows, classes;
  int64_t targets = 0;  // K
  Tensor target_ids, bias_values, vector_values;
  const S* bias = nullptr;          // (V,)
  const S* class_vector = nullptr;  // (V,)
  Operand teacher;                  // (N, V)
  S cap = 0;
  std::vector<LogSum<S>> log_sums;

  Task(int64_t rows, int64_t classes, const MaybeTensor& target, const MaybeTensor& class_vector,
       const MaybeTensor& teacher, const MaybeTensor& bias, double softcap, const Names& names);

  const int64_t* target_row(int64_t row) const {
    return target_ids.const_data_ptr<int64_t>() + row * targets;
  }

  // t a of the classes [first, first + n) of a row, into `to`; a is 1 without a class vector.
  void load_teacher(int64_t row, int64_t first, int64_t n, S* to) const;
};

// "lse@t" or "lse<t"
bool is_log_sum(const std::string& name);

inline bool contains(const Names& names, const char* name) {
  for (const auto& n : names) {
    if (n == name) return true;
  }
  return false;
}

// A grain for at::parallel_for over rows that each cost `width` elements: some 50 us. On a busy
// machine a thread that waits for another can lose a time slice, thousands of these.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 131072 / (width + 1)); }

}  // namespace lossops
