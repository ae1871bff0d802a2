// dr and its sums over rows: in place, half precision over its products, into another matrix, each
// with softmax alone and with every term.
#include <deque>

#include "operands.h"

using namespace lossops;
using program::Buffer;
using program::expect_near;
using program::kDtype;
using program::Operands;
using program::Shape;

// Classes before those of a call, and all.
constexpr int64_t kFirst = 7, kAll = 1500;

// A call with numbers of its own for each statistic and coefficient.
template <typename T>
class Case : public Operands<T> {
 public:
  Case(const Shape& shape, bool plain)
      : Operands<T>(shape, kFirst), rows_(shape.rows), wide_(shape.rows * shape.targets) {
    GradientRows& rows = call.rows;
    for (auto field : {&GradientRows::shift, &GradientRows::lse, &GradientRows::mean,
                       &GradientRows::variance, &GradientRows::average, &GradientRows::c_lse,
                       &GradientRows::c_mean, &GradientRows::c_variance, &GradientRows::c_softplus,
                       &GradientRows::c_stable, &GradientRows::c_average, &GradientRows::c_moment,
                       &GradientRows::c_vector, &GradientRows::c_teacher}) {
      rows.*field = normal(rows_);
    }
    for (float& shift : floats_[0]) shift += 6;                  // dr in half precision is finite
    if (rows_ > 1) const_cast<float*>(rows.lse)[1] = -INFINITY;  // no negatives
    call.logits = this->logits;
    call.sides = this->sides;
    call.terms = plain ? kSoftmax | kAverage : 1023u & ~kLogSums;
    if (!plain) {
      call.log_sums = {2, {0.5f, 1.0f}, {INFINITY, -0.5f}, {}, {}};
      for (int k = 0; k < 2; ++k) {
        call.log_sums.lse[k] = normal(rows_), call.log_sums.coefficient[k] = normal(rows_);
      }
      for (int k = 0; k < 3; ++k) {
        Buffer<int64_t>& ids = ids_.emplace_back(rows_);
        program::fill_ids(ids, shape.classes + 1);
        for (int64_t& id : ids) id += kFirst;
        call.rows.extreme[k] = ids.data(), call.rows.c_extreme[k] = normal(rows_);
      }
      call.at_target = normal(wide_), call.unit = normal(1);
    }
    call.first_class = kFirst;
    call.num_classes = kAll;
    call.parts = 1;
  }

  // dr in double, in the order of row.h.
  double expected(int64_t i, int64_t j) {
    const GradientRows& rows = call.rows;
    const double z = this->z(i, j), unit = call.unit == nullptr ? 1 : *call.unit;
    const int k = this->target(i, kFirst + j);
    if (k >= 0) {
      return call.at_target == nullptr ? 0 : unit * call.at_target[i * call.sides.num_targets + k];
    }
    const auto base = [](double lse) { return lse == -INFINITY ? 0 : lse; };
    const double a = call.sides.class_vector == nullptr ? 1 : this->class_vector[j];
    const double t = call.sides.teacher == nullptr ? 0 : a * to_float(this->teacher(i, j));
    const RowBasis<double> basis = {rows.shift[i],
                                    base(rows.lse[i]),
                                    rows.mean[i],
                                    rows.variance[i],
                                    rows.average[i],
                                    rows.c_lse[i],
                                    rows.c_mean[i],
                                    rows.c_variance[i],
                                    rows.c_softplus[i],
                                    rows.c_stable[i],
                                    rows.c_vector[i],
                                    rows.c_teacher[i],
                                    rows.c_average[i] / double(kAll),
                                    2.0 * rows.c_moment[i]};
    double dz = basis.negative(call.terms, z, a, t);
    for (int s = 0; s < call.log_sums.count; ++s) {
      const double temperature = call.log_sums.temperature[s];
      const double power = temperature * (z - rows.shift[i]) - base(call.log_sums.lse[s][i]);
      if (z <= call.log_sums.limit[s]) {
        dz += temperature * call.log_sums.coefficient[s][i] * std::exp(power);
      }
    }
    for (int e = 0; e < 3; ++e) {
      if (rows.c_extreme[e] != nullptr && rows.extreme[e][i] == kFirst + j) {
        dz += rows.c_extreme[e][i];
      }
    }
    const double softcap = call.logits.softcap;
    return unit * (softcap == 0 ? dz : dz * softcap_slope(z, softcap));
  }

  GradientCall call{};

 private:
  float* normal(int64_t n) {
    Buffer<float>& buffer = floats_.emplace_back(n);
    fill_normal(buffer);
    return buffer.data();
  }

  int64_t rows_, wide_;
  std::deque<Buffer<float>> floats_;
  std::deque<Buffer<int64_t>> ids_;
};

template <typename T, typename Out>
void compare(Case<T>& a) {
  const GradientCall& call = a.call;
  logits_gradient(call, nullptr);
  const Out* out = static_cast<const Out*>(call.out);
  constexpr double kEps = sizeof(Out) == 4 ? 2e-5 : kDtype<Out> == Dtype::kHalf ? 1e-3 : 8e-3;
  for (int64_t i = 0; i < call.logits.rows; ++i) {
    for (int j = 0; j < call.logits.classes; ++j) {
      expect_near("dr", to_float(out[i * call.out_stride + j]), a.expected(i, j), kEps);
    }
  }
}

// Into the products' memory, of which half precision takes half.
template <typename T, typename Out>
void check_in_place(const Shape& shape, bool plain, int parts = 1) {
  Case<T> a(shape, plain);
  a.call.out = a.r.data(), a.call.out_dtype = kDtype<Out>;
  a.call.out_stride = a.r.stride * (sizeof(T) / sizeof(Out)), a.call.parts = parts;
  compare<T, Out>(a);
}

template <typename T, typename Out>
void check_apart(const Shape& shape, int64_t skip, int64_t gap, bool plain, int parts = 1) {
  Case<T> a(shape, plain);
  program::Matrix<Out> out(shape.rows, shape.classes, skip, gap);
  a.call.out = out.data(), a.call.out_dtype = kDtype<Out>, a.call.out_stride = out.stride;
  a.call.parts = parts;
  if (parts > 1) a.call.sides.class_vector = nullptr;
  compare<T, Out>(a);
}

void check_columns(const Shape& shape, bool plain, bool accumulate) {
  Case<float> a(shape, plain);
  Buffer<float> db(shape.classes, 3.0f);
  column_sums({a.call, db.data(), accumulate}, nullptr);
  for (int j = 0; j < shape.classes; ++j) {
    double sum = accumulate ? 3 : 0, size = 1;
    for (int64_t i = 0; i < shape.rows; ++i) {
      sum += a.expected(i, j), size += std::abs(a.expected(i, j));
    }
    expect_near("db", db[j], sum, 1e-5 * size);
  }
}

void check(unsigned, const std::string&) {
  for (const bool plain : {false, true}) {
    // Every place in 16 bytes, of the products and of dr.
    for (int64_t skip = 0; skip < 8; ++skip) {
      const int classes = 24 + int(skip) % 5;
      const Shape shape = {3, classes, skip, 9 - skip, 2, skip % 2 == 0 ? 0.0f : -0.7f};
      check_in_place<float, float>(shape, plain);
      check_in_place<__half, __half>(shape, plain);
      check_in_place<float, __nv_bfloat16>(shape, plain);
      check_apart<float, float>(shape, skip / 2, skip, plain);
      check_apart<float, __half>(shape, skip, 1, plain);
      check_apart<__nv_bfloat16, __nv_bfloat16>(shape, 8 - skip, 3, plain);
    }
    // Several vectors a thread at once, of which only the first is ragged.
    check_in_place<float, float>({2, 509, 1, 3}, plain);
    // Blocks of several warps; several tiles a thread, packed and not; several parts.
    check_in_place<float, float>({2, 300, 1, 0, 1, 1.5f}, plain);
    check_in_place<float, __half>({2, 1100, 3, 2}, plain);
    check_in_place<float, __nv_bfloat16>({2, 5000, 0, 0}, plain);
    check_in_place<__nv_bfloat16, __nv_bfloat16>({2, 1100, 1, 0}, plain, 3);
    check_apart<float, float>({2, 600, 1, 1}, 2, 0, plain, 3);
    check_in_place<float, __half>({5, 21, 3, program::kFar}, plain);
    check_apart<float, float>({5, 21, 1, program::kFar}, 0, program::kFar, plain);
    // One class; one row; more rows than a block has; no targets.
    check_in_place<float, __half>({4, 1, 3, 1}, plain);
    check_in_place<__half, __half>({1, 70, 5, 0, 3}, plain, 5);
    check_in_place<float, float>({11, 9, 2, 1, 0, 0.5f}, plain);

    check_columns({19, 131, 1, 2, 2, -0.7f}, plain, true);
    check_columns({3, 256, 0, 0, 0}, plain, false);
    check_columns({5, 1, 3, program::kFar}, plain, false);
  }
}
