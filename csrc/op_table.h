// The op library: public C++ signatures and the table every binding is generated from.
//
// Symbols: M tokens, N out_features, K in_features, R rank. x' = mask_in * x, g = mask_out * grad; where a
// mask is 0 the channel is skipped, not multiplied.
//   apt_linear           y = mask_out * (x' W^T + s (x' A^T) B^T + b)
//   apt_linear_forward   the same and t = x' A^T, which the backward needs
//   apt_linear_backward  dx = mask_in * (g W + s u A), dA = mask_in * s u^T x, dB = s g^T t, db = sum g,
//                        with u = g B
//   merge_               W <- diag(mask_out) (W + s B A) diag(mask_in), in place
//   mask_grads_          grads[i] scaled along dims[i] by masks[i], in place
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Tensor apt_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out, double scaling);

// t [..., R] has x's dtype, but is float32 where x is float16: low-rank activations may exceed 65504.
std::tuple<Tensor, Tensor> apt_linear_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                              const Tensor& lora_A, const Tensor& lora_B,
                                              const OptTensor& mask_in, const OptTensor& mask_out,
                                              double scaling);

// The same without an op's promise about t, which may be a view with gaps between its rows.
std::tuple<Tensor, Tensor> linear_with_low(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                           const Tensor& lora_A, const Tensor& lora_B,
                                           const OptTensor& mask_in, const OptTensor& mask_out,
                                           double scaling);

// (dx, dA, dB, db); one that output_mask does not ask for is an empty tensor [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> apt_linear_backward(const Tensor& grad, const Tensor& x,
                                                               const OptTensor& weight, const Tensor& lora_A,
                                                               const Tensor& lora_B, const Tensor& t,
                                                               const OptTensor& mask_in,
                                                               const OptTensor& mask_out, double scaling,
                                                               std::array<bool, 4> output_mask);

void merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
            const OptTensor& mask_in, const OptTensor& mask_out, bool check);

void mask_grads_(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims);

// apt_linear on the kept lanes alone (compact_linear.h says what the operands are): the products have the size of
// what is kept. Internal: apt_ext.APTAdapter.compact prepares the operands.
Tensor compact_linear(const Tensor& x, const OptTensor& packed, const OptTensor& bias, const Tensor& lora_A,
                      const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                      const Tensor& index_in, const Tensor& index_out, const Tensor& position_in,
                      const Tensor& position_out, const Tensor& kept, double scaling, bool compact_in,
                      bool compact_out);

std::tuple<Tensor, Tensor> compact_linear_forward(const Tensor& x, const OptTensor& packed,
                                                  const OptTensor& bias, const Tensor& lora_A,
                                                  const Tensor& lora_B, const OptTensor& mask_in,
                                                  const OptTensor& mask_out, const Tensor& index_in,
                                                  const Tensor& index_out, const Tensor& position_in,
                                                  const Tensor& position_out, const Tensor& kept,
                                                  double scaling, bool compact_in, bool compact_out);

// `gathered`: x is its kept lanes under mask_in already, as the forward left them.
std::tuple<Tensor, Tensor, Tensor, Tensor> compact_linear_backward(
    const Tensor& grad, const Tensor& x, const OptTensor& packed, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& t, const OptTensor& mask_in, const OptTensor& mask_out, const Tensor& index_in,
    const Tensor& index_out, const Tensor& position_in, const Tensor& position_out, const Tensor& kept,
    double scaling, bool compact_in, bool compact_out, bool gathered, std::array<bool, 4> output_mask);

// packed <- the kept rows and columns of W, in one pass.
void pack_kept_(const Tensor& packed, const Tensor& weight, const Tensor& index_in, const Tensor& index_out,
                const Tensor& kept);

// The refusals of the two ops without the work, for other ways to the same values.
void check_apt_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                      const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out);
void check_apt_linear_backward(const Tensor& grad, const Tensor& x, const OptTensor& weight,
                               const Tensor& lora_A, const Tensor& lora_B, const Tensor& t,
                               const OptTensor& mask_in, const OptTensor& mask_out);

// One line an op: name, schema, function. Schemas, dispatcher registrations and pybind11 bindings all come
// from here. An op that mutates returns nothing: returning the mutated argument fails opcheck.
template <class Def>
void for_each_op(Def&& def) {
  def("apt_linear",
      "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in=None, "
      "Tensor? mask_out=None, float scaling=1.0) -> Tensor",
      &apt_linear);
  def("apt_linear_forward",
      "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in, "
      "Tensor? mask_out, float scaling) -> (Tensor y, Tensor t)",
      &apt_linear_forward);
  def("apt_linear_backward",
      "(Tensor grad, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor t, Tensor? mask_in, "
      "Tensor? mask_out, float scaling, bool[4] output_mask) -> (Tensor dx, Tensor dA, Tensor dB, Tensor db)",
      &apt_linear_backward);
  def("merge_",
      "(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? mask_in=None, "
      "Tensor? mask_out=None, bool check=True) -> ()",
      &merge_);
  def("compact_linear",
      "(Tensor x, Tensor? packed, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in, "
      "Tensor? mask_out, Tensor index_in, Tensor index_out, Tensor position_in, Tensor position_out, "
      "Tensor kept, float scaling, bool compact_in=False, bool compact_out=False) -> Tensor",
      &compact_linear);
  def("compact_linear_forward",
      "(Tensor x, Tensor? packed, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in, "
      "Tensor? mask_out, Tensor index_in, Tensor index_out, Tensor position_in, Tensor position_out, "
      "Tensor kept, float scaling, bool compact_in, bool compact_out) -> (Tensor y, Tensor t)",
      &compact_linear_forward);
  def("compact_linear_backward",
      "(Tensor grad, Tensor x, Tensor? packed, Tensor lora_A, Tensor lora_B, Tensor t, Tensor? mask_in, "
      "Tensor? mask_out, Tensor index_in, Tensor index_out, Tensor position_in, Tensor position_out, "
      "Tensor kept, float scaling, bool compact_in, bool compact_out, bool gathered, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor db)",
      &compact_linear_backward);
  def("pack_kept_",
      "(Tensor(a!) packed, Tensor weight, Tensor index_in, Tensor index_out, Tensor kept) -> ()",
      &pack_kept_);
  def("mask_grads_", "(Tensor(a!)[] grads, Tensor[] masks, int[] dims) -> ()", &mask_grads_);
}

}  // namespace apt
