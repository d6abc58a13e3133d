// Autograd, autocast and batching of a compacted layer.
#include "../ops/compact_linear.h"

#include <ATen/ops/constant_pad_nd.h>

#include "composite.h"
#include "layer.h"

namespace apt {
namespace {

// The op as plain ATen operations.
Tensor composite_compact(const Tensor& x, const CompactOperands& o) {
  check_compact(x, o);
  const Sides sides = sides_of(o);
  const Side &in = sides.in, &out = sides.out;
  check_width(x, "x", o.compact_in, in);
  auto channels_of = [](const Side& side) { return side.index.narrow(0, 0, side.kept).to(at::kLong); };
  const Tensor kept_in = channels_of(in), kept_out = channels_of(out);
  auto of = [](const OptTensor& vector, const Tensor& kept) {
    return vector.has_value() ? OptTensor(vector->index_select(0, kept)) : std::nullopt;
  };
  OptTensor weight;
  if (o.weight.has_value()) {
    weight = used_weight(*o.weight, sides).view({out.width, in.width});
    weight = weight->narrow(0, 0, out.kept).narrow(1, 0, in.kept);
  }
  const Tensor used = o.compact_in ? x.narrow(-1, 0, in.kept) : x.index_select(-1, kept_in);
  const Tensor lora_A = o.lora_A.index_select(1, kept_in), lora_B = o.lora_B.index_select(0, kept_out);
  const OptTensor bias = of(o.bias, kept_out), mask_in = of(in.mask, kept_in),
                  mask_out = of(out.mask, kept_out);
  OptTensor keep;
  if (o.dropout > 0.0) {
    auto sizes = with_last(x, in.size);
    keep = drawn_mask(sizes, o.dropout, *o.rng).index_select(-1, kept_in);
  }
  const Tensor y = composite_dropped(
      used, {{weight, bias, lora_A, lora_B, mask_in, mask_out}, o.scaling, o.dropout, o.rng}, keep);
  if (o.compact_out) return at::constant_pad_nd(y, {0, out.width - out.kept});
  return y.new_zeros_symint(with_last(y, out.size)).index_copy(-1, kept_out, y);
}

// The halves alone: like those of apt_linear, and without a derivative of their own.
#define APT_HALF \
  ": it is one half of a compacted layer and has no derivative of its own; call compact(False) first"

struct CompactOp {
  using Operands = CompactOperands;
  static constexpr const char *kName = "compact_linear", *kWeightName = "packed";
  static constexpr const char* kForwardRefusal = "compact_linear_forward" APT_HALF;

  static auto& op() { return handle<&CompactArguments::forward<&compact_linear>>("compact_linear"); }
  static auto& forward_op() {
    return handle<&CompactArguments::forward<&compact_linear_forward>>("compact_linear_forward");
  }
  static auto& backward_op() {
    return handle<&CompactBackwardArguments::backward<&compact_linear_backward>>("compact_linear_backward");
  }

  // The kept channels of x are saved instead of x. An op could not return them: its shapes are known in
  // advance.
  static Forward forward(const Tensor& x, const CompactOperands& o) {
    CompactForward done = compact_forward(x, o);
    return {done.y, done.t, done.x, done.gathered};
  }
  static constexpr auto composite = &composite_compact;
  static Gradients composite_backward(const Tensor&, const Tensor&, const Tensor&, const CompactOperands&,
                                      const Needs&) {
    TORCH_CHECK(false, "compact_linear_backward" APT_HALF);
  }

  static void save_extra(const CompactOperands& o, variable_list& saved) {
    saved.insert(saved.end(), {o.index_in, o.index_out, o.position_in, o.position_out, o.kept});
  }
  static int64_t flags(const CompactOperands& o, bool gathered) {
    return (o.compact_in ? 16 : 0) | (o.compact_out ? 32 : 0) | (gathered ? 64 : 0);
  }
  static void check_backward() {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "a compacted layer has no second derivative (create_graph=True): it keeps only the kept lanes of x; "
        "call compact(False) first");
  }
  static CompactOperands restore(const LinearOperands& o, const variable_list& saved, int64_t flags) {
    return {o,         saved[8],          saved[9],          saved[10], saved[11], saved[12],
            o.scaling, (flags & 16) != 0, (flags & 32) != 0, o.dropout, o.rng,     (flags & 64) != 0};
  }

  // What is in use, unless the call is traced: then sizes must not depend on values.
  static OptTensor used_weight(const Tensor& x, const CompactOperands& o) {
    const bool fits = o.weight.has_value() && o.weight->dim() == 1 && o.lora_A.dim() == 2 &&
                      o.lora_B.dim() == 2 && o.index_in.dim() == 1 && o.index_out.dim() == 1 &&
                      o.kept.is_cpu() && o.kept.scalar_type() == at::kLong && o.kept.dim() == 0;
    if (!fits || is_traced(x, o.lora_A)) return o.weight;  // the op says what is wrong
    return apt::used_weight(*o.weight, sides_of(o));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(apt_ext, Autograd, m) {
  m.impl("compact_linear", &CompactArguments::forward<&layer_autograd<CompactOp>>);
  m.impl("compact_linear_forward", &CompactArguments::forward<&layer_forward_autograd<CompactOp>>);
  m.impl("compact_linear_backward", &CompactBackwardArguments::backward<&layer_backward_autograd<CompactOp>>);
}

TORCH_LIBRARY_IMPL(apt_ext, FuncTorchBatched, m) {
  m.impl("compact_linear", &CompactArguments::forward<&composite_compact>);
}

TORCH_LIBRARY_IMPL(apt_ext, AutocastCPU, m) {
  m.impl("compact_linear", &CompactArguments::forward<&layer_autocast<CompactOp, at::kCPU>>);
}
TORCH_LIBRARY_IMPL(apt_ext, AutocastCUDA, m) {
  m.impl("compact_linear", &CompactArguments::forward<&layer_autocast<CompactOp, at::kCUDA>>);
}

}  // namespace apt
