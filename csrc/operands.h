// Operands of the ops: structures instead of loose arguments, and what is done to them before the arithmetic.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>
#include <vector>

#include "tensor.h"

namespace apt {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, lora_A, lora_B and the bias
using Needs = std::array<bool, 4>;                             // which of these are asked for

inline const OptTensor kNone;

// The operands of apt_linear and compact_linear beside x, by reference: they belong to the caller.
struct LayerOperands {
  const OptTensor& weight;  // compact_linear: packed
  const OptTensor& bias;
  const Tensor &lora_A, &lora_B;
  const OptTensor &mask_in, &mask_out;
};

// Functions of loose arguments, as the dispatcher calls them, from functions of operands. Rest are the types
// of an op's arguments beyond those of LayerOperands.
template <class Operands, class... Rest>
struct LooseArguments {
  template <auto function>
  static auto forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                      const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                      Rest... rest) {
    return function(x, Operands{{weight, bias, lora_A, lora_B, mask_in, mask_out}, rest...});
  }

  template <auto function>
  static Gradients backward(const Tensor& grad, const Tensor& x, const OptTensor& weight,
                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& t,
                            const OptTensor& mask_in, const OptTensor& mask_out, Rest... rest, Needs need) {
    const Operands operands{{weight, kNone, lora_A, lora_B, mask_in, mask_out}, rest...};
    return function(grad, x, t, operands, need);
  }
};

// Call an op with operands instead of loose arguments.
template <class Op, class Operands>
auto call_forward(const Op& op, const Tensor& x, const Operands& o) {
  auto call = [&](const auto&... rest) {
    return op.call(x, o.weight, o.bias, o.lora_A, o.lora_B, o.mask_in, o.mask_out, rest...);
  };
  return std::apply(call, o.rest());
}

template <class Op, class Operands>
Gradients call_backward(const Op& op, const Tensor& grad, const Tensor& x, const Tensor& t, const Operands& o,
                        const Needs& need) {
  auto call = [&](const auto&... rest) {
    return op.call(grad, x, o.weight, o.lora_A, o.lora_B, t, o.mask_in, o.mask_out, rest..., need);
  };
  return std::apply(call, o.backward_rest());
}

inline std::vector<c10::SymInt> with_last(const Tensor& x, const c10::SymInt& last) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = last;
  return sizes;
}

// Return the options of t. It leaves float16, whose range a low-rank activation can exceed although y does
// not.
inline at::TensorOptions low_rank_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type());
}

// Flatten to two dimensions. A view is a dispatched call, so matrices are taken as they are.
inline Tensor flat(const Tensor& x) {
  if (x.dim() == 2) return x;
  int64_t columns = x.size(-1), rows = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  return x.reshape({rows, columns});
}

// Copy a matrix whose rows are too far apart for cuBLAS, which counts that distance in 32 bits.
inline Tensor limit_row_stride(const Tensor& matrix) {
  constexpr int64_t kFarthest = std::numeric_limits<int32_t>::max();
  bool far = matrix.is_cuda() && (matrix.stride(0) >= kFarthest || matrix.stride(1) >= kFarthest);
  return far ? matrix.contiguous() : matrix;
}

inline OptTensor limit_row_stride(const OptTensor& matrix) {
  return matrix.has_value() ? OptTensor(limit_row_stride(*matrix)) : std::nullopt;
}

// Allocate what the gradients of a meta tensor look like.
inline std::array<Tensor, 4> empty_gradients(const Tensor& x, c10::SymIntArrayRef x_sizes,
                                             const LayerOperands& o, const c10::SymInt& N,
                                             const Needs& need) {
  std::array<Tensor, 4> out;
  if (need[0]) out[0] = at::empty_symint(x_sizes, x.options());
  if (need[1]) out[1] = at::empty_symint(o.lora_A.sym_sizes(), o.lora_A.options());
  if (need[2]) out[2] = at::empty_symint(o.lora_B.sym_sizes(), o.lora_B.options());
  if (need[3]) out[3] = at::empty_symint({N}, x.options());
  return out;
}

// Return the gradients as an op does: an empty tensor [0] for one that is not asked for.
inline Gradients gradients_of(std::array<Tensor, 4>& out, const Tensor& x) {
  for (Tensor& gradient : out) {
    if (!gradient.defined()) gradient = at::empty({0}, x.options());
  }
  return {out[0], out[1], out[2], out[3]};
}

// Run kernels on the tensors' device, and do not autocast the products inside an op a second time.
struct Scope {
  explicit Scope(const Tensor& tensor)
      : device(tensor.is_cuda() ? std::optional(tensor.device()) : std::nullopt) {}
  c10::OptionalDeviceGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace apt
