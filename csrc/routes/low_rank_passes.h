// The route of 16-bit types on CUDA: the library's dense product, and around it passes of our own at the
// speed of memory (cuda/low_rank.cu, cuda/token_sums.cu). A mask on the output side decides the order:
//
//   no mask   low-rank part into the output first, then the dense product on top (beta = 1): the output is
//             written once
//   a mask    dense product first, then low-rank part, bias and mask in one pass over the output
//
// A compacted layer goes the same way with other ends. x's kept channels are gathered while the low-rank
// product is made of them, and what the dense product gives is scattered, with the low-rank part, into the
// output.
//
// Saved for the backward are x and t [M, R], never a masked copy of x. Workspace: that copy during a call,
// and partial sums of the factors' gradients, at most (M / 64) R (N + K) floats.
#pragma once

#include "gather_scatter.h"
#include "linear.h"
#include "plan.h"

namespace apt {

// The sides of a compacted layer that are gathered or scattered on the way, if any. Its Layer is that of the
// kept channels, without a mask on these sides.
struct KeptSides {
  const KeptSide *in = nullptr, *out = nullptr;
  Tensor lora_A, lora_B;  // full-size
};

// For a plan that says kPasses. With kept sides x, grad and what comes back are full-size there. The third
// result is x's kept channels, and passes_backward is given them as x.
std::tuple<Tensor, Tensor, Tensor> passes_forward(const Tensor& x, const Layer& layer, const LinearPlan& plan,
                                                  const KeptSides& kept = {});
std::array<Tensor, 4> passes_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need,
                                      const LinearPlan& plan, const KeptSides& kept = {});

// Return true if this route can gather and scatter these sides on the way.
bool passes_fit(const Tensor& x, const LinearPlan& plan, const KeptSides& kept);

}  // namespace apt
