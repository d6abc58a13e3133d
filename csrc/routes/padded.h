// The route of widths and ranks that are no multiple of 8. The library's 16-bit product is several times
// slower where a row does not fill whole 16 bytes, so copies that do go through linear_forward and
// linear_backward, and what comes back is copied to its own width. Masks act in the copies that are made
// anyway.
#pragma once

#include "linear.h"

namespace apt {

std::tuple<Tensor, Tensor> padded_forward(const Tensor& x, const Layer& layer);
std::array<Tensor, 4> padded_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need);

// Return t [M, ..] with a rank larger than its own: the longer rows that it was made in where it has them,
// whatever they hold there (it ends in entries that are cut off), else a copy filled up with zeros.
Tensor low_of_rank(const Tensor& t, int64_t R);

}  // namespace apt
