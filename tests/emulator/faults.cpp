// Kernels that are right, and the same with one fault, for tests/emulator/test_emulator.py.
#include <sys/mman.h>

#include <map>

#include "program.h"

using lossops::from_float;
using lossops::to_float;
using program::Buffer;
using program::expect;
using program::expect_near;

enum class Fault {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kNoWarpBarrier,
  kDivergentBarrier,
  kEarlyExit,
  kSharedOverrun,
  kGlobalOverrun,
  kUninitialised,
  kTwoThreads,
  kTwoBlocks,
  kLaneOutside,
  kLaneNotInMask,
  kMissingLanes,
  kSignedIndex,
  kUnsignedIndex,
  kShuffleOrders,
  kOverlap,
  kMisaligned,
};

constexpr int kThreads = 96, kWarps = kThreads / 32;

// out (R): log-sum-exp of the rows of x (R, C), twice, so that shared memory is written again.
template <typename T, Fault FAULT>
__global__ void __launch_bounds__(kThreads)
    row_lse(const T* __restrict__ x, float* __restrict__ out, int64_t columns) {
  LOSSOPS_SHARED(float, maxima, kWarps);
  LOSSOPS_SHARED(float, sums, kWarps);
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  const T* row = x + blockIdx.x * columns;
  if (FAULT == Fault::kEarlyExit && threadIdx.x >= columns) return;
  for (int pass = 0; pass < 2; ++pass) {
    float m = -INFINITY, s = 0.0f;
    for (int64_t j = threadIdx.x; j < columns + (FAULT == Fault::kGlobalOverrun); j += blockDim.x) {
      const float z = to_float(row[j]), larger = fmaxf(m, z);
      s = s * expf(m - larger) + expf(z - larger);
      m = larger;
    }
    for (int bits = 16; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(~0u, m, bits), larger = fmaxf(m, other);
      const float other_sum = __shfl_xor_sync(~0u, s, bits);
      if (larger > -INFINITY) s = s * expf(m - larger) + other_sum * expf(other - larger);
      m = larger;
    }
    if (lane == 0 && !(FAULT == Fault::kUninitialised && warp == 1)) {
      maxima[warp + (FAULT == Fault::kSharedOverrun)] = m;
      sums[warp] = s;
    }
    if (FAULT == Fault::kDivergentBarrier) {
      if (warp < 2) __syncthreads();
    } else if (FAULT != Fault::kNoBarrier) {
      __syncthreads();
    }
    m = maxima[0], s = sums[0];
    for (int w = 1; w < kWarps; ++w) {
      const float larger = fmaxf(m, maxima[w]);
      s = s * expf(m - larger) + sums[w] * expf(maxima[w] - larger);
      m = larger;
    }
    if (FAULT == Fault::kTwoThreads || threadIdx.x == 0)
      out[FAULT == Fault::kTwoBlocks ? 0 : static_cast<int>(blockIdx.x)] = m + logf(s);
    if (FAULT != Fault::kNoSecondBarrier) __syncthreads();
  }
}

template <typename T, Fault FAULT>
void check_row_lse(int64_t columns) {
  const int64_t rows = 5;
  Buffer<T> x(rows * columns);
  Buffer<float> out(rows);
  fill_normal(x, 3.0f);
  LOSSOPS_LAUNCH((row_lse<T, FAULT>), rows, kThreads, nullptr, x.data(), out.data(), columns);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < columns; ++j) sum += std::exp(double{to_float(x[i * columns + j])});
    expect_near("lse of row " + std::to_string(i), out[i], std::log(sum), 1e-6);
  }
}

template <Fault FAULT>
void check_row_lse() {
  for (int64_t columns : {1, 95, 1000}) check_row_lse<float, FAULT>(columns);
  if constexpr (FAULT == Fault::kNone) {
    check_row_lse<__half, FAULT>(101);
    check_row_lse<__nv_bfloat16, FAULT>(101);
  }
}

// out (n): every warp's part reversed, each lane by way of shared memory.
template <Fault FAULT>
__global__ void reverse_warps(float* out) {
  LOSSOPS_SHARED(float, values, kThreads);
  const int first = threadIdx.x / warpSize * warpSize, lane = threadIdx.x % warpSize;
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (FAULT != Fault::kNoWarpBarrier) __syncwarp();
  out[threadIdx.x] = values[first + 31 - lane];
}

template <Fault FAULT>
void check_reverse() {
  Buffer<float> out(kThreads);
  LOSSOPS_LAUNCH(reverse_warps<FAULT>, 1, kThreads, nullptr, out.data());
  for (int i = 0; i < kThreads; ++i) expect_near("reversed", out[i], i / 32 * 32 + 31 - i % 32, 0);
}

// What lanes say to each other, in a last warp that is not full.
template <Fault FAULT>
__global__ void talk(int* out) {
  const int lane = threadIdx.x % warpSize;
  const unsigned all = threadIdx.x < 32 ? ~0u : 0xffffu;
  const unsigned low = 0xffu;
  int sum = 1;
  for (int by = 1; by < 32; by *= 2) {
    const int before = __shfl_up_sync(all, sum, by);
    if (lane >= by) sum += before;
  }
  if (FAULT == Fault::kLaneNotInMask) sum += __shfl_sync(low, sum, 0);
  if (lane < 8) {
    const unsigned mask = FAULT == Fault::kMissingLanes ? 0xffffu : low;
    sum += __shfl_sync(mask, 100, FAULT == Fault::kLaneOutside ? 9 : 7);
    sum += __shfl_down_sync(low, 1000, 2, 4) + __shfl_xor_sync(low, 10000 * lane, 1, 4);
  }
  sum += 1000000 * __popc(__ballot_sync(all, lane % 3 == 0)) * __any_sync(all, lane == 15) *
         (1 - __all_sync(all, lane < 15));
  out[threadIdx.x] = sum;
}

template <Fault FAULT>
void check_talk() {
  constexpr int kSpeakers = 48;
  Buffer<int> out(kSpeakers);
  LOSSOPS_LAUNCH(talk<FAULT>, dim3(1), dim3(kSpeakers), nullptr, out.data());
  for (int i = 0; i < kSpeakers; ++i) {
    const int lane = i % 32, low = lane < 8 ? 1100 + 10000 * (lane ^ 1) : 0;
    expect_near("said", out[i], lane + 1 + low + 1000000 * (i < 32 ? 11 : 6), 0);
  }
}

// What lane 0 writes comes to lane 2 by way of lane 1.
template <Fault FAULT>
__global__ void pass_on(int* out) {
  LOSSOPS_SHARED(int, told, 1);
  const int lane = threadIdx.x;
  if (lane == 0) told[0] = 5;
  if (lane < 2) __syncwarp(3u);
  if (lane == 1 || lane == 2) {
    if (FAULT == Fault::kShuffleOrders) {
      __shfl_sync(6u, lane, 1);
    } else {
      __syncwarp(6u);
    }
  }
  if (lane == 2) *out = told[0];
}

template <Fault FAULT>
void check_pass_on() {
  Buffer<int> out(1);
  LOSSOPS_LAUNCH(pass_on<FAULT>, 1, 32, nullptr, out.data());
  expect_near("told", out[0], 5, 0);
}

// bytes (n), out (n, 8): threads side by side, in units smaller and larger than a word.
template <Fault FAULT>
__global__ void side_by_side(uint8_t* bytes, __half* out) {
  using Eight = lossops::Vector<__half>;
  LOSSOPS_SHARED(Eight, values, 64);
  const int i = static_cast<int>(threadIdx.x);
  bytes[i] = static_cast<uint8_t>(i);
  for (int j = 0; j < 8; ++j) values[8 * j + i / 8].element[i % 8] = __float2half_rn(8.0f * i + j);
  __syncthreads();
  Eight eight;
  for (int j = 0; j < 8; ++j) eight.element[j] = values[8 * j + i / 8].element[i % 8];
  reinterpret_cast<Eight*>(out + (FAULT == Fault::kMisaligned))[i] = eight;
  if (FAULT == Fault::kOverlap && i == 0) out[15] = eight.element[0];
}

template <Fault FAULT>
void check_side_by_side() {
  Buffer<uint8_t> bytes(64);
  Buffer<__half> out(64 * 8 + (FAULT == Fault::kMisaligned));
  LOSSOPS_LAUNCH(side_by_side<FAULT>, 1, 64, nullptr, bytes.data(), out.data());
  for (int i = 0; i < 64; ++i) expect_near("byte", bytes[i], i, 0);
  for (int i = 0; i < 512; ++i) expect_near("half", to_float(out[i]), i, 0);
}

// A shared array is aligned as its type asks, and no better.
__global__ void vectors_of_floats(float* out) {
  LOSSOPS_SHARED(float, values, 128);
  *reinterpret_cast<float4*>(&values[4 * threadIdx.x]) = {1.0f, 2.0f, 3.0f, 4.0f};
  out[threadIdx.x] = values[4 * threadIdx.x + 3];
}

void check_vectors_of_floats() {
  Buffer<float> out(32);
  LOSSOPS_LAUNCH(vectors_of_floats, 1, 32, nullptr, out.data());
}

// out (R): the first element of each row of a matrix with rows far apart.
template <Fault FAULT>
__global__ void first_of_rows(const char* x, int stride, float* out) {
  if (FAULT == Fault::kSignedIndex) {
    const int row = static_cast<int>(blockIdx.x);
    out[blockIdx.x] = x[row * stride];
  } else if (FAULT == Fault::kUnsignedIndex) {
    out[blockIdx.x] = x[blockIdx.x * static_cast<unsigned>(stride)];
  } else {
    out[blockIdx.x] = x[blockIdx.x * int64_t{stride}];
  }
}

template <Fault FAULT>
void check_first_of_rows() {
  const int64_t stride = int64_t{1} << 30, rows = 6;
  const size_t bytes = (rows - 1) * stride + 1;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  expect(memory != MAP_FAILED, "no address space");
  char* const x = static_cast<char*>(memory);
  Buffer<float> out(rows);
  for (int64_t i = 0; i < rows; ++i) x[i * stride] = static_cast<char>(i + 1);
  LOSSOPS_LAUNCH(first_of_rows<FAULT>, rows, 1, nullptr, x, static_cast<int>(stride), out.data());
  for (int64_t i = 0; i < rows; ++i) expect_near("first", out[i], i + 1.0, 0);
  munmap(memory, bytes);
}

__global__ void fill_shared() {
  LOSSOPS_SHARED(double, many, 7000);
  many[threadIdx.x] = 0.0;
}

void check_launches() {
  expect(cudaGetLastError() == cudaSuccess, "an error before any launch");
  const int64_t too_many = (int64_t{1} << 32) + 1;
  for (int64_t grid : {int64_t{0}, too_many}) {
    LOSSOPS_LAUNCH(fill_shared, grid, 1, nullptr);
    expect(cudaGetLastError() == cudaErrorInvalidConfiguration, "a grid that does not fit");
    expect(cudaGetLastError() == cudaSuccess, "an error is told twice");
  }
  LOSSOPS_LAUNCH(fill_shared, 1, 1025, nullptr);
  expect(cudaGetLastError() == cudaErrorInvalidConfiguration, "a block that does not fit");
}

void check(unsigned, const std::string& name) {
  const std::map<std::string, void (*)()> checks = {
      {"row_lse", check_row_lse<Fault::kNone>},
      {"reverse", check_reverse<Fault::kNone>},
      {"talk", check_talk<Fault::kNone>},
      {"pass_on", check_pass_on<Fault::kNone>},
      {"side_by_side", check_side_by_side<Fault::kNone>},
      {"first_of_rows", check_first_of_rows<Fault::kNone>},
      {"launches", check_launches},
      {"no barrier", check_row_lse<Fault::kNoBarrier>},
      {"no second barrier", check_row_lse<Fault::kNoSecondBarrier>},
      {"no warp barrier", check_reverse<Fault::kNoWarpBarrier>},
      {"divergent barrier", check_row_lse<Fault::kDivergentBarrier>},
      {"early exit", check_row_lse<Fault::kEarlyExit>},
      {"shared overrun", check_row_lse<Fault::kSharedOverrun>},
      {"global overrun", check_row_lse<Fault::kGlobalOverrun>},
      {"uninitialised shared memory", check_row_lse<Fault::kUninitialised>},
      {"two threads, one address", check_row_lse<Fault::kTwoThreads>},
      {"two blocks, one address", check_row_lse<Fault::kTwoBlocks>},
      {"shuffle from outside the mask", check_talk<Fault::kLaneOutside>},
      {"shuffle by a lane not in its mask", check_talk<Fault::kLaneNotInMask>},
      {"shuffle that lanes miss", check_talk<Fault::kMissingLanes>},
      {"order by a shuffle", check_pass_on<Fault::kShuffleOrders>},
      {"overlapping vectors", check_side_by_side<Fault::kOverlap>},
      {"misaligned vectors", check_side_by_side<Fault::kMisaligned>},
      {"vectors of shared floats", check_vectors_of_floats},
      {"signed index overflow", check_first_of_rows<Fault::kSignedIndex>},
      {"unsigned index overflow", check_first_of_rows<Fault::kUnsignedIndex>},
      {"too much shared memory", [] { LOSSOPS_LAUNCH(fill_shared, 1, 1, nullptr); }},
  };
  const auto found = checks.find(name);
  expect(found != checks.end(), "no such check: " + name);
  found->second();
}
