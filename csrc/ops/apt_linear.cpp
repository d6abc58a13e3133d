// An op = check, allocate, compute. Device-agnostic; on meta tensors it stops after allocating, so one body
// serves the real devices, fake tensors and symbolic shapes.
#include "../op_table.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../device.h"
#include "../operands.h"
#include "../routes/linear.h"

namespace apt {
namespace {

struct Sizes {
  c10::SymInt N, K, R;
};

// Everything apt_linear promises to refuse, in the order of its arguments.
Sizes check_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                   const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out) {
  for (auto [tensor, name] :
       {std::pair(&x, "x"), std::pair(&lora_A, "lora_A"), std::pair(&lora_B, "lora_B")}) {
    check_strided(*tensor, name);
    check_floating(*tensor, name);
    check_same_device(*tensor, name, x, "x");
  }
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have shape [..., K], got a 0-dimensional tensor");
  TORCH_CHECK_VALUE(lora_A.dim() == 2, "lora_A must have shape [R, K], got ", text(lora_A.sym_sizes()));
  TORCH_CHECK_VALUE(lora_B.dim() == 2, "lora_B must have shape [N, R], got ", text(lora_B.sym_sizes()));
  Sizes size{lora_B.sym_size(0), x.sym_size(-1), lora_A.sym_size(0)};
  if (weight.has_value()) {
    check_strided(*weight, "weight");
    check_dtype_of_x(x, weight, "weight", lora_A, lora_B);
    check_same_dtype(*weight, "weight", x, "x");
    check_same_device(*weight, "weight", x, "x");
  }
  // Where the layer agrees with itself it is x that does not fit, and not what it is held against first.
  bool layer_agrees =
      !weight.has_value() || (weight->dim() == 2 && weight->sym_size(1) == lora_A.sym_size(1));
  TORCH_CHECK_VALUE(!layer_agrees || size.K == lora_A.sym_size(1),
                    "x must have shape [..., K=", text(lora_A.sym_size(1)), "] to fit ",
                    weight.has_value() ? "weight and lora_A" : "lora_A", ", got ", text(x.sym_sizes()));
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 2, "weight must have shape [N, K=", text(size.K), "], got ",
                      text(weight->sym_sizes()));
    size.N = weight->sym_size(0);
    check_matrix(*weight, "weight", "N", size.N, "K", size.K,
                 [&] { return sized("x", x) + " and " + sized("lora_A", lora_A); });
  }
  if (!weight.has_value()) check_dtype_of_x(x, weight, "weight", lora_A, lora_B);
  check_dtype_or_float32(lora_A, "lora_A", x.scalar_type(), /*over_any=*/false);
  check_dtype_or_float32(lora_B, "lora_B", x.scalar_type(), /*over_any=*/false);
  check_matrix(lora_A, "lora_A", "R", size.R, "K", size.K, [&] {
    return sized("x", x) + (weight.has_value() ? " and " + sized("weight", *weight) : "");
  });
  check_matrix(lora_B, "lora_B", "N", size.N, "R", size.R, [&] {
    return (weight.has_value() ? sized("weight", *weight) + " and " : "") + sized("lora_A", lora_A);
  });
  if (bias.has_value()) {
    check_strided(*bias, "bias");
    check_same_dtype(*bias, "bias", x, "x");
    check_same_device(*bias, "bias", x, "x");
    check_vector(*bias, "bias", "N", size.N);
  }
  check_mask(mask_in, "mask_in", "K", size.K, x, "x");
  check_mask(mask_out, "mask_out", "N", size.N, x, "x");
  return size;
}

Sizes check_backward(const Tensor& grad, const Tensor& x, const OptTensor& weight, const Tensor& lora_A,
                     const Tensor& lora_B, const Tensor& t, const OptTensor& mask_in,
                     const OptTensor& mask_out) {
  Sizes size = check_linear(x, weight, std::nullopt, lora_A, lora_B, mask_in, mask_out);
  check_strided(grad, "grad");
  check_same_dtype(grad, "grad", x, "x");
  check_same_device(grad, "grad", x, "x");
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(with_last(x, size.N)), "grad must have shape ",
                    text(with_last(x, size.N)), ", got ", text(grad.sym_sizes()));
  check_strided(t, "t");
  check_same_device(t, "t", x, "x");
  at::ScalarType low_rank = c10::typeMetaToScalarType(low_rank_options(x).dtype());
  TORCH_CHECK_TYPE(t.scalar_type() == low_rank, "t must have dtype ", name_of(low_rank), ", got ",
                   name_of(t.scalar_type()));
  TORCH_CHECK_VALUE(t.sym_sizes() == c10::SymIntArrayRef(with_last(x, size.R)), "t must have shape ",
                    text(with_last(x, size.R)), ", got ", text(t.sym_sizes()));
  return size;
}

}  // namespace

void check_apt_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                      const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out) {
  check_linear(x, weight, bias, lora_A, lora_B, mask_in, mask_out);
}

void check_apt_linear_backward(const Tensor& grad, const Tensor& x, const OptTensor& weight,
                               const Tensor& lora_A, const Tensor& lora_B, const Tensor& t,
                               const OptTensor& mask_in, const OptTensor& mask_out) {
  check_backward(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out);
}

namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Layer& layer) {
  Sizes size =
      check_linear(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.mask_in, layer.mask_out);
  if (x.is_meta() || x.sym_numel() == 0) {
    Tensor y = at::empty_symint(with_last(x, size.N), x.options());
    Tensor t = at::zeros_symint(with_last(x, size.R), low_rank_options(x));
    if (x.is_meta() || y.numel() == 0) return {y, t};
  }
  Scope scope(x);
  auto [y, t] =
      linear_forward(reachable(flat(x)),
                     {reachable(layer.weight), layer.bias, reachable(layer.lora_A), reachable(layer.lora_B),
                      layer.mask_in, layer.mask_out, layer.scaling, layer.keep_low});
  if (x.dim() == 2) return {y, t};
  if (t.defined()) t = t.view_symint(with_last(x, size.R));
  return {y.view_symint(with_last(x, size.N)), t};
}

}  // namespace

std::tuple<Tensor, Tensor> linear_with_low(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                           const Tensor& lora_A, const Tensor& lora_B,
                                           const OptTensor& mask_in, const OptTensor& mask_out,
                                           double scaling) {
  return forward(x, {weight, bias, lora_A, lora_B, mask_in, mask_out, scaling, /*keep_low=*/true});
}

Tensor apt_linear(const Tensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out, double scaling) {
  return std::get<0>(
      forward(x, {weight, bias, lora_A, lora_B, mask_in, mask_out, scaling, /*keep_low=*/false}));
}

std::tuple<Tensor, Tensor> apt_linear_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                              const Tensor& lora_A, const Tensor& lora_B,
                                              const OptTensor& mask_in, const OptTensor& mask_out,
                                              double scaling) {
  auto [y, t] = linear_with_low(x, weight, bias, lora_A, lora_B, mask_in, mask_out, scaling);
  return {y, t.contiguous()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apt_linear_backward(const Tensor& grad, const Tensor& x,
                                                               const OptTensor& weight, const Tensor& lora_A,
                                                               const Tensor& lora_B, const Tensor& t,
                                                               const OptTensor& mask_in,
                                                               const OptTensor& mask_out, double scaling,
                                                               std::array<bool, 4> output_mask) {
  Sizes size = check_backward(grad, x, weight, lora_A, lora_B, t, mask_in, mask_out);
  auto [need_x, need_A, need_B, need_bias] = output_mask;
  std::array<Tensor, 4> out;
  if (x.is_meta()) {
    if (need_x) out[0] = at::empty_symint(x.sym_sizes(), x.options());
    if (need_A) out[1] = at::empty_symint(lora_A.sym_sizes(), lora_A.options());
    if (need_B) out[2] = at::empty_symint(lora_B.sym_sizes(), lora_B.options());
    if (need_bias) out[3] = at::empty_symint({size.N}, x.options());
  } else {
    Scope scope(x);
    out = linear_backward(
        reachable(flat(grad)), reachable(flat(x)), flat(t),
        {reachable(weight), std::nullopt, reachable(lora_A), reachable(lora_B), mask_in, mask_out, scaling},
        output_mask);
    if (need_x && x.dim() != 2) out[0] = out[0].view(x.sizes());
  }
  for (Tensor& gradient : out) {
    if (!gradient.defined()) gradient = at::empty({0}, x.options());
  }
  return {out[0], out[1], out[2], out[3]};
}

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
  // Conv1D hands a transposed view: there the roles of the two sides are exchanged, so that rows are
  // contiguous.
  bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  Tensor W = transposed ? weight.t() : weight;
  Tensor A = (transposed ? lora_B.t() : lora_A).contiguous();
  Tensor B = (transposed ? lora_A.t() : lora_B).contiguous();
  auto contiguous = [](const OptTensor& mask) { return mask.has_value() ? mask->contiguous() : Tensor(); };
  Tensor m_in = contiguous(transposed ? mask_out : mask_in),
         m_out = contiguous(transposed ? mask_in : mask_out);
  auto as_mask = [](const Tensor& mask) {
    return mask.defined() ? Mask{mask.const_data_ptr(), dtype_of(mask)} : Mask{};
  };
  MergeArgs args{W.mutable_data_ptr(),
                 A.const_data_ptr(),
                 B.const_data_ptr(),
                 W.size(0),
                 W.size(1),
                 A.size(0),
                 {W.stride(0), W.stride(1)},
                 as_mask(m_in),
                 as_mask(m_out),
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

namespace {

// One launch reads and writes them all, so the order between two views of the same memory would be chance.
void check_disjoint(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks) {
  std::vector<Extent> extents;
  for (const Tensor& grad : grads) extents.push_back(extent(grad));
  std::sort(extents.begin(), extents.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    TORCH_CHECK_VALUE(!extents[i - 1].meets(extents[i]),
                      "grads must be distinct tensors, got two that share memory");
  }
  for (const Tensor& mask : masks) {
    Extent read = extent(mask);
    auto after = std::partition_point(extents.begin(), extents.end(),
                                      [&](auto& grad) { return grad.begin < read.end; });
    TORCH_CHECK_VALUE(after == extents.begin() || !std::prev(after)->meets(read),
                      "masks must not share memory with grads, which mask_grads_ writes");
  }
}

void launch_mask_grads(const std::vector<MaskedGrad>& table, const Tensor& like) {
  Scope scope(like);
  kernels_for(like).mask_grads(table.data(), table.size(), current_stream(like));
}

}  // namespace

void mask_grads_(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims) {
  TORCH_CHECK_VALUE(grads.size() == masks.size() && grads.size() == dims.size(),
                    "grads, masks and dims must have equal lengths, got ", std::to_string(grads.size()), ", ",
                    std::to_string(masks.size()), " and ", std::to_string(dims.size()));
  std::vector<int64_t> wrapped(dims.begin(), dims.end());
  for (size_t i = 0; i < grads.size(); ++i) {
    Indexed grad_name{"grads", i}, mask_name{"masks", i};
    const Tensor &grad = grads[i], &mask = masks[i];
    check_strided(grad, grad_name);
    check_floating(grad, grad_name);
    int64_t dim = dims[i], rank = grad.dim();
    TORCH_CHECK_VALUE(rank >= 1, grad_name, " must have a dimension to mask, got a 0-dimensional tensor");
    TORCH_CHECK_VALUE(-rank <= dim && dim < rank, Indexed{"dims", i}, " must lie in [", std::to_string(-rank),
                      ", ", std::to_string(rank - 1), "] for ", grad_name, " of shape ",
                      text(grad.sym_sizes()), ", got ", std::to_string(dim));
    wrapped[i] = dim < 0 ? dim + rank : dim;
    check_mask(mask, mask_name, "size", grad.sym_size(wrapped[i]), grad, grad_name);
  }
  std::vector<Tensor> live, held;  // held: contiguous masks, alive until the launch
  std::vector<int64_t> along;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].is_meta() || grads[i].numel() == 0) continue;
    check_no_self_overlap(grads[i], Indexed{"grads", i});
    kernels_for(grads[i]);
    live.push_back(grads[i]);
    held.push_back(masks[i].contiguous());
    along.push_back(wrapped[i]);
  }
  check_disjoint(live, held);

  // All that can run out of memory comes before the first write.
  std::vector<std::pair<Tensor, std::vector<MaskedGrad>>> launches;  // one a device
  std::vector<std::pair<Tensor, Tensor>>
      copies;  // rare: a gradient that is not contiguous takes ATen's passes
  for (size_t i = 0; i < live.size(); ++i) {
    const Tensor &grad = live[i], &mask = held[i];
    if (!grad.is_contiguous()) {
      Scope scope(grad);
      std::vector<int64_t> shape(grad.dim(), 1);
      shape[along[i]] = -1;
      Tensor factor = mask.view(shape);
      copies.emplace_back(grad, at::where(factor == 0, 0, grad * factor).to(grad.scalar_type()));
      continue;
    }
    auto launch = std::find_if(launches.begin(), launches.end(),
                               [&](auto& entry) { return entry.first.device() == grad.device(); });
    if (launch == launches.end()) launch = launches.insert(launch, {grad, {}});
    int64_t inner = 1;
    for (int64_t d = along[i] + 1; d < grad.dim(); ++d) inner *= grad.size(d);
    launch->second.push_back({grad.mutable_data_ptr(), mask.const_data_ptr(), grad.numel(),
                              grad.size(along[i]), inner, dtype_of(grad), dtype_of(mask)});
  }
  for (auto& [grad, masked] : copies) grad.copy_(masked);
  for (auto& [like, table] : launches) launch_mask_grads(table, like);
}

}  // namespace apt
