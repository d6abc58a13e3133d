#include "composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>

#include "../ops/dropout_mask.h"
#include "common.h"

namespace apt {
namespace {

at::ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor rows(const Tensor& x) { return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2); }

Tensor along(const OptTensor& mask, int64_t dim) { return dim == 0 ? mask->unsqueeze(1) : *mask; }

// Select in both directions: `where` keeps a NaN of a pruned channel out of values, tangents and gradients.
Tensor scaled(const Tensor& matrix, const OptTensor& mask) {
  return mask.has_value() ? at::where(*mask == 0, 0, matrix * mask->to(matrix.scalar_type())) : matrix;
}

Tensor selected(const Tensor& matrix, const OptTensor& mask, int64_t dim) {
  return mask.has_value() ? at::where(along(mask, dim) == 0, 0, matrix) : matrix;
}

// What both directions need: x' = mask_in * x, A and B rounded to x's dtype, without their pruned channels.
struct WideOperands {
  WideOperands(const Tensor& x, const LinearOperands& o, const OptTensor& given)
      : wide(wide_type(x)),
        x(scaled(rows(x).to(wide), o.mask_in)),
        A(selected(o.lora_A.to(x.scalar_type()).to(wide), o.mask_in, 1)),
        B(selected(o.lora_B.to(x.scalar_type()).to(wide), o.mask_out, 0)),
        scaling(o.scaling / (1.0 - o.dropout)) {
    if (o.dropout > 0.0)
      keep = rows(given.has_value() ? *given : drawn_mask(x.sym_sizes(), o.dropout, *o.rng));
  }
  Tensor dropped(const Tensor& matrix) const { return keep.defined() ? at::where(keep, matrix, 0) : matrix; }
  at::ScalarType wide;
  Tensor x, A, B, keep;
  double scaling;
};

}  // namespace

Tensor drawn_mask(c10::SymIntArrayRef shape, double p, const Tensor& rng) {
  return handle<&dropout_mask>("dropout_mask").call(shape, p, rng);
}

Tensor composite_dropped(const Tensor& x, const LinearOperands& o, const OptTensor& keep) {
  check_apt_linear(x, o);
  WideOperands in(x, o, keep);
  Tensor y = at::mm(at::mm(in.dropped(in.x), in.A.t()), in.B.t()) * in.scaling;
  if (o.weight.has_value()) y = y + at::mm(in.x, o.weight->to(in.wide).t());
  if (o.bias.has_value()) y = y + o.bias->to(in.wide);
  return scaled(y, o.mask_out).to(x.scalar_type()).reshape_symint(with_last(x, o.lora_B.sym_size(0)));
}

Tensor composite_linear(const Tensor& x, const LinearOperands& o) {
  return composite_dropped(x, o, std::nullopt);
}

Gradients composite_backward(const Tensor& grad, const Tensor& x, const Tensor& t, const LinearOperands& o,
                             const Needs& need) {
  check_apt_linear_backward(grad, x, t, o);
  WideOperands in(x, o, std::nullopt);
  Tensor g = scaled(rows(grad).to(in.wide), o.mask_out);
  Tensor u = at::mm(g, in.B);
  std::array<Tensor, 4> out;
  if (need[0]) {
    Tensor dx = in.dropped(at::mm(u, in.A)) * in.scaling;
    if (o.weight.has_value()) dx = dx + at::mm(g, o.weight->to(in.wide));
    out[0] = scaled(dx, o.mask_in).to(x.scalar_type()).reshape_symint(x.sym_sizes());
  }
  const Tensor used = in.dropped(in.x);
  if (need[1]) out[1] = (at::mm(u.t(), used) * in.scaling).to(o.lora_A.scalar_type());
  if (need[2]) out[2] = (at::mm(g.t(), at::mm(used, in.A.t())) * in.scaling).to(o.lora_B.scalar_type());
  if (need[3]) out[3] = g.sum(0).to(x.scalar_type());
  return gradients_of(out, x);
}

}  // namespace apt
