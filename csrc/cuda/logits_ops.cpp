// torch ops of the kernels on logits; lossops/cuda.py calls them and allocates what they fill.
#include <vector>

#include "cuda/logits.h"
#include "cuda/logits_args.h"
#include "cuda/tensors.h"
#include "row.h"

namespace lossops {
namespace {

using Numbers = std::vector<double>;
using MaybeTensors = std::vector<MaybeTensor>;

void statistics(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b, double softcap,
                const MaybeTensor& target, const MaybeTensor& class_vector,
                const MaybeTensor& teacher, int64_t kept, const Numbers& temperatures,
                const Numbers& limits, int64_t parts, const MaybeTensor& states,
                const Tensor& values, const Tensor& numbers, const MaybeTensor& at_target) {
  StatisticsCall call;
  call.logits = logits_of(r, scale, b, softcap);
  call.sides = sides_of(r, target, class_vector, teacher);
  call.log_sums.count = static_cast<int>(temperatures.size());
  STD_TORCH_CHECK(limits.size() == temperatures.size(), temperatures.size(), " temperatures and ",
                  limits.size(), " limits");
  STD_TORCH_CHECK(call.log_sums.count <= kMostLogSums, "at most ", kMostLogSums, " log-sums, got ",
                  temperatures.size());
  STD_TORCH_CHECK(0 <= kept && kept < 2 * keep::kFourLogSums, "no statistics are kept as ", kept);
  const int room = kept & keep::kFourLogSums ? kMostLogSums : kept & keep::kOneLogSum ? 1 : 0;
  STD_TORCH_CHECK(call.log_sums.count <= room, call.log_sums.count, " log-sums, room is kept for ",
                  room);
  for (int k = 0; k < call.log_sums.count; ++k) {
    call.log_sums.temperature[k] = static_cast<float>(temperatures[k]);
    call.log_sums.limit[k] = static_cast<float>(limits[k]);
  }
  call.kept = static_cast<unsigned>(kept);
  call.parts = checked_parts(parts);
  call.states = floats("states", states);
  if (parts > 1) {
    const int64_t words = parts * state_words(call.logits.dtype, call.kept) * r.size(0);
    STD_TORCH_CHECK(states.has_value() && states->numel() >= words, "states must have ", words,
                    " elements");
  }
  call.values = floats("values", values);
  call.ids = ids("ids", numbers);
  call.at_target = floats("at_target", at_target, r.size(0) * call.sides.num_targets);
  check_rows("values", values, kValueRows + call.log_sums.count, r.size(0));
  check_rows("ids", numbers, 3, r.size(0));
  check_devices(r, scale, b, target, class_vector, teacher, states, values, numbers, at_target);
  const OnDevice device(r);
  logits_statistics(call, device.stream());
  check_launch("logits_statistics");
}

GradientCall gradient_call(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b,
                           double softcap, const MaybeTensor& target,
                           const MaybeTensor& class_vector, const MaybeTensor& teacher,
                           const MaybeTensors& statistics, const MaybeTensors& coefficients,
                           const Numbers& temperatures, const Numbers& limits,
                           const MaybeTensors& log_statistics, const MaybeTensors& log_coefficients,
                           int64_t first_class, int64_t num_classes) {
  STD_TORCH_CHECK(statistics.size() == 8 && coefficients.size() == 12,
                  "8 statistics and 12 coefficients, got ", statistics.size(), " and ",
                  coefficients.size());
  GradientCall call;
  call.logits = logits_of(r, scale, b, softcap);
  call.sides = sides_of(r, target, class_vector, teacher);
  auto s = [&](int k) { return floats("a statistic", statistics[k], r.size(0)); };
  auto c = [&](int k) { return floats("a coefficient", coefficients[k], r.size(0)); };
  call.rows = {.shift = s(0),
               .lse = s(1),
               .mean = s(2),
               .variance = s(3),
               .average = s(4),
               .c_lse = c(0),
               .c_mean = c(1),
               .c_variance = c(2),
               .c_softplus = c(3),
               .c_stable = c(4),
               .c_average = c(5),
               .c_moment = c(6),
               .c_vector = c(7),
               .c_teacher = c(8),
               .extreme = {},
               .c_extreme = {}};
  for (int k = 0; k < 3; ++k) {
    check_size("the id of an extreme", statistics[5 + k], r.size(0));
    call.rows.extreme[k] = ids("the id of an extreme", statistics[5 + k]);
    call.rows.c_extreme[k] = c(9 + k);
    STD_TORCH_CHECK(!coefficients[9 + k].has_value() || statistics[5 + k].has_value(),
                    "an extreme with a coefficient needs its id");
  }
  static constexpr unsigned kTerms[] = {kSoftmax, kEntropy, kVariance, kSoftplus, kStable,
                                        kAverage, kMoment,  kVector,   kTeacher};
  call.terms = 0;
  for (int k = 0; k < 9; ++k) call.terms |= coefficients[k].has_value() ? kTerms[k] : 0;
  const size_t sums = temperatures.size();
  STD_TORCH_CHECK(
      limits.size() == sums && log_statistics.size() == sums && log_coefficients.size() == sums,
      "one limit, log-sum and coefficient for each temperature, got ", limits.size(), ", ",
      log_statistics.size(), ", ", log_coefficients.size(), " for ", sums);
  for (size_t k = 0; k < sums; ++k) {
    if (!log_coefficients[k].has_value()) continue;
    const int at = call.log_sums.count++;
    STD_TORCH_CHECK(at < kMostSlopes, "at most ", kMostSlopes, " log-sums with a coefficient");
    STD_TORCH_CHECK(log_statistics[k].has_value(), "a log-sum with a coefficient is missing");
    call.log_sums.temperature[at] = static_cast<float>(temperatures[k]);
    call.log_sums.limit[at] = static_cast<float>(limits[k]);
    call.log_sums.lse[at] = floats("a log-sum", log_statistics[k], r.size(0));
    call.log_sums.coefficient[at] = floats("a coefficient", log_coefficients[k], r.size(0));
  }
  check_devices(r, scale, b, target, class_vector, teacher);
  for (const auto* some : {&statistics, &coefficients, &log_statistics, &log_coefficients}) {
    check_devices_of(r, *some);
  }
  STD_TORCH_CHECK(statistics[0].has_value(), "a gradient needs the shift of its rows");
  STD_TORCH_CHECK(!(call.terms & kTeacher) || teacher.has_value(), "no teacher");
  call.first_class = first_class;
  call.num_classes = num_classes;
  call.at_target = nullptr;
  call.unit = nullptr;
  call.out = nullptr;
  call.parts = 1;
  return call;
}

void gradient(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b, double softcap,
              const MaybeTensor& target, const MaybeTensor& class_vector,
              const MaybeTensor& teacher, const MaybeTensors& statistics,
              const MaybeTensors& coefficients, const Numbers& temperatures, const Numbers& limits,
              const MaybeTensors& log_statistics, const MaybeTensors& log_coefficients,
              int64_t first_class, int64_t num_classes, const MaybeTensor& at_target,
              const MaybeTensor& unit, int64_t parts, const Tensor& out) {
  GradientCall call = gradient_call(r, scale, b, softcap, target, class_vector, teacher, statistics,
                                    coefficients, temperatures, limits, log_statistics,
                                    log_coefficients, first_class, num_classes);
  check_rows("out", out, r.size(0), r.size(1));
  call.at_target = floats("at_target", at_target, r.size(0) * call.sides.num_targets);
  call.unit = floats("unit", unit, 1);
  call.out = out.data_ptr();
  call.out_dtype = dtype_of("out", out);
  call.out_stride = out.stride(0);
  call.parts = checked_parts(parts);
  STD_TORCH_CHECK(
      call.logits.dtype == call.out_dtype || (call.logits.dtype == Dtype::kFloat && parts == 1),
      "out must have the dtype of r, or be half precision of float32 in one part");
  check_devices(r, at_target, unit, out);
  const OnDevice device(r);
  logits_gradient(call, device.stream());
  check_launch("logits_gradient");
}

void check_kernels(int64_t device) {
  const OnDevice on(static_cast<int32_t>(device));
  const cudaError_t error = why_no_kernels();
  STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error));
}

void columns(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b, double softcap,
             const MaybeTensor& target, const MaybeTensor& class_vector, const MaybeTensor& teacher,
             const MaybeTensors& statistics, const MaybeTensors& coefficients,
             const Numbers& temperatures, const Numbers& limits, const MaybeTensors& log_statistics,
             const MaybeTensors& log_coefficients, int64_t first_class, int64_t num_classes,
             bool accumulate, int64_t parts, const Tensor& db) {
  STD_TORCH_CHECK(r.scalar_type() == ScalarType::Float, "products must be float32");
  const ColumnsCall call{gradient_call(r, scale, b, softcap, target, class_vector, teacher,
                                       statistics, coefficients, temperatures, limits,
                                       log_statistics, log_coefficients, first_class, num_classes),
                         floats("db", db, parts * r.size(1)), accumulate, checked_parts(parts)};
  check_devices(r, db);
  const OnDevice device(r);
  column_sums(call, device.stream());
  check_launch("column_sums");
}

}  // namespace
}  // namespace lossops

#define LOGITS "Tensor r, Tensor? scale, Tensor? b, float softcap"
#define SIDES "Tensor? target, Tensor? class_vector, Tensor? teacher"
#define SLOPES                                                                           \
  "Tensor?[] statistics, Tensor?[] coefficients, float[] temperatures, float[] limits, " \
  "Tensor?[] log_statistics, Tensor?[] log_coefficients, int first_class, int num_classes"

STABLE_TORCH_LIBRARY_FRAGMENT(lossops_cuda, m) {
  m.def("logits_statistics(" LOGITS ", " SIDES
        ", int kept, float[] temperatures, float[] limits, int parts, Tensor(a!)? states, "
        "Tensor(b!) values, Tensor(c!) ids, Tensor(d!)? at_target) -> ()");
  m.def("logits_gradient(" LOGITS ", " SIDES ", " SLOPES
        ", Tensor? at_target, Tensor? unit, int parts, Tensor(a!) out) -> ()");
  m.def("column_sums(" LOGITS ", " SIDES ", " SLOPES
        ", bool accumulate, int parts, Tensor(a!) db) -> ()");
  m.def("check_kernels(int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lossops_cuda, LOSSOPS_DEVICE, m) {
  m.impl("logits_statistics", TORCH_BOX(&lossops::statistics));
  m.impl("logits_gradient", TORCH_BOX(&lossops::gradient));
  m.impl("column_sums", TORCH_BOX(&lossops::columns));
}

// It takes no tensor that would tell the dispatcher where to go.
STABLE_TORCH_LIBRARY_IMPL(lossops_cuda, CompositeExplicitAutograd, m) {
  m.impl("check_kernels", TORCH_BOX(&lossops::check_kernels));
}
