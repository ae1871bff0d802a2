// The primitives of lossops/reference.py on the CPU: same names, same arguments, same meaning.
//
// `tile` is the number of classes whose logits are in flight at once; it changes speed and rounding,
// never meaning. Nothing outlives a call, and the same call on the same number of threads gives the
// same bits.
#pragma once

#include "cpu/task.h"

namespace lossops {

std::vector<Tensor> linear_statistics(const Tensor& x, const Tensor& w, const MaybeTensor& b,
                                      const MaybeTensor& scale, double softcap,
                                      const MaybeTensor& target, const MaybeTensor& class_vector,
                                      const MaybeTensor& teacher, const Names& names, int64_t tile);

// `buffer` (R, V) may have any row stride. If it is at least V + 1, and the storage has room for it,
// column V of each row is used too, and where `wanted` asks for no more than the targets and lse
// the buffer holds exponentials: the gradient then costs no pass at all.
std::vector<Tensor> linear_chunk_statistics(const Tensor& x, const Tensor& w, const MaybeTensor& b,
                                            const MaybeTensor& scale, double softcap,
                                            const MaybeTensor& target,
                                            const MaybeTensor& class_vector,
                                            const MaybeTensor& teacher, const Names& names,
                                            const Names& wanted, const Tensor& buffer,
                                            int64_t tile);

void linear_chunk_gradient(const Tensor& x, const Tensor& w, const MaybeTensor& b,
                           const MaybeTensor& scale, double softcap, const MaybeTensor& target,
                           const MaybeTensor& class_vector, const MaybeTensor& teacher,
                           const Names& names, const Names& wanted, const Tensor& buffer,
                           const std::vector<MaybeTensor>& statistics,
                           const std::vector<MaybeTensor>& coefficients, const MaybeTensor& dx,
                           const MaybeTensor& dw, const MaybeTensor& db, bool accumulate,
                           int64_t tile);

void linear_gradient(const Tensor& x, const Tensor& w, const MaybeTensor& b,
                     const MaybeTensor& scale, double softcap, const MaybeTensor& target,
                     const MaybeTensor& class_vector, const MaybeTensor& teacher,
                     const Names& names, const std::vector<MaybeTensor>& statistics,
                     const std::vector<MaybeTensor>& coefficients, const MaybeTensor& dx,
                     const MaybeTensor& dw, const MaybeTensor& db, int64_t tile);

std::vector<Tensor> logits_statistics(const Tensor& z, const MaybeTensor& target,
                                      const MaybeTensor& class_vector, const MaybeTensor& teacher,
                                      const Names& names);

void logits_gradient(const Tensor& z, const MaybeTensor& target, const MaybeTensor& class_vector,
                     const MaybeTensor& teacher, const Names& names,
                     const std::vector<MaybeTensor>& statistics,
                     const std::vector<MaybeTensor>& coefficients, const Tensor& out);

}  // namespace lossops
