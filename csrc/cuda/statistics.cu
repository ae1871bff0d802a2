// Statistics of rows of logits that exist: one read of each logit.
//
//   rows of up to 32 · 16 logits    one warp each
//   longer ones                     one block of 256 threads each, 128 where all is collected
//   few and long ones               `parts` blocks each, then a kernel that merges their states
//
// A thread reads vectors of 16 bytes, 16 logits at a time where little is done for a logit and one
// vector where much is, keeps a state (state.h), and states merge by shuffles, through shared
// memory and in the order of the parts: the same bits every time. Bytes: those of the logits and,
// with a teacher, of it; 32-bit words of a state for each part and row.
#include <type_traits>

#include "cuda/logits.h"
#include "cuda/state.h"
#include "cuda/vectors.h"

namespace lossops {
namespace {

constexpr int kTileLogits = 16;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Sets that are compiled; a call takes the first that has all it asks for. Products are float32;
// logits that exist may be half precision, with fewer sets.
constexpr unsigned kPlain = keep::kLse;
constexpr unsigned kTwoSums = keep::kLse | keep::kOneLogSum;
constexpr unsigned kExtremes = keep::kLse | keep::kMax | keep::kRunnerUp | keep::kBelowTarget;
constexpr unsigned kSoftmaxed = keep::kLse | keep::kEntropy | keep::kMax | keep::kSum;
constexpr unsigned kMoments = keep::kLse | keep::kMax | keep::kSum | keep::kSumsq;
constexpr unsigned kBinary = keep::kMax | keep::kSoftplus;
constexpr unsigned kStable = keep::kStableSum;
constexpr unsigned kSecond = keep::kLse | keep::kEntropy | keep::kVariance;
constexpr unsigned kTaught = keep::kLse | keep::kWeightedSum | keep::kTeacher;
constexpr unsigned kFourSums = keep::kLse | keep::kOneLogSum | keep::kFourLogSums;
constexpr unsigned kEverything =
    kExtremes | kSoftmaxed | kMoments | kBinary | kStable | kSecond | kTaught | kFourSums;

template <unsigned... kSets>
struct Sets {};
using FloatSets = Sets<kPlain, kTwoSums, kStable, kBinary, kSoftmaxed, kMoments, kSecond, kTaught,
                       kFourSums, kExtremes, kEverything>;
using HalfSets = Sets<kPlain, kSoftmaxed, kEverything>;

template <unsigned kKept>
constexpr bool kRich = kKept == kEverything;

// Threads of a block, and blocks that a multiprocessor has registers for. Left to itself nvcc 13.0
// aims at 64 registers and spills a few words.
template <unsigned kKept>
constexpr int kThreads = kRich<kKept> ? 128 : 256;
template <unsigned kKept>
constexpr int kBlocks = kKept == kPlain || kKept == kTwoSums || kRich<kKept> ? 3 : 2;
constexpr int kMergeThreads = 64;

// f(std::integral_constant of the set).
template <typename F, unsigned kFirst, unsigned... kRest>
void with_set(Sets<kFirst, kRest...>, unsigned kept, F f) {
  if ((kept & ~kFirst) == 0) return f(std::integral_constant<unsigned, kFirst>());
  if constexpr (sizeof...(kRest) > 0) with_set(Sets<kRest...>(), kept, f);
}

// f(an element of the type, the set).
template <typename F>
void with_type_and_set(Dtype dtype, unsigned kept, F f) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using Compiled = std::conditional_t<std::is_same_v<T, float>, FloatSets, HalfSets>;
    with_set(Compiled(), kept, [&](auto set) { f(zero, set); });
  });
}

// Lane 0 gets the states of its warp, merged in the order of the lanes.
template <unsigned kKept>
__device__ __forceinline__ State<kKept> merge_lanes(State<kKept> state, const LogSums& log_sums) {
  for (int step = 1; step < 32; step *= 2) {
    State<kKept> other = state;
    other.each([step](auto& word) { word = __shfl_down_sync(0xffffffffu, word, step); });
    state = merge(state, other, log_sums);
  }
  return state;
}

__device__ __forceinline__ void put(float* values, int row_of, int64_t rows, int64_t row, float x) {
  values[row_of * rows + row] = x;
}

// Sums over all classes of a row are relative to one of 32 of its logits, the first that is not far
// below the largest of them: any may be masked, by -inf or by a number such as -1e9. The k-th, -inf
// for none:
constexpr float kFar = 64;

__device__ __forceinline__ float probe(const Logits& logits, const LogitMap& map, int64_t row,
                                       int k) {
  const int id = k * ((logits.classes + 31) / 32);
  if (id >= logits.classes) return -kInf<float>;
  return map.of(element(logits.r, logits.dtype, row * logits.stride + id), id);
}

// All lanes of a warp together.
__device__ __forceinline__ float pivot_of(const Logits& logits, const LogitMap& map, int64_t row) {
  const float own = probe(logits, map, row, threadIdx.x % 32);
  float largest = own;
  for (int step = 1; step < 32; step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  const unsigned near = __ballot_sync(0xffffffffu, own >= largest - kFar);
  return finite(__shfl_sync(0xffffffffu, own, near == 0 ? 0 : __ffs(near) - 1));
}

// What a caller gets, relative to the shift; -1 for no id.
template <unsigned kKept>
__device__ void finish(const StatisticsCall& call, const State<kKept>& s, int64_t row,
                       float pivot) {
  using S = State<kKept>;
  const int64_t n = call.logits.rows;
  const float shift = s.shift();
  const double up = static_cast<double>(pivot) - shift;
  auto moved = [up](const Sum& sum, const Sum& weight) {
    return static_cast<float>(sum.value() + weight.value() * up);
  };
  auto id_of = [](int id) { return id == kNoId ? int64_t(-1) : int64_t(id); };
  put(call.values, kShift, n, row, shift);
  if constexpr (S::has(keep::kLse)) put(call.values, kLseRow, n, row, logf(s.sum));
  if constexpr (S::has(keep::kEntropy)) put(call.values, kMeanRow, n, row, s.mean);
  if constexpr (S::has(keep::kVariance)) {
    put(call.values, kVarianceRow, n, row, s.spread / (s.sum == 0 ? 1 : s.sum));
  }
  if constexpr (S::has(keep::kMax)) {
    put(call.values, kMaxRow, n, row, s.top - shift);
    call.ids[row] = id_of(s.best);
  }
  if constexpr (S::has(keep::kRunnerUp)) {
    put(call.values, kRunnerUpRow, n, row, s.second.value - shift);
    call.ids[n + row] = id_of(s.second.id);
  }
  if constexpr (S::has(keep::kBelowTarget)) {
    put(call.values, kBelowTargetRow, n, row, s.below.value - shift);
    call.ids[2 * n + row] = id_of(s.below.id);
  }
  if constexpr (S::has(keep::kSum)) {
    put(call.values, kAverageRow, n, row, static_cast<float>(s.average + up));
  }
  if constexpr (S::has(keep::kSumsq)) put(call.values, kMomentRow, n, row, s.moment);
  if constexpr (S::has(keep::kSoftplus)) put(call.values, kSoftplusRow, n, row, s.softplus);
  if constexpr (S::has(keep::kStableSum)) put(call.values, kStableSumRow, n, row, s.stable);
  if constexpr (S::has(keep::kWeightedSum)) {
    put(call.values, kWeightedSumRow, n, row, moved(s.weighted, s.weights));
  }
  if constexpr (S::has(keep::kTeacher)) {
    put(call.values, kTeacherRow, n, row, moved(s.taught, s.teacher));
  }
  for (int k = 0; k < S::kSums; ++k) {
    if (k >= call.log_sums.count) continue;
    const float from = call.log_sums.limit[k] < kInf<float> ? finite(s.largest[k]) - shift : 0;
    put(call.values, kValueRows + k, n, row, logf(s.power[k]) + from);
  }
}

// A state of a part of a row, word by word, rows side by side; after them what it is relative to.
template <unsigned kKept>
constexpr int kPartWords = State<kKept>::kWords + 1;

template <unsigned kKept>
__device__ __forceinline__ float* words_of(const StatisticsCall& call, int part, int64_t row) {
  return call.states + static_cast<int64_t>(part) * kPartWords<kKept> * call.logits.rows + row;
}

__device__ __forceinline__ void write_word(float* at, float x) { *at = x; }
__device__ __forceinline__ void write_word(float* at, int x) { *at = __int_as_float(x); }
__device__ __forceinline__ void read_word(const float* at, float& x) { x = *at; }
__device__ __forceinline__ void read_word(const float* at, int& x) { x = __float_as_int(*at); }

template <unsigned kKept>
__device__ __forceinline__ void write_state(float* words, int64_t hop, State<kKept> state) {
  state.each([&](auto& word) {
    write_word(words, word);
    words += hop;
  });
}

template <unsigned kKept>
__device__ __forceinline__ State<kKept> read_state(const float* words, int64_t hop) {
  State<kKept> state;
  state.each([&](auto& word) {
    read_word(words, word);
    words += hop;
  });
  return state;
}

// z of the row's targets: -inf for none, NaN for an id that is no class.
template <typename T>
__device__ float target_logit(const Row<T>& row, const LogitMap& map, int64_t id) {
  if (id < 0) return -kInf<float>;
  if (id >= row.classes) return kNaN;
  return map.of(to_float(row.begin[id]), static_cast<int>(id));
}

template <typename T, unsigned kKept>
__global__ void __launch_bounds__(kThreads<kKept>, kBlocks<kKept>)
    statistics_kernel(StatisticsCall call) {
  using S = State<kKept>;
  constexpr int kSize = Row<T>::kSize;
  constexpr int kTile = kRich<kKept> ? kSize : kTileLogits;
  LOSSOPS_SHARED(float, shared, kThreads<kKept> / 32 * S::kWords);

  const int part = blockIdx.y;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Warps beyond the last row read it again and write nothing: all threads reach the barrier.
  const int64_t row = number < call.logits.rows ? number : call.logits.rows - 1;
  const Row<T> logits(static_cast<const T*>(call.logits.r) + row * call.logits.stride,
                      call.logits.classes);
  const LogitMap map(call.logits);
  const RowTargets targets(call.sides, row, 0, call.logits.classes);
  const int64_t teacher_row = row * call.sides.teacher_stride;

  float at_target = -kInf<float>;
  if (S::has(keep::kBelowTarget) && targets.count > 0) {
    at_target = target_logit(logits, map, targets.ids[0]);
  }
  const float pivot = S::has(keep::kSum | keep::kWeightedSum | keep::kTeacher)
                          ? pivot_of(call.logits, map, row)
                          : 0;
  S state;
  const int per_part = logits.per_part(call.parts);
  const int begin = part * per_part;
  const int end = begin + per_part < logits.vectors ? begin + per_part : logits.vectors;
  for (int v = begin + threadIdx.x; v < end; v += blockDim.x * (kTile / kSize)) {
    auto tile = load_tile<kTile>(logits, v, blockDim.x, end);
    map.apply(tile);
    targets.each(tile, [&](int i, int) { tile.targets |= 1u << i; });
    if constexpr (S::has(keep::kWeightedSum | keep::kTeacher)) {
      for (int i = 0; i < kTile; ++i) {
        tile.a[i] = tile.t[i] = 0;
        if (!tile.is_valid(i)) continue;
        const int id = tile.id(i);
        if (call.sides.class_vector != nullptr) tile.a[i] = call.sides.class_vector[id];
        if (call.sides.teacher == nullptr) continue;
        const float t = element(call.sides.teacher, call.sides.teacher_dtype, teacher_row + id);
        tile.t[i] = call.sides.class_vector == nullptr ? t : t * tile.a[i];
      }
    }
    state = merge(state, state_of<kKept>(tile, at_target, pivot, call.log_sums), call.log_sums);
  }

  state = merge_lanes(state, call.log_sums);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (warps > 1) {
    if (lane == 0) write_state(shared + warp * S::kWords, 1, state);
    __syncthreads();
    if (warp > 0) return;
    state = lane < warps ? read_state<kKept>(shared + lane * S::kWords, 1) : S();
    state = merge_lanes(state, call.log_sums);
  }
  if (number >= call.logits.rows) return;
  if (part == 0 && call.at_target != nullptr) {
    for (int k = lane; k < targets.count; k += 32) {
      call.at_target[row * targets.count + k] = target_logit(logits, map, targets.ids[k]);
    }
  }
  if (lane > 0) return;
  if (call.parts == 1) {
    finish(call, state, row, pivot);
  } else {
    float* words = words_of<kKept>(call, part, row);
    write_state(words, call.logits.rows, state);
    words[S::kWords * call.logits.rows] = pivot;
  }
}

// The parts of a row in their order; one thread a row.
template <unsigned kKept>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(StatisticsCall call) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (row >= call.logits.rows) return;
  const int64_t hop = call.logits.rows;
  State<kKept> state;
  for (int part = 0; part < call.parts; ++part) {
    const State<kKept> other = read_state<kKept>(words_of<kKept>(call, part, row), hop);
    state = merge(state, other, call.log_sums);
  }
  // All parts have the same.
  finish(call, state, row, words_of<kKept>(call, 0, row)[State<kKept>::kWords * hop]);
}

}  // namespace

int state_words(Dtype dtype, unsigned kept) {
  int words = 0;
  with_type_and_set(dtype, kept, [&](auto, auto set) { words = kPartWords<set()>; });
  return words;
}

cudaError_t why_no_kernels() {
#ifdef LOSSOPS_EMULATE
  return cudaSuccess;
#else
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, merge_kernel<kPlain>);
  cudaGetLastError();  // or the next launch would seem to have failed
  return error;
#endif
}

void logits_statistics(const StatisticsCall& call, cudaStream_t stream) {
  const bool is_short = call.parts == 1 && call.logits.classes <= 32 * kTileLogits;
  const int64_t rows = call.logits.rows;
  with_type_and_set(call.logits.dtype, call.kept, [&](auto zero, auto set) {
    constexpr unsigned kKept = set(), kAll = kThreads<kKept>;
    const dim3 block = is_short ? dim3(32, kAll / 32) : dim3(kAll, 1);
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, block.y)), call.parts);
    LOSSOPS_LAUNCH((statistics_kernel<decltype(zero), kKept>), grid, block, stream, call);
    if (call.parts > 1) {
      const dim3 blocks(static_cast<unsigned>(ceil_div(rows, kMergeThreads)));
      LOSSOPS_LAUNCH(merge_kernel<kKept>, blocks, dim3(kMergeThreads), stream, call);
    }
  });
}

}  // namespace lossops
