// The only file of this folder that knows torch: the current stream, and the table the rest of the library
// looks up.
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "../device.h"
#include "kernels.h"

namespace apt {

Stream current_cuda_stream(int device_index) {
  return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device_index)).stream();
}

bool is_cuda_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

const Kernels kCudaKernels{&cuda::lanes, &cuda::merge, &cuda::mask_grads};

}  // namespace apt
