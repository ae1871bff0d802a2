// From tensors of the libtorch stable ABI to what a launch needs: checks, pointers, the stream.
//
// One binary serves CPU and CUDA builds of torch: nothing here names a symbol of libtorch_cuda.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/device.h"

namespace lossops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// While it lives the tensor's device is the current one; launches go to its current stream.
class OnDevice {
 public:
#ifdef LOSSOPS_EMULATE
  explicit OnDevice(const Tensor&) {}
  explicit OnDevice(int32_t) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : OnDevice(t.get_device_index()) {}
  explicit OnDevice(int32_t index) : index_(index), guard_(index) {
    cudaSetDevice(index_);  // of the runtime that is linked in here, which is not torch's
  }
  cudaStream_t stream() const {
    return static_cast<cudaStream_t>(
        torch::stable::accelerator::getCurrentStream(index_).nativeHandle());
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Raises what the last launch was refused for.
inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name,
                  " could not be launched: ", cudaGetErrorString(error));
}

// Raises where a tensor is elsewhere than the first; the dispatcher looks at one of them only.
template <typename... Others>
void check_devices(const Tensor& first, const Others&... others) {
  const auto is_there = [&](const MaybeTensor& t) {
    return !t ||
           (t->is_cuda() == first.is_cuda() && t->get_device_index() == first.get_device_index());
  };
  STD_TORCH_CHECK((is_there(others) && ...), "all tensors must be on one device");
}

inline void check_devices_of(const Tensor& first, const std::vector<MaybeTensor>& others) {
  for (const MaybeTensor& t : others) check_devices(first, t);
}

inline Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

// The data of a dense tensor of one dtype; null for none.
template <typename T>
T* data(const char* name, const MaybeTensor& t, ScalarType dtype) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->is_contiguous(), name, " must be ",
                  torch::headeronly::toString(dtype), " without holes, got ",
                  torch::headeronly::toString(t->scalar_type()));
  return static_cast<T*>(t->data_ptr());
}

inline void check_size(const char* name, const MaybeTensor& t, int64_t size) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->numel() == size, name, " must have ", size, " elements, got ", t->numel());
}

inline float* floats(const char* name, const MaybeTensor& t) {
  return data<float>(name, t, ScalarType::Float);
}

inline float* floats(const char* name, const MaybeTensor& t, int64_t size) {
  check_size(name, t, size);
  return floats(name, t);
}

inline int64_t* ids(const char* name, const MaybeTensor& t) {
  return data<int64_t>(name, t, ScalarType::Long);
}

// A matrix whose rows have no holes.
inline void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                  " must have shape (", rows, ", ", columns, "), got ", t.dim(), " dims, (",
                  t.dim() > 0 ? t.size(0) : 0, ", ", t.dim() > 1 ? t.size(1) : 0, ")");
  STD_TORCH_CHECK(t.stride(1) == 1 || columns <= 1, name, " must have rows without holes, got ",
                  "stride ", t.stride(1));
}

}  // namespace lossops
