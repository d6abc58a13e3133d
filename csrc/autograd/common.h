// Shared by the autograd of all ops: handles of the dispatcher, and who asks for a derivative.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>
#include <string>
#include <type_traits>

#include "../checks.h"

namespace apt {

// Look up the dispatcher's handle of an op, once. Fake tensors and tracing modes see every call through it.
template <auto function>
auto& handle(const char* name) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow((std::string("apt_ext::") + name).c_str(), "")
                       .typed<std::remove_pointer_t<decltype(function)>>();
  return op;
}

inline OptTensor or_none(const Tensor& tensor) { return tensor.defined() ? OptTensor(tensor) : std::nullopt; }

inline bool wants_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

inline bool wants_grad(const OptTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

inline bool is_dual(const Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}

// Return true if somebody else differentiates: forward mode (dual numbers), or a gradient transform of
// torch.func.
inline bool is_transformed(const Tensor& tensor) {
  return is_dual(tensor) ||
         (tensor.defined() && tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper));
}
inline bool is_transformed(const OptTensor& tensor) { return tensor.has_value() && is_transformed(*tensor); }

// Return true if shapes must be known without the values: fake tensors, meta, and modes that look at each
// call.
inline bool is_traced(const Tensor& x, const Tensor& lora_A) {
  auto has_python = [](const Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); };
  return x.is_meta() || has_python(x) || has_python(lora_A) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Refuse a layout that is a Python subclass (jagged): it would reach its own code before an op's checks.
template <class Name>
void check_dense(const OptTensor& tensor, const Name& name) {
  if (tensor.has_value()) check_strided(*tensor, name);
}

template <class... Tensors>
bool any_transformed(const Tensors&... tensors) {
  return (is_transformed(tensors) || ...);
}

template <class... Tensors>
bool any_wants_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (wants_grad(tensors) || ...);
}

}  // namespace apt
