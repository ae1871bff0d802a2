// The op of standin.cu.
#include "cuda/tensors.h"
#include "standin.h"

namespace lossops {
namespace {

void reverse(const Tensor& x, const Tensor& out, bool barrier) {
  check_rows("out", out, x.size(0), x.size(1));
  check_rows("x", x, out.size(0), 0 < x.size(1) && x.size(1) <= 128 ? x.size(1) : 128);
  const OnDevice device(x);
  reverse_rows(dtype_of("x", x), x.data_ptr(), x.stride(0), floats("out", out), x.size(0),
               x.size(1), barrier, device.stream());
  check_launch("reverse_rows");
}

}  // namespace
}  // namespace lossops

STABLE_TORCH_LIBRARY_FRAGMENT(lossops_cuda, m) {
  m.def("standin_reverse(Tensor x, Tensor(a!) out, bool barrier) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lossops_cuda, LOSSOPS_DEVICE, m) {
  m.impl("standin_reverse", TORCH_BOX(&lossops::reverse));
}
