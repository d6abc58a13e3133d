// Autograd, autocast and batching of apt_linear.
#include "composite.h"
#include "layer.h"

namespace apt {
namespace {

struct LinearOp {
  using Operands = LinearOperands;
  static constexpr const char *kName = "apt_linear", *kWeightName = "weight";
  static constexpr const char* kForwardRefusal =
      "apt_linear_forward is one half of apt_linear and has no gradient of its own; call apt_linear";

  static auto& op() { return handle<&LinearArguments::forward<&apt_linear>>("apt_linear"); }
  static auto& forward_op() {
    return handle<&LinearArguments::forward<&apt_linear_forward>>("apt_linear_forward");
  }
  static auto& backward_op() {
    return handle<&LinearArguments::backward<&apt_linear_backward>>("apt_linear_backward");
  }

  static Forward forward(const Tensor& x, const LinearOperands& o) {
    auto [y, t] = linear_with_low(x, o);
    return {y, t, x};
  }
  static constexpr auto composite = &composite_linear;
  static constexpr auto composite_backward = &apt::composite_backward;

  static void save_extra(const LinearOperands&, variable_list&) {}
  static int64_t flags(const LinearOperands&, bool) { return 0; }
  static void check_backward() {}
  static LinearOperands restore(const LinearOperands& o, const variable_list&, int64_t) { return o; }
  static const OptTensor& used_weight(const Tensor&, const LinearOperands& o) { return o.weight; }
};

// What it returns has no gradient. A layout that is a Python subclass is refused before it reaches its own code.
Tensor dropout_mask_autograd(c10::SymIntArrayRef shape, double p, const Tensor& rng) {
  check_dense(rng, "rng");
  at::AutoDispatchBelowADInplaceOrView below;
  return drawn_mask(shape, p, rng);
}

}  // namespace

TORCH_LIBRARY_IMPL(apt_ext, Autograd, m) {
  m.impl("apt_linear", &LinearArguments::forward<&layer_autograd<LinearOp>>);
  m.impl("apt_linear_forward", &LinearArguments::forward<&layer_forward_autograd<LinearOp>>);
  m.impl("apt_linear_backward", &LinearArguments::backward<&layer_backward_autograd<LinearOp>>);
  m.impl("dropout_mask", &dropout_mask_autograd);
}

// torch.func.vmap batches the plain operations.
TORCH_LIBRARY_IMPL(apt_ext, FuncTorchBatched, m) {
  m.impl("apt_linear", &LinearArguments::forward<&composite_linear>);
  m.impl("apt_linear_backward", &LinearArguments::backward<&composite_backward>);
}

TORCH_LIBRARY_IMPL(apt_ext, AutocastCPU, m) {
  m.impl("apt_linear", &LinearArguments::forward<&layer_autocast<LinearOp, at::kCPU>>);
}
TORCH_LIBRARY_IMPL(apt_ext, AutocastCUDA, m) {
  m.impl("apt_linear", &LinearArguments::forward<&layer_autocast<LinearOp, at::kCUDA>>);
}

}  // namespace apt
