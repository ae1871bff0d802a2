#include "cpu/task.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdlib>
#include <string_view>

#include "cpu/passes.h"

namespace lossops {
namespace {

constexpr std::string_view kTemperature = "lse@", kFiltered = "lse<";

// Calls f with a null pointer of the C++ type of a floating dtype. Inlined since rows may be short:
// one of 128 takes some 30 ns.
template <typename F>
LOSSOPS_LANE void by_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    case at::kDouble:
      return f(static_cast<double*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    case at::kHalf:
      return f(static_cast<c10::Half*>(nullptr));
    default:
      TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16, got ", dtype,
                  "; convert the tensor first");
  }
}

template <typename S>
LogSum<S> log_sum(const std::string& name) {
  const S number = static_cast<S>(std::strtod(name.c_str() + kTemperature.size(), nullptr));
  if (name.starts_with(kFiltered)) return {S(1), number};
  return {number, kInf<S>};
}

// (outputs) of one canonical name, in order.
Names outputs(const std::string& name) {
  if (name == "entropy") return {"mean"};
  if (name == "max") return {"max", "argmax"};
  if (name == "runner_up" || name == "below_target") return {name, name + "_index"};
  if (name == "sum") return {"average"};
  if (name == "sumsq") return {"moment"};
  for (const char* same :
       {"target", "lse", "variance", "softplus", "stable_sum", "weighted_sum", "teacher"}) {
    if (name == same) return {name};
  }
  TORCH_CHECK(is_log_sum(name), "names must be canonical statistics, got '", name,
              "'; pass lossops.statistics.canonical(names)");
  return {name};
}

Names all_outputs(const Names& names) {
  Names all{"shift"};
  for (const auto& name : names) {
    for (auto& output : outputs(name)) all.push_back(std::move(output));
  }
  return all;
}

bool is_index(const std::string& output) {
  return output == "argmax" || output.ends_with("_index");
}

template <typename S>
S** field(Fields<S>& f, const std::string& output) {
  if (output == "shift") return &f.shift;
  if (output == "target") return &f.target;
  if (output == "lse") return &f.lse;
  if (output == "mean") return &f.mean;
  if (output == "variance") return &f.variance;
  if (output == "max") return &f.max;
  if (output == "runner_up") return &f.runner_up;
  if (output == "below_target") return &f.below_target;
  if (output == "average") return &f.average;
  if (output == "moment") return &f.moment;
  if (output == "softplus") return &f.softplus;
  if (output == "stable_sum") return &f.stable_sum;
  if (output == "weighted_sum") return &f.weighted_sum;
  if (output == "teacher") return &f.teacher;
  return &f.log_sums.emplace_back(nullptr);
}

template <typename S>
int64_t** index_field(Fields<S>& f, const std::string& output) {
  if (output == "argmax") return &f.argmax;
  return output == "runner_up_index" ? &f.runner_up_index : &f.below_target_index;
}

// A tensor as contiguous values of type S: itself, or a copy.
template <typename S>
Tensor dense(const Tensor& t) {
  return t.to(c10::CppTypeToScalarType<S>::value).contiguous();
}

}  // namespace

bool is_log_sum(const std::string& name) {
  return name.starts_with(kTemperature) || name.starts_with(kFiltered);
}

Operand::Operand(const Tensor& matrix)
    : data(const_cast<void*>(matrix.const_data_ptr())),
      dtype(matrix.scalar_type()),
      row_stride(matrix.stride(0)),
      column_stride(matrix.stride(1)) {}

template <typename S>
void Operand::load(int64_t row, int64_t column, int64_t n, S* to) const {
  by_dtype(dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(data) + row * row_stride;
    widen(from + column * column_stride, column_stride, n, to);
  });
}

template <typename S>
void Operand::store(int64_t row, int64_t column, int64_t n, const S* from) const {
  by_dtype(dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(data) + row * row_stride;
    narrow(from, column_stride, n, to + column * column_stride);
  });
}

template <typename S>
Fields<S>::Fields(const Names& names, const std::vector<MaybeTensor>& tensors) {
  const Names all = all_outputs(names);
  TORCH_CHECK(tensors.size() == all.size(), "expected one tensor for each of the ", all.size(),
              " outputs of names, got ", tensors.size());
  // `log_sums` must not move while pointers into it are handed out.
  log_sums.reserve(all.size());
  owners.reserve(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    if (is_index(all[i])) {
      if (!tensors[i] || !tensors[i]->defined()) continue;
      if (tensors[i]->scalar_type() != at::kLong) continue;  // the unused slot of a coefficient
      owners.push_back(tensors[i]->contiguous());
      *index_field(*this, all[i]) = owners.back().template data_ptr<int64_t>();
      continue;
    }
    S** slot = field(*this, all[i]);
    if (!tensors[i] || !tensors[i]->defined()) continue;
    owners.push_back(dense<S>(*tensors[i]));
    *slot = owners.back().template data_ptr<S>();
  }
}

std::vector<Tensor> allocate_statistics(const Names& names, int64_t rows, const MaybeTensor& target,
                                        const at::TensorOptions& options) {
  std::vector<Tensor> tensors;
  for (const auto& output : all_outputs(names)) {
    if (output == "target") {
      TORCH_CHECK(target.has_value(), "statistic 'target' needs target (N, K), got None");
      tensors.push_back(at::full({rows, target->size(1)}, -kInf<double>, options));
    } else {
      tensors.push_back(at::empty({rows}, is_index(output) ? options.dtype(at::kLong) : options));
    }
  }
  return tensors;
}

template <typename S>
Task<S>::Task(int64_t rows_, int64_t classes_, const MaybeTensor& target, const MaybeTensor& vector,
              const MaybeTensor& teacher_, const MaybeTensor& b, double softcap, const Names& names)
    : rows(rows_), classes(classes_), cap(static_cast<S>(softcap)) {
  if (target) {
    TORCH_CHECK(target->dim() == 2 && target->size(0) == rows && target->scalar_type() == at::kLong,
                "target must be int64 of shape (", rows, ", K), got ", target->scalar_type(), " ",
                target->sizes());
    target_ids = target->contiguous();
    targets = target->size(1);
  }
  if (vector) {
    TORCH_CHECK(vector->dim() == 1 && vector->size(0) == classes, "class_vector must have shape (",
                classes, ",), got ", vector->sizes());
    vector_values = dense<S>(*vector);
    class_vector = vector_values.template const_data_ptr<S>();
  }
  if (teacher_) {
    TORCH_CHECK(teacher_->dim() == 2 && teacher_->size(0) == rows && teacher_->size(1) == classes,
                "teacher must have shape (", rows, ", ", classes, "), got ", teacher_->sizes());
    if (teacher_->numel()) teacher = Operand(*teacher_);
  }
  if (b) {
    bias_values = dense<S>(*b);
    bias = bias_values.template const_data_ptr<S>();
  }
  for (const auto& name : names) {
    if (is_log_sum(name)) log_sums.push_back(log_sum<S>(name));
  }
  TORCH_CHECK(target || !contains(names, "below_target"),
              "statistic 'below_target' needs target (N, K), got None");
  TORCH_CHECK(vector || !contains(names, "weighted_sum"),
              "statistic 'weighted_sum' needs class_vector (V,), got None");
  TORCH_CHECK(teacher_ || !contains(names, "teacher"),
              "statistic 'teacher' needs teacher (N, V), got None");
}

template <typename S>
void Task<S>::load_teacher(int64_t row, int64_t first, int64_t n, S* to) const {
  teacher.load(row, first, n, to);
  if (class_vector != nullptr) multiply(to, class_vector + first, n);
}

template struct Fields<float>;
template struct Fields<double>;
template struct Task<float>;
template struct Task<double>;
template void Operand::load<float>(int64_t, int64_t, int64_t, float*) const;
template void Operand::load<double>(int64_t, int64_t, int64_t, double*) const;
template void Operand::store<float>(int64_t, int64_t, int64_t, const float*) const;
template void Operand::store<double>(int64_t, int64_t, int64_t, const double*) const;

}  // namespace lossops
