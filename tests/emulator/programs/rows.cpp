// Rows picked and normalised, and their gradient: aligned and odd rows, one warp or eight, and more
// than the registers keep.
#include "cuda/rows.h"

#include "program.h"

using namespace lossops;
using program::Buffer;
using program::expect_near;

template <typename T>
void check_rows(Dtype dtype, int width, int64_t stride, int64_t skip) {
  constexpr int64_t kClasses = 5, kCount = 9;
  Buffer<T> table(skip + (kClasses - 1) * stride + width), unit(kCount * width);
  Buffer<T> gradient(kCount * width), found(kCount * width);
  Buffer<float> norms(kCount);
  Buffer<int64_t> ids(kCount);
  fill_normal(table);
  fill_normal(gradient);
  program::fill_ids(ids, kClasses);
  ids[3] = -1;
  ids[4] = kClasses;
  const double eps = sizeof(T) == 4 ? 1e-6 : 1e-2;

  normalized_rows({dtype, kCount, kClasses, width, Rows{table.data() + skip, stride}, ids.data(),
                   1e-12f, Rows{unit.data(), width}, norms.data()},
                  nullptr);
  normalized_rows_gradient({dtype, kCount, width, Rows{unit.data(), width},
                            Rows{gradient.data(), width}, Rows{found.data(), width}, norms.data()},
                           nullptr);
  for (int64_t i = 0; i < kCount; ++i) {
    if (i == 3 || i == 4) {
      for (int64_t k = 0; k < width; ++k) {
        program::expect(std::isnan(to_float(unit[i * width + k])), "a row that is not there");
      }
      continue;
    }
    double square = 0, along = 0;
    const T* w = table.data() + skip + ids[i] * stride;
    for (int64_t k = 0; k < width; ++k) {
      square += double(to_float(w[k])) * to_float(w[k]);
      along += double(to_float(unit[i * width + k])) * to_float(gradient[i * width + k]);
    }
    const double norm = std::sqrt(square);
    expect_near("norm", norms[i], norm, 1e-5);
    for (int64_t k = 0; k < width; ++k) {
      const double u = to_float(unit[i * width + k]), g = to_float(gradient[i * width + k]);
      expect_near("unit", u, to_float(w[k]) / norm, eps);
      expect_near("gradient", to_float(found[i * width + k]), (g - along * u) / norm,
                  eps * (1 + std::abs(g) / norm));
    }
  }
}

void check(unsigned, const std::string&) {
  check_rows<float>(Dtype::kFloat, 136, 140, 0);
  check_rows<float>(Dtype::kFloat, 3, 3, 1);
  check_rows<__half>(Dtype::kHalf, 1048, 1048, 0);
  check_rows<__half>(Dtype::kHalf, 37, 41, 1);
  check_rows<__nv_bfloat16>(Dtype::kBFloat16, 8, 8, 0);
  check_rows<__nv_bfloat16>(Dtype::kBFloat16, 8300, 8301, 3);
  normalized_rows({Dtype::kFloat, 0, 0, 8, {}, nullptr, 1.0f, {}, nullptr}, nullptr);
}
