// What the sweeps over the tiles of x wᵀ share: how much is in flight, in which dtype the operands
// are taken, and the checks of a call.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/columns.h"
#include "cpu/half.h"
#include "cpu/primitives.h"
#include "cpu/products.h"
#include "cpu/statistics.h"

namespace lossops {

// Rows in flight at once where a call is not a chunk: with 2048 classes 16 MiB of logits.
constexpr int64_t kRowBlock = 2048;

// Half-precision rows of x, of w and of dw are each taken in float32, at most so many and so much
// of them: all the scratch there is, with the logits, is 4 to 64 MiB.
constexpr int64_t kUpcastRows = 1024, kUpcastBytes = 16 << 20;

template <typename S>
constexpr auto kDtype = c10::CppTypeToScalarType<S>::value;

// f(first, n) for the parts of [0, total).
template <typename F>
void each_part(int64_t total, int64_t part, F&& f) {
  for (int64_t first = 0; first < total; first += part) f(first, std::min(part, total - first));
}

// How many of at most `count` rows of D values are worked on at once.
inline int64_t rows_in_flight(const Head& head, int64_t count) {
  if (!at::isReducedFloatingType(head.x.scalar_type())) return count;
  const int64_t fit = kUpcastBytes / (4 * std::max<int64_t>(1, head.x.size(1)));
  return std::min({count, kUpcastRows, std::max<int64_t>(256, fit / 64 * 64)});
}

inline std::optional<double> factor(const MaybeTensor& scale) {
  if (!scale) return std::nullopt;
  return scale->item().toDouble();
}

// Scratch for the logits of a block of rows and a tile of classes. Its row stride is no power of
// two: the rows of a column would share a cache set.
template <typename S>
Tensor logits_scratch(const Task<S>& task, int64_t block, int64_t tile, const Tensor& like) {
  const int64_t stride = (std::min(task.classes, tile) + 31) / 16 * 16;
  return at::empty({std::min(task.rows, block), stride}, like.options().dtype(kDtype<S>));
}

// pass(row, z, scratch) for each row of the tile z (rows, n) of T; scratch (n,) is the thread's.
template <typename T, typename S = T, typename F>
void each_row(const Tensor& z, F&& pass) {
  const int64_t n = z.size(1), stride = z.stride(0);
  T* data = z.template data_ptr<T>();
  at::parallel_for(0, z.size(0), row_grain(n), [&](int64_t begin, int64_t end) {
    std::vector<S> scratch(n);
    for (int64_t row = begin; row < end; ++row) pass(row, data + row * stride, scratch.data());
  });
}

// The rows of a tile rounded as products of bfloat16 take them, where a call's are such.
template <typename S>
class RoundedTile {
 public:
  RoundedTile(bool on, int64_t rows, int64_t tile, const Tensor& like) {
    if (!on) return;
    stride_ = tile / 16 * 16 + 48;  // no power of two, as logits_scratch
    rows_ = at::empty({rows, stride_}, like.options().dtype(at::kBFloat16));
  }
  // Row i of dz (1, n), once it is done.
  void put(int64_t i, const S* dz, int64_t n) {
    if (rows_.defined()) narrow(dz, 1, n, row(i));
  }
  at::BFloat16* row(int64_t i) { return rows_.template data_ptr<at::BFloat16>() + i * stride_; }
  // What the products take: the rows that were put, or dz (R, n) as it is.
  Tensor operator()(const Tensor& dz) const {
    return rows_.defined() ? rows_.narrow(0, 0, dz.size(0)).narrow(1, 0, dz.size(1)) : dz;
  }

 private:
  int64_t stride_ = 0;
  Tensor rows_;
};

// How a call's products take x and w. Operands that are upcast carry the scale of the logits; the
// product of bfloat16 ones applies it to z, where it is not rounded.
struct Operands {
  at::ScalarType dtype;
  std::optional<double> scale;

  explicit Operands(const Head& head)
      : dtype(operand_dtype(head.x, head.w)), scale(factor(head.scale)) {}

  bool half() const { return dtype == at::kBFloat16; }
  double scale_of_z() const { return half() ? scale.value_or(1.0) : 1.0; }
  Rows x(const Head& head, int64_t block) const {
    return Rows(head.x, dtype, half() ? std::nullopt : scale, block);
  }
  Rows scaled_x(const Head& head, int64_t block) const { return Rows(head.x, dtype, scale, block); }
  Rows w(const Head& head, int64_t tile) const { return Rows(head.w, dtype, std::nullopt, tile); }
};

// The caller's dx, or dense rows in its stead that finish() copies into it.
class DenseRows {
 public:
  explicit DenseRows(const MaybeTensor& dx) : dx_(dx) {
    if (!dx) return;
    const bool dense = dx->stride(1) == 1 || dx->size(1) == 1;
    rows_ = dense ? *dx : at::empty(dx->sizes(), dx->options());
  }
  explicit operator bool() const { return dx_.has_value(); }
  Tensor& rows() { return rows_; }
  void finish() const {
    if (dx_ && !rows_.is_same(*dx_)) dx_->copy_(rows_);
  }

 private:
  MaybeTensor dx_;
  Tensor rows_;
};

inline void check_gradients(const Head& head, const MaybeTensor& dx, const MaybeTensor& dw,
                            const MaybeTensor& db, at::ScalarType dtype) {
  const Tensor &x = head.x, &w = head.w;
  TORCH_CHECK(!dx || (dx->sizes() == x.sizes() && dx->scalar_type() == dtype), "dx must be ", dtype,
              " of shape ", x.sizes(), ", got ", dx ? dx->sizes() : at::IntArrayRef(), " of ",
              dx ? dx->scalar_type() : dtype);
  TORCH_CHECK(!dw || dw->sizes() == w.sizes(), "dw must have shape ", w.sizes(), ", got ",
              dw ? dw->sizes() : at::IntArrayRef());
  TORCH_CHECK(!db || (db->dim() == 1 && db->size(0) == w.size(0)), "db must have shape (",
              w.size(0), ",), got ", db ? db->sizes() : at::IntArrayRef());
}

// Gradients of no rows or no classes; true when there is nothing else to do.
inline bool trivial(const Head& head, const MaybeTensor& dx, const MaybeTensor& dw,
                    const MaybeTensor& db, bool accumulate) {
  if (head.x.size(0) != 0 && head.w.size(0) != 0) return !dx && !dw && !db;
  if (dx) dx->zero_();
  if (dw && !accumulate) dw->zero_();
  if (db && !accumulate) db->zero_();
  return true;
}

inline void check(const Head& head, int64_t tile) {
  const Tensor &x = head.x, &w = head.w;
  TORCH_CHECK(x.dim() == 2 && x.is_floating_point(), "x must be floating of shape (N, D), got ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(w.dim() == 2 && w.size(1) == x.size(1), "w must have shape (V, ", x.size(1),
              "), as x is ", x.sizes(), ", got ", w.sizes());
  TORCH_CHECK(!head.b || (head.b->dim() == 1 && head.b->size(0) == w.size(0)),
              "b must have shape (", w.size(0), ",), as w is ", w.sizes(), ", got ",
              head.b ? head.b->sizes() : at::IntArrayRef());
  TORCH_CHECK(!head.scale || head.scale->numel() == 1, "scale must have one element, got ",
              head.scale ? head.scale->sizes() : at::IntArrayRef());
  TORCH_CHECK(tile > 0, "tile must be at least 1 class, got ", tile);
}

inline bool in_double(const Head& head) { return head.x.scalar_type() == at::kDouble; }

template <typename S>
Task<S> task_of(const Head& head) {
  return Task<S>(head.x.size(0), head.w.size(0), head.target, head.class_vector, head.teacher,
                 head.b, head.softcap, head.names);
}

// For a sweep with nothing to do after a tile.
constexpr auto kNothing = [](const auto&, int64_t) {};

// Gives the states the logits of their first targets before these are met, where a product of
// single rows has the bits that the tiles will have.
template <typename S>
bool look_ahead(const Task<S>& task, const Rows& x, const Rows& w, double scale,
                std::vector<RowState<S>>& states) {
  if constexpr (std::is_same_v<S, float>) {
    if (task.targets == 0 || x.dtype() != at::kBFloat16) return false;
    const Tensor ids = task.target_ids.select(1, 0).clamp(0, task.classes - 1);
    Tensor z = at::empty({task.rows}, x.matrix().options().dtype(at::kFloat));
    half_row_logits(z, x.matrix(), w.matrix(), ids, static_cast<float>(scale));
    auto* logits = z.data_ptr<float>();
    for (int64_t row = 0; row < task.rows; ++row) {
      const int64_t y = task.target_row(row)[0];
      states[row].knows_target = true;
      if (y < 0 || y >= task.classes) continue;
      map_logits(logits + row, 1, task.bias ? task.bias + y : nullptr, task.cap);
      states[row].first_target = logits[row];
    }
    return true;
  }
  return false;
}

// Statistics by tiles z_tile(row, rows, class, classes): class tiles outside, so that a tile of w
// serves all rows; after(z, first) sees each tile when its rows are done. `stored`: z_tile gives
// memory that holds on to its logits, so that a second look at them needs no product.
template <typename S, typename F, typename After>
void sweep(const Task<S>& task, Rows& x, Rows& w, double scale, int64_t tile, int64_t row_block,
           F&& z_tile, const Fields<S>& out, const Kept& keep, std::vector<RowState<S>>& states,
           After&& after, bool stored = false) {
  const auto each_tile = [&](auto&& pass, auto&& done) {
    each_part(task.classes, tile, [&](int64_t first, int64_t n) {
      const Tensor wt = w(first, n);
      each_part(task.rows, row_block, [&](int64_t row, int64_t rows) {
        const Tensor z = z_tile(row, rows, first, n);
        logits_tile(z, x(row, rows), wt, scale);
        each_row<S>(z, [&](int64_t i, S* zi, S* scratch) {
          map_logits(zi, n, task.bias ? task.bias + first : nullptr, task.cap);
          pass(row + i, zi, first, n, scratch);
        });
        done(z, first);
      });
    });
  };
  const bool ahead = out.below_target != nullptr && look_ahead(task, x, w, scale, states);
  each_tile([&](int64_t row, S* z, int64_t first, int64_t n,
                S* scratch) { collect(task, out, states[row], row, z, first, n, keep, scratch); },
            after);
  const auto mistaken = [](const RowState<S>& state) { return state.mistaken; };
  const bool again = out.below_target != nullptr &&
                     (!ahead || std::any_of(states.begin(), states.end(), mistaken));
  const auto below = [&](int64_t row, S* z, int64_t first, int64_t n, S*) {
    drop_targets(task, row, z, first, n);
    merge_below(states[row], z, first, n);
  };
  if (again) {
    for (auto& state : states) {
      state.below = -kInf<S>;
      state.below_index = -1;
    }
  }
  if (again && stored) {
    each_part(task.classes, tile, [&](int64_t first, int64_t n) {
      each_part(task.rows, row_block, [&](int64_t row, int64_t rows) {
        each_row<S>(z_tile(row, rows, first, n),
                    [&](int64_t i, S* z, S* scratch) { below(row + i, z, first, n, scratch); });
      });
    });
  } else if (again) {
    // The same products have the same bits, so ties with the target are ties here too.
    each_tile(below, kNothing);
  }
  for (int64_t row = 0; row < task.rows; ++row) finish(task, out, states[row], row);
}

// Statistics of all rows, no logits kept; after(z, first) as in sweep().
template <typename S, typename After>
Tensors statistics_of(const Head& head, int64_t tile, After&& after) {
  const Task<S> task = task_of<S>(head);
  const Tensors tensors =
      allocate_statistics(head.names, task.rows, head.target, head.x.options().dtype(kDtype<S>));
  const Fields<S> out(head.names, {tensors.begin(), tensors.end()});
  std::vector<RowState<S>> states(task.rows, RowState<S>(task.log_sums.size()));
  const Operands operands(head);
  const int64_t block = rows_in_flight(head, kRowBlock);
  tile = rows_in_flight(head, tile);
  Rows x = operands.x(head, block), w = operands.w(head, tile);
  const Tensor scratch = logits_scratch(task, block, tile, head.x);
  const auto z_tile = [&](int64_t, int64_t rows, int64_t, int64_t n) {
    return scratch.narrow(0, 0, rows).narrow(1, 0, n);
  };
  sweep(task, x, w, operands.scale_of_z(), tile, block, z_tile, out, Kept(), states, after);
  return tensors;
}

// Gradients by tiles of logits that pass(row, z, first, n, scratch) turns into dz: dx and dw by
// GEMM while the tile is in cache, the targets apart. Class tiles outside: dw is rounded once.
template <typename S, typename Pass>
void sweep_gradient(const Head& head, const Chain<S>& chain, const MaybeTensor& dx,
                    const MaybeTensor& dw, const MaybeTensor& db, int64_t tile, Pass&& pass) {
  const Task<S>& task = chain.task;
  const Operands operands(head);
  const int64_t block = rows_in_flight(head, kRowBlock);
  tile = rows_in_flight(head, tile);
  Rows x = operands.x(head, block), w = operands.w(head, tile);
  const bool apart = operands.half() && operands.scale.has_value();
  Rows scaled_x = apart ? operands.scaled_x(head, block) : x;
  const Tensor scratch = logits_scratch(task, block, tile, head.x);
  DenseRows by_row(dx);
  RoundedTile<S> rounded(operands.half(), std::min(task.rows, block), std::min(task.classes, tile),
                         head.x);
  ClassGradient<S> by_class(chain, dw, db, false, tile, head.x, factor(head.scale));
  each_part(task.classes, tile, [&](int64_t first, int64_t n) {
    const Tensor wt = w(first, n);
    by_class.begin(first, n);
    each_part(task.rows, block, [&](int64_t row, int64_t rows) {
      const Tensor z = scratch.narrow(0, 0, rows).narrow(1, 0, n), part = x(row, rows);
      logits_tile(z, part, wt, operands.scale_of_z());
      each_row<S>(z, [&](int64_t i, S* zi, S* rest) {
        map_logits(zi, n, task.bias ? task.bias + first : nullptr, task.cap);
        pass(row + i, zi, first, n, rest);
        rounded.put(i, zi, n);
      });
      const Tensor dz = rounded(z);
      if (by_row) dx_tile(by_row.rows().narrow(0, row, rows), dz, wt, first > 0);
      if (dw || db) by_class.add(dz, z, apart ? scaled_x(row, rows) : part, nullptr);
    });
    if (dw || db) by_class.end();
  });
  if (!by_row) return;
  add_targets_to_rows(chain, Operand(head.w), by_row.rows());
  by_row.finish();
}

}  // namespace lossops
