// The primitives of lossops/reference.py on the CPU: same names, same arguments, same meaning.
//
// `tile` is the number of classes whose logits are in flight at once; it changes speed and
// rounding, never meaning. Nothing outlives a call, and the same call on the same number of threads
// gives the same bits.
#pragma once

#include <tuple>

#include "cpu/task.h"

namespace lossops {

// The arguments every linear primitive begins with.
struct Head {
  Tensor x;                           // (N, D)
  Tensor w;                           // (V, D)
  MaybeTensor b;                      // (V,)
  MaybeTensor scale;                  // ()
  double softcap;                     // 0 for none
  MaybeTensor target;                 // (N, K) int64
  MaybeTensor class_vector, teacher;  // (V,), (N, V)
  Names names;
};

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

Tensors linear_statistics(const Head& head, int64_t tile);

// `buffer` (R, V) may have any row stride. If it is at least V + 1, and the storage has room for
// it, column V of each row is used too, and where `wanted` asks for no more than the targets and
// lse the buffer holds exponentials: the gradient then costs no pass at all. Where products take
// bfloat16 as it is (half.h) they may be kept as these round them, in a buffer of bfloat16 with an
// even stride of at least V + 3.
Tensors linear_chunk_statistics(const Head& head, const Names& wanted, const Tensor& buffer,
                                int64_t tile);

void linear_chunk_gradient(const Head& head, const Names& wanted, const Tensor& buffer,
                           const MaybeTensors& statistics, const MaybeTensors& coefficients,
                           const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                           bool accumulate, int64_t tile);

void linear_gradient(const Head& head, const MaybeTensors& statistics,
                     const MaybeTensors& coefficients, const MaybeTensor& dx, const MaybeTensor& dw,
                     const MaybeTensor& db, int64_t tile);

// The halves of a chunk's gradient. linear_chunk_negatives leaves in the buffer dr of the
// negatives, 0 at the targets, up to a factor of each row that it returns; linear_products takes
// dx, dw and db from such a buffer.
Tensor linear_chunk_negatives(const Head& head, const Names& wanted, const Tensor& buffer,
                              const MaybeTensors& statistics, const MaybeTensors& coefficients,
                              int64_t tile);

void linear_products(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
                     const Tensor& buffer, const Tensor& row_factor, const MaybeTensor& dx,
                     const MaybeTensor& dw, const MaybeTensor& db, bool accumulate, int64_t tile);

// dr of the negatives among the classes from `first` on, computed again, into `buffer` (N, n).
void linear_negatives(const Head& head, const MaybeTensors& statistics,
                      const MaybeTensors& coefficients, int64_t first, const Tensor& buffer,
                      int64_t tile);

// Near columns of blocks of rows of a buffer, and the sums of what is far: see far.cpp.
Tensors far_sums(const Tensor& buffer, const Tensor& row_factor, const Tensor& limit, int64_t block,
                 int64_t group);

// Σ over the negatives of a term of one logit, (N,), and where dx, dw or db is given the gradients,
// in one visit of each tile. `kind`, `parameters`: "sigmoid" (), "hinge" (margin), "gumbel" (most),
// "asymmetric" (gamma, clip, detached).
Tensor linear_binary(const Tensor& x, const Tensor& w, const MaybeTensor& b,
                     const MaybeTensor& scale, const MaybeTensor& target, const MaybeTensor& weight,
                     const std::string& kind, const std::vector<double>& parameters,
                     const MaybeTensor& row_factor, const MaybeTensor& at_target,
                     const MaybeTensor& dx, const MaybeTensor& dw, const MaybeTensor& db,
                     int64_t tile);

// Log-sums of the negatives by row and by column: shift, lse (N,), column shift, lse (V,), target.
Tensors linear_pair_statistics(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
                               const MaybeTensor& target, int64_t tile);

void linear_pair_gradient(const Tensor& x, const Tensor& w, const MaybeTensor& scale,
                          const MaybeTensor& target, const Tensors& statistics,
                          const MaybeTensors& coefficients, const MaybeTensor& dx,
                          const MaybeTensor& dw, int64_t tile);

Tensors logits_statistics(const Tensor& z, const MaybeTensor& target,
                          const MaybeTensor& class_vector, const MaybeTensor& teacher,
                          const Names& names);

void logits_gradient(const Tensor& z, const MaybeTensor& target, const MaybeTensor& class_vector,
                     const MaybeTensor& teacher, const Names& names, const MaybeTensors& statistics,
                     const MaybeTensors& coefficients, const Tensor& out);

// Draws of class ids, as lossops/reference_sampling.py: ids (num,), and the draws they took, -1 for
// more than `most`.
Tensor sample_permuted(int64_t key, int64_t count, int64_t num);

Tensor sample_uniform(int64_t key, int64_t count, int64_t num);

std::tuple<Tensor, int64_t> sample_log_uniform(int64_t key, int64_t count, double log2, int64_t num,
                                               bool unique, int64_t most);

std::tuple<Tensor, int64_t> sample_alias(int64_t key, const Tensor& threshold, const Tensor& alias,
                                         int64_t num, bool unique, int64_t most);

// Thresholds and aliases (V,) of a distribution (V,) float64.
std::tuple<Tensor, Tensor> alias_table(const Tensor& probability);

// Rows of a table by id, as lossops/reference_rows.py: w / max(|w|, eps) and the divisors, and the
// gradient of the rows from that of the normalised ones.
std::tuple<Tensor, Tensor> normalized_rows(const Tensor& table, const Tensor& ids, double eps);

Tensor normalized_rows_gradient(const Tensor& rows, const Tensor& norms, const Tensor& gradient);

// Updates of the rows `ids`, which rise strictly, in place.
void sgd_rows(const Tensor& table, const MaybeTensor& velocity, const Tensor& ids,
              const Tensor& gradient, double lr, double momentum, double weight_decay);

void adamw_rows(const Tensor& table, const Tensor& mean, const Tensor& square, const Tensor& count,
                const Tensor& ids, const Tensor& gradient, double lr, double beta1, double beta2,
                double eps, double weight_decay);

}  // namespace lossops
