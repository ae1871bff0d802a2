// Losses over pairs, on float32 products in memory: sums of single logits, log-sums of columns, and
// dz in place.
//
//   binary, pair_gradient    one block a row: one read of each product, one write of its dz
//   pair_columns             a block has 128 columns and one of the parts of the rows, a warp every
//                            eighth row of them: one read
//
// dz in bfloat16 goes over the products it comes from, a tile read as a whole before any of it is
// overwritten (gradient.cu). Sums join in a fixed order: the same bits every time.
#include "cuda/pairs.h"
#include "cuda/vectors.h"
#include "row.h"

namespace lossops {
namespace {

constexpr int kThreads = 256;
constexpr int kSize = Row<float>::kSize;
constexpr int kTile = 2 * kSize;

// f(v, tile) for the tiles of a row, and with `out` what f left in the tile goes there. All threads
// of the block take part in every step.
template <typename Out, typename F>
__device__ __forceinline__ void each_tile(const Row<float>& products, Out* out, F f) {
  constexpr int kVectors = kTile / kSize;
  const uintptr_t boundary = reinterpret_cast<uintptr_t>(out) - products.offset * sizeof(Out);
  const bool whole = boundary % (kSize * sizeof(Out)) == 0;
  for (int from = 0; from < products.vectors; from += blockDim.x * kVectors) {
    const int v = from + threadIdx.x;
    auto tile = load_tile<kTile>(products, v, blockDim.x, products.vectors);
    if constexpr (sizeof(Out) < sizeof(float)) __syncthreads();
    f(tile);
    if (out == nullptr) continue;
    for (int u = 0; u < kVectors; ++u) {
      const unsigned there = tile.valid >> (u * kSize) & ((1u << kSize) - 1);
      store<kSize>(out, products.first(v + u * blockDim.x), tile.z + u * kSize, there, whole);
    }
  }
}

__device__ __forceinline__ Row<float> products_of(const Logits& logits, int64_t row) {
  return Row<float>(static_cast<const float*>(logits.r) + row * logits.stride, logits.classes);
}

template <typename Out>
__device__ __forceinline__ Out* row_of(void* out, int64_t stride, int64_t row) {
  return out == nullptr ? nullptr : static_cast<Out*>(out) + row * stride;
}

template <Binary kKind>
__device__ __forceinline__ Addend<float> addend(const BinaryCall& call, float z) {
  if constexpr (kKind == Binary::kSigmoid) return SigmoidTerm<float>()(z);
  if constexpr (kKind == Binary::kHinge) return HingeTerm<float>{call.p}(z);
  if constexpr (kKind == Binary::kGumbel) return GumbelTerm<float>{call.p}(z);
  if constexpr (kKind == Binary::kAsymmetric) {
    return AsymmetricTerm<float>{call.p, call.q, call.detached}(z);
  }
}

template <Binary kKind, typename Out>
__global__ void __launch_bounds__(kThreads) binary_kernel(BinaryCall call) {
  LOSSOPS_SHARED(float, warp_sums, kThreads / 32);
  const int64_t row = blockIdx.x;
  const LogitMap map(call.logits);
  const RowTargets targets(call.sides, row, 0, call.logits.classes);
  const float factor = call.factor == nullptr ? 1.0f : call.factor[row];
  float total = 0;
  each_tile(products_of(call.logits, row), row_of<Out>(call.out, call.out_stride, row),
            [&](auto& tile) {
              map.apply(tile);
              targets.each(tile, [&](int i, int) { tile.targets |= 1u << i; });
              const unsigned negatives = tile.valid & ~tile.targets;
              for (int i = 0; i < kTile; ++i) {
                const Addend<float> one = addend<kKind>(call, tile.z[i]);
                const bool counts = negatives >> i & 1;
                float a = counts ? 1.0f : 0.0f;
                if (counts && call.sides.class_vector != nullptr) {
                  a = call.sides.class_vector[tile.id(i)];
                }
                total += counts ? a * one.value : 0.0f;
                tile.z[i] = counts ? factor * a * one.slope : 0.0f;
              }
            });
  for (int step = 1; step < 32; step *= 2) {
    total += __shfl_down_sync(0xffffffffu, total, step);
  }
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) total += warp_sums[w];
  call.sums[row] = total;
}

constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 128;

__global__ void __launch_bounds__(kThreads)
    pair_columns_kernel(PairColumnsCall call, int64_t rows_of_part) {
  LOSSOPS_SHARED(float, tops, kWarps* kColumns);
  LOSSOPS_SHARED(float, totals, kWarps* kColumns);
  constexpr int kPerThread = kColumns / 32;
  const LogitMap map(call.logits);
  const int first = blockIdx.x * kColumns + threadIdx.x;
  float top[kPerThread], total[kPerThread] = {};
  for (int i = 0; i < kPerThread; ++i) top[i] = -kInf<float>;
  const int64_t begin = blockIdx.y * rows_of_part, after = begin + rows_of_part;
  const int64_t end = after < call.logits.rows ? after : call.logits.rows;
  for (int64_t row = begin + threadIdx.y; row < end; row += kWarps) {
    const float* products = static_cast<const float*>(call.logits.r) + row * call.logits.stride;
    const RowTargets targets(call.sides, row, 0, call.logits.classes);
    Tile<kPerThread, 1> tile;
    tile.first = first;
    tile.hop = 32;
    for (int i = 0; i < kPerThread; ++i) {
      const bool inside = tile.id(i) < call.logits.classes;
      tile.z[i] = inside ? map.of(products[tile.id(i)], tile.id(i)) : -kInf<float>;
    }
    targets.each(tile, [&](int i, int) { tile.z[i] = -kInf<float>; });
    for (int i = 0; i < kPerThread; ++i) {
      const float raised = fmaxf(top[i], tile.z[i]);
      // What had no negatives has nothing to scale: its shift of 0 may be far above all others.
      if (top[i] != -kInf<float>) {
        total[i] *= Lane<float>::exp(finite(top[i]) - finite(raised));
      }
      total[i] += Lane<float>::exp(tile.z[i] - finite(raised));
      top[i] = raised;
    }
  }
  for (int i = 0; i < kPerThread; ++i) {
    tops[threadIdx.y * kColumns + i * 32 + threadIdx.x] = top[i];
    totals[threadIdx.y * kColumns + i * 32 + threadIdx.x] = total[i];
  }
  __syncthreads();
  const int thread = threadIdx.y * 32 + threadIdx.x, column = blockIdx.x * kColumns + thread;
  if (thread >= kColumns || column >= call.logits.classes) return;
  float largest = -kInf<float>, sum = 0;
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, tops[w * kColumns + thread]);
  for (int w = 0; w < kWarps; ++w) {
    const float from = tops[w * kColumns + thread], part = totals[w * kColumns + thread];
    sum += from == -kInf<float> ? part : part * Lane<float>::exp(finite(from) - finite(largest));
  }
  const int64_t at = static_cast<int64_t>(blockIdx.y) * call.logits.classes + column;
  call.shift[at] = finite(largest);
  call.lse[at] = logf(sum);
}

template <typename Out>
__global__ void __launch_bounds__(kThreads, 4) pair_gradient_kernel(PairGradientCall call) {
  const int64_t row = blockIdx.x;
  const LogitMap map(call.logits);
  const RowTargets targets(call.sides, row, 0, call.logits.classes);
  auto base = [](float shift, float lse) { return shift + (lse == -kInf<float> ? 0.0f : lse); };
  const bool by_row = call.c_row != nullptr, by_column = call.c_column != nullptr;
  const float c = by_row ? call.c_row[row] : 0.0f;
  const float row_shift = by_row ? call.row_shift[row] : 0.0f;
  const float row_lse = by_row ? base(0, call.row_lse[row]) : 0.0f;
  each_tile(products_of(call.logits, row), row_of<Out>(call.out, call.out_stride, row),
            [&](auto& tile) {
              map.apply(tile);
              for (int i = 0; i < kTile; ++i) {
                const float z = tile.z[i];
                float dz = by_row ? c * Lane<float>::exp(z - row_shift - row_lse) : 0.0f;
                if (by_column && tile.is_valid(i)) {
                  const int id = tile.id(i);
                  const float lse = base(0, call.column_lse[id]);
                  dz += call.c_column[id] * Lane<float>::exp(z - call.column_shift[id] - lse);
                }
                tile.z[i] = dz;
              }
              targets.each(tile, [&](int i, int) { tile.z[i] = 0; });
            });
}

dim3 block_of(const Logits& logits) {
  int threads = 32;
  while (threads < kThreads && threads * kTile < logits.classes) threads *= 2;
  return dim3(threads);
}

template <typename Out>
void launch(const BinaryCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(call.logits.rows)), block = block_of(call.logits);
  switch (call.kind) {
    case Binary::kSigmoid:
      LOSSOPS_LAUNCH((binary_kernel<Binary::kSigmoid, Out>), grid, block, stream, call);
      break;
    case Binary::kHinge:
      LOSSOPS_LAUNCH((binary_kernel<Binary::kHinge, Out>), grid, block, stream, call);
      break;
    case Binary::kGumbel:
      LOSSOPS_LAUNCH((binary_kernel<Binary::kGumbel, Out>), grid, block, stream, call);
      break;
    case Binary::kAsymmetric:
      LOSSOPS_LAUNCH((binary_kernel<Binary::kAsymmetric, Out>), grid, block, stream, call);
      break;
  }
}

}  // namespace

void binary(const BinaryCall& call, cudaStream_t stream) {
  if (call.out_dtype == Dtype::kBFloat16) {
    launch<__nv_bfloat16>(call, stream);
  } else {
    launch<float>(call, stream);
  }
}

void pair_columns(const PairColumnsCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(call.logits.classes, kColumns)), call.parts);
  const int64_t rows_of_part = ceil_div(call.logits.rows, call.parts);
  LOSSOPS_LAUNCH(pair_columns_kernel, grid, dim3(32, kWarps), stream, call, rows_of_part);
}

void pair_gradient(const PairGradientCall& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(call.logits.rows)), block = block_of(call.logits);
  if (call.out_dtype == Dtype::kBFloat16) {
    LOSSOPS_LAUNCH(pair_gradient_kernel<__nv_bfloat16>, grid, block, stream, call);
  } else {
    LOSSOPS_LAUNCH(pair_gradient_kernel<float>, grid, block, stream, call);
  }
}

}  // namespace lossops
