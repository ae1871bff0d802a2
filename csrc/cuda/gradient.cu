// dr in place of products, or into another matrix: one read of each product, one write of its dr.
//
//   blocks of 256 threads, `parts` a row; short rows share a block, a warp or more each
//   half precision over the products it comes from: one block a row, which reads a tile as a whole
//   before it overwrites any of it, so that dr at byte 2 j never lands on what is still to be read
//   at byte 4 j
//
// Bytes a logit of b bytes: b, and b or 2 of dr; with a teacher its own. dr of an element depends
// on nothing but its row's statistics: any order gives the same bits.
#include <type_traits>

#include "cuda/logits.h"
#include "cuda/slopes.h"
#include "cuda/vectors.h"

namespace lossops {
namespace {

constexpr int kThreads = 256;

template <typename T, typename Out, bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 3 : 2) gradient_kernel(GradientCall call) {
  constexpr int kSize = Row<T>::kSize;
  constexpr int kTile = kPlain ? 16 : kSize;
  constexpr int kVectors = kTile / kSize;
  constexpr bool kPacks = sizeof(Out) < sizeof(T);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= call.logits.rows) return;  // where kPacks a block has one row, and all threads go on

  const Row<T> products(static_cast<const T*>(call.logits.r) + row * call.logits.stride,
                        call.logits.classes);
  Out* out = static_cast<Out*>(call.out) + row * call.out_stride;
  const uintptr_t boundary = reinterpret_cast<uintptr_t>(out) - products.offset * sizeof(Out);
  const bool whole = boundary % (kSize * sizeof(Out)) == 0;
  const RowSlopes<kPlain> slopes(call, row);

  const int per_part = products.per_part(call.parts);
  const int begin = blockIdx.y * per_part;
  const int end = begin + per_part < products.vectors ? begin + per_part : products.vectors;
  for (int from = begin; from < end; from += blockDim.x * kVectors) {
    const int v = from + threadIdx.x;
    auto tile = load_tile<kTile>(products, v, blockDim.x, end);
    if constexpr (kPacks) __syncthreads();
    slopes.apply(tile);
    for (int u = 0; u < kVectors; ++u) {
      const unsigned there = tile.valid >> (u * kSize) & ((1u << kSize) - 1);
      store<kSize>(out, products.first(v + u * blockDim.x), tile.z + u * kSize, there, whole);
    }
  }
}

template <typename T, typename Out>
void launch(const GradientCall& call, cudaStream_t stream) {
  const int vectors = static_cast<int>(ceil_div(call.logits.classes, Row<T>::kSize));
  // A warp for four vectors a thread, up to all of a block.
  int threads = 32;
  while (threads < kThreads && threads * 4 < vectors) threads *= 2;
  const bool shares = call.parts == 1 && sizeof(Out) == sizeof(T);
  const dim3 block(threads, shares ? kThreads / threads : 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(call.logits.rows, block.y)), call.parts);
  if (is_plain(call)) {
    LOSSOPS_LAUNCH((gradient_kernel<T, Out, true>), grid, block, stream, call);
  } else {
    LOSSOPS_LAUNCH((gradient_kernel<T, Out, false>), grid, block, stream, call);
  }
}

}  // namespace

void logits_gradient(const GradientCall& call, cudaStream_t stream) {
  if (call.logits.dtype == call.out_dtype) {
    with_type(call.out_dtype,
              [&](auto zero) { launch<decltype(zero), decltype(zero)>(call, stream); });
  } else if (call.out_dtype == Dtype::kHalf) {
    launch<float, __half>(call, stream);
  } else {
    launch<float, __nv_bfloat16>(call, stream);
  }
}

}  // namespace lossops
