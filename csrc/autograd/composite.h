// apt_linear and its gradient as plain ATen operations, which torch can differentiate and batch in every way.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The ops' own signatures, formulas and refusals. The 16-bit types run in float32 throughout, and W in a wide
// copy: this is the way of second derivatives, forward mode, torch.func and vmap, not of training.
Tensor composite_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                        double scaling);

// t is not read: as a constant it would hide how the gradient of B depends on x and A.
std::tuple<Tensor, Tensor, Tensor, Tensor> composite_backward(const Tensor& grad, const Tensor& x,
                                                              const OptTensor& weight, const Tensor& lora_A,
                                                              const Tensor& lora_B, const Tensor& t,
                                                              const OptTensor& mask_in,
                                                              const OptTensor& mask_out, double scaling,
                                                              std::array<bool, 4> output_mask);

}  // namespace apt
