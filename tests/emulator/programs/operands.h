// Logits as the launchers take them: rows anywhere in memory, what goes with them, and z in double.
#pragma once

#include <vector>

#include "cuda/logits.h"
#include "program.h"
#include "row.h"

namespace program {

struct Shape {
  int64_t rows;
  int classes;
  int64_t skip = 0, gap = 0;  // elements before the first row, and between rows
  int targets = 1;            // a row
  float scale = 0;            // 0: z are the products; else there are a bias and a softcap too
};

template <typename T>
class Operands {
 public:
  // Targets among the classes first_class + [0, classes), and some that are not.
  explicit Operands(const Shape& shape, int64_t first_class = 0)
      : r(shape.rows, shape.classes, shape.skip, shape.gap),
        teacher(shape.rows, shape.classes, shape.skip + 1, shape.gap + 1),
        scale(1, shape.scale),
        b(shape.classes),
        class_vector(shape.classes),
        targets(shape.rows * shape.targets) {
    fill_normal(r, 2.0f);
    fill_normal(teacher);
    fill_normal(b);
    fill_normal(class_vector);
    fill_ids(targets, shape.classes + 2);
    for (int64_t& id : targets) id = id > shape.classes ? -1 : first_class + id;
    const bool mapped = shape.scale != 0;
    logits = {.r = r.data(),
              .dtype = kDtype<T>,
              .stride = r.stride,
              .rows = shape.rows,
              .classes = shape.classes,
              .scale = mapped ? scale.data() : nullptr,
              .b = mapped ? b.data() : nullptr,
              .softcap = mapped ? 5.0f : 0.0f};
    sides = {.targets = targets.data(),
             .num_targets = shape.targets,
             .class_vector = class_vector.data(),
             .teacher = teacher.data(),
             .teacher_dtype = kDtype<__half>,
             .teacher_stride = teacher.stride};
    // Now, for what comes out may lie where the products were.
    for (int64_t i = 0; i < shape.rows; ++i) {
      for (int j = 0; j < shape.classes; ++j) {
        const double product = lossops::to_float(r(i, j));
        z_.push_back(mapped ? lossops::softcap(product * scale[0] + b[j], 5.0) : product);
      }
    }
  }

  double z(int64_t i, int64_t j) const { return z_[i * r.columns + j]; }

  // The last of the row's targets that is this class; -1 for none.
  int target(int64_t i, int64_t id) {
    for (int k = sides.num_targets; k-- > 0;) {
      if (targets[i * sides.num_targets + k] == id) return k;
    }
    return -1;
  }

  Matrix<T> r;
  Matrix<__half> teacher;
  Buffer<float> scale, b, class_vector;
  Buffer<int64_t> targets;
  lossops::Logits logits;
  lossops::Sides sides;

 private:
  std::vector<double> z_;
};

}  // namespace program
