// Ask torch for the current CUDA stream and the properties of a GPU. The only file of this folder that knows
// torch.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

#include "../device.h"

namespace apt {

Stream current_cuda_stream(int device_index) {
  return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device_index)).stream();
}

bool is_cuda_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

void check_cuda_gpu(int device_index) {
  static std::array<std::atomic<bool>, 128> found{};
  const auto place = static_cast<size_t>(device_index) % found.size();
  if (found[place].load(std::memory_order_relaxed)) return;
  const cudaDeviceProp* properties =
      at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(device_index));
  check_gpu(properties->name, properties->major, properties->minor, APT_CUDA_ARCHS);
  found[place].store(true, std::memory_order_relaxed);
}

DeviceLimits cuda_limits(int device_index) {
  const cudaDeviceProp* properties =
      at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(device_index));
  return {properties->major * 10 + properties->minor, properties->multiProcessorCount,
          static_cast<int64_t>(properties->sharedMemPerBlockOptin)};
}

}  // namespace apt
