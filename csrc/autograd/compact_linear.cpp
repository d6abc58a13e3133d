// Autograd and autocast of a compacted layer.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../op_table.h"
#include "../ops/compact_linear.h"
#include "common.h"

namespace apt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Compact : torch::autograd::Function<Compact> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptTensor& packed, const OptTensor& bias,
                        const Tensor& lora_A, const Tensor& lora_B, const OptTensor& mask_in,
                        const OptTensor& mask_out, const Tensor& index_in, const Tensor& index_out,
                        const Tensor& position_in, const Tensor& position_out, const Tensor& kept,
                        double scaling, bool compact_in, bool compact_out) {
    at::AutoDispatchBelowADInplaceOrView below;
    CompactForward done{Tensor(), Tensor(), x, false};
    if (is_traced(x, lora_A)) {
      std::tie(done.y, done.t) =
          handle<&compact_linear_forward>("compact_linear_forward")
              .call(x, packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out, position_in,
                    position_out, kept, scaling, compact_in, compact_out);
    } else {
      // The kept lanes of x are saved instead of x; an op could not return them, its shapes are known in
      // advance.
      done = compact_forward(x, {packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                                 position_in, position_out, kept, scaling, compact_in, compact_out});
    }
    bool need_bias = bias.has_value() && bias->requires_grad();
    int64_t need = (x.requires_grad() ? 1 : 0) | (lora_A.requires_grad() ? 2 : 0) |
                   (lora_B.requires_grad() ? 4 : 0) | (need_bias ? 8 : 0);
    // All of it is saved: what changes in place before the backward is torch's own error.
    ctx->save_for_backward({done.x, or_undefined(packed), lora_A, lora_B, done.t, or_undefined(mask_in),
                            or_undefined(mask_out), index_in, index_out, position_in, position_out, kept});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["flags"] =
        need | (compact_in ? 16 : 0) | (compact_out ? 32 : 0) | (done.gathered ? 64 : 0);
    return done.y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "a compacted layer has no second derivative (create_graph=True): it keeps only the kept lanes of x; "
        "call compact(False) first");
    auto saved = ctx->get_saved_variables();
    int64_t flags = ctx->saved_data["flags"].toInt();
    std::array<bool, 4> need{(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0};
    auto [dx, dA, dB, db] = handle<&compact_linear_backward>("compact_linear_backward")
                                .call(grads[0], saved[0], or_none(saved[1]), saved[2], saved[3], saved[4],
                                      or_none(saved[5]), or_none(saved[6]), saved[7], saved[8], saved[9],
                                      saved[10], saved[11], ctx->saved_data["scaling"].toDouble(),
                                      (flags & 16) != 0, (flags & 32) != 0, (flags & 64) != 0, need);
    auto wanted = [](bool needed, const Tensor& gradient) { return needed ? gradient : Tensor(); };
    variable_list out(15);
    out[0] = wanted(need[0], dx), out[2] = wanted(need[3], db);
    out[3] = wanted(need[1], dA), out[4] = wanted(need[2], dB);
    return out;
  }
};

Tensor compact_autograd(const Tensor& x, const OptTensor& packed, const OptTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                        const Tensor& index_in, const Tensor& index_out, const Tensor& position_in,
                        const Tensor& position_out, const Tensor& kept, double scaling, bool compact_in,
                        bool compact_out) {
  check_dense(x, "x");
  check_dense(packed, "packed");
  check_dense(bias, "bias");
  check_dense(lora_A, "lora_A");
  check_dense(lora_B, "lora_B");
  check_dense(mask_in, "mask_in");
  check_dense(mask_out, "mask_out");
  check_constant("compact_linear", packed, "packed");
  check_constant("compact_linear", mask_in, "mask_in");
  check_constant("compact_linear", mask_out, "mask_out");
  if (any_transformed(x, packed, bias, lora_A, lora_B, mask_in, mask_out)) {
    return composite_compact(x, {packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                                 position_in, position_out, kept, scaling, compact_in, compact_out});
  }
  if (any_wants_grad(x, bias, lora_A, lora_B)) {
    return Compact::apply(x, packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                          position_in, position_out, kept, scaling, compact_in, compact_out);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&compact_linear>("compact_linear")
      .call(x, packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out, position_in,
            position_out, kept, scaling, compact_in, compact_out);
}

Tensor compact_batched(const Tensor& x, const OptTensor& packed, const OptTensor& bias, const Tensor& lora_A,
                       const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                       const Tensor& index_in, const Tensor& index_out, const Tensor& position_in,
                       const Tensor& position_out, const Tensor& kept, double scaling, bool compact_in,
                       bool compact_out) {
  return composite_compact(x, {packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                               position_in, position_out, kept, scaling, compact_in, compact_out});
}

// The halves alone: like those of apt_linear, and without a derivative of their own.
constexpr const char* kHalf =
    "it is one half of a compacted layer and has no derivative of its own; call compact(False) first";

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& x, const OptTensor& packed, const OptTensor& bias,
                                            const Tensor& lora_A, const Tensor& lora_B,
                                            const OptTensor& mask_in, const OptTensor& mask_out,
                                            const Tensor& index_in, const Tensor& index_out,
                                            const Tensor& position_in, const Tensor& position_out,
                                            const Tensor& kept, double scaling, bool compact_in,
                                            bool compact_out) {
  TORCH_CHECK(
      !any_wants_grad(x, packed, bias, lora_A, lora_B) && !any_transformed(x, packed, bias, lora_A, lora_B),
      "compact_linear_forward: ", kHalf);
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&compact_linear_forward>("compact_linear_forward")
      .call(x, packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out, position_in,
            position_out, kept, scaling, compact_in, compact_out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_autograd(
    const Tensor& grad, const Tensor& x, const OptTensor& packed, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& t, const OptTensor& mask_in, const OptTensor& mask_out, const Tensor& index_in,
    const Tensor& index_out, const Tensor& position_in, const Tensor& position_out, const Tensor& kept,
    double scaling, bool compact_in, bool compact_out, bool gathered, std::array<bool, 4> output_mask) {
  TORCH_CHECK(
      !any_wants_grad(grad, x, lora_A, lora_B) && !any_transformed(grad, x, packed, lora_A, lora_B, t),
      "compact_linear_backward: ", kHalf);
  at::AutoDispatchBelowADInplaceOrView below;
  return handle<&compact_linear_backward>("compact_linear_backward")
      .call(grad, x, packed, lora_A, lora_B, t, mask_in, mask_out, index_in, index_out, position_in,
            position_out, kept, scaling, compact_in, compact_out, gathered, output_mask);
}

void pack_autograd(const Tensor& packed, const Tensor& weight, const Tensor& index_in,
                   const Tensor& index_out, const Tensor& kept) {
  check_constant("pack_kept_", packed, "packed");
  check_dense(packed, "packed");
  check_dense(weight, "weight");
  at::AutoDispatchBelowAutograd below;
  handle<&pack_kept_>("pack_kept_").call(packed, weight, index_in, index_out, kept);
}

void pack_counted(const Tensor& packed, const Tensor& weight, const Tensor& index_in, const Tensor& index_out,
                  const Tensor& kept) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    handle<&pack_kept_>("pack_kept_").call(packed, weight, index_in, index_out, kept);
  }
  count_write(packed);
}

template <c10::DeviceType device>
Tensor compact_autocast(const Tensor& x, const OptTensor& packed, const OptTensor& bias, const Tensor& lora_A,
                        const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                        const Tensor& index_in, const Tensor& index_out, const Tensor& position_in,
                        const Tensor& position_out, const Tensor& kept, double scaling, bool compact_in,
                        bool compact_out) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::ScalarType to = at::autocast::get_autocast_dtype(device);
  auto cast = [to](const auto& tensor) { return at::autocast::cached_cast(to, tensor, device); };
  Tensor input = cast(x);
  auto cast_mask = [&](const OptTensor& mask) { return input.scalar_type() == to ? cast(mask) : mask; };
  // What is in use, unless the call is traced: then sizes must not depend on values.
  OptTensor used = is_traced(x, lora_A)
                       ? packed
                       : used_part({packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                                    position_in, position_out, kept, scaling, compact_in, compact_out});
  return handle<&compact_linear>("compact_linear")
      .call(input, cast(used), cast(bias), cast(lora_A), cast(lora_B), cast_mask(mask_in),
            cast_mask(mask_out), index_in, index_out, position_in, position_out, kept, scaling, compact_in,
            compact_out);
}

}  // namespace

TORCH_LIBRARY_IMPL(apt_ext, Autograd, m) {
  m.impl("compact_linear", &compact_autograd);
  m.impl("compact_linear_forward", &forward_autograd);
  m.impl("compact_linear_backward", &backward_autograd);
  m.impl("pack_kept_", &pack_autograd);
}

TORCH_LIBRARY_IMPL(apt_ext, ADInplaceOrView, m) { m.impl("pack_kept_", &pack_counted); }

TORCH_LIBRARY_IMPL(apt_ext, FuncTorchBatched, m) { m.impl("compact_linear", &compact_batched); }

TORCH_LIBRARY_IMPL(apt_ext, AutocastCPU, m) { m.impl("compact_linear", &compact_autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(apt_ext, AutocastCUDA, m) { m.impl("compact_linear", &compact_autocast<at::kCUDA>); }

}  // namespace apt
