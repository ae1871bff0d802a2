// What the programs of this folder share: memory of exactly the size that a kernel is told, numbers
// to fill it, and comparisons with a plain loop.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace program {

// n elements in an allocation of their own, whose bytes are all ones: NaN, or -1. What has over a
// gigabyte, for rows that are far apart, takes no memory until it is touched.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : n_(n) {
    if (is_huge()) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* const mapped = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, flags, -1, 0);
      if (mapped == MAP_FAILED) throw std::runtime_error("no room for rows that are far apart");
      data_ = static_cast<T*>(mapped);
    } else {
      data_ = static_cast<T*>(malloc(bytes()));
      memset(static_cast<void*>(data_), 0xff, bytes());
    }
  }
  Buffer(int64_t n, T value) : Buffer(n) {
    for (T& x : *this) x = value;
  }
  ~Buffer() {
    if (is_huge()) {
      munmap(data_, bytes());
    } else {
      free(data_);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  int64_t size() const { return n_; }
  T* begin() { return data_; }
  T* end() { return data_ + n_; }
  T& operator[](int64_t i) { return data_[i]; }
  bool is_huge() const { return bytes() >> 30 > 0; }

 private:
  size_t bytes() const { return n_ * sizeof(T); }

  T* data_;
  int64_t n_;
};

// Elements between rows so that some are 2^31 or more from the first of five.
constexpr int64_t kFar = int64_t{1} << 29;

// Rows that begin `skip` elements after 16 bytes and end `gap` before the next, the last with the
// memory; only rows may be touched.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, int64_t skip, int64_t gap)
      : rows(rows), columns(columns), stride(columns + gap), skip_(skip), memory_(size()) {
    if (rows == 0 || memory_.is_huge()) return;
    ASAN_POISON_MEMORY_REGION(memory_.data(), skip * sizeof(T));
    for (T* end = data() + columns; end < memory_.end(); end += stride) {
      ASAN_POISON_MEMORY_REGION(end, gap * sizeof(T));
    }
  }
  Matrix(int64_t rows, int64_t columns, int64_t skip, int64_t gap, T value)
      : Matrix(rows, columns, skip, gap) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(&(*this)(i, 0), columns, value);
  }

  const int64_t rows, columns, stride;
  T* data() { return memory_.data() + skip_; }
  T& operator()(int64_t i, int64_t j) { return data()[i * stride + j]; }

 private:
  int64_t size() const { return rows == 0 ? 0 : skip_ + (rows - 1) * stride + columns; }

  int64_t skip_;
  Buffer<T> memory_;
};

// Where the matrices of a call begin and how far apart their rows are: all of them, or number
// `only` of those that are made while the others lie on 16 bytes.
struct Places {
  int64_t skip = 0, gap = 0;
  int only = -1, made = 0;

  template <typename T, typename... Value>
  Matrix<T> matrix(int64_t rows, int64_t columns, Value... value) {
    const bool here = made++ == only || only < 0;
    return Matrix<T>(rows, columns, here ? skip : 0, here ? gap : 0, value...);
  }
};

// The Dtype of a type.
template <typename T>
constexpr lossops::Dtype kDtype = lossops::Dtype::kFloat;
template <>
constexpr lossops::Dtype kDtype<__half> = lossops::Dtype::kHalf;
template <>
constexpr lossops::Dtype kDtype<__nv_bfloat16> = lossops::Dtype::kBFloat16;

inline std::mt19937_64 draw;

// Normal numbers, rounded to the type.
template <typename T>
void fill_normal(Buffer<T>& buffer, float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  for (T& x : buffer) x = lossops::from_float<T>(normal(draw));
}

template <typename T>
void fill_normal(Matrix<T>& matrix, float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    for (int64_t j = 0; j < matrix.columns; ++j) {
      matrix(i, j) = lossops::from_float<T>(normal(draw));
    }
  }
}

// Ids in [0, end).
inline void fill_ids(Buffer<int64_t>& buffer, int64_t end) {
  std::uniform_int_distribution<int64_t> ids(0, end - 1);
  for (int64_t& id : buffer) id = ids(draw);
}

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

inline void expect_near(const std::string& name, double got, double wanted, double tolerance) {
  if (got == wanted || (std::isnan(got) && std::isnan(wanted))) return;
  expect(std::abs(got - wanted) <= tolerance * std::max(1.0, std::abs(wanted)),
         name + " is " + std::to_string(got) + ", not " + std::to_string(wanted));
}

}  // namespace program

// What a program does; `seed` is that of its numbers and of the order of blocks and threads. A
// further argument is in `name`.
void check(unsigned seed, const std::string& name);

int main(int count, char** arguments) {
  const auto seed = static_cast<unsigned>(count > 1 ? atoi(arguments[1]) : 0);
  program::draw.seed(seed);
  cuda_emulator::set_seed(seed);
  try {
    check(seed, count > 2 ? arguments[2] : "");
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
