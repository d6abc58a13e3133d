// Autograd of the ops that write in place: nothing written may need a gradient, and every write is counted.
#include <torch/library.h>

#include "../ops/compact_linear.h"
#include "../ops/mask_grads.h"
#include "../ops/merge.h"
#include "common.h"

namespace apt {
namespace {

template <class Name>
void check_plain(const char* op, const OptTensor& tensor, const Name& name) {
  check_dense(tensor, name);
  TORCH_CHECK(!tensor.has_value() || !is_dual(*tensor), op, " has no forward-mode derivative, but ", name,
              " carries a tangent (dual numbers, torch.func.jvp); expected it without");
}

void merge_autograd(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                    const OptTensor& mask_in, const OptTensor& mask_out, bool check) {
  check_constant("merge_", weight, "weight");
  check_plain("merge_", weight, "weight");
  check_plain("merge_", lora_A, "lora_A");
  check_plain("merge_", lora_B, "lora_B");
  check_plain("merge_", mask_in, "mask_in");
  check_plain("merge_", mask_out, "mask_out");
  at::AutoDispatchBelowAutograd below;
  handle<&merge_>("merge_").call(weight, lora_A, lora_B, scaling, mask_in, mask_out, check);
}

void mask_grads_autograd(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims) {
  for (size_t i = 0; i < grads.size(); ++i) {
    check_constant("mask_grads_", grads[i], Indexed{"grads", i});
    check_plain("mask_grads_", grads[i], Indexed{"grads", i});
  }
  for (size_t i = 0; i < masks.size(); ++i) check_plain("mask_grads_", masks[i], Indexed{"masks", i});
  at::AutoDispatchBelowAutograd below;
  handle<&mask_grads_>("mask_grads_").call(grads, masks, dims);
}

void pack_autograd(const Tensor& packed, const Tensor& weight, const Tensor& index_in,
                   const Tensor& index_out, const Tensor& kept) {
  check_constant("pack_kept_", packed, "packed");
  check_dense(packed, "packed");
  check_dense(weight, "weight");
  at::AutoDispatchBelowAutograd below;
  handle<&pack_kept_>("pack_kept_").call(packed, weight, index_in, index_out, kept);
}

// Count a write through a raw pointer, which is invisible to autograd otherwise. Here and not under Autograd,
// which inference mode leaves out.
void count_write(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}
void count_write(at::TensorList tensors) {
  for (const Tensor& tensor : tensors) count_write(tensor);
}

// Run an op whose first argument is written.
template <auto op>
struct Counted;

template <class Written, class... Args, void (*op)(Written, Args...)>
struct Counted<op> {
  template <const char* name>
  static void run(Written written, Args... args) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      handle<op>(name).call(written, args...);
    }
    count_write(written);
  }
};

constexpr char kMerge[] = "merge_", kMaskGrads[] = "mask_grads_", kPack[] = "pack_kept_";

}  // namespace

TORCH_LIBRARY_IMPL(apt_ext, Autograd, m) {
  m.impl(kMerge, &merge_autograd);
  m.impl(kMaskGrads, &mask_grads_autograd);
  m.impl(kPack, &pack_autograd);
}

TORCH_LIBRARY_IMPL(apt_ext, ADInplaceOrView, m) {
  m.impl(kMerge, &Counted<&merge_>::run<kMerge>);
  m.impl(kMaskGrads, &Counted<&mask_grads_>::run<kMaskGrads>);
  m.impl(kPack, &Counted<&pack_kept_>::run<kPack>);
}

}  // namespace apt
