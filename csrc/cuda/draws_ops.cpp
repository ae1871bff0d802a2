// Ops of lossops_cuda on draws of class ids: what lossops/cuda_draws.py calls. Outputs come
// allocated; a draw is as long as its output.
#include "cuda/draws.h"
#include "cuda/tensors.h"

namespace lossops {
namespace {

bool* flags(const char* name, const Tensor& t) { return data<bool>(name, t, ScalarType::Bool); }

template <typename Draw>
void draw_into(const Draw& one, const Tensor& ids_) {
  const OnDevice device(ids_);
  draw(one, ids_.numel(), ids("ids", ids_), device.stream());
  check_launch("a draw");
}

uint64_t bits(int64_t key) { return static_cast<uint64_t>(key); }

void draw_permuted_op(int64_t key, int64_t count, const Tensor& ids) {
  STD_TORCH_CHECK(ids.numel() <= count, "num must be in [0, ", count, "], got ", ids.numel());
  draw_into(Permutation(bits(key), count), ids);
}

void draw_uniform_op(int64_t key, int64_t count, const Tensor& ids) {
  draw_into(UniformDraw{bits(key), count}, ids);
}

void draw_log_uniform_op(int64_t key, int64_t count, double log2, const Tensor& ids) {
  draw_into(LogUniformDraw{bits(key), count, log2}, ids);
}

void draw_alias_op(int64_t key, const Tensor& threshold, const Tensor& alias, const Tensor& ids_) {
  check_devices(ids_, threshold, alias);
  check_size("alias", alias, threshold.numel());
  draw_into(
      AliasDraw{bits(key), threshold.numel(),
                data<double>("threshold", threshold, ScalarType::Double), ids("alias", alias)},
      ids_);
}

void mark_first_op(const Tensor& sorted, const Tensor& order, const Tensor& first) {
  check_devices(sorted, order, first);
  check_size("order", order, sorted.numel());
  check_size("first", first, sorted.numel());
  const OnDevice device(sorted);
  mark_first(ids("sorted", sorted), ids("order", order), sorted.numel(), flags("first", first),
             device.stream());
  check_launch("mark_first");
}

void take_first_op(const Tensor& draws, const Tensor& first, const Tensor& rank, const Tensor& ids_,
                   const Tensor& tries) {
  check_devices(draws, first, rank, ids_, tries);
  check_size("first", first, draws.numel());
  check_size("rank", rank, draws.numel());
  check_size("tries", tries, 1);
  const OnDevice device(draws);
  take_first({ids("draws", draws), flags("first", first), ids("rank", rank), draws.numel(),
              ids_.numel(), ids("ids", ids_), ids("tries", tries)},
             device.stream());
  check_launch("take_first");
}

void find_positions_op(const Tensor& ids_, const Tensor& wanted, const Tensor& found) {
  check_devices(ids_, wanted, found);
  check_size("found", found, wanted.numel());
  const OnDevice device(ids_);
  find_positions(ids("ids", ids_), ids_.numel(), ids("wanted", wanted), wanted.numel(),
                 ids("found", found), device.stream());
  check_launch("find_positions");
}

void find_hits_op(const Tensor& drawn, const Tensor& target, const Tensor& hit) {
  check_devices(drawn, target, hit);
  const int64_t n = drawn.size(0);
  STD_TORCH_CHECK(drawn.dim() == 2 && target.dim() == 2 && target.size(0) == n,
                  "drawn must have shape (N, S) and target (N, K), got ", n, " and ",
                  target.size(0), " rows");
  check_size("hit", hit, drawn.numel());
  const OnDevice device(drawn);
  find_hits({ids("drawn", drawn), ids("target", target), n, drawn.size(1), target.size(1),
             flags("hit", hit)},
            device.stream());
  check_launch("find_hits");
}

}  // namespace
}  // namespace lossops

STABLE_TORCH_LIBRARY_FRAGMENT(lossops_cuda, m) {
  m.def("draw_permuted(int key, int count, Tensor(a!) ids) -> ()");
  m.def("draw_uniform(int key, int count, Tensor(a!) ids) -> ()");
  m.def("draw_log_uniform(int key, int count, float log2, Tensor(a!) ids) -> ()");
  m.def("draw_alias(int key, Tensor threshold, Tensor alias, Tensor(a!) ids) -> ()");
  m.def("mark_first(Tensor sorted, Tensor order, Tensor(a!) first) -> ()");
  m.def(
      "take_first(Tensor draws, Tensor first, Tensor rank, Tensor(a!) ids, "
      "Tensor(b!) tries) -> ()");
  m.def("find_positions(Tensor ids, Tensor wanted, Tensor(a!) found) -> ()");
  m.def("find_hits(Tensor drawn, Tensor target, Tensor(a!) hit) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lossops_cuda, LOSSOPS_DEVICE, m) {
  m.impl("draw_permuted", TORCH_BOX(&lossops::draw_permuted_op));
  m.impl("draw_uniform", TORCH_BOX(&lossops::draw_uniform_op));
  m.impl("draw_log_uniform", TORCH_BOX(&lossops::draw_log_uniform_op));
  m.impl("draw_alias", TORCH_BOX(&lossops::draw_alias_op));
  m.impl("mark_first", TORCH_BOX(&lossops::mark_first_op));
  m.impl("take_first", TORCH_BOX(&lossops::take_first_op));
  m.impl("find_positions", TORCH_BOX(&lossops::find_positions_op));
  m.impl("find_hits", TORCH_BOX(&lossops::find_hits_op));
}
