// Gradients by class: a tile of dw and db, summed over blocks of rows and rounded once.
//
// Bytes of db: one read of the tile, from the last-level cache where the GEMMs have left it.
// Scratch: (tile, D) where dw is of another dtype or layout, and (tile,) for db.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/products.h"
#include "cpu/targets.h"

namespace lossops {

// to (n,) += Σ_i f_i dz_i over dz (rows, n); f may be null for ones. Blocks of 256 rows.
template <typename S>
void add_column_sums(const S* dz, int64_t stride, int64_t rows, int64_t n, const S* f, S* to) {
  constexpr int64_t width = Vec<S>::size(), kVectors = 4, kColumns = kVectors * width;
  const int64_t grain = row_grain(rows * kColumns);
  at::parallel_for(0, (n + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin * kColumns; column < std::min(n, end * kColumns);
         column += kColumns) {
      const int64_t count = std::min(kColumns, n - column);
      for (int64_t block = 0; block < rows; block += 256) {
        Vec<S> sums[kVectors]{};
        for (int64_t i = block; i < std::min(rows, block + 256); ++i) {
          const S* from = dz + i * stride + column;
          const Vec<S> factor(f == nullptr ? S(1) : f[i]);
          for (int64_t v = 0; v < kVectors && v * width < count; ++v) {
            const int64_t left = std::min(width, count - v * width);
            sums[v] = Lane<Vec<S>>::fma(factor, load(from + v * width, left, S(0)), sums[v]);
          }
        }
        for (int64_t v = 0; v < kVectors && v * width < count; ++v) {
          const int64_t left = std::min(width, count - v * width);
          S* at = to + column + v * width;
          store(at, load(at, left, S(0)) + sums[v], left);
        }
      }
    }
  });
}

// dw (V, D) and db (V,), either None, filled one tile of classes at a time.
template <typename S>
class ClassGradient {
 public:
  // x (N, D) as the caller gave it, for the targets; `scale` is its factor.
  ClassGradient(const Chain<S>& chain, const MaybeTensor& dw, const MaybeTensor& db,
                bool accumulate, int64_t tile, const Tensor& x, std::optional<double> scale)
      : dw_(dw),
        db_(db),
        accumulate_(accumulate),
        x_(x),
        scale_(static_cast<S>(scale.value_or(1))) {
    if (dw || db) targets_ = target_entries(chain);
    const auto dtype = c10::CppTypeToScalarType<S>::value;
    direct_ = dw && dw->scalar_type() == dtype && (dw->stride(1) == 1 || dw->size(1) == 1);
    if (dw && !direct_) {
      dw_scratch_ = at::empty({std::min(tile, dw->size(0)), dw->size(1)}, x.options().dtype(dtype));
    }
    if (db) db_scratch_ = at::empty({std::min(tile, db->size(0))}, x.options().dtype(dtype));
  }

  // From here on the tile is that of the classes [first, first + n).
  void begin(int64_t first, int64_t n) {
    first_ = first;
    n_ = n;
    fresh_ = true;
    if (dw_) dw_part_ = direct_ ? dw_->narrow(0, first, n) : dw_scratch_.narrow(0, 0, n);
    if (db_) db_scratch_.zero_();
  }

  // Adds dzᵀ x of a block of rows, for db Σ f z with the row factors f (rows,) that x has already:
  // z is dz before it was rounded, where that is at hand.
  void add(const Tensor& dz, const Tensor& z, const Tensor& x, const S* f) {
    if (dw_) dw_tile(dw_part_, dz, x, !fresh_ || (accumulate_ && direct_));
    if (db_) {
      const Tensor wide = z.to(db_scratch_.scalar_type());  // mostly itself
      add_column_sums(wide.template const_data_ptr<S>(), wide.stride(0), wide.size(0), n_, f,
                      db_scratch_.template data_ptr<S>());
    }
    fresh_ = false;
  }

  // Adds the targets and writes the tile where it belongs.
  void end() {
    add_targets_to_classes(targets_, first_, n_, Operand(x_), scale_, x_.size(1),
                           dw_ ? dw_part_.template data_ptr<S>() : nullptr,
                           dw_ ? dw_part_.stride(0) : 0,
                           db_ ? db_scratch_.template data_ptr<S>() : nullptr);
    if (dw_ && !direct_) put(dw_->narrow(0, first_, n_), dw_part_);
    if (db_) put(db_->narrow(0, first_, n_), db_scratch_.narrow(0, 0, n_));
  }

 private:
  void put(const Tensor& to, const Tensor& from) const {
    if (accumulate_) {
      to.add_(from);
    } else {
      to.copy_(from);
    }
  }

  MaybeTensor dw_, db_;
  bool accumulate_, direct_, fresh_ = true;
  Tensor x_, dw_scratch_, db_scratch_, dw_part_;
  S scale_;
  std::vector<TargetEntry<S>> targets_;
  int64_t first_ = 0, n_ = 0;
};

}  // namespace lossops
