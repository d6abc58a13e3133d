// The GPUs that a build has code for, and the refusal of others. Without CUDA, so that it is tested without a
// GPU.
#pragma once

#include <string>

namespace apt {

// Whether a build for `archs`, as TORCH_CUDA_ARCH_LIST writes them ("8.0;9.0a;9.0+PTX"), runs on this compute
// capability: its own machine code, that of an earlier minor version, or PTX of an earlier version. True for
// entries of another form (names such as "Hopper"), of which nothing is known.
bool has_code_for(const std::string& archs, int major, int minor);

// RuntimeError unless it does; `gpu` is its name.
void check_gpu(const std::string& gpu, int major, int minor, const std::string& archs);

}  // namespace apt
