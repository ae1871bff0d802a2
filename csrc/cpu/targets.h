// The targets' part of the gradient, kept out of the tiles: value (N, K) of dr at the target ids.
//
//   dx_n += value_nk w_y      dw_y += value_nk x_n      db_y += value_nk        y = target_nk
//
// Bytes: a row of w and of x read and one of dx and of dw updated per target; no atomics: dx goes
// by rows, dw by runs of equal ids after a stable sort, so the sums have one order.
#pragma once

#include <vector>

#include "cpu/gradient.h"

namespace lossops {

template <typename S>
struct TargetEntry {
  int64_t id, row;
  S value;
};

// The targets of all rows with their values, by id and then by row; none where the id is absent.
template <typename S>
std::vector<TargetEntry<S>> target_entries(const Chain<S>& chain);

// dr at target k of a row, whose id must be a class.
template <typename S>
S target_gradient(const Chain<S>& chain, int64_t row, int64_t k);

// dx (N, D), dense rows.
template <typename S>
void add_targets_to_rows(const Chain<S>& chain, const Operand& w, Tensor& dx);

// dw (n, D) and db (n,), either null, of the classes [first, first + n); x is taken times `scale`.
template <typename S>
void add_targets_to_classes(const std::vector<TargetEntry<S>>& entries, int64_t first, int64_t n,
                            const Operand& x, S scale, int64_t width, S* dw, int64_t dw_stride,
                            S* db);

}  // namespace lossops
