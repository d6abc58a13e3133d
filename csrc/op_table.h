// The table of ops. Schemas, dispatcher registrations and pybind11 bindings all come from it.
//
// Symbols: M tokens, N out_features, K in_features, R rank. x' = mask_in * x, g = mask_out * grad; where a
// mask is 0 the channel is skipped, not multiplied.
//   apt_linear           y = mask_out * (x' W^T + s (x' A^T) B^T + b)
//                        dropout p: drop(x') / (1 - p) in the place of the second x'
//   apt_linear_forward   the same and t = x' A^T, which the backward needs; dropout: t = drop(x') A^T
//   dropout_mask         which elements of a low-rank input are kept
//   apt_linear_backward  dx = mask_in * (g W + s u A), dA = mask_in * s u^T x, dB = s g^T t, db = sum g,
//                        with u = g B
//   merge_               W <- diag(mask_out) (W + s B A) diag(mask_in), in place
//   compact_linear ...   apt_linear on the kept channels alone
//   pack_kept_           packed <- the kept rows and columns of W
//   mask_grads_          grads[i] scaled along dims[i] by masks[i], in place
#pragma once

#include "ops/apt_linear.h"
#include "ops/compact_linear.h"
#include "ops/dropout_mask.h"
#include "ops/mask_grads.h"
#include "ops/merge.h"

namespace apt {

// One entry an op: name, schema, function. An op that mutates returns nothing: returning the mutated argument
// fails opcheck.
template <class Def>
void for_each_op(Def&& def) {
  def("apt_linear",
      "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in=None, "
      "Tensor? mask_out=None, float scaling=1.0, float dropout=0.0, Tensor? rng=None) -> Tensor",
      &LinearArguments::forward<&apt_linear>);
  def("apt_linear_forward",
      "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in, "
      "Tensor? mask_out, float scaling, float dropout=0.0, Tensor? rng=None) -> (Tensor y, Tensor t)",
      &LinearArguments::forward<&apt_linear_forward>);
  def("apt_linear_backward",
      "(Tensor grad, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor t, Tensor? mask_in, "
      "Tensor? mask_out, float scaling, float dropout, Tensor? rng, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor db)",
      &LinearArguments::backward<&apt_linear_backward>);
  def("merge_",
      "(Tensor(a!) weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? mask_in=None, "
      "Tensor? mask_out=None, bool check=True) -> ()",
      &merge_);
  def("compact_linear",
      "(Tensor x, Tensor? packed, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in, "
      "Tensor? mask_out, Tensor index_in, Tensor index_out, Tensor position_in, Tensor position_out, "
      "Tensor kept, float scaling, bool compact_in=False, bool compact_out=False, float dropout=0.0, "
      "Tensor? rng=None) -> Tensor",
      &CompactArguments::forward<&compact_linear>);
  def("compact_linear_forward",
      "(Tensor x, Tensor? packed, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? mask_in, "
      "Tensor? mask_out, Tensor index_in, Tensor index_out, Tensor position_in, Tensor position_out, "
      "Tensor kept, float scaling, bool compact_in, bool compact_out, float dropout=0.0, Tensor? rng=None) "
      "-> (Tensor y, Tensor t)",
      &CompactArguments::forward<&compact_linear_forward>);
  def("compact_linear_backward",
      "(Tensor grad, Tensor x, Tensor? packed, Tensor lora_A, Tensor lora_B, Tensor t, Tensor? mask_in, "
      "Tensor? mask_out, Tensor index_in, Tensor index_out, Tensor position_in, Tensor position_out, "
      "Tensor kept, float scaling, bool compact_in, bool compact_out, float dropout, Tensor? rng, "
      "bool gathered, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor db)",
      &CompactBackwardArguments::backward<&compact_linear_backward>);
  def("pack_kept_",
      "(Tensor(a!) packed, Tensor weight, Tensor index_in, Tensor index_out, Tensor kept) -> ()",
      &pack_kept_);
  def("dropout_mask", "(SymInt[] shape, float p, Tensor rng) -> Tensor", &dropout_mask);
  def("mask_grads_", "(Tensor(a!)[] grads, Tensor[] masks, int[] dims) -> ()", &mask_grads_);
}

}  // namespace apt
