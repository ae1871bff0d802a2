// Reading and writing a row by vectors of 16 bytes, wherever the row begins.
//
// Vectors lie on the 16-byte boundaries of memory: vector k of a row that begins `offset` elements
// after one has the classes k · kSize - offset + [0, kSize). Only the first and the last may hold
// what is not of the row, and are read one by one. No element is read twice.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/logits.h"
#include "cuda/state.h"
#include "row.h"

namespace lossops {

template <typename T>
struct Row {
  static constexpr int kSize = Vector<T>::kSize;
  const T* begin;
  int classes, offset, vectors;

  __device__ __forceinline__ Row(const T* begin, int classes)
      : begin(begin),
        classes(classes),
        offset(static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T))),
        vectors((offset + classes + kSize - 1) / kSize) {}

  __device__ __forceinline__ int first(int vector) const { return vector * kSize - offset; }

  // Vectors of each of `parts` parts, the last of which may have fewer: at most 2^28 and 2^16, and
  // a division of 64 bits is a call.
  __device__ __forceinline__ int per_part(int parts) const {
    return static_cast<int>(static_cast<unsigned>(vectors + parts - 1) /
                            static_cast<unsigned>(parts));
  }

  // Whether all elements of a vector are of the row.
  __device__ __forceinline__ bool is_whole(int vector) const {
    return first(vector) >= 0 && first(vector) + kSize <= classes;
  }

  // Elements of a whole vector.
  __device__ __forceinline__ void load(int vector, float* out) const {
    const Vector<T> found = *reinterpret_cast<const Vector<T>*>(begin + first(vector));
    for (int i = 0; i < kSize; ++i) out[i] = to_float(found.element[i]);
  }

  // Elements of any vector, 0 where there is none; bits of those there are.
  __device__ __forceinline__ unsigned load_some(int vector, float* out) const {
    const int at = first(vector);
    unsigned there = 0;
    for (int i = 0; i < kSize; ++i) {
      const bool inside = at + i >= 0 && at + i < classes;
      out[i] = inside ? to_float(begin[at + i]) : 0.0f;
      there |= static_cast<unsigned>(inside) << i;
    }
    return there;
  }
};

// kSize elements from `out[at]` on, those whose bits are set; as one vector where `whole`.
template <int kSize, typename Out>
__device__ __forceinline__ void store(Out* out, int at, const float* value, unsigned there,
                                      bool whole) {
  using Packed = std::conditional_t<kSize * sizeof(Out) == 16, uint4, uint2>;
  static_assert(kSize * sizeof(Out) == sizeof(Packed));
  if (whole && there == (1u << kSize) - 1) {
    Out rounded[kSize];
    for (int i = 0; i < kSize; ++i) rounded[i] = from_float<Out>(value[i]);
    Packed packed;
    memcpy(&packed, rounded, sizeof packed);
    Packed* to = reinterpret_cast<Packed*>(out + at);
#ifdef __CUDA_ARCH__
    __stwb(to, packed);  // an assignment would be compiled to a store of each element or word
#else
    *to = packed;
#endif
    return;
  }
  for (int i = 0; i < kSize; ++i) {
    if (there >> i & 1) out[at + i] = from_float<Out>(value[i]);
  }
}

// An element of a matrix whose type is known at run time only.
__device__ __forceinline__ float element(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kHalf:
      return to_float(static_cast<const __half*>(data)[at]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// z of products r. Nothing is fused: every kernel must find the same bits, or statistics and
// gradients, targets and negatives, would be of different logits.
struct LogitMap {
  float scale, softcap;
  const float* b;

  __device__ __forceinline__ explicit LogitMap(const Logits& logits)
      : scale(logits.scale == nullptr ? 1.0f : *logits.scale),
        softcap(logits.softcap),
        b(logits.b) {}

  // In place of the products of a tile, where a branch costs least.
  template <int kTile, int kVector>
  __device__ __forceinline__ void apply(Tile<kTile, kVector>& tile) const {
    for (int i = 0; i < kTile; ++i) tile.z[i] = __fmul_rn(tile.z[i], scale);
    if (b != nullptr) {
      for (int i = 0; i < kTile; ++i) {
        tile.z[i] = __fadd_rn(tile.z[i], tile.is_valid(i) ? b[tile.id(i)] : 0.0f);
      }
    }
    if (softcap != 0) {
      for (int i = 0; i < kTile; ++i) tile.z[i] = lossops::softcap(tile.z[i], softcap);
    }
  }

  __device__ __forceinline__ float of(float r, int id) const {
    const float scaled = __fmul_rn(r, scale), z = b == nullptr ? scaled : __fadd_rn(scaled, b[id]);
    return softcap == 0 ? z : lossops::softcap(z, softcap);
  }
};

// A tile of the row that begins with vector v, `hop` vectors apart, those below `end`.
template <int kTile, typename T>
__device__ __forceinline__ Tile<kTile, Row<T>::kSize> load_tile(const Row<T>& row, int v, int hop,
                                                                int end) {
  constexpr int kSize = Row<T>::kSize, kVectors = kTile / kSize;
  Tile<kTile, kSize> tile;
  tile.first = row.first(v);
  tile.hop = hop * kSize;
  const int last = v + (kVectors - 1) * hop;
  if (last < end && row.is_whole(v) && row.is_whole(last)) {
    for (int u = 0; u < kVectors; ++u) row.load(v + u * hop, tile.z + u * kSize);
    return tile;
  }
  tile.valid = 0;
  for (int u = 0; u < kVectors; ++u) {
    if (v + u * hop < end) {
      tile.valid |= row.load_some(v + u * hop, tile.z + u * kSize) << (u * kSize);
    } else {
      for (int i = 0; i < kSize; ++i) tile.z[u * kSize + i] = 0;
    }
  }
  return tile;
}

// Targets of a row among the `classes` classes from `first_class` on; most rows have one.
struct RowTargets {
  const int64_t* ids;
  int64_t first_class;
  int count, classes, one;

  __device__ __forceinline__ RowTargets(const Sides& sides, int64_t row, int64_t first_class,
                                        int classes)
      : ids(sides.targets + row * sides.num_targets),
        first_class(first_class),
        count(sides.num_targets),
        classes(classes),
        one(count > 0 ? read(0) : -1) {}

  // Counted from the first class; -1 for a target that is not among these.
  __device__ __forceinline__ int at(int k) const { return k == 0 ? one : read(k); }

  // f(i, k) for every class i of a tile that is target k; most tiles have none.
  template <int kTile, int kVector, typename F>
  __device__ __forceinline__ void each(const Tile<kTile, kVector>& tile, F f) const {
    for (int k = 0; k < count; ++k) {
      const int y = at(k), away = y - tile.first;
      if (y < 0 || away < 0 || away >= (kTile / kVector - 1) * tile.hop + kVector) continue;
      for (int i = 0; i < kTile; ++i) {
        if (tile.id(i) == y) f(i, k);
      }
    }
  }

 private:
  __device__ __forceinline__ int read(int k) const {
    const int64_t local = ids[k] - first_class;
    return local >= 0 && local < classes ? static_cast<int>(local) : -1;
  }
};

}  // namespace lossops
