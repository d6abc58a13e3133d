// The arithmetic of apt_linear on matrices that are checked and on one real device, and the choice of its
// route.
#pragma once

#include "drop_channels.h"

namespace apt {

// What forward and backward have in common. x's dtype is the compute dtype.
struct Layer {
  OptTensor weight;             // [N, K]
  OptTensor bias;               // [N]
  Tensor lora_A, lora_B;        // [R, K], [N, R], compute dtype or float32
  OptTensor mask_in, mask_out;  // [K], [N]
  double scaling;               // with what dropout takes away: s / (1 - p)
  bool keep_low = true;         // false if forward's t is not wanted
  Drop drop = {};  // of mask_in * x on its way to lora_A, and of the gradient that comes back by it
};

// The routes share these two signatures.
//   forward   x [M, K] -> (y [M, N], t [M, R]); t may be the first columns of rows that are longer
//   backward  grad [M, N], x [M, K], t [M, R] -> dx [M, K], dA [R, K], dB [N, R], db [N]; undefined where not
//             needed
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Layer& layer);
std::array<Tensor, 4> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need);

}  // namespace apt
