// The shape of a program: the launchers of a file, on buffers of exactly their sizes.
#include "standin.h"

#include "program.h"

using lossops::to_float;

template <typename T>
void check_reverse_rows(int64_t rows, int64_t columns, int64_t stride) {
  program::Buffer<T> x((rows - 1) * stride + columns);
  program::Buffer<float> out(rows * columns);
  fill_normal(x);
  lossops::reverse_rows(program::kDtype<T>, x.data(), stride, out.data(), rows, columns, true,
                        nullptr);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      program::expect_near("reversed", out[i * columns + j],
                           to_float(x[i * stride + columns - 1 - j]), 0.0);
}

void check(unsigned, const std::string&) {
  check_reverse_rows<float>(3, 100, 100);
  check_reverse_rows<__half>(1, 1, 7);
  check_reverse_rows<__nv_bfloat16>(2, 128, 131);
}
