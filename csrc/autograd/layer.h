// Autograd and autocast of the two layer ops, written once. In C++ because a Python autograd.Function costs
// more than a small layer's product.
//
// An Op names its Operands, the handles of its three ops (op, forward_op, backward_op) and what differs:
//   kName, kWeightName, kForwardRefusal   texts of messages
//   forward                               the arithmetic of forward_op, where nobody traces
//   composite, composite_backward         plain ATen operations, for whoever differentiates further
//   save_extra, flags, restore            what a backward needs beside LayerOperands
//   check_backward                        a refusal of second derivatives
//   used_weight                           what autocast casts of the weight
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../ops/apt_linear.h"
#include "common.h"

namespace apt {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a forward leaves for its backward. `input` is x or, gathered, its kept channels.
struct Forward {
  Tensor y, t, input;
  bool gathered = false;
};

template <class Op>
struct LayerFunction : torch::autograd::Function<LayerFunction<Op>> {
  using Operands = typename Op::Operands;

  // Beside x the arguments that can have a gradient, and then all operands: these are constants here.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const Operands& o) {
    at::AutoDispatchBelowADInplaceOrView below;
    Forward done;
    if (is_traced(x, lora_A)) {
      std::tie(done.y, done.t) = call_forward(Op::forward_op(), x, o);
      done.input = x;
    } else {
      done = Op::forward(x, o);
    }
    // All of it is saved, needed or not: what changes in place before the backward (growth, a mask) is then
    // torch's own error instead of a gradient of the old shape, or of another function.
    variable_list saved;
    saved.reserve(13);  // the most that an op saves
    saved.insert(saved.end(), {done.input, o.weight.value_or(Tensor()), lora_A, lora_B, done.t,
                               o.mask_in.value_or(Tensor()), o.mask_out.value_or(Tensor()),
                               o.dropout > 0.0 ? o.rng.value_or(Tensor()) : Tensor()});
    Op::save_extra(o, saved);
    ctx->save_for_backward(std::move(saved));
    const bool need_bias = bias.has_value() && bias->requires_grad();
    ctx->saved_data["scaling"] = o.scaling;
    ctx->saved_data["dropout"] = o.dropout;
    ctx->saved_data["flags"] = (x.requires_grad() ? 1 : 0) | (lora_A.requires_grad() ? 2 : 0) |
                               (lora_B.requires_grad() ? 4 : 0) | (need_bias ? 8 : 0) |
                               Op::flags(o, done.gathered);
    return done.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    Op::check_backward();
    const auto saved = ctx->get_saved_variables();
    const int64_t flags = ctx->saved_data["flags"].toInt();
    const Needs need{(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0};
    const OptTensor weight = or_none(saved[1]), mask_in = or_none(saved[5]), mask_out = or_none(saved[6]),
                    rng = or_none(saved[7]);
    const double scaling = ctx->saved_data["scaling"].toDouble(),
                 dropout = ctx->saved_data["dropout"].toDouble();
    const Operands o = Op::restore(
        {{weight, kNone, saved[2], saved[3], mask_in, mask_out}, scaling, dropout, rng}, saved, flags);
    auto [dx, dA, dB, db] = call_backward(Op::backward_op(), grads[0], saved[0], saved[4], o, need);
    auto wanted = [](bool needed, const Tensor& gradient) { return needed ? gradient : Tensor(); };
    return {wanted(need[0], dx), wanted(need[3], db), wanted(need[1], dA), wanted(need[2], dB), Tensor()};
  }
};

template <class Op>
Tensor layer_autograd(const Tensor& x, const typename Op::Operands& o) {
  check_dense(x, "x");
  check_dense(o.weight, Op::kWeightName);
  check_dense(o.bias, "bias");
  check_dense(o.lora_A, "lora_A");
  check_dense(o.lora_B, "lora_B");
  check_dense(o.mask_in, "mask_in");
  check_dense(o.mask_out, "mask_out");
  check_dense(o.rng, "rng");
  check_constant(Op::kName, o.weight, Op::kWeightName);
  check_constant(Op::kName, o.mask_in, "mask_in");
  check_constant(Op::kName, o.mask_out, "mask_out");
  if (any_transformed(x, o.weight, o.bias, o.lora_A, o.lora_B, o.mask_in, o.mask_out, o.rng))
    return Op::composite(x, o);
  if (any_wants_grad(x, o.bias, o.lora_A, o.lora_B))
    return LayerFunction<Op>::apply(x, o.bias, o.lora_A, o.lora_B, o);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_forward(Op::op(), x, o);
}

// The first half is an op of its own so that a compiler can place it. Alone it is not differentiable.
template <class Op>
std::tuple<Tensor, Tensor> layer_forward_autograd(const Tensor& x, const typename Op::Operands& o) {
  TORCH_CHECK(!any_wants_grad(x, o.weight, o.bias, o.lora_A, o.lora_B, o.mask_in, o.mask_out) &&
                  !any_transformed(x, o.weight, o.bias, o.lora_A, o.lora_B, o.mask_in, o.mask_out, o.rng),
              Op::kForwardRefusal);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_forward(Op::forward_op(), x, o);
}

// The gradient is differentiated where somebody asks for it: create_graph=True, forward over reverse.
template <class Op>
Gradients layer_backward_autograd(const Tensor& grad, const Tensor& x, const Tensor& t,
                                  const typename Op::Operands& o, const Needs& need) {
  if (any_wants_grad(grad, x, o.lora_A, o.lora_B) ||
      any_transformed(grad, x, o.weight, o.lora_A, o.lora_B, t, o.mask_in, o.mask_out, o.rng))
    return Op::composite_backward(grad, x, t, o, need);
  at::AutoDispatchBelowADInplaceOrView below;
  return call_backward(Op::backward_op(), grad, x, t, o, need);
}

// Under autocast(T) floating inputs other than float64 are cast to T, and the masks with them. The output is
// T.
template <class Op, c10::DeviceType device>
Tensor layer_autocast(const Tensor& x, const typename Op::Operands& o) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType to = at::autocast::get_autocast_dtype(device);
  auto cast = [to](const auto& tensor) { return at::autocast::cached_cast(to, tensor, device); };
  const Tensor input = cast(x);
  auto cast_mask = [&](const OptTensor& mask) { return input.scalar_type() == to ? cast(mask) : mask; };
  const OptTensor weight = cast(Op::used_weight(x, o)), bias = cast(o.bias);
  const Tensor lora_A = cast(o.lora_A), lora_B = cast(o.lora_B);
  const OptTensor mask_in = cast_mask(o.mask_in), mask_out = cast_mask(o.mask_out);
  return call_forward(Op::op(), input, o.with({weight, bias, lora_A, lora_B, mask_in, mask_out}));
}

}  // namespace apt
