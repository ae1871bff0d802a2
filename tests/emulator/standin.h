// Kernels laid out as those of csrc/cuda, for tests of the emulator from Python.
#pragma once

#include "cuda/device.h"

namespace lossops {

// out (R, C) = the rows of x (R, C), `stride` apart, from last to first; wrong without `barrier`.
void reverse_rows(Dtype dtype, const void* x, int64_t stride, float* out, int64_t rows,
                  int64_t columns, bool barrier, cudaStream_t stream);

}  // namespace lossops
