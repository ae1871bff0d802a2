// Rows picked and normalised, and their gradient: rows at every place in 16 bytes, one warp or
// eight, and more than the registers keep.
#include "cuda/rows.h"

#include "program.h"

using namespace lossops;
using program::Buffer;
using program::expect_near;
using program::kDtype;
using program::Matrix;
using program::Places;

template <typename T>
void check_rows(int width, Places places = {}, int64_t count = 9) {
  constexpr int64_t kClasses = 5;
  auto table = places.matrix<T>(kClasses, width), unit = places.matrix<T>(count, width);
  auto gradient = places.matrix<T>(count, width), found = places.matrix<T>(count, width);
  Buffer<float> norms(count);
  Buffer<int64_t> ids(count);
  fill_normal(table);
  fill_normal(gradient);
  program::fill_ids(ids, kClasses);
  if (count > 4) ids[3] = -1, ids[4] = kClasses;
  const double eps = sizeof(T) == 4 ? 1e-6 : 1e-2;
  const auto rows = [](Matrix<T>& t) { return Rows{t.data(), t.stride}; };

  normalized_rows({kDtype<T>, count, kClasses, width, rows(table), ids.data(), 1e-12f, rows(unit),
                   norms.data()},
                  nullptr);
  normalized_rows_gradient(
      {kDtype<T>, count, width, rows(unit), rows(gradient), rows(found), norms.data()}, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= kClasses) {
      for (int64_t k = 0; k < width; ++k) {
        program::expect(std::isnan(to_float(unit(i, k))), "a row that is not there");
      }
      continue;
    }
    double square = 0, along = 0;
    for (int64_t k = 0; k < width; ++k) {
      square += std::pow(to_float(table(ids[i], k)), 2);
      along += double(to_float(unit(i, k))) * to_float(gradient(i, k));
    }
    const double norm = std::sqrt(square);
    expect_near("norm", norms[i], norm, 1e-5);
    for (int64_t k = 0; k < width; ++k) {
      const double u = to_float(unit(i, k)), g = to_float(gradient(i, k));
      expect_near("unit", u, to_float(table(ids[i], k)) / norm, eps);
      expect_near("gradient", to_float(found(i, k)), (g - along * u) / norm,
                  eps * (1 + std::abs(g) / norm));
    }
  }
}

void check(unsigned, const std::string&) {
  for (int64_t skip = 0; skip < 8; ++skip) {
    check_rows<float>(24 + skip % 4, {skip, 8 - skip});
    check_rows<__half>(16 + skip, {skip, 8 - skip});
  }
  // Whole vectors, but for one matrix that begins, or whose rows begin, half a vector later.
  for (int only = 0; only < 4; ++only) {
    check_rows<float>(24, {2, 0, only});
    check_rows<__half>(24, {0, 4, only});
  }
  check_rows<float>(25, {0, 3});  // rows on 16 bytes that end within a vector
  check_rows<__nv_bfloat16>(8);
  check_rows<float>(1, {3, 0}, 1);
  check_rows<float>(136, {0, 4});
  check_rows<__half>(1048, {}, 2);
  check_rows<__nv_bfloat16>(8300, {3, 1}, 3);
  check_rows<float>(4200, {}, 2);
  check_rows<__half>(8, {0, program::kFar});
  normalized_rows({Dtype::kFloat, 0, 0, 8, {}, nullptr, 1.0f, {}, nullptr}, nullptr);
}
