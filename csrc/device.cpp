#include "device.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <sstream>

namespace apt {
namespace {

constexpr Kernels kCpuKernels{.mask_channels = &cpu::mask_channels,
                              .drop_channels = &cpu::drop_channels,
                              .merge = &cpu::merge,
                              .merge_scratch = &cpu::merge_scratch,
                              .mask_grads = &cpu::mask_grads,
                              .gather = &cpu::gather,
                              .scatter = &cpu::scatter,
                              .channel_sums = &cpu::channel_sums,
                              .copy_factors = &cpu::copy_factors};

#ifdef APT_WITH_CUDA
constexpr Kernels kCudaKernels{.mask_channels = &cuda::mask_channels,
                               .drop_channels = &cuda::drop_channels,
                               .merge = &cuda::merge,
                               .mask_grads = &cuda::mask_grads,
                               .gather = &cuda::gather,
                               .scatter = &cuda::scatter,
                               .channel_sums = &cuda::channel_sums,
                               .copy_factors = &cuda::copy_factors,
                               .low_rank = &cuda::low_rank,
                               .token_sums = &cuda::token_sums,
                               .add_spans = &cuda::add_spans,
                               .to_half = &cuda::to_half,
                               .shared_down = &cuda::shared_down,
                               .shared_up = &cuda::shared_up,
                               .shared_token_sums = &cuda::shared_token_sums};
#endif

}  // namespace

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

bool has_code_for(const std::string& archs, int major, int minor) {
  std::istringstream listed(archs);
  std::string entry;
  while (std::getline(listed, entry, ';')) {
    if (entry.empty()) continue;
    int of_major = 0, of_minor = 0, end = 0;
    if (std::sscanf(entry.c_str(), "%d.%d%n", &of_major, &of_minor, &end) != 2) return true;
    std::string suffix = entry.substr(end);
    const bool one_gpu = suffix.rfind('a', 0) == 0, family = suffix.rfind('f', 0) == 0;
    if (one_gpu || family) suffix.erase(0, 1);
    const bool translates = suffix == "+PTX" && !one_gpu && !family;
    if (!suffix.empty() && suffix != "+PTX") return true;
    if (of_major == major && (one_gpu ? of_minor == minor : of_minor <= minor)) return true;
    if (translates && (of_major < major || (of_major == major && of_minor <= minor))) return true;
  }
  return false;
}

void check_gpu(const std::string& gpu, int major, int minor, const std::string& archs) {
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  TORCH_CHECK(has_code_for(archs, major, minor), "apt_ext has no code for ", gpu, " (compute capability ",
              capability, "): this build is for ", archs,
              "; rebuild it for this GPU: TORCH_CUDA_ARCH_LIST=", capability,
              " APT_WITH_CUDA=1 python -m pip install --no-build-isolation --force-reinstall --no-deps .");
}

}  // namespace apt
