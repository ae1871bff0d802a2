// Losses over pairs: sums of rows and dz, over the products and packed to half of them; log-sums of
// columns.
#include "cuda/pairs.h"

#include "operands.h"

using namespace lossops;
using program::Buffer;
using program::expect_near;
using program::kDtype;
using program::Operands;
using program::Shape;

Addend<double> addend(const BinaryCall& call, double z) {
  const double p = call.p, q = call.q;
  switch (call.kind) {
    case Binary::kSigmoid:
      return SigmoidTerm<double>()(z);
    case Binary::kHinge:
      return HingeTerm<double>{p}(z);
    case Binary::kGumbel:
      return GumbelTerm<double>{p}(z);
    default:
      return AsymmetricTerm<double>{p, q, call.detached}(z);
  }
}

// dz lies where the products were, in half of their memory where it is half as large.
template <typename Out>
int64_t stride_of(const Operands<float>& a) {
  return a.r.stride * int64_t(sizeof(float) / sizeof(Out));
}

// f(found, i, j) for every dz.
template <typename Out, typename F>
void each_dz(Operands<float>& a, F f) {
  const Out* out = reinterpret_cast<const Out*>(a.r.data());
  for (int64_t i = 0; i < a.r.rows; ++i) {
    for (int64_t j = 0; j < a.r.columns; ++j) {
      f(to_float(out[i * stride_of<Out>(a) + j]), i, j);
    }
  }
}

template <typename Out>
constexpr double kEps = sizeof(Out) == 4 ? 1e-5 : 8e-3;

// Without `out`, the sums alone.
template <typename Out>
void check_binary(Binary kind, bool out, const Shape& shape, float p, float q = 0,
                  bool detached = false) {
  Operands<float> a(shape);
  if (!out) a.sides.class_vector = nullptr;
  Buffer<float> factor(shape.rows), sums(shape.rows);
  fill_normal(factor);
  const BinaryCall call{.logits = a.logits,
                        .sides = a.sides,
                        .kind = kind,
                        .p = p,
                        .q = q,
                        .detached = detached,
                        .factor = out ? factor.data() : nullptr,
                        .sums = sums.data(),
                        .out = out ? a.r.data() : nullptr,
                        .out_dtype = kDtype<Out>,
                        .out_stride = stride_of<Out>(a)};
  binary(call, nullptr);
  for (int64_t i = 0; i < shape.rows; ++i) {
    double sum = 0, size = 1;
    for (int j = 0; j < shape.classes; ++j) {
      if (a.target(i, j) >= 0) continue;
      const double added = (out ? a.class_vector[j] : 1.0) * addend(call, a.z(i, j)).value;
      sum += added, size += std::abs(added);
    }
    expect_near("a sum", sums[i], sum, 1e-5 * size);
  }
  if (!out) return;
  each_dz<Out>(a, [&](double found, int64_t i, int64_t j) {
    const double dz = factor[i] * a.class_vector[j] * addend(call, a.z(i, j)).slope;
    expect_near("dz", found, a.target(i, j) >= 0 ? 0 : dz, kEps<Out>);
  });
}

void check_columns(const Shape& shape) {
  Operands<float> a(shape);
  Buffer<float> shift(shape.classes), lse(shape.classes);
  pair_columns({a.logits, a.sides, shift.data(), lse.data()}, nullptr);
  for (int j = 0; j < shape.classes; ++j) {
    double largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < shape.rows; ++i) {
      if (a.target(i, j) >= 0) continue;
      largest = std::max(largest, a.z(i, j)), sum += std::exp(a.z(i, j));
    }
    expect_near("shift", shift[j], sum == 0 ? 0 : largest, 1e-5);
    expect_near("lse", shift[j] + lse[j], std::log(sum), 1e-5);
  }
}

template <typename Out>
void check_gradient(const Shape& shape, bool by_row, bool by_column) {
  Operands<float> a(shape);
  const int64_t n = shape.rows, v = shape.classes;
  Buffer<float> row_shift(n, 6.0f), row_lse(n), c_row(n);
  Buffer<float> column_shift(v, 6.0f), column_lse(v), c_column(v);
  for (auto buffer : {&row_lse, &c_row, &column_lse, &c_column}) fill_normal(*buffer);
  row_lse[0] = column_lse[0] = -INFINITY;  // no negatives
  pair_gradient({a.logits, a.sides, row_shift.data(), row_lse.data(),
                 by_row ? c_row.data() : nullptr, column_shift.data(), column_lse.data(),
                 by_column ? c_column.data() : nullptr, a.r.data(), kDtype<Out>, stride_of<Out>(a)},
                nullptr);
  each_dz<Out>(a, [&](double found, int64_t i, int64_t j) {
    const auto q = [&](float shift, float lse) {
      return std::exp(a.z(i, j) - shift - (lse == -INFINITY ? 0 : lse));
    };
    double dz = by_row ? c_row[i] * q(row_shift[i], row_lse[i]) : 0;
    if (by_column) dz += c_column[j] * q(column_shift[j], column_lse[j]);
    expect_near("dz", found, a.target(i, j) >= 0 ? 0 : dz, kEps<Out>);
  });
}

template <typename Out>
void check_all(const Shape& shape) {
  for (const bool out : {false, true}) {
    check_binary<Out>(Binary::kSigmoid, out, shape, 0);
    check_binary<Out>(Binary::kHinge, out, shape, -0.3f);
    check_binary<Out>(Binary::kGumbel, out, shape, 6.0f);
    check_binary<Out>(Binary::kAsymmetric, out, shape, 2.0f, 0.05f);
    check_binary<Out>(Binary::kAsymmetric, out, shape, 1.5f, 0.0f, true);
    check_gradient<Out>(shape, out, true);
  }
  check_gradient<Out>(shape, true, false);
}

void check(unsigned, const std::string&) {
  // Every place in 16 bytes, where a warp has a row.
  for (int64_t skip = 0; skip < 4; ++skip) {
    const Shape shape = {3, 24 + int(skip), skip, 5 - skip, 2, skip % 2 == 0 ? 0.0f : -0.7f};
    check_all<float>(shape);
    check_all<__nv_bfloat16>(shape);
  }
  // A block of several warps; several tiles a thread; one class; no targets.
  for (const Shape& shape : {Shape{2, 602, 1, 1, 1, 1.5f}, Shape{1, 5000, 3}, Shape{2, 1, 2, 0, 1},
                             Shape{5, 9, 1, program::kFar}, Shape{1, 40, 0, 0, 0}}) {
    check_all<float>(shape);
    check_all<__nv_bfloat16>(shape);
  }
  check_columns({19, 131, 1, 2, 2, -0.7f});
  check_columns({3, 256, 0, 0, 0, 1.5f});
  check_columns({5, 1, 3, program::kFar});
}
