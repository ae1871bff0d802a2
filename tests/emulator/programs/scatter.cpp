// Sums by class and what is made of them: runs of one pair, of a few, and longer than a block.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda/rows.h"
#include "program.h"

using namespace lossops;
using program::Buffer;
using program::expect_near;
using program::kDtype;
using program::Matrix;
using program::Places;

template <typename T>
Rows rows_of(Matrix<T>& matrix) {
  return {matrix.data(), matrix.stride};
}

// Pairs (row, class) sorted by class, and their sums in double.
template <typename T>
struct Case {
  static constexpr int64_t kClasses = 6;
  int64_t count, per_row;
  int width;
  Matrix<T> rows;
  Buffer<int64_t> target, ids, order;
  Buffer<float> value, scale;
  std::vector<double> sums, values;  // (classes, width), (classes,)
  std::vector<bool> touched;

  // Class 2 has most of the pairs; some have no class.
  Case(int64_t count, int64_t per_row, int width, Places& places, bool weighs)
      : count(count),
        per_row(per_row),
        width(width),
        rows(places.matrix<T>(count / per_row, width)),
        target(count),
        ids(count),
        order(count),
        value(count, 1.0f),
        scale(1, 1.0f),
        sums(kClasses * width),
        values(kClasses),
        touched(kClasses) {
    fill_normal(rows);
    if (weighs) fill_normal(value);
    if (weighs) scale[0] = 0.7f;
    program::fill_ids(target, 3 * kClasses);
    for (int64_t& id : target) id = id > kClasses ? 2 : id == kClasses ? -1 : id;
    target[count / 2] = kClasses;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return target[a] < target[b]; });
    for (int64_t p = 0; p < count; ++p) {
      ids[p] = target[order[p]];
      if (ids[p] < 0 || ids[p] >= kClasses) continue;
      touched[ids[p]] = true;
      values[ids[p]] += value[order[p]];
      for (int64_t k = 0; k < width; ++k) {
        sums[ids[p] * width + k] +=
            double(value[order[p]]) * scale[0] * to_float(rows(order[p] / per_row, k));
      }
    }
  }

  Pairs pairs(bool weighs) {
    return {kDtype<T>,
            count,
            per_row,
            kClasses,
            width,
            rows_of(rows),
            ids.data(),
            order.data(),
            weighs ? value.data() : nullptr,
            weighs ? scale.data() : nullptr};
  }
};

template <typename T>
void check_targets(int64_t count, int64_t per_row, int width, Places places = {}) {
  Case<T> a(count, per_row, width, places, true);
  constexpr int64_t kClasses = Case<T>::kClasses;
  const int64_t n = count / per_row;
  auto dw = places.matrix<float>(kClasses, width, 1.0f), dx = places.matrix<float>(n, width, 3.0f);
  auto w = places.matrix<T>(kClasses, width);
  Buffer<float> db(kClasses, 2.0f);
  fill_normal(w);
  add_to_classes(a.pairs(true), rows_of(dw), db.data(), nullptr);
  add_to_rows({kDtype<T>, n, per_row, kClasses, width, rows_of(w), rows_of(dx), a.target.data(),
               a.value.data()},
              nullptr);
  for (int64_t j = 0; j < kClasses; ++j) {
    expect_near("db", db[j], 2 + a.values[j], 1e-4);
    for (int64_t k = 0; k < width; ++k) {
      expect_near("dw", dw(j, k), 1 + a.sums[j * width + k], 1e-4);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < width; ++k) {
      double sum = 3;
      for (int64_t p = i * per_row; p < (i + 1) * per_row; ++p) {
        const int64_t id = a.target[p];
        if (id >= 0 && id < kClasses) sum += double(a.value[p]) * to_float(w(id, k));
      }
      expect_near("dx", dx(i, k), sum, 1e-4);
    }
  }
  // db alone
  Buffer<float> alone(kClasses, 2.0f);
  Pairs pairs = a.pairs(true);
  pairs.width = 0;
  add_to_classes(pairs, {}, alone.data(), nullptr);
  for (int64_t j = 0; j < kClasses; ++j) expect_near("db alone", alone[j], db[j], 0);
}

template <typename T>
void check_tables(int64_t count, int width, Places places = {}) {
  Case<T> a(count, 1, width, places, false);
  constexpr int64_t kClasses = Case<T>::kClasses;
  const double eps = sizeof(T) == 4 ? 1e-4 : 5e-2;
  const auto table = [&] { return places.matrix<T>(kClasses, width, from_float<T>(0.5f)); };
  auto sums = table(), w = table(), v = table(), w2 = table(), m2 = table(), v2 = table();
  Buffer<int32_t> steps(kClasses, 2);
  const SgdUpdate<double> sgd(0.1, 0.9, 0.01);
  const AdamwUpdate<double> adamw(0.1, 0.8, 0.95, 1e-6, 0.03);
  scatter_rows(a.pairs(false), rows_of(sums), nullptr);
  sgd_rows(a.pairs(false), rows_of(w), rows_of(v), {0.1, 0.9, 0.01}, nullptr);
  adamw_rows(a.pairs(false),
             {rows_of(w2),
              rows_of(m2),
              rows_of(v2),
              steps.data(),
              {0.1, 0.8, 0.95, 1e-6, 0.03},
              0.1f,
              std::log(0.8),
              std::log(0.95)},
             nullptr);
  for (int64_t j = 0; j < kClasses; ++j) {
    program::expect(steps[j] == (a.touched[j] ? 3 : 2), "steps of a row");
    for (int64_t k = 0; k < width; ++k) {
      double sum = 0.5, wj = 0.5, vj = 0.5, w2j = 0.5, m2j = 0.5, v2j = 0.5;
      if (a.touched[j]) {
        sum = a.sums[j * width + k];
        sgd(wj, vj, sum);
        adamw(w2j, m2j, v2j, sum, 0.1 / (1 - std::pow(0.8, 3)),
              1 / std::sqrt(1 - std::pow(0.95, 3)));
      }
      expect_near("sum", to_float(sums(j, k)), sum, eps);
      expect_near("w", to_float(w(j, k)), wj, eps);
      expect_near("v", to_float(v(j, k)), vj, eps);
      expect_near("w of adamw", to_float(w2(j, k)), w2j, eps);
      expect_near("m", to_float(m2(j, k)), m2j, eps);
      expect_near("square", to_float(v2(j, k)), v2j, eps);
    }
  }
}

void check(unsigned seed, const std::string&) {
  for (int64_t skip = 0; skip < 8; ++skip) {
    check_targets<__half>(12, 1, 16 + skip % 3, {skip, 8 - skip});
    check_tables<float>(9, 12 + skip % 3, {skip, 8 - skip});
    check_tables<__half>(1 + seed, 16, {skip, 8 - skip});
  }
  // Whole vectors, but for one matrix that begins, or whose rows begin, half a vector later.
  for (int only = 0; only < 7; ++only) {
    if (only < 4) check_targets<float>(9, 1, 12, {2, 0, only});
    if (only < 4) check_targets<float>(9, 1, 12, {0, 2, only});
    check_tables<float>(9, 12, {2, 0, only});
    check_tables<float>(9, 12, {0, 2, only});
  }
  // Rows on 16 bytes that end within a vector.
  check_targets<float>(9, 1, 13, {0, 3});
  check_tables<float>(9, 13, {0, 3});
  check_targets<float>(400, 2, 132);
  check_targets<float>(12, 1, 8, {0, program::kFar});
  check_targets<__half>(71, 1, 5);
  check_targets<__nv_bfloat16>(120, 40, 264);
  check_tables<float>(207, 36);  // 8 · 25 + 7: the last look ahead ends there
  check_tables<__nv_bfloat16>(1 + seed, 37, {1, 0});
}
