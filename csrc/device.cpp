#include "device.h"

#include <c10/util/Exception.h>

namespace apt {

const Kernels& kernels_for(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return kCpuKernels;
#ifdef APT_WITH_CUDA
  if (tensor.is_cuda()) {
    check_cuda_gpu(tensor.get_device());
    return kCudaKernels;
  }
#endif
  TORCH_CHECK(!tensor.is_cuda(), "apt_ext was built without CUDA and got a tensor on ", tensor.device().str(),
              "; rebuild it beside a CUDA torch with nvcc on the PATH: APT_WITH_CUDA=1 python -m pip install "
              "--no-build-isolation --force-reinstall --no-deps .");
  TORCH_CHECK(false, "apt_ext has kernels for cpu and cuda, got a tensor on ", tensor.device().str());
}

Stream current_stream(const at::Tensor& tensor) {
#ifdef APT_WITH_CUDA
  if (tensor.is_cuda()) return current_cuda_stream(tensor.get_device());
#endif
  return nullptr;
}

bool is_capturing(const at::Tensor& tensor) {
#ifdef APT_WITH_CUDA
  if (tensor.is_cuda()) return is_cuda_capturing();
#endif
  return false;
}

DeviceLimits limits_of(const at::Tensor& tensor) {
#ifdef APT_WITH_CUDA
  if (tensor.is_cuda()) return cuda_limits(tensor.get_device());
#endif
  return {};
}

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected float64, float32, float16 or bfloat16, got ",
                       c10::toString(tensor.scalar_type()));
  }
}

}  // namespace apt
