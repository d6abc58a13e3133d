// apt_linear and its two halves. The formulas stand in op_table.h.
#pragma once

#include "../operands.h"

namespace apt {

struct LinearOperands : LayerOperands {
  double scaling;
  double dropout = 0.0;          // of mask_in * x on its way to lora_A
  const OptTensor& rng = kNone;  // int64 [2]: seed and offset that it is drawn by

  LinearOperands with(const LayerOperands& other) const { return {other, scaling, dropout, rng}; }
  auto rest() const { return std::tie(scaling, dropout, rng); }
  auto backward_rest() const { return rest(); }
};
using LinearArguments = LooseArguments<LinearOperands, double, double, const OptTensor&>;

Tensor apt_linear(const Tensor& x, const LinearOperands& operands);

// Return y and t [..., R]. t has x's dtype, but is float32 where x is float16: low-rank activations may
// exceed 65504. With dropout, t = drop(x') A^T without the factor 1 / (1 - p), which goes with the scaling.
std::tuple<Tensor, Tensor> apt_linear_forward(const Tensor& x, const LinearOperands& operands);

// The same without an op's promise about t, which may be a view with gaps between its rows.
std::tuple<Tensor, Tensor> linear_with_low(const Tensor& x, const LinearOperands& operands);

Gradients apt_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                              const LinearOperands& operands, const Needs& need);

// Refuse what the ops refuse, without their work: for other ways to the same values.
void check_apt_linear(const Tensor& x, const LinearOperands& operands);
void check_apt_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                               const LinearOperands& operands);

// The checks that apt_linear and compact_linear share.
void check_factors(const Tensor& x, const LayerOperands& operands);
void check_factor_dtypes(const Tensor& x, const LayerOperands& operands);
void check_grad_and_t(const Tensor& grad, const Tensor& t, const Tensor& x, const c10::SymInt& out_channels,
                      const c10::SymInt& R);

}  // namespace apt
