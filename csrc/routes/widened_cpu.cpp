#include "widened_cpu.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "library.h"
#include "mask_channels.h"

namespace apt {
namespace {

bool has_fast_bfloat16() {
  // oneDNN's own answer: without it ATen's 16-bit product is 4 to 500 times slower than float32.
  static const bool supported = [] {
    auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return op.has_value() && op->typed<bool()>().call();
  }();
  return supported && at::globalContext().userEnabledMkldnn();
}

int64_t block_rows(int64_t columns) {
  constexpr int64_t kBlockElements = int64_t{1} << 20;  // 4 MiB of float32: stays in a last-level cache
  return std::max<int64_t>(64, kBlockElements / std::max<int64_t>(1, columns));
}

OptTensor rows_of(const OptTensor& tensor, int64_t start, int64_t length,
                  std::optional<at::ScalarType> dtype) {
  if (!tensor.has_value()) return std::nullopt;
  Tensor rows = tensor->narrow(0, start, length);
  return dtype.has_value() ? rows.to(*dtype) : rows;
}

}  // namespace

bool is_widened(const Tensor& x) {
  return x.is_cpu() &&
         (x.scalar_type() == at::kHalf || (x.scalar_type() == at::kBFloat16 && !has_fast_bfloat16()));
}

std::tuple<Tensor, Tensor> widened_forward(const Tensor& x, const Layer& layer) {
  Tensor wide_x = mask_channels(x, layer.mask_in, 1, false).to(at::kFloat);
  Tensor factor = mask_channels(layer.lora_A.to(x.scalar_type()), layer.mask_in, 1, true).to(at::kFloat);
  Tensor t = at::mm(drop_channels(wide_x, layer.drop), factor.t());
  int64_t N = layer.lora_B.size(0), step = block_rows(x.size(1));
  Tensor y = at::empty({x.size(0), N}, x.options());
  for (int64_t start = 0; start < N; start += step) {
    int64_t length = std::min(step, N - start);
    Layer block{rows_of(layer.weight, start, length, at::kFloat),
                rows_of(layer.bias, start, length, at::kFloat),
                Tensor(),
                layer.lora_B.narrow(0, start, length).to(x.scalar_type()).to(at::kFloat),
                std::nullopt,
                rows_of(layer.mask_out, start, length, at::kFloat),
                layer.scaling};
    y.narrow(1, start, length).copy_(output_of(wide_x, t, block));
  }
  return {y, x.scalar_type() == at::kHalf ? t : t.to(x.scalar_type())};
}

std::array<Tensor, 4> widened_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                       const Layer& layer, const std::array<bool, 4>& need) {
  // The weight alone stays narrow, and is widened block by block below.
  auto wide = [&](const OptTensor& mask) {
    return mask.has_value() ? OptTensor(mask->to(at::kFloat)) : std::nullopt;
  };
  auto rounded = [&](const Tensor& factor) { return factor.to(x.scalar_type()).to(at::kFloat); };
  Layer low_rank{std::nullopt,          std::nullopt,        rounded(layer.lora_A),
                 rounded(layer.lora_B), wide(layer.mask_in), wide(layer.mask_out),
                 layer.scaling,         layer.keep_low,      layer.drop};
  Tensor wide_grad = grad.to(at::kFloat);
  Tensor wide_x = need[1] ? x.to(at::kFloat) : x;
  auto grads = linear_backward(wide_grad, wide_x, t.to(at::kFloat), low_rank, need);
  if (need[0] && layer.weight.has_value()) {
    Tensor g = mask_channels(wide_grad, low_rank.mask_out, 1, false);
    Tensor dense = at::zeros({g.size(0), layer.weight->size(1)}, g.options());
    int64_t N = g.size(1), step = block_rows(dense.size(1));
    for (int64_t start = 0; start < N; start += step) {
      int64_t length = std::min(step, N - start);
      dense.addmm_(g.narrow(1, start, length), layer.weight->narrow(0, start, length).to(at::kFloat));
    }
    mask_channels_(dense, low_rank.mask_in, 1, false);
    grads[0].add_(dense);
  }
  if (need[0]) grads[0] = grads[0].to(x.scalar_type());
  if (need[1]) grads[1] = grads[1].to(layer.lora_A.scalar_type());
  if (need[2]) grads[2] = grads[2].to(layer.lora_B.scalar_type());
  if (need[3]) grads[3] = grads[3].to(x.scalar_type());
  return grads;
}

}  // namespace apt
