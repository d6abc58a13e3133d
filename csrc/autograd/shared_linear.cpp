#include "shared_linear.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "../device.h"
#include "common.h"

namespace apt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Edge;
using torch::autograd::variable_list;

// How many inputs of the node are a layer's: lora_A, lora_B and, where there is one, the bias.
size_t inputs_of(const SharedLayer& layer) { return layer.bias.has_value() ? 3 : 2; }

// Return true if autograd or a mode wants to see each layer's own op.
bool needs_own_op(const Tensor& tensor) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet kWrapped{Key::Python, Key::FuncTorchBatched, Key::FuncTorchGradWrapper,
                                         Key::Batched, Key::Functionalize};
  return tensor.defined() && (tensor.key_set().has_any(kWrapped) || is_dual(tensor));
}
bool needs_own_op(const OptTensor& tensor) { return tensor.has_value() && needs_own_op(*tensor); }
bool needs_own_op(const SharedLayer& layer) {
  return needs_own_op(layer.weight) || needs_own_op(layer.bias) || needs_own_op(layer.lora_A) ||
         needs_own_op(layer.lora_B) || needs_own_op(layer.mask_out);
}

bool is_plain_call(const Tensor& x) {
  return x.defined() && !x.is_meta() && !x.is_inference() && x.layout() == at::kStrided && x.numel() > 0 &&
         !needs_own_op(x) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

// As layer_autocast does it.
Tensor cast_x(const Tensor& x, at::ScalarType to) {
  return at::autocast::cached_cast(to, x, x.device().type());
}
SharedLayer cast_layer(const SharedLayer& layer, at::ScalarType to, const Tensor& x) {
  const auto device = x.device().type();
  auto cast = [&](const auto& tensor) { return at::autocast::cached_cast(to, tensor, device); };
  return {cast(layer.weight),
          cast(layer.bias),
          cast(layer.lora_A),
          cast(layer.lora_B),
          x.scalar_type() == to ? cast(layer.mask_out) : layer.mask_out,
          layer.scaling,
          layer.dropout,
          layer.rng};
}

// Return true where a forward may be one that is computed again in the backward, or that other one: there each
// layer draws at its own call, or what is drawn could be handed to another layer the second time.
bool may_be_recomputed() {
  return !at::GradMode::is_enabled() || torch::autograd::get_current_graph_task_id() != -1 ||
         !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

uint32_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

// What a backward needs of layers beside x and t. What belongs to a layer is held as it is, and looked at only
// where the layer has a part in the backward: it may change before its own call. What was made for the call
// (casts) is saved as autograd saves.
struct KeptLayers {
  static constexpr size_t kEach = 5;
  std::vector<Tensor> own;              // kEach a layer, undefined where there is none or it is saved
  std::vector<int64_t> version, saved;  // of own; the place among what is saved, or -1
  variable_list to_save;

  void add(const OptTensor& used, const OptTensor& given) {
    const bool is_own = used.has_value() && used->is_same(*given);
    own.push_back(is_own ? *used : Tensor());
    version.push_back(is_own ? version_of(*used) : 0);
    saved.push_back(used.has_value() && !is_own ? static_cast<int64_t>(to_save.size()) : -1);
    if (used.has_value() && !is_own) to_save.push_back(*used);
  }
};

Tensor kept_tensor(const KeptLayers& kept, size_t i, const variable_list& saved) {
  if (kept.saved[i] >= 0) return saved[kept.saved[i]];
  const Tensor& own = kept.own[i];
  TORCH_CHECK(
      !own.defined() || version_of(own) == kept.version[i],
      "one of the variables needed for gradient computation has been modified by an inplace operation: "
      "[",
      own.toString(), " ", own.sizes(), "] is at version ", version_of(own), "; expected version ",
      kept.version[i], " instead");
  return own;
}

struct SharedFunction : torch::autograd::Function<SharedFunction> {
  // inputs: x, and those of each layer. given: the layers before autocast.
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs,
                               const std::vector<SharedLayer>& layers,
                               const std::vector<SharedLayer>& given) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor& x = inputs[0];
    auto outputs = shared_linear_forward(x, layers);
    KeptLayers kept;
    kept.to_save.push_back(x);
    variable_list out;
    std::vector<double> scalings, dropouts;
    std::vector<int64_t> flags;
    for (size_t i = 0; i < layers.size(); ++i) {
      const SharedLayer& layer = layers[i];
      kept.to_save.push_back(std::get<1>(outputs[i]));
      scalings.push_back(layer.scaling), dropouts.push_back(layer.dropout);
      flags.push_back((wants(layer.lora_A) ? 1 : 0) | (wants(layer.lora_B) ? 2 : 0) |
                      (wants(layer.bias.value_or(Tensor())) ? 4 : 0) | (layer.bias.has_value() ? 8 : 0));
      out.push_back(std::get<0>(outputs[i]));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      kept.add(layers[i].weight, given[i].weight);
      kept.add(layers[i].lora_A, given[i].lora_A);
      kept.add(layers[i].lora_B, given[i].lora_B);
      kept.add(layers[i].mask_out, given[i].mask_out);
      kept.add(layers[i].rng, given[i].rng);
    }
    ctx->save_for_backward(std::move(kept.to_save));
    ctx->set_materialize_grads(false);
    ctx->saved_data["own"] = kept.own;
    ctx->saved_data["version"] = kept.version;
    ctx->saved_data["saved"] = kept.saved;
    ctx->saved_data["scalings"] = scalings;
    ctx->saved_data["dropouts"] = dropouts;
    ctx->saved_data["flags"] = flags;
    ctx->saved_data["need_x"] = x.requires_grad();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const KeptLayers kept{ctx->saved_data["own"].toTensorVector(),
                          ctx->saved_data["version"].toIntVector(),
                          ctx->saved_data["saved"].toIntVector(),
                          {}};
    const auto scalings = ctx->saved_data["scalings"].toDoubleVector(),
               dropouts = ctx->saved_data["dropouts"].toDoubleVector();
    const auto flags = ctx->saved_data["flags"].toIntVector();
    const bool need_x = ctx->saved_data["need_x"].toBool();
    const Tensor& x = saved[0];
    std::vector<SharedLayer> layers(scalings.size());
    std::vector<Tensor> lows;
    std::vector<std::array<bool, 3>> need;
    bool own_op = needs_own_op(x) || any_wants_grad(x) || c10::impl::TorchDispatchModeTLS::any_modes_set();
    for (size_t i = 0; i < layers.size(); ++i) {
      lows.push_back(saved[1 + i]);
      need.push_back({(flags[i] & 1) != 0, (flags[i] & 2) != 0, (flags[i] & 4) != 0});
      if (!grads[i].defined()) continue;
      auto of_layer = [&](size_t k) { return kept_tensor(kept, KeptLayers::kEach * i + k, saved); };
      layers[i] = {or_none(of_layer(0)), std::nullopt, of_layer(1), of_layer(2),
                   or_none(of_layer(3)), scalings[i],  dropouts[i], or_none(of_layer(4))};
      own_op = own_op || needs_own_op(grads[i]) || needs_own_op(layers[i]) ||
               any_wants_grad(grads[i], layers[i].lora_A, layers[i].lora_B);
    }
    SharedGradients found = own_op ? by_own_ops(grads, x, lows, layers, need_x, need)
                                   : together(grads, x, lows, layers, need_x, need);
    variable_list out{found.x};
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto& [dA, dB, db] = found.own[i];
      out.insert(out.end(), {dA, dB});
      if ((flags[i] & 8) != 0) out.push_back(db);
    }
    out.resize(out.size() + 2);  // for `layers` and `given`
    return out;
  }

 private:
  static bool wants(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

  static SharedGradients together(const variable_list& grads, const Tensor& x,
                                  const std::vector<Tensor>& lows, const std::vector<SharedLayer>& layers,
                                  bool need_x, const std::vector<std::array<bool, 3>>& need) {
    at::AutoDispatchBelowADInplaceOrView below;
    return shared_linear_backward(grads, x, lows, layers, need_x, need);
  }

  // For whoever differentiates further, or looks at each op.
  static SharedGradients by_own_ops(const variable_list& grads, const Tensor& x,
                                    const std::vector<Tensor>& lows, const std::vector<SharedLayer>& layers,
                                    bool need_x, const std::vector<std::array<bool, 3>>& need) {
    static auto& op = handle<&LinearArguments::backward<&apt_linear_backward>>("apt_linear_backward");
    SharedGradients out;
    out.own.resize(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      if (!grads[i].defined()) continue;
      auto [dx, dA, dB, db] = call_backward(op, grads[i], x, lows[i], layers[i].operands(),
                                            Needs{need_x, need[i][0], need[i][1], need[i][2]});
      if (need_x) out.x = out.x.defined() ? out.x + dx : dx;
      auto wanted = [](bool needed, const Tensor& gradient) { return needed ? gradient : Tensor(); };
      out.own[i] = {wanted(need[i][0], dA), wanted(need[i][1], dB), wanted(need[i][2], db)};
    }
    return out;
  }
};

variable_list shared_outputs(const Tensor& x, const std::vector<SharedLayer>& layers,
                             const std::vector<SharedLayer>& given) {
  variable_list inputs{x};
  bool wants_gradient = any_wants_grad(x);
  for (const SharedLayer& layer : layers) {
    inputs.insert(inputs.end(), {layer.lora_A, layer.lora_B});
    if (layer.bias.has_value()) inputs.push_back(*layer.bias);
    wants_gradient = wants_gradient || any_wants_grad(layer.bias, layer.lora_A, layer.lora_B);
  }
  if (wants_gradient) return SharedFunction::apply(at::TensorList(inputs), layers, given);
  at::AutoDispatchBelowADInplaceOrView below;
  variable_list out;
  for (auto& [y, t] : shared_linear_forward(x, layers)) out.push_back(y);
  return out;
}

}  // namespace

SeenTensor::SeenTensor(const OptTensor& tensor)
    : is_there_(tensor.has_value()),
      tensor_(is_there_ ? tensor->getIntrusivePtr() : Tensor().getIntrusivePtr()) {
  if (!is_there_) return;
  data_ = tensor->const_data_ptr(), count_ = tensor->numel();
  version_ = version_of(*tensor), requires_grad_ = tensor->requires_grad();
}

bool SeenTensor::is_still(const OptTensor& tensor) const {
  if (tensor.has_value() != is_there_) return false;
  return !is_there_ || (!tensor_.expired() && tensor_._unsafe_get_target() == tensor->unsafeGetTensorImpl() &&
                        tensor->const_data_ptr() == data_ && tensor->numel() == count_ &&
                        version_of(*tensor) == version_ && tensor->requires_grad() == requires_grad_);
}

CallState CallState::of(const Tensor& x) {
  const auto device = x.device().type();
  const bool autocast = at::autocast::is_autocast_enabled(device);
  return {at::GradMode::is_enabled(), autocast,
          autocast ? at::autocast::get_autocast_dtype(device) : at::ScalarType::Undefined, current_stream(x)};
}

SharedOutputs::SharedOutputs(const Tensor& x, const std::vector<SharedLayer>& layers,
                             const std::vector<size_t>& taken, const CallState& state)
    : x_(x), state_(state) {
  for (const size_t i : taken) {
    const SharedLayer& layer = layers[i];
    outputs_.push_back({i,
                        Tensor(),
                        {SeenTensor(layer.weight), SeenTensor(layer.bias), SeenTensor(layer.lora_A),
                         SeenTensor(layer.lora_B), SeenTensor(layer.mask_out)},
                        layer.scaling,
                        layer.dropout,
                        {},
                        0});
  }
}

std::shared_ptr<SharedOutputs> SharedOutputs::compute(const Tensor& x, std::vector<SharedLayer> layers,
                                                      bool always, const std::function<Tensor()>& draw) {
  if (!is_plain_call(x)) return nullptr;
  const CallState state = CallState::of(x);
  const bool casts = state.autocast && x.scalar_type() != at::kDouble;
  const at::ScalarType dtype = casts ? state.autocast_dtype : x.scalar_type();
  std::vector<size_t> taken;
  const bool draws_alone = may_be_recomputed();
  for (size_t i = 0; i < layers.size(); ++i) {
    const SharedLayer& layer = layers[i];
    if (layer.dropout > 0.0 && draws_alone) continue;
    if (needs_own_op(layer) || any_wants_grad(layer.weight, layer.mask_out)) continue;
    if (always || is_worth_sharing(x, layer, dtype)) taken.push_back(i);
  }
  if (taken.size() < 2) return nullptr;
  for (const size_t i : taken)
    if (layers[i].dropout > 0.0) layers[i].rng = draw();
  const Tensor input = casts ? cast_x(x, dtype) : x;
  std::vector<SharedLayer> used, given;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::erase_if(taken, [&](size_t i) {
    SharedLayer layer = casts ? cast_layer(layers[i], dtype, input) : layers[i];
    const bool is_left = !fits(input, layer);
    if (!is_left) used.push_back(std::move(layer)), given.push_back(layers[i]);
    return is_left;
  });
  if (taken.size() < 2) return nullptr;
  std::shared_ptr<SharedOutputs> out(new SharedOutputs(x, layers, taken, state));
  variable_list outputs = shared_outputs(input, used, given);
  NodePointer node = outputs[0].grad_fn();
  size_t place = 1;
  for (size_t j = 0; j < taken.size(); ++j) {
    Output& output = out->outputs_[j];
    output.y = outputs[j].variable_data();
    output.first_input = place;
    for (size_t k = 0; node && k < inputs_of(used[j]); ++k)
      output.edges.push_back(std::exchange(node->next_edges()[place + k], Edge()));
    place += inputs_of(used[j]);
  }
  if (node) out->node_ = WeakNode(node), out->untaken_ = node;
  return out;
}

OptTensor SharedOutputs::take(size_t i, const Tensor& x, const SharedLayer& layer) {
  const auto found =
      std::find_if(outputs_.begin(), outputs_.end(), [i](const Output& output) { return output.layer == i; });
  if (found == outputs_.end() || !found->y.defined() || !x_.is_still(x) || !(state_ == CallState::of(x)))
    return std::nullopt;
  const OptTensor now[] = {layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.mask_out};
  for (size_t k = 0; k < std::size(now); ++k)
    if (!found->seen[k].is_still(now[k])) return std::nullopt;
  if (found->scaling != layer.scaling || found->dropout != layer.dropout) return std::nullopt;
  if (layer.dropout > 0.0 && may_be_recomputed()) return std::nullopt;
  if (node_.has_value()) {
    NodePointer node = node_->lock();
    if (!node) return std::nullopt;
    std::move(found->edges.begin(), found->edges.end(), node->next_edges().begin() + found->first_input);
    const auto number = static_cast<uint32_t>(found - outputs_.begin());
    torch::autograd::impl::set_gradient_edge(found->y, Edge(node, number));
    untaken_ = NodePointer();  // from here on outputs hold it
  }
  return std::exchange(found->y, Tensor());
}

}  // namespace apt
