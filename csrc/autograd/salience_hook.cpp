#include "salience_hook.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include "../ops/channel_sums.h"

namespace apt {
namespace {

Tensor sums_of(const Tensor& values, const OptTensor& tokens, const OptTensor& position, bool is_signed) {
  Tensor sums = channel_sums(values, tokens, is_signed);
  if (!position.has_value() || sums.numel() == position->numel()) return sums;
  return at::where(*position < 0, 0, sums.index_select(0, position->clamp_min(0)));
}

}  // namespace

bool SalienceHook::record(const Tensor& h, const OptTensor& tokens, const OptTensor& position) {
  const bool counts = tokens.has_value() && tokens->sizes() == h.sizes().slice(0, h.dim() - 1);
  if (!at::GradMode::is_enabled() || !h.requires_grad() || !is_new(h)) return counts;
  const OptTensor counted = counts ? tokens : std::nullopt;
  Tensor absolute = sums_of(h, counted, position, false);
  Tensor with_sign = is_signed_ ? sums_of(h, counted, position, true) : Tensor();
  h.register_hook(
      [self = shared_from_this(), absolute, with_sign, counted, position](const Tensor& gradient) {
        if (!gradient.defined()) return;  // a sibling of h has one
        std::vector<Tensor> found{absolute, sums_of(gradient, counted, position, false)};
        if (with_sign.defined()) found.push_back(with_sign);
        self->add(std::move(found));
      });
  return counts;
}

bool SalienceHook::is_new(const Tensor& h) {
  const void* node = torch::autograd::impl::gradient_edge(h).function.get();
  const bool is_repeated = static_cast<bool>(torch::autograd::get_current_node());  // in a backward
  const std::lock_guard lock(mutex_);
  std::erase_if(known_, [](const Known& one) { return one.tensor.expired(); });
  for (const Known& one : known_)
    if (is_repeated && one.tensor._unsafe_get_target() == h.unsafeGetTensorImpl() && one.node == node)
      return false;
  known_.push_back({c10::weak_intrusive_ptr<at::TensorImpl>(h.getIntrusivePtr()), node});
  return true;
}

void SalienceHook::add(std::vector<Tensor> found) {
  const at::NoGradGuard constants;
  const std::lock_guard lock(mutex_);
  sums_ = sums_.empty() ? std::move(found) : at::_foreach_add(sums_, found);
}

std::vector<Tensor> SalienceHook::sums() const {
  const std::lock_guard lock(mutex_);
  return sums_;
}

bool SalienceHook::has_gradients() const {
  const std::lock_guard lock(mutex_);
  return !sums_.empty();
}

void SalienceHook::reset() {
  const std::lock_guard lock(mutex_);
  sums_.clear();
}

}  // namespace apt
