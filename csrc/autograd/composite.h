// apt_linear and its gradient as plain ATen operations, which torch can differentiate and batch in every way.
#pragma once

#include "../ops/apt_linear.h"

namespace apt {

// The op's own formula and refusals. The 16-bit types run in float32 throughout, and W in a wide copy: this
// is the way of second derivatives, forward mode, torch.func and vmap, not of training.
Tensor composite_linear(const Tensor& x, const LinearOperands& operands);

// The same with the mask that x is dropped by, if it is given, instead of the one that x's shape draws.
Tensor composite_dropped(const Tensor& x, const LinearOperands& operands, const OptTensor& keep);

// Call the op dropout_mask.
Tensor drawn_mask(c10::SymIntArrayRef shape, double p, const Tensor& rng);

// t is not read: as a constant it would hide how the gradient of B depends on x and A.
Gradients composite_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                             const LinearOperands& operands, const Needs& need);

}  // namespace apt
