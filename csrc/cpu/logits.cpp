// The two primitives on logits that exist, of any floating dtype and any strides.
//
// A tile of a row is widened into 8 KiB of scratch and goes through the row passes there. Bytes:
// one read of the logits for the statistics, one read and one write for the gradient, which may go
// into the logits themselves. Verified by tests/test_cpu_backend.py.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "cpu/primitives.h"
#include "cpu/statistics.h"
#include "cpu/targets.h"

namespace lossops {
namespace {

constexpr int64_t kTile = 2048;

// pass(row, z, first, n, scratch) for the tiles of each row in order, then done(row).
template <typename S, typename F, typename G>
void each_tile(const Task<S>& task, const Operand& logits, F&& pass, G&& done) {
  const int64_t tile = std::min(kTile, task.classes);
  at::parallel_for(0, task.rows, row_grain(task.classes), [&](int64_t begin, int64_t end) {
    std::vector<S> z(tile), scratch(tile);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < task.classes; first += tile) {
        const int64_t n = std::min(tile, task.classes - first);
        logits.load(row, first, n, z.data());
        pass(row, z.data(), first, n, scratch.data());
      }
      done(row);
    }
  });
}

template <typename S>
Tensors logits_statistics_of(const Tensor& z, const MaybeTensor& target,
                             const MaybeTensor& class_vector, const MaybeTensor& teacher,
                             const Names& names) {
  const Task<S> task(z.size(0), z.size(1), target, class_vector, teacher, std::nullopt, 0, names);
  const auto options = z.options().dtype(c10::CppTypeToScalarType<S>::value);
  const auto tensors = allocate_statistics(names, task.rows, target, options);
  const Fields<S> out(names, {tensors.begin(), tensors.end()});
  std::vector<RowState<S>> states(task.rows, RowState<S>(task.log_sums.size()));
  const Operand logits(z);
  for (int64_t row = 0; out.below_target != nullptr && row < task.rows; ++row) {
    const int64_t y = task.targets == 0 ? -1 : task.target_row(row)[0];
    states[row].knows_target = true;
    if (y >= 0 && y < task.classes) logits.load(row, y, 1, &states[row].first_target);
  }
  each_tile(
      task, logits,
      [&](int64_t row, S* tile, int64_t first, int64_t n, S* scratch) {
        collect(task, out, states[row], row, tile, first, n, Kept(), scratch);
      },
      [&](int64_t row) { finish(task, out, states[row], row); });
  return tensors;
}

template <typename S>
void logits_gradient_of(const Tensor& z, const MaybeTensor& target, const MaybeTensor& class_vector,
                        const MaybeTensor& teacher, const Names& names,
                        const MaybeTensors& statistics, const MaybeTensors& coefficients,
                        const Tensor& out) {
  const Task<S> task(z.size(0), z.size(1), target, class_vector, teacher, std::nullopt, 0, names);
  const Fields<S> statistic(names, statistics), coefficient(names, coefficients);
  const Chain<S> chain{task, statistic, coefficient};
  const Operand to(out);
  each_tile(
      task, Operand(z),
      [&](int64_t row, S* tile, int64_t first, int64_t n, S* scratch) {
        gradient(chain, row, InPlace<S>{tile}, first, n, scratch);
        for (int64_t k = 0; k < task.targets; ++k) {
          const int64_t at = task.target_row(row)[k] - first;
          if (at >= 0 && at < n) tile[at] = target_gradient(chain, row, k);
        }
        to.store(row, first, n, tile);
      },
      [](int64_t) {});
}

void check_logits(const Tensor& z) {
  TORCH_CHECK(z.dim() == 2 && z.is_floating_point(),
              "logits must be floating of shape (N, V), got ", z.scalar_type(), " ", z.sizes());
}

}  // namespace

Tensors logits_statistics(const Tensor& z, const MaybeTensor& target,
                          const MaybeTensor& class_vector, const MaybeTensor& teacher,
                          const Names& names) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_logits(z);
  return (z.scalar_type() == at::kDouble
              ? logits_statistics_of<double>
              : logits_statistics_of<float>)(z, target, class_vector, teacher, names);
}

void logits_gradient(const Tensor& z, const MaybeTensor& target, const MaybeTensor& class_vector,
                     const MaybeTensor& teacher, const Names& names, const MaybeTensors& statistics,
                     const MaybeTensors& coefficients, const Tensor& out) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_logits(z);
  TORCH_CHECK(out.sizes() == z.sizes() && out.is_floating_point(), "out must be floating of shape ",
              z.sizes(), ", got ", out.scalar_type(), " ", out.sizes());
  (z.scalar_type() == at::kDouble ? logits_gradient_of<double>
                                  : logits_gradient_of<float>)(z, target, class_vector, teacher,
                                                               names, statistics, coefficients,
                                                               out);
}

}  // namespace lossops
