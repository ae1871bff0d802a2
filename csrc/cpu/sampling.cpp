// Samples of class ids on the CPU; the arithmetic of a draw is in csrc/sampling.h.
//
// S draws cost O(S) time and memory whatever V is. Distinct ids are the first S that appear among
// draws 0, 1, ...: a table of ids seen, at most half full, tells repeats.
#include "sampling.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <tuple>
#include <vector>

#include "cpu/primitives.h"

namespace lossops {
namespace {

Tensor ids_of(int64_t n) { return at::empty({n}, at::kLong); }

// Ids seen, by open addressing.
class Seen {
 public:
  explicit Seen(int64_t capacity) {
    uint64_t size = 16;
    while (size < 2 * static_cast<uint64_t>(capacity)) size *= 2;
    slots_.assign(size, -1);
  }
  // Whether the id is new.
  bool insert(int64_t id) {
    const uint64_t mask = slots_.size() - 1;
    uint64_t at = mix(static_cast<uint64_t>(id)) & mask;
    while (slots_[at] >= 0) {
      if (slots_[at] == id) return false;
      at = (at + 1) & mask;
    }
    slots_[at] = id;
    return true;
  }

 private:
  std::vector<int64_t> slots_;
};

template <typename Draw>
std::tuple<Tensor, int64_t> draws(const Draw& draw, int64_t num, bool unique, int64_t most) {
  const Tensor ids = ids_of(num);
  int64_t* out = ids.data_ptr<int64_t>();
  if (!unique) {
    at::parallel_for(0, num, 4096, [&](int64_t begin, int64_t end) {
      const Draw of = draw;  // which no store to `out` can change: the loop has lanes
      for (int64_t t = begin; t < end; ++t) out[t] = of(t);
    });
    return {ids, num};
  }
  Seen seen(num);
  int64_t found = 0, tries = 0;
  for (; found < num && tries < most; ++tries) {
    const int64_t id = draw(tries);
    if (seen.insert(id)) out[found++] = id;
  }
  return {ids, found < num ? -1 : tries};
}

uint64_t bits(int64_t key) { return static_cast<uint64_t>(key); }

}  // namespace

Tensor sample_permuted(int64_t key, int64_t count, int64_t num) {
  TORCH_CHECK(0 <= num && num <= count, "num must be in [0, ", count, "], got ", num);
  const Tensor ids = ids_of(num);
  int64_t* out = ids.data_ptr<int64_t>();
  const Permutation permutation(bits(key), count);
  at::parallel_for(0, num, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) out[k] = static_cast<int64_t>(permutation(k));
  });
  return ids;
}

Tensor sample_uniform(int64_t key, int64_t count, int64_t num) {
  return std::get<0>(draws(UniformDraw{bits(key), count}, num, false, num));
}

std::tuple<Tensor, int64_t> sample_log_uniform(int64_t key, int64_t count, double log2, int64_t num,
                                               bool unique, int64_t most) {
  return draws(LogUniformDraw{bits(key), count, log2}, num, unique, most);
}

std::tuple<Tensor, int64_t> sample_alias(int64_t key, const Tensor& threshold, const Tensor& alias,
                                         int64_t num, bool unique, int64_t most) {
  TORCH_CHECK(threshold.dim() == 1 && threshold.scalar_type() == at::kDouble &&
                  threshold.is_contiguous() && alias.sizes() == threshold.sizes() &&
                  alias.scalar_type() == at::kLong && alias.is_contiguous(),
              "threshold (V,) must be float64 and alias (V,) int64, both dense, got ",
              threshold.scalar_type(), " ", threshold.sizes(), " and ", alias.scalar_type(), " ",
              alias.sizes());
  const AliasDraw draw{bits(key), threshold.size(0), threshold.const_data_ptr<double>(),
                       alias.const_data_ptr<int64_t>()};
  return draws(draw, num, unique, most);
}

std::tuple<Tensor, Tensor> alias_table(const Tensor& probability) {
  TORCH_CHECK(probability.dim() == 1 && probability.scalar_type() == at::kDouble &&
                  probability.is_contiguous(),
              "probability must be float64 of shape (V,), got ", probability.scalar_type(), " ",
              probability.sizes());
  const int64_t v = probability.size(0);
  const Tensor threshold = at::mul(probability, static_cast<double>(v)), alias = at::arange(v);
  double* height = threshold.data_ptr<double>();
  int64_t* other = alias.data_ptr<int64_t>();
  std::vector<int64_t> small, large;
  for (int64_t i = 0; i < v; ++i) (height[i] < 1.0 ? small : large).push_back(i);
  while (!small.empty() && !large.empty()) {
    const int64_t low = small.back(), high = large.back();
    small.pop_back();
    other[low] = high;
    height[high] -= 1.0 - height[low];
    if (height[high] >= 1.0) continue;
    large.pop_back();
    small.push_back(high);
  }
  for (const auto& rest : {small, large}) {  // what rounding left over
    for (const int64_t i : rest) height[i] = 1.0;
  }
  return {threshold, alias};
}

}  // namespace lossops
