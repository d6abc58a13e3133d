// Autograd and autocast, in C++ because a Python autograd.Function costs more than a small layer's product.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "check.h"
#include "ops.h"

namespace apt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The dispatcher's handle, looked up once: fake tensors and tracing modes see every inner call.
template <auto function>
auto& handle(const char* name) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow((std::string("apt_ext::") + name).c_str(), "")
                       .typed<std::remove_pointer_t<decltype(function)>>();
  return op;
}

void check_no_forward_ad(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    TORCH_CHECK(!tensor->defined() || !tensor->_fw_grad(/*level=*/0).defined(),
                "apt_linear has no forward-mode derivative (jvp, dual numbers); use reverse mode, or "
                "apt_ext.reference.apt_linear, which is plain differentiable torch");
  }
}

Tensor or_undefined(const OptTensor& tensor) { return tensor.value_or(Tensor()); }
OptTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptTensor(tensor) : std::nullopt; }

// The gradient formula itself: refuses to be differentiated, in words and only when somebody tries.
struct Backward : torch::autograd::Function<Backward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, const Tensor& x, const OptTensor& weight,
                               const Tensor& lora_A, const Tensor& lora_B, const Tensor& t,
                               const OptTensor& mask_in, const OptTensor& mask_out, double scaling,
                               std::array<bool, 4> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dA, dB, db] =
        handle<&apt_linear_backward>("apt_linear_backward")
            .call(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out, scaling, output_mask);
    return {dx, dA, dB, db};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "apt_linear cannot be differentiated twice (create_graph=True); use "
                "apt_ext.reference.apt_linear, which "
                "is plain differentiable torch");
  }
};

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                        const Tensor& lora_A, const Tensor& lora_B, const OptTensor& mask_in,
                        const OptTensor& mask_out, double scaling) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, t] = handle<&apt_linear_forward>("apt_linear_forward")
                      .call(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
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

bool wants_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

Tensor linear_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                       const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                       double scaling) {
  check_strided(x, "x");
  Tensor b = or_undefined(bias);
  check_no_forward_ad({&x, &lora_A, &lora_B, &b});
  if (at::GradMode::is_enabled()) {
    check_constant("apt_linear", weight, "weight");
    check_constant("apt_linear", mask_in, "mask_in");
    check_constant("apt_linear", mask_out, "mask_out");
    if (wants_grad(x) || wants_grad(lora_A) || wants_grad(lora_B) || wants_grad(b)) {
      return Linear::apply(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
    }
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&apt_linear>("apt_linear").call(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
}

// The two halves are ops of their own so that a compiler can place them; alone they are not differentiable.
std::tuple<Tensor, Tensor> forward_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                            const Tensor& lora_A, const Tensor& lora_B,
                                            const OptTensor& mask_in, const OptTensor& mask_out,
                                            double scaling) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !(wants_grad(x) || wants_grad(lora_A) || wants_grad(lora_B) ||
                                               wants_grad(or_undefined(bias))),
              "apt_linear_forward is one half of apt_linear and has no gradient of its own; call apt_linear");
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&apt_linear_forward>("apt_linear_forward")
      .call(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_autograd(const Tensor& grad, const Tensor& x,
                                                             const OptTensor& weight, const Tensor& lora_A,
                                                             const Tensor& lora_B, const Tensor& t,
                                                             const OptTensor& mask_in,
                                                             const OptTensor& mask_out, double scaling,
                                                             std::array<bool, 4> output_mask) {
  auto out = Backward::apply(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out, scaling, output_mask);
  return {out[0], out[1], out[2], out[3]};
}

void merge_autograd(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                    const OptTensor& mask_in, const OptTensor& mask_out, bool check) {
  check_constant("merge_", weight, "weight");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle<&merge_>("merge_").call(weight, lora_A, lora_B, scaling, mask_in, mask_out, check);
  }
  // A write through a raw pointer is invisible to autograd unless it is counted.
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
}

void mask_grads_autograd(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims) {
  for (const Tensor& grad : grads) check_constant("mask_grads_", grad, "a tensor of grads");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle<&mask_grads_>("mask_grads_").call(grads, masks, dims);
  }
  for (const Tensor& grad : grads) {
    if (!grad.is_inference()) grad.unsafeGetTensorImpl()->bump_version();
  }
}

// Under autocast(T): floating inputs other than float64, and the masks, are cast to T; the output is T.
template <c10::DeviceType device>
Tensor linear_autocast(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                       const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                       double scaling) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::ScalarType to = at::autocast::get_autocast_dtype(device);
  auto cast = [to](const auto& tensor) { return at::autocast::cached_cast(to, tensor, device); };
  return handle<&apt_linear>("apt_linear")
      .call(cast(x), cast(weight), cast(bias), cast(lora_A), cast(lora_B), cast(mask_in), cast(mask_out),
            scaling);
}

}  // namespace

TORCH_LIBRARY_IMPL(apt_ext, Autograd, m) {
  m.impl("apt_linear", &linear_autograd);
  m.impl("apt_linear_forward", &forward_autograd);
  m.impl("apt_linear_backward", &backward_autograd);
  m.impl("merge_", &merge_autograd);
  m.impl("mask_grads_", &mask_grads_autograd);
}

TORCH_LIBRARY_IMPL(apt_ext, AutocastCPU, m) { m.impl("apt_linear", &linear_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(apt_ext, AutocastCUDA, m) { m.impl("apt_linear", &linear_autocast<at::kCUDA>); }

}  // namespace apt
