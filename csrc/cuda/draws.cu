// Draws of class ids on a device, and what the losses over a sample look up in it; the arithmetic
// of a draw is in csrc/sampling.h, the same bits as on a CPU.
//
// A thread makes one draw, or one look-up; 256 threads a block. Bytes, which are the minimum but
// for the ids that a search reads from cache:
//
//   draw             write 8 S; an alias draw reads 16 at a random place of the tables
//   mark_first       read 16 T, write T at random places
//   take_first       read T + 8 first ones, write 8 S
//   find_positions   read and write 8 M: one launch for search, bounds, gather and comparisons
//   find_hits        read 8 N S, write N S: no N S K comparisons in memory
//
// Distinct ids are the first S that appear among T draws. T is known in advance (enough with all
// but certainty, lossops/cuda_draws.py), so that nobody waits for a number of ids.
//
// Verified by tests/emulator/test_draws.py on a CPU; has not run on a GPU.
#include "cuda/draws.h"

namespace lossops {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

template <typename Draw>
__global__ void __launch_bounds__(kThreads) draw_kernel(Draw draw, int64_t num, int64_t* ids) {
  const int64_t t = thread_of_grid();
  if (t < num) ids[t] = static_cast<int64_t>(draw(t));
}

__global__ void __launch_bounds__(kThreads)
    mark_first_kernel(const int64_t* sorted, const int64_t* order, int64_t num, bool* first) {
  const int64_t j = thread_of_grid();
  if (j < num) first[order[j]] = j == 0 || sorted[j - 1] != sorted[j];
}

__global__ void __launch_bounds__(kThreads) take_first_kernel(TakeFirst a) {
  const int64_t t = thread_of_grid();
  if (t >= a.num || !a.first[t]) return;
  const int64_t rank = a.rank[t];
  if (rank <= a.wanted) a.ids[rank - 1] = a.draws[t];
  if (rank == a.wanted) *a.tries = t + 1;
}

__global__ void __launch_bounds__(kThreads)
    find_positions_kernel(const int64_t* ids, int64_t num, const int64_t* wanted, int64_t count,
                          int64_t* found) {
  const int64_t i = thread_of_grid();
  if (i >= count) return;
  const int64_t id = wanted[i];
  int64_t begin = 0, end = num;  // the first that is not below id lies in [begin, end]
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (ids[middle] < id) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  found[i] = begin < num && ids[begin] == id ? begin : -1;
}

__global__ void __launch_bounds__(kThreads) find_hits_kernel(FindHits a) {
  const int64_t i = thread_of_grid();
  if (i >= a.rows * a.num) return;
  const int64_t id = a.drawn[i];
  const int64_t* target = a.target + i / a.num * a.per_row;
  bool hit = false;
  for (int64_t k = 0; k < a.per_row; ++k) hit |= target[k] == id;
  a.hit[i] = hit;
}

template <typename Draw>
void launch(const Draw& draw, int64_t num, int64_t* ids, cudaStream_t stream) {
  if (num == 0) return;
  LOSSOPS_LAUNCH(draw_kernel<Draw>, ceil_div(num, kThreads), kThreads, stream, draw, num, ids);
}

}  // namespace

void draw(const Permutation& draw, int64_t num, int64_t* ids, cudaStream_t stream) {
  launch(draw, num, ids, stream);
}

void draw(const UniformDraw& draw, int64_t num, int64_t* ids, cudaStream_t stream) {
  launch(draw, num, ids, stream);
}

void draw(const LogUniformDraw& draw, int64_t num, int64_t* ids, cudaStream_t stream) {
  launch(draw, num, ids, stream);
}

void draw(const AliasDraw& draw, int64_t num, int64_t* ids, cudaStream_t stream) {
  launch(draw, num, ids, stream);
}

void mark_first(const int64_t* sorted, const int64_t* order, int64_t num, bool* first,
                cudaStream_t stream) {
  if (num == 0) return;
  LOSSOPS_LAUNCH(mark_first_kernel, ceil_div(num, kThreads), kThreads, stream, sorted, order, num,
                 first);
}

void take_first(const TakeFirst& a, cudaStream_t stream) {
  if (a.num == 0) return;
  LOSSOPS_LAUNCH(take_first_kernel, ceil_div(a.num, kThreads), kThreads, stream, a);
}

void find_positions(const int64_t* ids, int64_t num, const int64_t* wanted, int64_t count,
                    int64_t* found, cudaStream_t stream) {
  if (count == 0) return;
  LOSSOPS_LAUNCH(find_positions_kernel, ceil_div(count, kThreads), kThreads, stream, ids, num,
                 wanted, count, found);
}

void find_hits(const FindHits& a, cudaStream_t stream) {
  if (a.rows == 0 || a.num == 0) return;
  LOSSOPS_LAUNCH(find_hits_kernel, ceil_div(a.rows * a.num, kThreads), kThreads, stream, a);
}

}  // namespace lossops
