// apt_linear of several layers that read the same x, without mask_in. No op of the dispatcher: layers are
// called one by one, and autograd/shared_linear.h hands the outputs out.
#pragma once

#include <vector>

#include "../routes/shared_linear.h"
#include "apt_linear.h"

namespace apt {

// The operands of one layer. Unlike LinearOperands it owns them.
struct SharedLayer {
  OptTensor weight, bias;
  Tensor lora_A, lora_B;
  OptTensor mask_out;
  double scaling = 1.0, dropout = 0.0;
  OptTensor rng;  // where something is dropped

  LinearOperands operands() const {
    return {{weight, bias, lora_A, lora_B, kNone, mask_out}, scaling, dropout, rng};
  }
};

// Return true if the layer fits x as apt_linear would find it. Says nothing of what does not.
bool fits(const Tensor& x, const SharedLayer& layer);

// Return true if sharing x costs less than reading it for each layer, in this compute dtype.
bool is_worth_sharing(const Tensor& x, const SharedLayer& layer, at::ScalarType dtype);

// y and t of each layer, which fits x.
std::vector<std::tuple<Tensor, Tensor>> shared_linear_forward(const Tensor& x,
                                                              const std::vector<SharedLayer>& layers);

// As SharedGradients says, for tensors of any number of dimensions. An undefined gradient has no part.
SharedGradients shared_linear_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                       const std::vector<Tensor>& lows,
                                       const std::vector<SharedLayer>& layers, bool need_x,
                                       const std::vector<std::array<bool, 3>>& need);

}  // namespace apt
