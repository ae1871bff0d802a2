// Ops of lossops_cuda on rows of a table: what lossops/cuda_rows.py calls. Outputs come allocated.
#include "cuda/rows.h"
#include "cuda/tensors.h"

namespace lossops {
namespace {

// A matrix of `dtype` whose rows have no holes.
Rows rows_of(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  check_rows(name, t, rows, columns);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(t.scalar_type()));
  return {t.data_ptr(), t.stride(0)};
}

int width_of(const Tensor& rows) {
  STD_TORCH_CHECK(rows.size(1) <= 1 << 22, "rows must have at most 2^22 elements, got ",
                  rows.size(1));  // a launch has 65535 parts of at least 128
  return static_cast<int>(rows.size(1));
}

Rows rows_like(const char* name, const Tensor& t, int64_t rows, const Tensor& table) {
  return rows_of(name, t, rows, table.size(1), table.scalar_type());
}

void normalized_rows_op(const Tensor& table, const Tensor& ids_, double eps, const Tensor& rows,
                        const Tensor& norms) {
  check_devices(table, ids_, rows, norms);
  const int64_t count = ids_.numel();
  check_size("norms", norms, count);
  const OnDevice device(table);
  normalized_rows(
      {dtype_of("table", table), count, table.size(0), width_of(table),
       rows_like("table", table, table.size(0), table), ids("ids", ids_), static_cast<float>(eps),
       rows_like("rows", rows, count, table), floats("norms", norms)},
      device.stream());
  check_launch("normalized_rows");
}

void normalized_rows_gradient_op(const Tensor& rows, const Tensor& norms, const Tensor& gradient,
                                 const Tensor& found) {
  check_devices(rows, norms, gradient, found);
  const int64_t count = rows.size(0);
  check_size("norms", norms, count);
  const OnDevice device(rows);
  normalized_rows_gradient(
      {dtype_of("rows", rows), count, width_of(rows), rows_like("rows", rows, count, rows),
       rows_like("gradient", gradient, count, rows), rows_like("found", found, count, rows),
       floats("norms", norms)},
      device.stream());
  check_launch("normalized_rows_gradient");
}

// Pairs (id, row) for a table of `classes` rows, `per_row` of them for each row.
Pairs pairs_of(const Tensor& rows, const Tensor& ids_, const MaybeTensor& order,
               const MaybeTensor& value, const MaybeTensor& scale, int64_t classes) {
  const int64_t count = ids_.numel(), n = rows.size(0);
  STD_TORCH_CHECK(value && n > 0 ? count % n == 0 : count == n,
                  "ids must have as many for each of ", n, " rows, one without values, got ",
                  count);
  if (order) check_size("order", *order, count);
  if (value) check_size("value", *value, count);
  if (scale) check_size("scale", *scale, 1);
  return {dtype_of("rows", rows), count,
          n > 0 ? count / n : 1,  classes,
          width_of(rows),         rows_like("rows", rows, n, rows),
          ids("ids", ids_),       ids("order", order),
          floats("value", value), floats("scale", scale)};
}

void scatter_rows_op(const Tensor& rows, const Tensor& ids, const MaybeTensor& order,
                     const Tensor& table) {
  check_devices(rows, ids, order, table);
  const Pairs pairs = pairs_of(rows, ids, order, {}, {}, table.size(0));
  const OnDevice device(rows);
  scatter_rows(pairs, rows_like("table", table, table.size(0), rows), device.stream());
  check_launch("scatter_rows");
}

void add_to_classes_op(const MaybeTensor& dw, const MaybeTensor& db, const Tensor& rows,
                       const Tensor& ids, const MaybeTensor& order, const Tensor& value,
                       const MaybeTensor& scale, int64_t classes) {
  check_devices(rows, dw, db, ids, order, value, scale);
  Pairs pairs = pairs_of(rows, ids, order, value, scale, classes);
  Rows to;
  if (dw) {
    to = rows_of("dw", *dw, classes, rows.size(1), ScalarType::Float);
  } else {
    pairs.width = 0;
  }
  if (db) check_size("db", *db, classes);
  const OnDevice device(rows);
  add_to_classes(pairs, to, floats("db", db), device.stream());
  check_launch("add_to_classes");
}

void add_to_rows_op(const Tensor& dx, const Tensor& w, const Tensor& target, const Tensor& value) {
  check_devices(w, dx, target, value);
  STD_TORCH_CHECK(target.dim() == 2, "target must have shape (N, K), got ", target.dim(), " dims");
  check_size("value", value, target.numel());
  const int64_t count = target.size(0), classes = w.size(0);
  const int width = width_of(w);
  const OnDevice device(w);
  add_to_rows({dtype_of("w", w), count, target.size(1), classes, width,
               rows_like("w", w, classes, w), rows_of("dx", dx, count, width, ScalarType::Float),
               ids("target", target), floats("value", value)},
              device.stream());
  check_launch("add_to_rows");
}

void sgd_rows_op(const Tensor& table, const MaybeTensor& velocity, const Tensor& ids,
                 const MaybeTensor& order, const Tensor& gradient, double lr, double momentum,
                 double weight_decay) {
  check_devices(table, velocity, ids, order, gradient);
  const int64_t classes = table.size(0);
  const Pairs pairs = pairs_of(gradient, ids, order, {}, {}, classes);
  const OnDevice device(table);
  sgd_rows(pairs, rows_like("table", table, classes, gradient),
           velocity ? rows_like("velocity", *velocity, classes, gradient) : Rows(),
           {lr, momentum, weight_decay}, device.stream());
  check_launch("sgd_rows");
}

void adamw_rows_op(const Tensor& table, const Tensor& mean, const Tensor& square,
                   const Tensor& count, const Tensor& ids, const MaybeTensor& order,
                   const Tensor& gradient, double lr, double beta1, double beta2, double eps,
                   double weight_decay) {
  check_devices(table, mean, square, count, ids, order, gradient);
  const int64_t classes = table.size(0);
  const Pairs pairs = pairs_of(gradient, ids, order, {}, {}, classes);
  check_size("count", count, classes);
  const OnDevice device(table);
  adamw_rows(pairs,
             {rows_like("table", table, classes, gradient),
              rows_like("mean", mean, classes, gradient),
              rows_like("square", square, classes, gradient),
              data<int32_t>("count", count, ScalarType::Int),
              {lr, beta1, beta2, eps, weight_decay},
              static_cast<float>(lr),
              std::log(beta1),
              std::log(beta2)},
             device.stream());
  check_launch("adamw_rows");
}

}  // namespace
}  // namespace lossops

STABLE_TORCH_LIBRARY_FRAGMENT(lossops_cuda, m) {
  m.def(
      "normalized_rows(Tensor table, Tensor ids, float eps, Tensor(a!) rows, "
      "Tensor(b!) norms) -> ()");
  m.def(
      "normalized_rows_gradient(Tensor rows, Tensor norms, Tensor gradient, "
      "Tensor(a!) found) -> ()");
  m.def("scatter_rows(Tensor rows, Tensor ids, Tensor? order, Tensor(a!) table) -> ()");
  m.def(
      "add_to_classes(Tensor(a!)? dw, Tensor(b!)? db, Tensor rows, Tensor ids, Tensor? order, "
      "Tensor value, Tensor? scale, int classes) -> ()");
  m.def("add_to_rows(Tensor(a!) dx, Tensor w, Tensor target, Tensor value) -> ()");
  m.def(
      "sgd_rows(Tensor(a!) table, Tensor(b!)? velocity, Tensor ids, Tensor? order, "
      "Tensor gradient, float lr, float momentum, float weight_decay) -> ()");
  m.def(
      "adamw_rows(Tensor(a!) table, Tensor(b!) mean, Tensor(c!) square, Tensor(d!) count, "
      "Tensor ids, Tensor? order, Tensor gradient, float lr, float beta1, float beta2, "
      "float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lossops_cuda, LOSSOPS_DEVICE, m) {
  m.impl("normalized_rows", TORCH_BOX(&lossops::normalized_rows_op));
  m.impl("normalized_rows_gradient", TORCH_BOX(&lossops::normalized_rows_gradient_op));
  m.impl("scatter_rows", TORCH_BOX(&lossops::scatter_rows_op));
  m.impl("add_to_classes", TORCH_BOX(&lossops::add_to_classes_op));
  m.impl("add_to_rows", TORCH_BOX(&lossops::add_to_rows_op));
  m.impl("sgd_rows", TORCH_BOX(&lossops::sgd_rows_op));
  m.impl("adamw_rows", TORCH_BOX(&lossops::adamw_rows_op));
}
