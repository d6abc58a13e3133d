// Look up what a tensor's device offers: kernels, stream, limits, and whether this build has code for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "backend.h"
#include "routes/plan.h"

namespace apt {

// Return the kernels of a tensor's device. Throws, in words, for a device this build has none for.
const Kernels& kernels_for(const at::Tensor& tensor);

// Return the stream that work on `tensor` is queued on now; null on the CPU.
Stream current_stream(const at::Tensor& tensor);

// Return true if that stream is being captured into a CUDA graph.
bool is_capturing(const at::Tensor& tensor);

DType dtype_of(const at::Tensor& tensor);

// Return what launch_plan may know of the tensor's device.
DeviceLimits limits_of(const at::Tensor& tensor);

// Return true if a build for `archs`, as TORCH_CUDA_ARCH_LIST writes them ("8.0;9.0a;9.0+PTX"), runs on this
// compute capability: by its own machine code, that of an earlier minor version, or PTX of an earlier
// version. Also true for entries of another form (names such as "Hopper"), of which nothing is known.
bool has_code_for(const std::string& archs, int major, int minor);

// Throw a RuntimeError unless it does; `gpu` is its name. Without CUDA, so that it is tested without a GPU.
void check_gpu(const std::string& gpu, int major, int minor, const std::string& archs);

#ifdef APT_WITH_CUDA
// cuda/device.cpp
Stream current_cuda_stream(int device_index);
bool is_cuda_capturing();
void check_cuda_gpu(int device_index);  // check_gpu for this build, asked once a GPU
DeviceLimits cuda_limits(int device_index);
#endif

}  // namespace apt
