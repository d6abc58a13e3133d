// The route of 16-bit products that a CPU does slowly: in float32, W and its gradient side in blocks of rows,
// so that the extra memory is a block and not a second W.
#pragma once

#include "linear.h"

namespace apt {

// Return true for such products: bfloat16 where the library has no fast one, and float16 always, whose t
// could overflow there.
bool is_widened(const Tensor& x);

std::tuple<Tensor, Tensor> widened_forward(const Tensor& x, const Layer& layer);
std::array<Tensor, 4> widened_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                       const Layer& layer, const std::array<bool, 4>& need);

}  // namespace apt
