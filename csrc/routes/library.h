// The route on which the library (cuBLAS, MKL, oneDNN) makes every product, and masks are passes of our own.
#pragma once

#include "linear.h"

namespace apt {

std::tuple<Tensor, Tensor> library_forward(const Tensor& x, const Layer& layer);
std::array<Tensor, 4> library_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                       const Layer& layer, const std::array<bool, 4>& need);

// Return y = mask_out * (x W^T + s t B^T + b) for x that is masked already and t that is computed.
Tensor output_of(const Tensor& x, const Tensor& t, const Layer& layer);

}  // namespace apt
