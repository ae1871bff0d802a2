#include "cpu/half.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <vector>

namespace lossops {
namespace {

using Half = at::BFloat16;

constexpr int64_t kStrip = 64;   // columns of a strip of the packed matrix
constexpr int64_t kDepth = 256;  // K of a micro-kernel: its strip, 32 KiB, stays in the first cache
constexpr int64_t kBlock = 128;  // M of a micro-kernel
constexpr int64_t kLanes = at::vec::Vectorized<float>::size();

int64_t even(int64_t n) { return n + (n & 1); }

// A right-hand matrix (K, N) as the micro-kernels read it: strips of 64 columns; in a strip, for
// each pair of rows, the two values of every column side by side. What is ragged ends in zeros.
class Packed {
 public:
  Packed(int64_t k, int64_t n, const Tensor& like)
      : k_(even(k)),
        n_(n),
        words_(at::empty({strips(), k_ / 2, kStrip}, like.options().dtype(at::kInt))) {}

  int64_t k() const { return k_; }
  int64_t n() const { return n_; }
  int64_t strips() const { return (n_ + kStrip - 1) / kStrip; }
  uint32_t* strip(int64_t s) {
    return reinterpret_cast<uint32_t*>(words_.data_ptr<int32_t>()) + s * (k_ / 2) * kStrip;
  }
  const Half* block(int64_t s, int64_t first_k) const {
    const auto* words = words_.const_data_ptr<int32_t>() + (s * (k_ / 2) + first_k / 2) * kStrip;
    return reinterpret_cast<const Half*>(words);
  }

 private:
  int64_t k_, n_;
  Tensor words_;
};

const uint16_t* bits(const Tensor& t) {
  return reinterpret_cast<const uint16_t*>(t.const_data_ptr<Half>());
}

// to (n, m) = from (m, n)ᵀ, both of 32-bit words.
void transpose(const uint32_t* from, int64_t from_stride, int64_t m, int64_t n, uint32_t* to,
               int64_t to_stride) {
  for (int64_t i = 0; i < m; i += kLanes) {
    for (int64_t j = 0; j < n; j += kLanes) {
      const int mm = static_cast<int>(std::min(kLanes, m - i));
      const int nn = static_cast<int>(std::min(kLanes, n - j));
      at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from + i * from_stride + j),
                                    from_stride, reinterpret_cast<float*>(to + j * to_stride + i),
                                    to_stride, mm, nn);
    }
  }
}

// matrix (K, N): pairs of its rows.
Packed pack(const Tensor& matrix) {
  const int64_t k = matrix.size(0), n = matrix.size(1), stride = matrix.stride(0);
  Packed packed(k, n, matrix);
  const uint16_t* from = bits(matrix);
  at::parallel_for(0, packed.strips(), 1, [&](int64_t begin, int64_t end) {
    const std::vector<uint16_t> zeros(kStrip, 0);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t count = std::min(kStrip, n - s * kStrip);
      uint32_t* to = packed.strip(s);
      for (int64_t row = 0; row < k; row += 2, to += kStrip) {
        const uint16_t* low = from + row * stride + s * kStrip;
        const uint16_t* high = row + 1 < k ? low + stride : zeros.data();
        for (int64_t j = 0; j < count; ++j) {
          to[j] = static_cast<uint32_t>(high[j]) << 16 | low[j];
        }
        std::fill(to + count, to + kStrip, 0u);
      }
    }
  });
  return packed;
}

// matrixᵀ for a matrix (N, K), K even: a pair is one word of a row.
Packed pack_transposed(const Tensor& matrix) {
  const int64_t n = matrix.size(0), k = matrix.size(1), stride = matrix.stride(0);
  Packed packed(k, n, matrix);
  const uint16_t* from = bits(matrix);
  at::parallel_for(0, packed.strips(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t count = std::min(kStrip, n - s * kStrip);
      uint32_t* to = packed.strip(s);
      if (count < kStrip) std::fill(to, to + k / 2 * kStrip, 0u);
      // A row starts at an even element, so its pairs are aligned words.
      const auto* words = reinterpret_cast<const uint32_t*>(from + s * kStrip * stride);
      transpose(words, stride / 2, count, k / 2, to, kStrip);
    }
  });
  return packed;
}

std::atomic<bool> portable{false};

bool multiplies_bfloat16() {
  static const bool found = [] {
    const auto capabilities = at::cpu::get_cpu_capabilities();
    const auto has = [&](const char* name) {
      const auto at = capabilities.find(name);
      return at != capabilities.end() && at->second.isBool() && at->second.toBool();
    };
    return (has("amx_bf16") && has("amx_tile") && at::cpu::init_amx()) || has("avx512_bf16");
  }();
  return found;
}

// c (m, n) (+)= a (m, k) b, b in a strip: ATen's brgemm, or in plain loops for tests.
void micro_kernel(int64_t m, int64_t n, int64_t k, const Half* a, int64_t a_stride, const Half* b,
                  float* c, int64_t c_stride, bool accumulate) {
  if (!portable) {
    at::native::cpublas::brgemm(m, n, k, a_stride, kStrip, c_stride, accumulate, a, b, c, true);
    return;
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * c_stride + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l) {
        sum += static_cast<float>(a[i * a_stride + l]) *
               static_cast<float>(b[(l / 2 * kStrip + j) * 2 + l % 2]);
      }
      c[i * c_stride + j] = sum;
    }
  }
}

// c (M, N) (+)= scale · a (M, K) b; a row of a is readable up to b.k().
void multiply(Tensor& c, const Half* a, int64_t a_stride, const Packed& b, bool accumulate,
              float scale) {
  const int64_t m = c.size(0), n = b.n(), stride = c.stride(0);
  float* out = c.data_ptr<float>();
  const int64_t blocks = (m + kBlock - 1) / kBlock;
  // Blocks of rows are shared out where there are enough, else strips; a sum is never split.
  const bool by_rows = blocks >= 2 * at::get_num_threads();
  const auto part = [&](int64_t block, int64_t s) {
    const int64_t row = block * kBlock, rows = std::min(kBlock, m - row);
    const int64_t columns = std::min(kStrip, n - s * kStrip);
    float* to = out + row * stride + s * kStrip;
    for (int64_t k = 0; k < b.k(); k += kDepth) {
      micro_kernel(rows, columns, std::min(kDepth, b.k() - k), a + row * a_stride + k, a_stride,
                   b.block(s, k), to, stride, accumulate || k > 0);
    }
    if (scale == 1.0f) return;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[i * stride + j] *= scale;
    }
  };
  at::parallel_for(0, by_rows ? blocks : b.strips(), 1, [&](int64_t begin, int64_t end) {
    const int64_t first_block = by_rows ? begin : 0, last_block = by_rows ? end : blocks;
    const int64_t first_strip = by_rows ? 0 : begin, last_strip = by_rows ? b.strips() : end;
    for (int64_t s = first_strip; s < last_strip; ++s) {
      for (int64_t block = first_block; block < last_block; ++block) part(block, s);
    }
    if (!portable) at::native::cpublas::brgemm_release(true);  // this thread's tile registers
  });
}

// Nearest bfloat16, ties to even, as bits; NaN stays NaN. Branchless, for the compiler to
// vectorise.
inline uint32_t round_bits(float value) {
  const auto u = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
  return (u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
}

// Rows further apart are copied: on AVX-512 brgemm asks for memory of its stride's size.
constexpr int64_t kMaxStride = 1 << 24;

// A matrix of even width whose rows are dense, not far apart, and start at even elements.
Tensor paired(const Tensor& matrix) {
  const bool fits = matrix.stride(1) == 1 && matrix.stride(0) % 2 == 0 &&
                    matrix.stride(0) <= kMaxStride &&
                    reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 4 == 0;
  return fits ? matrix : matrix.clone(at::MemoryFormat::Contiguous);
}

// The bits of a value of dz, which may be rounded already.
inline uint32_t round_bits(uint16_t bits) { return bits; }

// dz (R, T) rounded, rows padded with a zero to an even length.
Tensor rounded(const Tensor& dz) {
  if (dz.scalar_type() == at::kBFloat16 && dz.size(1) % 2 == 0) return paired(dz);
  if (dz.scalar_type() == at::kBFloat16) return at::constant_pad_nd(dz, {0, 1});
  const int64_t rows = dz.size(0), n = dz.size(1), width = even(n), stride = dz.stride(0);
  Tensor out = at::empty({rows, width}, dz.options().dtype(at::kBFloat16));
  const float* from = dz.const_data_ptr<float>();
  auto* to = reinterpret_cast<uint16_t*>(out.data_ptr<Half>());
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = from + i * stride;
      uint16_t* at = to + i * width;
      for (int64_t j = 0; j < n; ++j) at[j] = static_cast<uint16_t>(round_bits(row[j]));
      if (n < width) at[n] = 0;
    }
  });
  return out;
}

// dzᵀ (T, R) rounded, rows padded likewise. Pairs of rows of dz become words, and words transpose.
template <typename T>
Tensor rounded_transposed(const Tensor& dz, const T* from) {
  const int64_t rows = dz.size(0), n = dz.size(1), width = even(rows), stride = dz.stride(0);
  Tensor out = at::empty({n, width}, dz.options().dtype(at::kBFloat16));
  auto* to = reinterpret_cast<uint32_t*>(out.data_ptr<Half>());
  const int64_t words = width / 2;
  constexpr int64_t kColumns = 16 * kLanes;
  at::parallel_for(0, (n + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> pairs(kLanes * kColumns);
    const std::vector<T> zeros(kColumns, T(0));
    for (int64_t column = begin * kColumns; column < std::min(n, end * kColumns);
         column += kColumns) {
      const int64_t count = std::min(kColumns, n - column);
      for (int64_t word = 0; word < words; word += kLanes) {
        const int64_t height = std::min(kLanes, words - word);
        for (int64_t i = 0; i < height; ++i) {
          const int64_t row = 2 * (word + i);
          const T* low = from + row * stride + column;
          const T* high = row + 1 < rows ? low + stride : zeros.data();
          uint32_t* pair = pairs.data() + i * kColumns;
          for (int64_t j = 0; j < count; ++j)
            pair[j] = round_bits(high[j]) << 16 | round_bits(low[j]);
        }
        transpose(pairs.data(), kColumns, height, count, to + column * words + word, words);
      }
    }
  });
  return out;
}

Tensor dense(const Tensor& matrix) {
  return matrix.stride(1) == 1 ? matrix : matrix.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

bool half_products(at::ScalarType x, at::ScalarType w, int64_t d) {
  if (x != at::kBFloat16 || w != at::kBFloat16 || d % 2 != 0 || d == 0) return false;
  return portable || (multiplies_bfloat16() && at::globalContext().userEnabledMkldnn());
}

void portable_half_products(bool on) { portable = on; }

void half_logits(Tensor& z, const Tensor& x, const Tensor& w, float scale) {
  const Tensor rows = paired(x);
  const Packed packed = pack_transposed(paired(w));
  multiply(z, rows.const_data_ptr<Half>(), rows.stride(0), packed, false, scale);
}

void half_row_logits(Tensor& z, const Tensor& x, const Tensor& w, const Tensor& ids, float scale) {
  const Tensor rows = paired(x);
  const int64_t stride = rows.stride(0);
  for (int64_t first = 0; first < x.size(0); first += kStrip) {
    const int64_t n = std::min(kStrip, x.size(0) - first);
    const Packed packed = pack_transposed(w.index_select(0, ids.narrow(0, first, n)));
    Tensor block = at::empty({n, n}, z.options());
    multiply(block, rows.const_data_ptr<Half>() + first * stride, stride, packed, false, scale);
    z.narrow(0, first, n).copy_(block.diagonal());
  }
}

void half_dx(Tensor& dx, const Tensor& dz, const Tensor& w, bool accumulate) {
  const Tensor rows = rounded(dz);
  multiply(dx, rows.const_data_ptr<Half>(), rows.stride(0), pack(dense(w)), accumulate, 1.0f);
}

void half_dw(Tensor& dw, const Tensor& dz, const Tensor& x, bool accumulate) {
  const Tensor columns = dz.scalar_type() == at::kBFloat16
                             ? rounded_transposed(dz, bits(dz))
                             : rounded_transposed(dz, dz.const_data_ptr<float>());
  multiply(dw, columns.const_data_ptr<Half>(), columns.stride(0), pack(dense(x)), accumulate, 1.0f);
}

}  // namespace lossops
