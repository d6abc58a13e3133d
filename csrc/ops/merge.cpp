#include "merge.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <utility>

#include "../checks.h"
#include "../device.h"

namespace apt {
namespace {

Mask mask_of(const Tensor& mask) {
  return mask.defined() ? Mask{mask.const_data_ptr(), dtype_of(mask)} : Mask{};
}

void check_arguments(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                     const OptTensor& mask_in, const OptTensor& mask_out) {
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
}

bool is_nothing(const Tensor& weight) { return weight.is_meta() || weight.numel() == 0; }

void check_memory(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const OptTensor& mask_in,
                  const OptTensor& mask_out) {
  check_no_self_overlap(weight, "weight");
  for (auto [tensor, name] : {std::pair(OptTensor(lora_A), "lora_A"), std::pair(OptTensor(lora_B), "lora_B"),
                              std::pair(mask_in, "mask_in"), std::pair(mask_out, "mask_out")}) {
    TORCH_CHECK_VALUE(!tensor.has_value() || !extent(weight).meets(extent(*tensor)), name,
                      " must not share memory with weight, which merge_ writes");
  }
}

// Operands as the kernels take them, and the kernel of their device. Making it allocates what has to be
// contiguous and is not; the calls allocate nothing, once `args.scratch` is there.
struct Operands {
  Tensor W, A, B, m_in, m_out;
  MergeArgs args;
  const Kernels* kernels;

  Operands(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
           const OptTensor& mask_in, const OptTensor& mask_out)
      : kernels(&kernels_for(weight)) {
    // Exchange the sides of a transposed view (Conv1D's weight), so that rows are contiguous.
    bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
    W = transposed ? weight.t() : weight;
    A = (transposed ? lora_B.t() : lora_A).contiguous();
    B = (transposed ? lora_A.t() : lora_B).contiguous();
    auto contiguous = [](const OptTensor& mask) { return mask.has_value() ? mask->contiguous() : Tensor(); };
    m_in = contiguous(transposed ? mask_out : mask_in);
    m_out = contiguous(transposed ? mask_in : mask_out);
    args = {W.mutable_data_ptr(),
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
            merge_plan({0, W.size(0), W.size(1), A.size(0), dtype_of(W)}, limits_of(W)),
            /*scratch=*/nullptr};
  }

  int64_t scratch_bytes() const {
    return kernels->merge_scratch == nullptr ? 0 : static_cast<int64_t>(kernels->merge_scratch(args));
  }

  void check(int32_t* not_finite) const {
    MergeArgs asked = args;
    asked.not_finite = not_finite;
    kernels->merge(asked, current_stream(W));
  }

  void write(const int32_t* unless = nullptr) const {
    MergeArgs asked = args;
    asked.unless = unless;
    kernels->merge(asked, current_stream(W));
  }
};

Tensor scratch_of(int64_t bytes) { return at::empty({bytes}, at::TensorOptions(at::kByte)); }

// Two weights over the same memory would be merged twice.
void check_disjoint(const std::vector<Operands>& all) {
  std::vector<Extent> extents;
  for (const Operands& one : all) extents.push_back(extent(one.W));
  std::sort(extents.begin(), extents.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    TORCH_CHECK_VALUE(!extents[i - 1].meets(extents[i]),
                      "weights must be distinct tensors, got two that share memory");
  }
}

}  // namespace

void merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
            const OptTensor& mask_in, const OptTensor& mask_out, bool check) {
  check_arguments(weight, lora_A, lora_B, mask_in, mask_out);
  if (is_nothing(weight)) return;
  check_memory(weight, lora_A, lora_B, mask_in, mask_out);
  TORCH_CHECK(
      !(check && is_capturing(weight)),
      "merge_: check=True reads its answer back from the device and cannot be captured in a CUDA graph; "
      "use check=False there");
  Scope scope(weight);
  Operands one(weight, lora_A, lora_B, scaling, mask_in, mask_out);
  Tensor scratch = scratch_of(one.scratch_bytes());
  one.args.scratch = scratch.mutable_data_ptr();
  if (!check) return one.write();
  // Both passes are queued before the answer is read, and the second does nothing where the first found a
  // fault: so the device never waits for the host.
  Tensor not_finite = at::zeros({1}, weight.options().dtype(at::kInt));
  one.check(not_finite.mutable_data_ptr<int32_t>());
  one.write(not_finite.const_data_ptr<int32_t>());
  TORCH_CHECK(not_finite.item<int32_t>() == 0,
              "merge_: the merged weight would not be finite (NaN or Inf in a kept lane, or a sum beyond ",
              name_of(weight.scalar_type()), "'s range); weight is unchanged");
}

int64_t merge_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_A,
                  const std::vector<Tensor>& lora_B, const std::vector<double>& scalings,
                  const std::vector<OptTensor>& masks_in, const std::vector<OptTensor>& masks_out) {
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(lora_A.size() == count && lora_B.size() == count && scalings.size() == count &&
                        masks_in.size() == count && masks_out.size() == count,
                    "merge_all: expected lists of equal lengths");
  std::vector<Operands> all;
  std::vector<size_t> index;  // of each in the arguments
  std::map<c10::Device, std::vector<size_t>, bool (*)(c10::Device, c10::Device)> by_device(
      [](c10::Device a, c10::Device b) {
        return std::pair(a.type(), a.index()) < std::pair(b.type(), b.index());
      });
  for (size_t i = 0; i < count; ++i) {
    check_arguments(weights[i], lora_A[i], lora_B[i], masks_in[i], masks_out[i]);
    if (is_nothing(weights[i])) continue;
    check_memory(weights[i], lora_A[i], lora_B[i], masks_in[i], masks_out[i]);
    TORCH_CHECK(!is_capturing(weights[i]),
                "merge_all: reads its answers back from the device and cannot be captured in a CUDA graph");
    Scope scope(weights[i]);
    by_device[weights[i].device()].push_back(all.size());
    all.emplace_back(weights[i], lora_A[i], lora_B[i], scalings[i], masks_in[i], masks_out[i]);
    index.push_back(i);
  }
  check_disjoint(all);
  int64_t bytes = 0;
  for (const Operands& one : all) bytes = std::max(bytes, one.scratch_bytes());
  Tensor scratch = scratch_of(bytes);
  for (Operands& one : all) one.args.scratch = scratch.mutable_data_ptr();
  std::vector<std::pair<const std::vector<size_t>*, Tensor>> answers;
  for (const auto& [device, here] : by_device) {
    Scope scope(all[here[0]].W);
    Tensor not_finite =
        at::zeros({static_cast<int64_t>(here.size())}, at::TensorOptions(at::kInt).device(device));
    auto* answer = not_finite.mutable_data_ptr<int32_t>();
    for (size_t i = 0; i < here.size(); ++i) all[here[i]].check(answer + i);
    answers.emplace_back(&here, not_finite);
  }
  size_t first = count;
  for (const auto& [here, not_finite] : answers) {
    const Tensor answer = not_finite.cpu();
    for (size_t i = 0; i < here->size(); ++i) {
      if (answer.const_data_ptr<int32_t>()[i] != 0) first = std::min(first, index[(*here)[i]]);
    }
  }
  if (first < count) return static_cast<int64_t>(first);
  for (const Operands& one : all) {
    Scope scope(one.W);
    one.write();
  }
  for (size_t i : index) {
    if (!weights[i].is_inference()) weights[i].unsafeGetTensorImpl()->bump_version();
  }
  return -1;
}

}  // namespace apt
