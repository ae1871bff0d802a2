// Rows of a table picked by id and normalised, and the gradient of that.
//
// S rows of D elements of T bytes, each read once and written once:
//
//   normalized_rows            read S (D T + 8), write S (D T + 4): the minimum
//   normalized_rows_gradient   read S (2 D T + 4), write S D T: the minimum
//
// Launch: a warp for each row where a row is at most 4 parts of 32 vectors of 16 bytes (2 KiB), 8
// rows a block; else the 8 warps of a block. A row stays in registers between its norm and its
// quotients; of one longer than 16 KiB the end is read a second time, from cache.
//
// Verified by tests/emulator/test_rows.py on a CPU; has not run on a GPU.
#include "cuda/features.h"

namespace lossops {
namespace {

constexpr int kBlockWarps = 8;
// Parts of a row that a warp keeps in registers: of one row of a table, and of two.
constexpr int kKept = 4, kKeptOfTwo = 2;

// f(features, j) for the parts of a row that are this warp's, one of kWarps; j = -1 beyond kMost.
template <typename T, int kWarps, int kMost, typename F>
__device__ __forceinline__ void each_part(int width, bool vectors, F f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    f(Features<T>(warp + j * kWarps, lane, width, vectors), j);
  }
  for (int part = warp + kMost * kWarps; part * Features<T>::kPart < width; part += kWarps) {
    f(Features<T>(part, lane, width, vectors), -1);
  }
}

// The sum over the warps of a row, in the same order in every thread.
template <int kWarps>
__device__ __forceinline__ float sum_of_row(float x) {
  x = sum_of_warp(x);
  if constexpr (kWarps > 1) {
    LOSSOPS_SHARED(float, sums, kWarps);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
    for (int i = 0; i < kWarps; ++i) x += sums[i];
  }
  return x;
}

template <int kWarps>
__device__ __forceinline__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * (kBlockWarps / kWarps) + threadIdx.x / (32 * kWarps);
}

template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kBlockWarps, 4)
    normalized_rows_kernel(NormalizedRows a, bool vectors) {
  constexpr int kSize = Features<T>::kSize;
  const int64_t i = row_of_thread<kWarps>();
  if (i >= a.count) return;  // whole warps; where a row has several, no row is missing
  const int64_t id = a.ids[i];
  const bool known = 0 <= id && id < a.classes;
  const T* from = known ? row<T>(a.table, id) : nullptr;

  Elements<T, kSize> kept[kKept];
  float sum = known ? 0.0f : NAN;
  each_part<T, kWarps, kKept>(a.width, vectors, [&](const Features<T>& features, int j) {
    const Elements<T, kSize> w = features.load(from);
    if (j >= 0) kept[j] = w;
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += w[k] * w[k];
  });
  float norm = sqrtf(sum_of_row<kWarps>(sum));
  norm = norm < a.eps ? a.eps : norm;  // keeps NaN
  const float inverse = 1.0f / norm;
  each_part<T, kWarps, kKept>(a.width, vectors, [&](const Features<T>& features, int j) {
    Elements<T, kSize> w = j >= 0 ? kept[j] : features.load(from);
#pragma unroll
    for (int k = 0; k < kSize; ++k) w.set(k, w[k] * inverse);
    features.store(row<T>(a.rows, i), w);
  });
  if (threadIdx.x % (32 * kWarps) == 0) a.norms[i] = norm;
}

template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kBlockWarps, 3)
    normalized_rows_gradient_kernel(NormalizedRowsGradient a, bool vectors) {
  constexpr int kSize = Features<T>::kSize;
  const int64_t i = row_of_thread<kWarps>();
  if (i >= a.count) return;
  const T *unit = row<T>(a.rows, i), *gradient = row<T>(a.gradient, i);

  Elements<T, kSize> kept_u[kKeptOfTwo], kept_g[kKeptOfTwo];
  float sum = 0.0f;
  each_part<T, kWarps, kKeptOfTwo>(a.width, vectors, [&](const Features<T>& features, int j) {
    const Elements<T, kSize> u = features.load(unit), g = features.load(gradient);
    if (j >= 0) kept_u[j] = u, kept_g[j] = g;
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += u[k] * g[k];
  });
  const float along = sum_of_row<kWarps>(sum), inverse = 1.0f / a.norms[i];
  each_part<T, kWarps, kKeptOfTwo>(a.width, vectors, [&](const Features<T>& features, int j) {
    const Elements<T, kSize> u = j >= 0 ? kept_u[j] : features.load(unit);
    Elements<T, kSize> g = j >= 0 ? kept_g[j] : features.load(gradient);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      g.set(k, (g[k] - along * u[k]) * inverse);
    }
    features.store(row<T>(a.found, i), g);
  });
}

// f(std::integral_constant<int, warps of a row>) with as many as the width asks for.
template <typename T, int kMost, typename F>
void with_warps(int64_t width, F f) {
  if (width <= kMost * Features<T>::kPart) return f(std::integral_constant<int, 1>());
  f(std::integral_constant<int, kBlockWarps>());
}

}  // namespace

void normalized_rows(const NormalizedRows& a, cudaStream_t stream) {
  if (a.count == 0) return;
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors =
        a.width % Vector<T>::kSize == 0 && is_aligned<T>(a.table) && is_aligned<T>(a.rows);
    with_warps<T, kKept>(a.width, [&](auto warps) {
      constexpr int kWarps = decltype(warps)::value;
      LOSSOPS_LAUNCH((normalized_rows_kernel<T, kWarps>), ceil_div(a.count, kBlockWarps / kWarps),
                     32 * kBlockWarps, stream, a, vectors);
    });
  });
}

void normalized_rows_gradient(const NormalizedRowsGradient& a, cudaStream_t stream) {
  if (a.count == 0) return;
  with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = a.width % Vector<T>::kSize == 0 && is_aligned<T>(a.rows) &&
                         is_aligned<T>(a.gradient) && is_aligned<T>(a.found);
    with_warps<T, kKeptOfTwo>(a.width, [&](auto warps) {
      constexpr int kWarps = decltype(warps)::value;
      LOSSOPS_LAUNCH((normalized_rows_gradient_kernel<T, kWarps>),
                     ceil_div(a.count, kBlockWarps / kWarps), 32 * kBlockWarps, stream, a, vectors);
    });
  });
}

}  // namespace lossops
