// The only file of this folder that knows torch: the current stream, and the table the rest of the library
// looks up.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

#include "../archs.h"
#include "../device.h"
#include "kernels.h"

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

const Kernels kCudaKernels{.lanes = &cuda::lanes,
                           .merge = &cuda::merge,
                           .mask_grads = &cuda::mask_grads,
                           .gather = &cuda::gather,
                           .scatter = &cuda::scatter,
                           .channel_sums = &cuda::channel_sums,
                           .copies = &cuda::copies,
                           .low_rank = &cuda::low_rank,
                           .token_sums = &cuda::token_sums,
                           .add_spans = &cuda::add_spans,
                           .to_half = &cuda::to_half};

}  // namespace apt
