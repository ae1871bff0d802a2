// CUDA on a CPU, for tests: the words of CUDA that kernels here use, with a fiber for every thread.
//
// csrc/cuda/device.h includes this in the place of CUDA's runtime; types come from NVIDIA's own
// headers. Blocks run one after the other, and the threads of a block take turns, in an order that
// a seed shuffles. What a GPU leaves undefined is a fault here, an std::runtime_error of the launch
// that names kernel, block and thread: threads that wait for each other for ever, a barrier that
// part of a block reaches, a shuffle from a lane outside its mask, an index that overflows 32 bits.
// With race_detector.cpp so is an access that no barrier orders, or of shared memory that nobody
// wrote; what leaves an allocation is AddressSanitizer's to find.
//
// Not modelled: weak memory order, caches, speed. Products and sums are not fused into fma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <math.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <type_traits>

#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __shared__  // in a kernel: LOSSOPS_SHARED
#define __constant__ static const
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#ifdef __SANITIZE_THREAD__
// All that a kernel calls is inlined. The compiler does not report the access where a call takes or
// returns an object of a class in memory, such as a __half.
#define __global__ __attribute__((flatten))
#else
#define __global__
#endif
#define __host__
#define __launch_bounds__(...)

namespace cuda_emulator {

constexpr unsigned kWarp = 32;

// Ends the launch: what the running thread does is a fault, at the code that called. May not throw,
// since the compiler believes that of the calls which -fsanitize=thread inserts.
[[noreturn]] void fail(const char* what);

// One number of an index: unsigned, as in CUDA, but its sums and products may not wrap. C++ lets
// unsigned numbers wrap, so no sanitizer sees `blockIdx.x * columns` do it.
struct Component {
  unsigned value;
  operator unsigned() const { return value; }
};

template <typename A, typename B>
auto checked_product(A a, B b) {
  decltype(a * b) product;
  if (__builtin_mul_overflow(a, b, &product)) fail("the product of an index overflows");
  return product;
}

template <typename A, typename B>
auto checked_sum(A a, B b) {
  decltype(a + b) sum;
  if (__builtin_add_overflow(a, b, &sum)) fail("the sum of an index overflows");
  return sum;
}

inline auto operator*(Component a, Component b) { return checked_product(a.value, b.value); }
inline auto operator+(Component a, Component b) { return checked_sum(a.value, b.value); }
auto operator*(Component a, std::integral auto b) { return checked_product(a.value, b); }
auto operator+(Component a, std::integral auto b) { return checked_sum(a.value, b); }
auto operator*(std::integral auto a, Component b) { return checked_product(a, b.value); }
auto operator+(std::integral auto a, Component b) { return checked_sum(a, b.value); }

struct Index {
  Component x, y, z;
};

// Where the running thread is.
struct Position {
  Index thread, block, block_dim, grid_dim;
};
extern Position position;

// Sizes of a launch, before a number that does not fit is cut to 32 bits.
struct Size {
  int64_t x, y = 1, z = 1;
  Size(dim3 size) : x(size.x), y(size.y), z(size.z) {}
  Size(std::integral auto size) : x(static_cast<int64_t>(size)) {}
};

// Runs body(argument) once for every thread of every block.
void run(const char* kernel, Size grid, Size block, void (*body)(void*), void* argument);

// As CUDA does it: arguments are evaluated once, and every thread has its own copies.
template <typename Kernel, typename... Arguments>
void launch(const char* name, Size grid, Size block, cudaStream_t, Kernel kernel,
            Arguments... arguments) {
  auto thread = [&] { kernel(arguments...); };
  using Thread = decltype(thread);
  run(name, grid, block, [](void* it) { (*static_cast<Thread*>(it))(); }, &thread);
}

// The block's array declared at `site`: filled with NaN, an allocation of its own, and aligned no
// better than asked.
void* shared_array(const void* site, size_t bytes, size_t alignment);

// Waits for all threads of the block.
void block_barrier();

// What the lanes of a mask do together once all of them are there.
enum class Together { kOrder, kShuffle, kVote };

// Waits for the lanes of the mask. kShuffle: the value, of `bytes` bytes, becomes that of lane
// `source`. kVote: the value, an unsigned, becomes a bit for each lane whose value was not zero.
void warp_meeting(Together together, const char* name, unsigned mask, void* value, size_t bytes,
                  int source);

int lane();

// These and what calls them are inlined, so that the code which waits is the kernel's.

// The shuffle whose source would be `source`: lanes that would leave their segment keep their own.
template <typename T>
__forceinline__ T shuffle(const char* name, unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  if (source < 0 || source / width != lane() / width) source = lane();
  warp_meeting(Together::kShuffle, name, mask, &value, sizeof(T), source);
  return value;
}

__forceinline__ unsigned vote(const char* name, unsigned mask, bool yes) {
  unsigned value = yes;
  warp_meeting(Together::kVote, name, mask, &value, sizeof(value), 0);
  return value;
}

// Order of blocks and threads in launches from now on; 0 is that of their numbers.
void set_seed(unsigned seed);

}  // namespace cuda_emulator

#define LOSSOPS_LAUNCH(kernel, grid, block, stream, ...)                       \
  cuda_emulator::launch(#kernel, grid, block, stream, [&](auto... arguments) { \
    kernel(arguments...);                                                      \
  } __VA_OPT__(, ) __VA_ARGS__)

#define LOSSOPS_SHARED(T, name, n) \
  static char name##_site;         \
  T(&name)                         \
  [n] = *static_cast<T(*)[n]>(cuda_emulator::shared_array(&name##_site, sizeof(T[n]), alignof(T)))

inline const cuda_emulator::Index& threadIdx = cuda_emulator::position.thread;
inline const cuda_emulator::Index& blockIdx = cuda_emulator::position.block;
inline const cuda_emulator::Index& blockDim = cuda_emulator::position.block_dim;
inline const cuda_emulator::Index& gridDim = cuda_emulator::position.grid_dim;
constexpr int warpSize = cuda_emulator::kWarp;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

__forceinline__ void __syncthreads() { cuda_emulator::block_barrier(); }

__forceinline__ void __syncwarp(unsigned mask = ~0u) {
  cuda_emulator::warp_meeting(cuda_emulator::Together::kOrder, "__syncwarp", mask, nullptr, 0, 0);
}

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int first = cuda_emulator::lane() / width * width;
  return cuda_emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), width);
}

template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  const int source = cuda_emulator::lane() ^ bits;
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, source, width);
}

template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
  const int source = cuda_emulator::lane() + static_cast<int>(by);
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, source, width);
}

template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
  const int source = cuda_emulator::lane() - static_cast<int>(by);
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, source, width);
}

__forceinline__ unsigned __ballot_sync(unsigned mask, int yes) {
  return cuda_emulator::vote("__ballot_sync", mask, yes);
}
__forceinline__ int __any_sync(unsigned mask, int yes) {
  return cuda_emulator::vote("__any_sync", mask, yes) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int yes) {
  return cuda_emulator::vote("__all_sync", mask, !yes) == 0;
}

// Kernels here have the same bits in every run, which sums in the order of arrival have not.
template <typename... T>
void atomicAdd(T...) = delete;
template <typename... T>
void atomicMax(T...) = delete;
template <typename... T>
void atomicMin(T...) = delete;
template <typename... T>
void atomicCAS(T...) = delete;
template <typename... T>
void atomicExch(T...) = delete;

// Device functions that a host compiler lacks.

template <typename A, typename B>
auto min(A a, B b) {
  using T = std::common_type_t<decltype(a * 1), decltype(b * 1)>;
  if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));
  return T(a) < T(b) ? T(a) : T(b);
}

template <typename A, typename B>
auto max(A a, B b) {
  using T = std::common_type_t<decltype(a * 1), decltype(b * 1)>;
  if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(uint64_t x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<uint64_t>(x)); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t{a} * b >> 32; }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Rounded to nearest and never fused: this needs -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// Of less precision on a GPU; macros, since glibc has declared some of these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(a, b) __fdiv_rn(a, b)
