// Which features of a row a thread works on, and how it loads and stores them.
//
// A row is cut into parts of 32·kSize features, one for each warp. Where all rows of a launch begin
// on 16 bytes and their width is whole vectors, a lane takes kSize neighbours in one access;
// otherwise kSize features that are 32 apart, so that the lanes of an access are neighbours still.
#pragma once

#include "cuda/rows.h"

namespace lossops {

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(__half x) { return __half_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

// The element of type U in the low bits.
template <typename U>
__device__ __forceinline__ U of_bits(uint32_t bits) {
  if constexpr (sizeof(U) == 4) return __uint_as_float(bits);
  const unsigned short low = static_cast<unsigned short>(bits);
  if constexpr (std::is_same_v<U, __half>) return __ushort_as_half(low);
  if constexpr (std::is_same_v<U, __nv_bfloat16>) return __ushort_as_bfloat16(low);
}

// kSize elements of a row of U, packed: an element of half precision takes half a register.
template <typename U, int kSize>
struct Elements {
  static constexpr int kInWord = 4 / sizeof(U), kWords = kSize / kInWord;
  uint32_t words[kWords];

  __device__ __forceinline__ U element(int k) const {
    return of_bits<U>(words[k / kInWord] >> 16 * (k % kInWord));
  }
  __device__ __forceinline__ void put(int k, U x) {
    uint32_t& word = words[k / kInWord];
    if constexpr (kInWord == 1) word = bits_of(x);
    if constexpr (kInWord == 2) {
      word = k % 2 == 0 ? (word & 0xffff0000u) | bits_of(x) : (word & 0xffffu) | bits_of(x) << 16;
    }
  }

  // From and to 16 bytes, or 32. An assignment would be compiled to four stores.
  __device__ __forceinline__ void load(const U* from) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 t = reinterpret_cast<const uint4*>(from)[i / 4];
      words[i] = t.x, words[i + 1] = t.y, words[i + 2] = t.z, words[i + 3] = t.w;
    }
  }
  __device__ __forceinline__ void store(U* to) const {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 t{words[i], words[i + 1], words[i + 2], words[i + 3]};
#ifdef __CUDA_ARCH__
      __stwb(reinterpret_cast<uint4*>(to) + i / 4, t);
#else
      reinterpret_cast<uint4*>(to)[i / 4] = t;
#endif
    }
  }

  __device__ __forceinline__ float operator[](int k) const { return to_float(element(k)); }
  __device__ __forceinline__ void set(int k, float x) { put(k, from_float<U>(x)); }
};

template <typename T>
class Features {
 public:
  static constexpr int kSize = Vector<T>::kSize, kPart = 32 * kSize;

  __device__ __forceinline__ Features(int part, int lane, int width, bool vectors)
      : first_(part * kPart + lane * (vectors ? kSize : 1)), width_(width), vectors_(vectors) {}

  // Zero beyond the row, and for no row.
  template <typename U>
  __device__ __forceinline__ Elements<U, kSize> load(const U* row) const {
    Elements<U, kSize> found{};
    if (vectors_) {
      if (row != nullptr && first_ < width_) found.load(row + first_);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int at = first_ + 32 * k;
        found.put(k, row != nullptr && at < width_ ? row[at] : from_float<U>(0.0f));
      }
    }
    return found;
  }

  template <typename U>
  __device__ __forceinline__ void store(U* row, const Elements<U, kSize>& values) const {
    if (vectors_) {
      if (first_ < width_) values.store(row + first_);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int at = first_ + 32 * k;
        if (at < width_) row[at] = values.element(k);
      }
    }
  }

 private:
  int first_, width_;
  bool vectors_;
};

// Sums of a lane's features.
template <typename T>
struct Floats {
  float value[Features<T>::kSize];
  __device__ __forceinline__ float& operator[](int k) { return value[k]; }
  __device__ __forceinline__ float operator[](int k) const { return value[k]; }
};

template <typename T>
__device__ __forceinline__ T* row(const Rows& rows, int64_t i) {
  return static_cast<T*>(rows.data) + i * rows.stride;
}

// Whether all rows, of elements U, begin on 16 bytes.
template <typename U>
bool is_aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * sizeof(U) % 16 == 0;
}

// The numbers of lanes 0 ... 31 in the same order in every lane.
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

}  // namespace lossops
