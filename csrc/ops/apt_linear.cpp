// An op checks, allocates and computes. It knows no device, and on meta tensors it stops after allocating:
// one body serves real devices, fake tensors and symbolic shapes.
#include "apt_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <string>
#include <utility>

#include "../checks.h"
#include "../routes/linear.h"
#include "dropout_mask.h"

namespace apt {
namespace {

struct Sizes {
  c10::SymInt N, K, R;
};

// Refuse everything that apt_linear promises to refuse, in the order of its arguments.
Sizes check_linear(const Tensor& x, const LinearOperands& o) {
  check_factors(x, o);
  const OptTensor& weight = o.weight;
  Sizes size{o.lora_B.sym_size(0), x.sym_size(-1), o.lora_A.sym_size(0)};
  if (weight.has_value()) {
    check_strided(*weight, "weight");
    check_dtype_of_x(x, weight, "weight", o.lora_A, o.lora_B);
    check_same_dtype(*weight, "weight", x, "x");
    check_same_device(*weight, "weight", x, "x");
  }
  // Where the layer agrees with itself it is x that does not fit, and not what it is held against first.
  const c10::SymInt K = o.lora_A.sym_size(1);
  const bool layer_agrees = !weight.has_value() || (weight->dim() == 2 && weight->sym_size(1) == K);
  TORCH_CHECK_VALUE(!layer_agrees || size.K == K, "x must have shape [..., K=", text(K), "] to fit ",
                    weight.has_value() ? "weight and lora_A" : "lora_A", ", got ", text(x.sym_sizes()));
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 2, "weight must have shape [N, K=", text(size.K), "], got ",
                      text(weight->sym_sizes()));
    size.N = weight->sym_size(0);
    check_matrix(*weight, "weight", "N", size.N, "K", size.K,
                 [&] { return sized("x", x) + " and " + sized("lora_A", o.lora_A); });
  } else {
    check_dtype_of_x(x, weight, "weight", o.lora_A, o.lora_B);
  }
  check_factor_dtypes(x, o);
  check_matrix(o.lora_A, "lora_A", "R", size.R, "K", size.K, [&] {
    return sized("x", x) + (weight.has_value() ? " and " + sized("weight", *weight) : "");
  });
  check_matrix(o.lora_B, "lora_B", "N", size.N, "R", size.R, [&] {
    return (weight.has_value() ? sized("weight", *weight) + " and " : "") + sized("lora_A", o.lora_A);
  });
  if (o.bias.has_value()) {
    check_strided(*o.bias, "bias");
    check_same_dtype(*o.bias, "bias", x, "x");
    check_same_device(*o.bias, "bias", x, "x");
    check_vector(*o.bias, "bias", "N", size.N);
  }
  check_mask(o.mask_in, "mask_in", "K", size.K, x, "x");
  check_mask(o.mask_out, "mask_out", "N", size.N, x, "x");
  check_dropout(o.dropout, o.rng, x);
  return size;
}

Layer layer_of(const LinearOperands& o, bool keep_low) {
  return {limit_row_stride(o.weight),    o.bias,    limit_row_stride(o.lora_A),
          limit_row_stride(o.lora_B),    o.mask_in, o.mask_out,
          o.scaling / (1.0 - o.dropout), keep_low,  drop_of(o.dropout, o.rng)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const LinearOperands& o, bool keep_low) {
  Sizes size = check_linear(x, o);
  if (x.is_meta() || x.sym_numel() == 0) {
    Tensor y = at::empty_symint(with_last(x, size.N), x.options());
    Tensor t = at::zeros_symint(with_last(x, size.R), low_rank_options(x));
    if (x.is_meta() || y.numel() == 0) return {y, t};
  }
  Scope scope(x);
  auto [y, t] = linear_forward(limit_row_stride(flat(x)), layer_of(o, keep_low));
  if (x.dim() == 2) return {y, t};
  if (t.defined()) t = t.view_symint(with_last(x, size.R));
  return {y.view_symint(with_last(x, size.N)), t};
}

}  // namespace

void check_factors(const Tensor& x, const LayerOperands& o) {
  for (auto [tensor, name] :
       {std::pair(&x, "x"), std::pair(&o.lora_A, "lora_A"), std::pair(&o.lora_B, "lora_B")}) {
    check_strided(*tensor, name);
    check_floating(*tensor, name);
    check_same_device(*tensor, name, x, "x");
  }
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have shape [..., K], got a 0-dimensional tensor");
  TORCH_CHECK_VALUE(o.lora_A.dim() == 2, "lora_A must have shape [R, K], got ", text(o.lora_A.sym_sizes()));
  TORCH_CHECK_VALUE(o.lora_B.dim() == 2, "lora_B must have shape [N, R], got ", text(o.lora_B.sym_sizes()));
}

void check_factor_dtypes(const Tensor& x, const LayerOperands& o) {
  check_dtype_or_float32(o.lora_A, "lora_A", x.scalar_type(), /*over_any=*/false);
  check_dtype_or_float32(o.lora_B, "lora_B", x.scalar_type(), /*over_any=*/false);
}

void check_grad_and_t(const Tensor& grad, const Tensor& t, const Tensor& x, const c10::SymInt& out_channels,
                      const c10::SymInt& R) {
  auto check_shape = [&](const Tensor& tensor, const char* name, const c10::SymInt& last) {
    TORCH_CHECK_VALUE(tensor.sym_sizes() == c10::SymIntArrayRef(with_last(x, last)), name,
                      " must have shape ", text(with_last(x, last)), ", got ", text(tensor.sym_sizes()));
  };
  check_strided(grad, "grad");
  check_same_dtype(grad, "grad", x, "x");
  check_same_device(grad, "grad", x, "x");
  check_shape(grad, "grad", out_channels);
  check_strided(t, "t");
  check_same_device(t, "t", x, "x");
  at::ScalarType low_rank = c10::typeMetaToScalarType(low_rank_options(x).dtype());
  TORCH_CHECK_TYPE(t.scalar_type() == low_rank, "t must have dtype ", name_of(low_rank), ", got ",
                   name_of(t.scalar_type()));
  check_shape(t, "t", R);
}

void check_apt_linear(const Tensor& x, const LinearOperands& operands) { check_linear(x, operands); }

void check_apt_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                               const LinearOperands& operands) {
  Sizes size = check_linear(x, operands);
  check_grad_and_t(grad, t, x, size.N, size.R);
}

std::tuple<Tensor, Tensor> linear_with_low(const Tensor& x, const LinearOperands& operands) {
  return forward(x, operands, /*keep_low=*/true);
}

Tensor apt_linear(const Tensor& x, const LinearOperands& operands) {
  return std::get<0>(forward(x, operands, /*keep_low=*/false));
}

std::tuple<Tensor, Tensor> apt_linear_forward(const Tensor& x, const LinearOperands& operands) {
  auto [y, t] = linear_with_low(x, operands);
  return {y, t.contiguous()};
}

Gradients apt_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t, const LinearOperands& o,
                              const Needs& need) {
  Sizes size = check_linear(x, o);
  check_grad_and_t(grad, t, x, size.N, size.R);
  std::array<Tensor, 4> out;
  if (x.is_meta()) {
    out = empty_gradients(x, x.sym_sizes(), o, size.N, need);
  } else {
    Scope scope(x);
    out = linear_backward(limit_row_stride(flat(grad)), limit_row_stride(flat(x)), flat(t),
                          layer_of(o, /*keep_low=*/true), need);
    if (need[0] && x.dim() != 2) out[0] = out[0].view(x.sizes());
  }
  return gradients_of(out, x);
}

}  // namespace apt
