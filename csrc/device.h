// The one lookup between a tensor and its device's kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "backend.h"
#include "routes/plan.h"

namespace apt {

// Throws, in words, for a device this build has no kernels for.
const Kernels& kernels_for(const at::Tensor& tensor);

// The stream that work on `tensor` is queued on now; null on the CPU.
Stream current_stream(const at::Tensor& tensor);

// Whether that stream is being captured into a CUDA graph.
bool is_capturing(const at::Tensor& tensor);

DType dtype_of(const at::Tensor& tensor);

// What launch_plan may know of the tensor's device.
DeviceLimits limits_of(const at::Tensor& tensor);

#ifdef APT_WITH_CUDA
Stream current_cuda_stream(int device_index);  // cuda/device.cpp
bool is_cuda_capturing();
void check_cuda_gpu(int device_index);  // RuntimeError where the build has no code for it; asked once a GPU
DeviceLimits cuda_limits(int device_index);
#endif

}  // namespace apt
