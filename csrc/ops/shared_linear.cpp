#include "shared_linear.h"

#include <algorithm>
#include <numeric>

namespace apt {
namespace {

Layer as_layer(const SharedLayer& layer) {
  return {limit_row_stride(layer.weight),
          layer.bias,
          limit_row_stride(layer.lora_A),
          limit_row_stride(layer.lora_B),
          std::nullopt,
          layer.mask_out,
          layer.scaling / (1.0 - layer.dropout),
          /*keep_low=*/true,
          drop_of(layer.dropout, layer.rng)};
}

// Return true if the passes take all of these.
bool all_share(const Tensor& x, const std::vector<SharedLayer>& layers, const std::vector<size_t>& which) {
  return std::all_of(which.begin(), which.end(),
                     [&](size_t i) { return is_worth_sharing(x, layers[i], x.scalar_type()); });
}

}  // namespace

bool fits(const Tensor& x, const SharedLayer& layer) {
  try {
    check_apt_linear(x, layer.operands());
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

bool is_worth_sharing(const Tensor& x, const SharedLayer& layer, at::ScalarType dtype) {
  if (x.dim() == 0 || layer.lora_A.dim() != 2 || layer.lora_B.dim() != 2 || !layer.weight.has_value())
    return false;
  const int64_t K = x.size(-1);
  return K > 0 && can_share_passes(x, x.numel() / K, layer.lora_B.size(0), K, layer.lora_A.size(0), dtype);
}

std::vector<std::tuple<Tensor, Tensor>> shared_linear_forward(const Tensor& x,
                                                              const std::vector<SharedLayer>& layers) {
  Scope scope(x);
  const Tensor rows = limit_row_stride(flat(x));
  std::vector<Layer> used;
  used.reserve(layers.size());
  for (const SharedLayer& layer : layers) used.push_back(as_layer(layer));
  std::vector<size_t> every(layers.size());
  std::iota(every.begin(), every.end(), size_t{0});
  std::vector<std::tuple<Tensor, Tensor>> out;
  if (all_share(x, layers, every)) {
    out = shared_passes_forward(rows, used);
  } else {
    for (const Layer& layer : used) out.push_back(linear_forward(rows, layer));
  }
  if (x.dim() != 2) {
    for (auto& [y, t] : out) {
      y = y.view_symint(with_last(x, y.sym_size(1)));
      t = t.view_symint(with_last(x, t.sym_size(1)));
    }
  }
  return out;
}

SharedGradients shared_linear_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                       const std::vector<Tensor>& lows,
                                       const std::vector<SharedLayer>& layers, bool need_x,
                                       const std::vector<std::array<bool, 3>>& need) {
  Scope scope(x);
  SharedGradients out;
  out.own.resize(layers.size());
  std::vector<size_t> called;
  for (size_t i = 0; i < layers.size(); ++i)
    if (grads[i].defined()) called.push_back(i);
  const Tensor rows = limit_row_stride(flat(x));
  if (called.size() > 1 && all_share(x, layers, called)) {
    std::vector<Tensor> used_grads, used_lows;
    std::vector<Layer> used;
    std::vector<std::array<bool, 3>> used_need;
    for (const size_t i : called) {
      used_grads.push_back(limit_row_stride(flat(grads[i])));
      used_lows.push_back(flat(lows[i]));
      used.push_back(as_layer(layers[i]));
      used_need.push_back(need[i]);
    }
    SharedGradients found = shared_passes_backward(used_grads, rows, used_lows, used, need_x, used_need);
    out.x = found.x;
    for (size_t j = 0; j < called.size(); ++j) out.own[called[j]] = found.own[j];
  } else {
    for (const size_t i : called) {
      auto [dx, dA, dB, db] =
          linear_backward(limit_row_stride(flat(grads[i])), rows, flat(lows[i]), as_layer(layers[i]),
                          {need_x, need[i][0], need[i][1], need[i][2]});
      out.own[i] = {dA, dB, db};
      if (need_x) out.x = out.x.defined() ? out.x.add_(dx) : dx;
    }
  }
  if (out.x.defined() && x.dim() != 2) out.x = out.x.view(x.sizes());
  return out;
}

}  // namespace apt
