// The words of CUDA that kernels here may use, so that the same source also runs on a CPU.
//
// nvcc knows them. With LOSSOPS_EMULATE a host compiler takes them from the emulator of the tests,
// where a thread of a block is a fiber: tests/emulator/cuda_emulator.h. Beyond these two macros a
// kernel uses plain CUDA: threadIdx and its like, __syncthreads, __syncwarp, __shfl_*_sync.
#pragma once

#include <cstdint>

#ifdef LOSSOPS_EMULATE
#include "cuda_emulator.h"
#define LOSSOPS_DEVICE CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LOSSOPS_DEVICE CUDA
#define LOSSOPS_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define LOSSOPS_SHARED(T, name, n) __shared__ T name[n]
#endif

namespace lossops {

// What elements in memory are; kernels compute in float.
enum class Dtype { kFloat, kHalf, kBFloat16 };

// f(T{}) for the type of the elements.
template <typename F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(float{});
    case Dtype::kHalf:
      return f(__half{});
    case Dtype::kBFloat16:
      return f(__nv_bfloat16{});
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
}

// The smallest unit of memory traffic that fills a bus: 16 bytes of elements.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lossops
