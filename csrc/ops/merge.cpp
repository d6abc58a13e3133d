#include "merge.h"

#include <ATen/ops/zeros.h>

#include <utility>

#include "../checks.h"
#include "../device.h"

namespace apt {
namespace {

Mask mask_of(const Tensor& mask) {
  return mask.defined() ? Mask{mask.const_data_ptr(), dtype_of(mask)} : Mask{};
}

}  // namespace

void merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
            const OptTensor& mask_in, const OptTensor& mask_out, bool check) {
  for (auto [tensor, name] :
       {std::pair(&weight, "weight"), std::pair(&lora_A, "lora_A"), std::pair(&lora_B, "lora_B")}) {
    check_strided(*tensor, name);
    check_floating(*tensor, name);
    check_same_device(*tensor, name, weight, "weight");
    TORCH_CHECK_VALUE(tensor->dim() == 2, name, " must be a matrix, got shape ", text(tensor->sym_sizes()));
  }
  check_dtype_or_float32(lora_A, "lora_A", weight.scalar_type(), /*over_any=*/false);
  check_same_dtype(lora_B, "lora_B", lora_A, "lora_A");
  check_matrix(lora_A, "lora_A", "R", lora_A.sym_size(0), "K", weight.sym_size(1),
               [&] { return sized("weight", weight); });
  check_matrix(lora_B, "lora_B", "N", weight.sym_size(0), "R", lora_A.sym_size(0),
               [&] { return sized("weight", weight) + " and " + sized("lora_A", lora_A); });
  check_mask(mask_in, "mask_in", "K", weight.sym_size(1), weight, "weight");
  check_mask(mask_out, "mask_out", "N", weight.sym_size(0), weight, "weight");
  if (weight.is_meta() || weight.numel() == 0) return;
  check_no_self_overlap(weight, "weight");
  for (auto [tensor, name] : {std::pair(OptTensor(lora_A), "lora_A"), std::pair(OptTensor(lora_B), "lora_B"),
                              std::pair(mask_in, "mask_in"), std::pair(mask_out, "mask_out")}) {
    TORCH_CHECK_VALUE(!tensor.has_value() || !extent(weight).meets(extent(*tensor)), name,
                      " must not share memory with weight, which merge_ writes");
  }
  TORCH_CHECK(
      !(check && is_capturing(weight)),
      "merge_: check=True reads its answer back from the device and cannot be captured in a CUDA graph; "
      "use check=False there");
  Scope scope(weight);
  // Exchange the sides of a transposed view (Conv1D's weight), so that rows are contiguous.
  bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  Tensor W = transposed ? weight.t() : weight;
  Tensor A = (transposed ? lora_B.t() : lora_A).contiguous();
  Tensor B = (transposed ? lora_A.t() : lora_B).contiguous();
  auto contiguous = [](const OptTensor& mask) { return mask.has_value() ? mask->contiguous() : Tensor(); };
  Tensor m_in = contiguous(transposed ? mask_out : mask_in),
         m_out = contiguous(transposed ? mask_in : mask_out);
  MergeArgs args{W.mutable_data_ptr(),
                 A.const_data_ptr(),
                 B.const_data_ptr(),
                 W.size(0),
                 W.size(1),
                 A.size(0),
                 {W.stride(0), W.stride(1)},
                 mask_of(m_in),
                 mask_of(m_out),
                 scaling,
                 dtype_of(W),
                 dtype_of(A),
                 /*not_finite=*/nullptr,
                 /*unless=*/nullptr,
                 merge_plan({0, W.size(0), W.size(1), A.size(0), dtype_of(W)}, limits_of(W))};
  const Kernels& kernels = kernels_for(weight);
  Stream stream = current_stream(weight);
  if (!check) return kernels.merge(args, stream);
  // Both passes are queued before the answer is read, and the second does nothing where the first found a
  // fault: so the device never waits for the host.
  Tensor not_finite = at::zeros({1}, weight.options().dtype(at::kInt));
  args.not_finite = not_finite.mutable_data_ptr<int32_t>();
  kernels.merge(args, stream);
  args.unless = std::exchange(args.not_finite, nullptr);
  kernels.merge(args, stream);
  TORCH_CHECK(not_finite.item<int32_t>() == 0,
              "merge_: the merged weight would not be finite (NaN or Inf in a kept lane, or a sum beyond ",
              name_of(weight.scalar_type()), "'s range); weight is unchanged");
}

}  // namespace apt
