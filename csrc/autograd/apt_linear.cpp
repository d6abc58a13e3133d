// Autograd and autocast, in C++ because a Python autograd.Function costs more than a small layer's product.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "../checks.h"
#include "../op_table.h"
#include "common.h"
#include "composite.h"

namespace apt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                        const Tensor& lora_A, const Tensor& lora_B, const OptTensor& mask_in,
                        const OptTensor& mask_out, double scaling) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, t] = is_traced(x, lora_A)
                      ? handle<&apt_linear_forward>("apt_linear_forward")
                            .call(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling)
                      : linear_with_low(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
    bool need_bias = bias.has_value() && bias->requires_grad();
    std::array<bool, 4> need{x.requires_grad(), lora_A.requires_grad(), lora_B.requires_grad(), need_bias};
    // The factors are always saved: growth between forward and backward is then torch's own "modified by an
    // inplace operation" instead of a gradient of the old shape. The masks likewise: the gradient belongs to
    // this forward's.
    ctx->save_for_backward(
        {x, or_undefined(weight), lora_A, lora_B, t, or_undefined(mask_in), or_undefined(mask_out)});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["need"] = (need[0] ? 1 : 0) | (need[1] ? 2 : 0) | (need[2] ? 4 : 0) | (need[3] ? 8 : 0);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    int64_t bits = ctx->saved_data["need"].toInt();
    std::array<bool, 4> need{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
    auto [dx, dA, dB, db] =
        handle<&apt_linear_backward>("apt_linear_backward")
            .call(grads[0], saved[0], or_none(saved[1]), saved[2], saved[3], saved[4], or_none(saved[5]),
                  or_none(saved[6]), ctx->saved_data["scaling"].toDouble(), need);
    auto wanted = [](bool needed, const Tensor& gradient) { return needed ? gradient : Tensor(); };
    return {wanted(need[0], dx),
            Tensor(),
            wanted(need[3], db),
            wanted(need[1], dA),
            wanted(need[2], dB),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor linear_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                       const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                       double scaling) {
  check_dense(x, "x");
  check_dense(weight, "weight");
  check_dense(bias, "bias");
  check_dense(lora_A, "lora_A");
  check_dense(lora_B, "lora_B");
  check_dense(mask_in, "mask_in");
  check_dense(mask_out, "mask_out");
  check_constant("apt_linear", weight, "weight");
  check_constant("apt_linear", mask_in, "mask_in");
  check_constant("apt_linear", mask_out, "mask_out");
  if (any_transformed(x, weight, bias, lora_A, lora_B, mask_in, mask_out)) {
    return composite_linear(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
  }
  if (any_wants_grad(x, bias, lora_A, lora_B)) {
    return Linear::apply(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&apt_linear>("apt_linear").call(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
}

// The first half is an op of its own so that a compiler can place it; alone it is not differentiable.
std::tuple<Tensor, Tensor> forward_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                            const Tensor& lora_A, const Tensor& lora_B,
                                            const OptTensor& mask_in, const OptTensor& mask_out,
                                            double scaling) {
  TORCH_CHECK(!any_wants_grad(x, weight, bias, lora_A, lora_B, mask_in, mask_out) &&
                  !any_transformed(x, weight, bias, lora_A, lora_B, mask_in, mask_out),
              "apt_linear_forward is one half of apt_linear and has no gradient of its own; call apt_linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&apt_linear_forward>("apt_linear_forward")
      .call(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
}

// The gradient is differentiated where somebody asks for it: create_graph=True, forward over reverse.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_autograd(const Tensor& grad, const Tensor& x,
                                                             const OptTensor& weight, const Tensor& lora_A,
                                                             const Tensor& lora_B, const Tensor& t,
                                                             const OptTensor& mask_in,
                                                             const OptTensor& mask_out, double scaling,
                                                             std::array<bool, 4> output_mask) {
  if (any_wants_grad(grad, x, lora_A, lora_B) ||
      any_transformed(grad, x, weight, lora_A, lora_B, mask_in, mask_out)) {
    return composite_backward(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out, scaling, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&apt_linear_backward>("apt_linear_backward")
      .call(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out, scaling, output_mask);
}

template <class Name>
void check_plain(const char* op, const OptTensor& tensor, const Name& name) {
  check_dense(tensor, name);
  TORCH_CHECK(!tensor.has_value() || !is_dual(*tensor), op, " has no forward-mode derivative, but ", name,
              " carries a tangent (dual numbers, torch.func.jvp); expected it without");
}

void merge_autograd(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                    const OptTensor& mask_in, const OptTensor& mask_out, bool check) {
  check_constant("merge_", weight, "weight");
  check_plain("merge_", weight, "weight");
  check_plain("merge_", lora_A, "lora_A");
  check_plain("merge_", lora_B, "lora_B");
  check_plain("merge_", mask_in, "mask_in");
  check_plain("merge_", mask_out, "mask_out");
  at::AutoDispatchBelowAutograd below;
  handle<&merge_>("merge_").call(weight, lora_A, lora_B, scaling, mask_in, mask_out, check);
}

void mask_grads_autograd(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims) {
  for (size_t i = 0; i < grads.size(); ++i) {
    check_constant("mask_grads_", grads[i], Indexed{"grads", i});
    check_plain("mask_grads_", grads[i], Indexed{"grads", i});
  }
  for (size_t i = 0; i < masks.size(); ++i) check_plain("mask_grads_", masks[i], Indexed{"masks", i});
  at::AutoDispatchBelowAutograd below;
  handle<&mask_grads_>("mask_grads_").call(grads, masks, dims);
}

void merge_counted(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                   const OptTensor& mask_in, const OptTensor& mask_out, bool check) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle<&merge_>("merge_").call(weight, lora_A, lora_B, scaling, mask_in, mask_out, check);
  }
  count_write(weight);
}

void mask_grads_counted(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle<&mask_grads_>("mask_grads_").call(grads, masks, dims);
  }
  for (const Tensor& grad : grads) count_write(grad);
}

// Under autocast(T): floating inputs other than float64 are cast to T, and the masks with them; the output is
// T.
template <c10::DeviceType device>
Tensor linear_autocast(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                       const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                       double scaling) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::ScalarType to = at::autocast::get_autocast_dtype(device);
  auto cast = [to](const auto& tensor) { return at::autocast::cached_cast(to, tensor, device); };
  Tensor input = cast(x);
  auto cast_mask = [&](const OptTensor& mask) { return input.scalar_type() == to ? cast(mask) : mask; };
  return handle<&apt_linear>("apt_linear")
      .call(input, cast(weight), cast(bias), cast(lora_A), cast(lora_B), cast_mask(mask_in),
            cast_mask(mask_out), scaling);
}

}  // namespace

TORCH_LIBRARY_IMPL(apt_ext, Autograd, m) {
  m.impl("apt_linear", &linear_autograd);
  m.impl("apt_linear_forward", &forward_autograd);
  m.impl("apt_linear_backward", &backward_autograd);
  m.impl("merge_", &merge_autograd);
  m.impl("mask_grads_", &mask_grads_autograd);
}

TORCH_LIBRARY_IMPL(apt_ext, ADInplaceOrView, m) {
  m.impl("merge_", &merge_counted);
  m.impl("mask_grads_", &mask_grads_counted);
}

// torch.func.vmap batches the plain operations.
TORCH_LIBRARY_IMPL(apt_ext, FuncTorchBatched, m) {
  m.impl("apt_linear", &composite_linear);
  m.impl("apt_linear_backward", &composite_backward);
}

TORCH_LIBRARY_IMPL(apt_ext, AutocastCPU, m) { m.impl("apt_linear", &linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(apt_ext, AutocastCUDA, m) { m.impl("apt_linear", &linear_autocast<at::kCUDA>); }

}  // namespace apt
