// Which columns of a block of rows are near, and the sums of what is far (lossops/near_far.py).
//
// M_ij = f_i B_ij, B the buffer. Column j of a block of rows is near where some |M_ij| > limit_i.
// Over its far columns, per group of classes:
//
//   r_i = Σ_j M_ij     c_j = Σ_i M_ij     and, where M has both signs, the same sums of |M_ij|
//
// Bytes: the buffer is read once; a strip of a block (128 rows of 8 vectors) stays in the cache for
// its second pass. Cost: 0.05 ns per logit and core of a 4 GHz AVX-512 processor. The sums of a row
// go strip by strip in double; a strip belongs to one thread, so the bits are always the same.
//
// Verified by tests/test_near_far.py against lossops/reference.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/passes.h"
#include "cpu/primitives.h"

namespace lossops {
namespace {

template <typename S>
struct Sums {
  bool* near;                                            // (n,)
  S *rows, *columns, *absolute_rows, *absolute_columns;  // the last two may be null
};

// One block of rows and one group of columns; whether a far value was negative.
template <typename S, bool kSigned>
bool sum_block(const S* b, int64_t stride, int64_t rows, int64_t n, const S* f, const S* h,
               const Sums<S>& out, int64_t row_step) {
  using V = Vec<S>;
  using A = Lane<V>;
  constexpr int64_t kVectors = 8, kWidth = V::size(), kColumns = kVectors * kWidth;
  std::vector<double> r(rows, 0), ra(kSigned ? rows : 0, 0);
  V lowest(0);
  for (int64_t column = 0; column < n; column += kColumns) {
    const int64_t columns = std::min(kColumns, n - column);
    const auto each = [&](auto&& f) LOSSOPS_INLINE_LAMBDA {
      if (columns == kColumns) {
        for (int64_t v = 0; v < kVectors; ++v) f(v, std::integral_constant<int64_t, kWidth>{});
      } else {
        for (int64_t v = 0; v * kWidth < columns; ++v) {
          f(v, std::min(kWidth, columns - v * kWidth));
        }
      }
    };
    V top[kVectors], sum[kVectors], absolute[kVectors], far[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) top[v] = sum[v] = absolute[v] = V(0);
    for (int64_t i = 0; i < rows; ++i) {
      const S* row = b + i * stride + column;
      const V factor(f[i]), over(h[i]);
      each([&](int64_t v, auto count) LOSSOPS_INLINE_LAMBDA {
        const V m = load(row + v * kWidth, count, S(0)) * factor;
        const V size = A::abs(m);
        top[v] = at::vec::maximum(top[v], size * over);
        sum[v] = sum[v] + m;
        if constexpr (kSigned) {
          absolute[v] = absolute[v] + size;
        } else {
          lowest = at::vec::minimum(lowest, m);
        }
      });
    }
    S lanes[kWidth];
    each([&](int64_t v, auto count) {
      far[v] = A::select(top[v] > V(1), V(0), V(1));
      top[v].store(lanes);
      for (int64_t k = 0; k < count; ++k) out.near[column + v * kWidth + k] = lanes[k] > 1;
      store(out.columns + column + v * kWidth, A::select(far[v] > V(0), sum[v], V(0)), count);
      if constexpr (kSigned) {
        store(out.absolute_columns + column + v * kWidth,
              A::select(far[v] > V(0), absolute[v], V(0)), count);
      }
    });
    for (int64_t i = 0; i < rows; ++i) {
      const S* row = b + i * stride + column;
      V total(0), size(0);
      each([&](int64_t v, auto count) LOSSOPS_INLINE_LAMBDA {
        const V m = A::select(far[v] > V(0), load(row + v * kWidth, count, S(0)), V(0));
        total = total + m;
        if constexpr (kSigned) size = size + A::abs(m);
      });
      r[i] += sum_of_lanes(total) * f[i];
      if constexpr (kSigned) ra[i] += sum_of_lanes(size) * std::abs(f[i]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    out.rows[i * row_step] = static_cast<S>(r[i]);
    if constexpr (kSigned) out.absolute_rows[i * row_step] = static_cast<S>(ra[i]);
  }
  S lanes[kWidth];
  lowest.store(lanes);
  return *std::min_element(lanes, lanes + kWidth) < 0;
}

// All blocks and groups; whether there was a negative value, which an unsigned sum cannot take.
template <typename S, bool kSigned>
bool sum_all(const Tensor& buffer, const Tensor& f, const Tensor& h, int64_t block, int64_t group,
             const Tensors& out) {
  const int64_t rows = buffer.size(0), classes = buffer.size(1), stride = buffer.stride(0);
  const int64_t blocks = (rows + block - 1) / block, groups = (classes + group - 1) / group;
  const S* data = buffer.template const_data_ptr<S>();
  const S *factors = f.template const_data_ptr<S>(), *overs = h.template const_data_ptr<S>();
  bool* near = out[0].template data_ptr<bool>();
  S* r = out[1].template data_ptr<S>();
  S* c = out[2].template data_ptr<S>();
  S* ra = kSigned ? out[3].template data_ptr<S>() : nullptr;
  S* ca = kSigned ? out[4].template data_ptr<S>() : nullptr;
  std::vector<char> negative(blocks * groups, 0);
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / groups, g = k % groups, row = b * block, first = g * group;
      const Sums<S> sums{near + b * classes + first, r + row * groups + g, c + b * classes + first,
                         kSigned ? ra + row * groups + g : nullptr,
                         kSigned ? ca + b * classes + first : nullptr};
      negative[k] = sum_block<S, kSigned>(
          data + row * stride + first, stride, std::min(block, rows - row),
          std::min(group, classes - first), factors + row, overs + row, sums, groups);
    }
  });
  return std::find(negative.begin(), negative.end(), 1) != negative.end();
}

template <typename S>
Tensors far_sums_of(const Tensor& buffer, const Tensor& row_factor, const Tensor& limit,
                    int64_t block, int64_t group) {
  const int64_t rows = buffer.size(0), classes = buffer.size(1);
  const int64_t blocks = (rows + block - 1) / block, groups = (classes + group - 1) / group;
  const auto options = buffer.options();
  const Tensor f = row_factor.to(options.dtype()).contiguous();
  // A limit of 0 makes all but 0 near, with a finite factor: 0 times it is 0.
  const Tensor h = limit.to(options.dtype()).reciprocal().clamp_max(1e30).contiguous();
  Tensors out{at::empty({blocks, classes}, options.dtype(at::kBool)),
              at::empty({rows, groups}, options), at::empty({blocks, classes}, options)};
  if (!sum_all<S, false>(buffer, f, h, block, group, out)) return out;
  out.push_back(at::empty({rows, groups}, options));
  out.push_back(at::empty({blocks, classes}, options));
  sum_all<S, true>(buffer, f, h, block, group, out);
  return out;
}

}  // namespace

Tensors far_sums(const Tensor& buffer, const Tensor& row_factor, const Tensor& limit, int64_t block,
                 int64_t group) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  TORCH_CHECK(buffer.dim() == 2 && (buffer.stride(1) == 1 || buffer.size(1) == 1) &&
                  (buffer.scalar_type() == at::kFloat || buffer.scalar_type() == at::kDouble),
              "buffer must be float32 or float64 of shape (R, V) with dense rows, got ",
              buffer.scalar_type(), " ", buffer.sizes());
  TORCH_CHECK(row_factor.dim() == 1 && row_factor.size(0) == buffer.size(0) &&
                  limit.sizes() == row_factor.sizes(),
              "row_factor and limit must have shape (", buffer.size(0), ",), got ",
              row_factor.sizes(), " and ", limit.sizes());
  TORCH_CHECK(block > 0 && group > 0, "block and group must be at least 1, got ", block, " and ",
              group);
  return (buffer.scalar_type() == at::kDouble
              ? far_sums_of<double>
              : far_sums_of<float>)(buffer, row_factor, limit, block, group);
}

}  // namespace lossops
