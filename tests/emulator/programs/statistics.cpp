// Statistics of rows: every compiled set with a warp, a block and several blocks a row, and rows at
// every place in 16 bytes.
#include <algorithm>
#include <vector>

#include "operands.h"

using namespace lossops;
using program::expect;
using program::expect_near;
using program::kDtype;
using program::Operands;
using program::Shape;

// Temperatures, and limits of either sign.
constexpr LogSums kFour = {4, {0.5f, 2.0f, 1.0f, 1.0f}, {INFINITY, INFINITY, 1.0f, -1.0f}};

template <typename T>
void check_row(const StatisticsCall& call, Operands<T>& a, int64_t i) {
  const int64_t n = call.logits.rows;
  const int v = call.logits.classes;
  std::vector<int> negatives;
  for (int j = 0; j < v; ++j) {
    if (a.target(i, j) < 0) negatives.push_back(j);
  }
  std::stable_sort(negatives.begin(), negatives.end(),
                   [&](int j, int k) { return a.z(i, j) > a.z(i, k); });
  const double shift = negatives.empty() ? 0 : a.z(i, negatives[0]);

  // `size` is that of what is added up.
  const auto near = [&](const char* name, int row, double wanted, double size = 1) {
    expect_near(name, call.values[row * n + i], wanted, 1e-5 + 3e-7 * size);
  };
  const auto extreme = [&](const char* name, int k, int row, size_t rank) {
    const bool any = rank < negatives.size();
    near(name, row, any ? a.z(i, negatives[rank]) - shift : -INFINITY);
    const int64_t id = call.ids[k * n + i];
    expect(any ? a.z(i, id) == a.z(i, negatives[rank]) && a.target(i, id) < 0 : id == -1, name);
  };
  const auto keeps = [&](unsigned set) { return (call.kept & set) != 0; };

  near("shift", kShift, shift);
  double sum = 0, mean = 0, variance = 0, softplus_sum = 0, stable_sum = 0;
  for (int j : negatives) {
    const double rel = a.z(i, j) - shift;
    sum += std::exp(rel), mean += std::exp(rel) * rel;
    softplus_sum += softplus(a.z(i, j)), stable_sum += stable(a.z(i, j));
  }
  const double divisor = sum == 0 ? 1 : sum;
  mean /= divisor;
  for (int j : negatives) {
    const double rel = a.z(i, j) - shift;
    variance += std::exp(rel) * (rel - mean) * (rel - mean) / divisor;
  }
  if (keeps(keep::kLse)) near("lse", kLseRow, std::log(sum));
  if (keeps(keep::kEntropy)) near("mean", kMeanRow, mean);
  if (keeps(keep::kVariance)) near("variance", kVarianceRow, variance);
  if (keeps(keep::kSoftplus)) near("softplus", kSoftplusRow, softplus_sum);
  if (keeps(keep::kStableSum)) near("stable", kStableSumRow, stable_sum);

  if (keeps(keep::kMax)) extreme("max", 0, kMaxRow, 0);
  if (keeps(keep::kRunnerUp)) extreme("runner up", 1, kRunnerUpRow, 1);
  if (keeps(keep::kBelowTarget)) {
    const int64_t id = a.sides.num_targets > 0 ? a.targets[i * a.sides.num_targets] : -1;
    const double z = id < 0 ? -INFINITY : id < v ? a.z(i, id) : NAN;
    size_t rank = 0;
    while (rank < negatives.size() && !(a.z(i, negatives[rank]) < z)) ++rank;
    extreme("below target", 2, kBelowTargetRow, rank);
  }

  double total = 0, moment = 0, weighted = 0, taught = 0, size = 0;
  for (int j = 0; j < v; ++j) {
    const double rel = a.z(i, j) - shift, w = call.sides.class_vector ? a.class_vector[j] : 0;
    const double t = to_float(a.teacher(i, j)) * (call.sides.class_vector ? w : 1.0);
    total += rel;
    weighted += w * rel, taught += t * rel, size += std::abs(w * rel) + std::abs(t * rel);
  }
  for (int j = 0; j < v; ++j) moment += std::pow(a.z(i, j) - shift - total / v, 2);
  if (keeps(keep::kSum)) near("average", kAverageRow, total / v);
  if (keeps(keep::kSumsq)) near("moment", kMomentRow, moment);
  if (keeps(keep::kWeightedSum) && call.sides.class_vector)
    near("weighted sum", kWeightedSumRow, weighted, size);
  if (keeps(keep::kTeacher)) near("teacher", kTeacherRow, taught, size);

  for (int k = 0; k < call.log_sums.count; ++k) {
    const double t = call.log_sums.temperature[k], limit = call.log_sums.limit[k];
    double power = 0;
    for (int j : negatives) {
      power += std::exp(t * ((a.z(i, j) > limit ? 0 : a.z(i, j)) - shift));
    }
    near("a log-sum", kValueRows + k, std::log(power));
  }
  for (int k = 0; k < a.sides.num_targets; ++k) {
    const int64_t at = i * a.sides.num_targets + k, id = a.targets[at];
    const double z = id < 0 ? -INFINITY : id < v ? a.z(i, id) : NAN;
    expect_near("at a target", call.at_target[at], z, 1e-5);
  }
}

template <typename T>
void check_statistics(unsigned kept, const Shape& shape, int parts = 1, bool weighs = true) {
  Operands<T> a(shape);
  LogSums log_sums = kFour;
  log_sums.count = (kept & keep::kFourLogSums) ? 4 : (kept & keep::kOneLogSum) ? 1 : 0;
  const int64_t words = parts == 1 ? 0 : parts * state_words(kDtype<T>, kept);
  program::Buffer<float> states(words * shape.rows), at_target(shape.rows * shape.targets);
  program::Buffer<float> values((kValueRows + log_sums.count) * shape.rows);
  program::Buffer<int64_t> ids(3 * shape.rows);
  if (!weighs) a.sides.class_vector = nullptr;
  const StatisticsCall call = {a.logits,      a.sides,    log_sums,
                               kept,          parts,      states.data(),
                               values.data(), ids.data(), at_target.data()};
  logits_statistics(call, nullptr);
  for (int64_t i = 0; i < shape.rows; ++i) check_row(call, a, i);
}

void check(unsigned, const std::string&) {
  constexpr unsigned kEverything = 2 * keep::kFourLogSums - 1;
  // A statistic alone takes the smallest set that has it, and each set has one that asks for it.
  for (unsigned kept = 1; kept < kEverything; kept *= 2) {
    check_statistics<float>(kept, {3, 37, 1, 2, 2, -0.7f});
    check_statistics<float>(kept, {2, 530, 2, 1});
    check_statistics<float>(kept, {2, 1200, 3, 4}, 3);
  }
  for (unsigned kept : {unsigned{keep::kLse}, unsigned{keep::kSum}, kEverything}) {
    for (int64_t skip = 0; skip < 8; ++skip) {
      check_statistics<float>(kept, {2, 24 + int(skip) % 5, skip, 9 - skip});
      check_statistics<__half>(kept, {2, 40 + int(skip) % 5, skip, 9 - skip, 2});
      check_statistics<__nv_bfloat16>(kept, {2, 530, skip, 9 - skip, 3, 1.5f});
    }
    check_statistics<float>(kept, {2, 1200, 0, 0, 2}, 3, false);
    // Several vectors a thread at once, of which only the first is ragged; parts that end within.
    check_statistics<float>(kept, {2, 509, 1, 3});
    check_statistics<float>(kept, {1, 6404, 0, 0}, 2);
    check_statistics<float>(kept, {5, 21, 1, program::kFar});
    // More parts than vectors; one class, which may be the target; one row; more rows than warps.
    check_statistics<__half>(kept, {1, 33, 5, 0, 2, 1.0f}, 7);
    check_statistics<float>(kept, {5, 1, 3, 2});
    check_statistics<__half>(kept, {17, 9, 1, 1, 0});
  }
}
