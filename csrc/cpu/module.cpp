// The Python module lossops._cpu_<capability>: the primitives, and what it was built for.
//
// Importing it allocates nothing and starts no thread; every function gives up the GIL.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cctype>
#include <string>
#include <utility>

#include "cpu/half.h"
#include "cpu/primitives.h"

#define LOSSOPS_STRING_(x) #x
#define LOSSOPS_STRING(x) LOSSOPS_STRING_(x)

namespace py = pybind11;

namespace lossops {
namespace {

constexpr int64_t kTile = 2048;  // classes; 1024 to 4096 take the same time

// f(Head, rest...) as a function of the head's parts, which come first in Python.
template <typename R, typename... Rest>
auto flatten(R (*f)(const Head&, Rest...)) {
  return
      [f](Tensor x, Tensor w, MaybeTensor b, MaybeTensor scale, double softcap, MaybeTensor target,
          MaybeTensor class_vector, MaybeTensor teacher, Names names, Rest... rest) {
        return f({std::move(x), std::move(w), std::move(b), std::move(scale), softcap,
                  std::move(target), std::move(class_vector), std::move(teacher), std::move(names)},
                 std::forward<Rest>(rest)...);
      };
}

template <typename F, typename... Names>
void define_linear(py::module_& m, const char* name, F f, Names... rest) {
  using py::arg;
  m.def(name, flatten(f), py::call_guard<py::gil_scoped_release>(), arg("x"), arg("w"), arg("b"),
        arg("scale"), arg("softcap"), arg("target"), arg("class_vector"), arg("teacher"),
        arg("names"), arg(rest)..., arg("tile") = kTile);
}

}  // namespace
}  // namespace lossops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace lossops;
  using py::arg;
  define_linear(m, "linear_statistics", linear_statistics);
  define_linear(m, "linear_chunk_statistics", linear_chunk_statistics, "wanted", "buffer");
  define_linear(m, "linear_chunk_gradient", linear_chunk_gradient, "wanted", "buffer", "statistics",
                "coefficients", "dx", "dw", "db", "accumulate");
  define_linear(m, "linear_gradient", linear_gradient, "statistics", "coefficients", "dx", "dw",
                "db");
  define_linear(m, "linear_chunk_negatives", linear_chunk_negatives, "wanted", "buffer",
                "statistics", "coefficients");
  define_linear(m, "linear_negatives", linear_negatives, "statistics", "coefficients", "first",
                "buffer");
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("linear_products", linear_products, no_gil, arg("x"), arg("w"), arg("scale"), arg("buffer"),
        arg("row_factor"), arg("dx"), arg("dw"), arg("db"), arg("accumulate"), arg("tile") = kTile);
  m.def("far_sums", far_sums, no_gil, arg("buffer"), arg("row_factor"), arg("limit"), arg("block"),
        arg("group"));
  m.def("logits_statistics", logits_statistics, no_gil, arg("z"), arg("target"),
        arg("class_vector"), arg("teacher"), arg("names"));
  m.def("logits_gradient", logits_gradient, no_gil, arg("z"), arg("target"), arg("class_vector"),
        arg("teacher"), arg("names"), arg("statistics"), arg("coefficients"), arg("out"));

  m.def("linear_binary", linear_binary, no_gil, arg("x"), arg("w"), arg("b"), arg("scale"),
        arg("target"), arg("weight"), arg("kind"), arg("parameters"), arg("row_factor"),
        arg("at_target"), arg("dx"), arg("dw"), arg("db"), arg("tile") = kTile);
  m.def("linear_pair_statistics", linear_pair_statistics, no_gil, arg("x"), arg("w"), arg("scale"),
        arg("target"), arg("tile") = kTile);
  m.def("linear_pair_gradient", linear_pair_gradient, no_gil, arg("x"), arg("w"), arg("scale"),
        arg("target"), arg("statistics"), arg("coefficients"), arg("dx"), arg("dw"),
        arg("tile") = kTile);

  m.def("sample_permuted", sample_permuted, no_gil, arg("key"), arg("count"), arg("num"));
  m.def("sample_uniform", sample_uniform, no_gil, arg("key"), arg("count"), arg("num"));
  m.def("sample_log_uniform", sample_log_uniform, no_gil, arg("key"), arg("count"), arg("log2"),
        arg("num"), arg("unique"), arg("most"));
  m.def("sample_alias", sample_alias, no_gil, arg("key"), arg("threshold"), arg("alias"),
        arg("num"), arg("unique"), arg("most"));
  m.def("alias_table", alias_table, no_gil, arg("probability"));

  m.def("normalized_rows", normalized_rows, no_gil, arg("table"), arg("ids"), arg("eps"));
  m.def("normalized_rows_gradient", normalized_rows_gradient, no_gil, arg("rows"), arg("norms"),
        arg("gradient"));
  m.def("sgd_rows", sgd_rows, no_gil, arg("table"), arg("velocity"), arg("ids"), arg("gradient"),
        arg("lr"), arg("momentum"), arg("weight_decay"));
  m.def("adamw_rows", adamw_rows, no_gil, arg("table"), arg("mean"), arg("square"), arg("count"),
        arg("ids"), arg("gradient"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"));

  // Whether bfloat16 products of depth d run on bfloat16 as it is, dz rounded to it.
  m.def(
      "half_products", [](int64_t d) { return half_products(at::kBFloat16, at::kBFloat16, d); },
      arg("d"));
  m.def("portable_half_products", portable_half_products, arg("on"));

  m.attr("torch_version") = LOSSOPS_TORCH_VERSION;
  std::string capability = LOSSOPS_STRING(CPU_CAPABILITY);
  for (char& c : capability) c = static_cast<char>(std::tolower(c));
  m.attr("capability") = capability;
}
