// Sums over the rows of dr, from float32 products: the gradient of the bias, before any rounding.
//
// A block has 128 classes and one of the parts of the rows; a warp takes every eighth row, a thread
// four classes of it. Sums of the warps join in shared memory in their order: the same bits every
// time. One read of each product.
#include "cuda/logits.h"
#include "cuda/slopes.h"

namespace lossops {
namespace {

constexpr int kWarps = 8;
constexpr int kPerThread = 4;
constexpr int kColumns = 32 * kPerThread;

template <bool kPlain>
__global__ void __launch_bounds__(32 * kWarps)
    column_sums_kernel(ColumnsCall call, int64_t rows_of_part) {
  LOSSOPS_SHARED(float, sums, kWarps* kColumns);
  const GradientCall& gradient = call.gradient;
  const int first = blockIdx.x * kColumns + threadIdx.x;
  float total[kPerThread] = {};
  const int64_t begin = blockIdx.y * rows_of_part, after = begin + rows_of_part;
  const int64_t end = after < gradient.logits.rows ? after : gradient.logits.rows;
  for (int64_t row = begin + threadIdx.y; row < end; row += kWarps) {
    const float* products =
        static_cast<const float*>(gradient.logits.r) + row * gradient.logits.stride;
    Tile<kPerThread, 1> tile;
    tile.first = first;
    tile.hop = 32;
    tile.valid = 0;
    for (int i = 0; i < kPerThread; ++i) {
      const bool inside = tile.id(i) < gradient.logits.classes;
      tile.z[i] = inside ? products[tile.id(i)] : 0.0f;
      tile.valid |= static_cast<unsigned>(inside) << i;
    }
    RowSlopes<kPlain>(gradient, row).apply(tile);
    for (int i = 0; i < kPerThread; ++i) total[i] += tile.z[i];
  }
  for (int i = 0; i < kPerThread; ++i) {
    sums[threadIdx.y * kColumns + i * 32 + threadIdx.x] = total[i];
  }
  __syncthreads();
  const int thread = threadIdx.y * 32 + threadIdx.x, column = blockIdx.x * kColumns + thread;
  if (thread >= kColumns || column >= gradient.logits.classes) return;
  float* db = call.db + static_cast<int64_t>(blockIdx.y) * gradient.logits.classes + column;
  float sum = call.accumulate ? *db : 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += sums[w * kColumns + thread];
  *db = sum;
}

}  // namespace

void column_sums(const ColumnsCall& call, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(call.gradient.logits.classes, kColumns));
  const dim3 grid(blocks, call.parts), block(32, kWarps);
  const int64_t rows_of_part = ceil_div(call.gradient.logits.rows, call.parts);
  if (is_plain(call.gradient)) {
    LOSSOPS_LAUNCH(column_sums_kernel<true>, grid, block, stream, call, rows_of_part);
  } else {
    LOSSOPS_LAUNCH(column_sums_kernel<false>, grid, block, stream, call, rows_of_part);
  }
}

}  // namespace lossops
