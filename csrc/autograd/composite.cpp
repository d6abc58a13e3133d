#include "composite.h"

#include <ATen/ATen.h>

#include "../op_table.h"

namespace apt {
namespace {

at::ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor rows(const Tensor& x) { return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2); }

Tensor along(const OptTensor& mask, int64_t dim) { return dim == 0 ? mask->unsqueeze(1) : *mask; }

// Selection in both directions: `where` keeps a NaN of a pruned lane out of values, tangents and gradients.
Tensor scaled(const Tensor& matrix, const OptTensor& mask) {
  return mask.has_value() ? at::where(*mask == 0, 0, matrix * mask->to(matrix.scalar_type())) : matrix;
}

Tensor selected(const Tensor& matrix, const OptTensor& mask, int64_t dim) {
  return mask.has_value() ? at::where(along(mask, dim) == 0, 0, matrix) : matrix;
}

// What both directions need: x' = mask_in * x, A and B rounded to x's dtype, without their pruned lanes.
struct Operands {
  Operands(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const OptTensor& mask_in,
           const OptTensor& mask_out)
      : wide(wide_type(x)),
        x(scaled(rows(x).to(wide), mask_in)),
        A(selected(lora_A.to(x.scalar_type()).to(wide), mask_in, 1)),
        B(selected(lora_B.to(x.scalar_type()).to(wide), mask_out, 0)) {}
  at::ScalarType wide;
  Tensor x, A, B;
};

}  // namespace

Tensor composite_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                        double scaling) {
  check_apt_linear(x, weight, bias, lora_A, lora_B, mask_in, mask_out);
  Operands in(x, lora_A, lora_B, mask_in, mask_out);
  Tensor y = at::mm(at::mm(in.x, in.A.t()), in.B.t()) * scaling;
  if (weight.has_value()) y = y + at::mm(in.x, weight->to(in.wide).t());
  if (bias.has_value()) y = y + bias->to(in.wide);
  auto shape = x.sym_sizes().vec();
  shape.back() = lora_B.sym_size(0);
  return scaled(y, mask_out).to(x.scalar_type()).reshape_symint(shape);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> composite_backward(const Tensor& grad, const Tensor& x,
                                                              const OptTensor& weight, const Tensor& lora_A,
                                                              const Tensor& lora_B, const Tensor& t,
                                                              const OptTensor& mask_in,
                                                              const OptTensor& mask_out, double scaling,
                                                              std::array<bool, 4> output_mask) {
  check_apt_linear_backward(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out);
  Operands in(x, lora_A, lora_B, mask_in, mask_out);
  Tensor g = scaled(rows(grad).to(in.wide), mask_out);
  Tensor u = at::mm(g, in.B);
  Tensor none = at::empty({0}, x.options());
  Tensor dx = none, dA = none, dB = none, db = none;
  if (output_mask[0]) {
    dx = at::mm(u, in.A) * scaling;
    if (weight.has_value()) dx = dx + at::mm(g, weight->to(in.wide));
    dx = scaled(dx, mask_in).to(x.scalar_type()).reshape_symint(x.sym_sizes());
  }
  if (output_mask[1]) dA = (at::mm(u.t(), in.x) * scaling).to(lora_A.scalar_type());
  if (output_mask[2]) dB = (at::mm(g.t(), at::mm(in.x, in.A.t())) * scaling).to(lora_B.scalar_type());
  if (output_mask[3]) db = g.sum(0).to(x.scalar_type());
  return {dx, dA, dB, db};
}

}  // namespace apt
