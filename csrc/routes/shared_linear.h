// Layers that read the same x, on CUDA in 16 bits: as low_rank_passes.h does for one, with the narrow products
// over x made together (cuda/shared_linear.cu).
//
//   forward    one pass over x for the ranks of all; then, for each, what low_rank_passes does with its t
//   backward   for each the sums over g and the pass over g; then one pass that writes dx from the ranks of
//              all, the dense products on top (beta = 1), and one pass of sums over x
//
// y, t and the gradients of factors and biases are to the bit those of a layer alone. dx is added up inside
// the products, in the order of the layers.
#pragma once

#include <vector>

#include "linear.h"

namespace apt {

// The gradients of lora_A, lora_B and the bias, undefined where not needed.
using OwnGradients = std::array<Tensor, 3>;

struct SharedGradients {
  Tensor x;
  std::vector<OwnGradients> own;  // one a layer
};

// Return true if a layer can take part: `x` is what it would read.
bool can_share_passes(const Tensor& x, int64_t M, int64_t N, int64_t K, int64_t R, at::ScalarType dtype);

// x [M, K] -> (y [M, N], t [M, R]) of each layer.
std::vector<std::tuple<Tensor, Tensor>> shared_passes_forward(const Tensor& x,
                                                              const std::vector<Layer>& layers);

// grads [M, N] of layers, all defined, at least two; lows: the t of their forward; need: of lora_A, lora_B and
// the bias of each.
SharedGradients shared_passes_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                       const std::vector<Tensor>& lows, const std::vector<Layer>& layers,
                                       bool need_x, const std::vector<std::array<bool, 3>>& need);

}  // namespace apt
