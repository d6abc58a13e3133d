// Widths that are no multiple of 8. The library's 16-bit product is up to nine times slower per unit of work
// where a row does not fill whole 16 bytes, so it gets copies that do. Masks act in the copies that are made
// anyway.
#include <ATen/ATen.h>

#include "linear.h"

namespace apt {
namespace {

int64_t rounded(int64_t size) { return (size + 7) / 8 * 8; }

// matrix [rows, cols] under its mask along `dim`, with zeros up to the next multiple of 8 in each dimension
// asked for; itself where nothing is to do.
Tensor padded(const Tensor& matrix, bool pad_rows, bool pad_cols, const OptTensor& mask = std::nullopt,
              int64_t dim = 1, bool select_only = false) {
  int64_t rows = matrix.size(0), cols = matrix.size(1);
  int64_t new_rows = pad_rows ? rounded(rows) : rows, new_cols = pad_cols ? rounded(cols) : cols;
  if (new_rows == rows && new_cols == cols) return lanes(matrix, mask, dim, select_only);
  return lanes_resized(matrix, new_rows, new_cols, mask, dim, select_only);
}

// The layer in widths of whole 16 bytes. Pruned lanes of the factors are selected; what else the masks do is
// done in the copies of x, g, y and dx.
Layer padded(const Layer& layer) {
  Layer out;
  if (layer.weight.has_value()) out.weight = padded(*layer.weight, true, true);
  if (layer.bias.has_value()) out.bias = padded(layer.bias->unsqueeze(1), true, false).squeeze(1);
  out.lora_A = padded(layer.lora_A, false, true, layer.mask_in, 1, true);
  out.lora_B = padded(layer.lora_B, true, false, layer.mask_out, 0, true);
  out.scaling = layer.scaling, out.keep_low = layer.keep_low;
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> padded_forward(const Tensor& x, const Layer& layer) {
  auto [y, t] = linear_forward(padded(x, false, true, layer.mask_in), padded(layer));
  return {lanes_resized(y, x.size(0), layer.lora_B.size(0), layer.mask_out, 1, false), t};
}

std::array<Tensor, 4> padded_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need) {
  auto [need_x, need_A, need_B, need_bias] = need;
  int64_t N = grad.size(1), K = x.size(1), R = layer.lora_A.size(0);
  Layer used = layer;
  if (!need_x) used.weight.reset();  // before it is copied
  Layer wide = padded(used);
  Tensor g = padded(grad, false, true, layer.mask_out);
  std::array<Tensor, 4> out = linear_backward(g, padded(x, false, true), t, wide, need);
  if (need_x) out[0] = lanes_resized(out[0], x.size(0), K, layer.mask_in, 1, false);
  // From the unmasked x: a NaN in a pruned lane ends in a pruned column.
  if (need_A) out[1] = lanes_resized(out[1], R, K, layer.mask_in, 1, false);
  if (need_B) out[2] = lanes_resized(out[2], N, R, layer.mask_out, 0, true);
  if (need_bias) out[3] = out[3].narrow(0, 0, N).contiguous();
  return out;
}

}  // namespace apt
