// Logits and what goes with them, from the arguments of an op.
#pragma once

#include <limits>

#include "cuda/logits.h"
#include "cuda/tensors.h"

namespace lossops {

inline Logits logits_of(const Tensor& r, const MaybeTensor& scale, const MaybeTensor& b,
                        double softcap) {
  check_rows("r", r, r.size(0), r.size(1));
  STD_TORCH_CHECK(r.size(1) < std::numeric_limits<int>::max() / 2,
                  "at most 2^30 classes in a chunk, got ", r.size(1));
  return {.r = r.data_ptr(),
          .dtype = dtype_of("r", r),
          .stride = r.stride(0),
          .rows = r.size(0),
          .classes = static_cast<int>(r.size(1)),
          .scale = floats("scale", scale, 1),
          .b = floats("b", b, r.size(1)),
          .softcap = static_cast<float>(softcap)};
}

inline Sides sides_of(const Tensor& r, const MaybeTensor& target, const MaybeTensor& class_vector,
                      const MaybeTensor& teacher) {
  Sides sides{};
  if (target.has_value()) {
    check_rows("target", *target, r.size(0), target->size(1));
    sides.targets = ids("target", target);
    sides.num_targets = static_cast<int>(target->size(1));
  }
  sides.class_vector = floats("class_vector", class_vector, r.size(1));
  if (teacher.has_value()) {
    check_rows("teacher", *teacher, r.size(0), r.size(1));
    sides.teacher = teacher->data_ptr();
    sides.teacher_dtype = dtype_of("teacher", *teacher);
    sides.teacher_stride = teacher->stride(0);
  }
  return sides;
}

// Into how many parts rows or columns are split: a dimension of a grid.
inline int checked_parts(int64_t parts) {
  STD_TORCH_CHECK(1 <= parts && parts <= 65535, "parts must be in [1, 65535], got ", parts);
  return static_cast<int>(parts);
}

}  // namespace lossops
