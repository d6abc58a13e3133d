// Widths and ranks that are no multiple of 8. The library's 16-bit product is several times slower per
// unit of work where a row does not fill whole 16 bytes, so it gets copies that do. Masks act in the copies
// that are made anyway.
#include <ATen/ATen.h>

#include "linear.h"

namespace apt {
namespace {

// matrix [rows, cols] under its mask along `dim`, with that many rows and columns: more are zeros. Itself
// where nothing is to do.
Tensor resized(const Tensor& matrix, int64_t rows, int64_t cols, const OptTensor& mask = std::nullopt,
               int64_t dim = 1, bool select_only = false) {
  if (matrix.size(0) == rows && matrix.size(1) == cols) return lanes(matrix, mask, dim, select_only);
  return lanes_resized(matrix, rows, cols, mask, dim, select_only);
}

Tensor padded_columns(const Tensor& matrix, const OptTensor& mask = std::nullopt) {
  return resized(matrix, matrix.size(0), padded_width(matrix.size(1)), mask);
}

Tensor padded_low(const Tensor& t) { return resized(t, t.size(0), padded_rank(t.size(1))); }

// A result of its own in its own size, under its mask: in place where the size is that already.
Tensor cut(Tensor result, int64_t rows, int64_t cols, const OptTensor& mask = std::nullopt, int64_t dim = 1,
           bool select_only = false) {
  if (result.size(0) != rows || result.size(1) != cols)
    return lanes_resized(result, rows, cols, mask, dim, select_only);
  lanes_(result, mask, dim, select_only);
  return result;
}

// The layer in widths of whole 16 bytes. Pruned lanes of the factors are selected; what else the masks do is
// done in the copies of x, g, y and dx.
Layer padded(const Layer& layer) {
  const int64_t N = padded_width(layer.lora_B.size(0)), K = padded_width(layer.lora_A.size(1)),
                R = padded_rank(layer.lora_A.size(0));
  Layer out;
  if (layer.weight.has_value()) out.weight = resized(*layer.weight, N, K);
  if (layer.bias.has_value()) out.bias = resized(layer.bias->unsqueeze(1), N, 1).squeeze(1);
  out.lora_A = resized(layer.lora_A, R, K, layer.mask_in, 1, true);
  out.lora_B = resized(layer.lora_B, N, R, layer.mask_out, 0, true);
  out.scaling = layer.scaling, out.keep_low = layer.keep_low;
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> padded_forward(const Tensor& x, const Layer& layer) {
  auto [y, t] = linear_forward(padded_columns(x, layer.mask_in), padded(layer));
  int64_t M = x.size(0);
  return {cut(y, M, layer.lora_B.size(0), layer.mask_out),
          layer.keep_low ? cut(t, M, layer.lora_A.size(0)) : Tensor()};
}

std::array<Tensor, 4> padded_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need) {
  auto [need_x, need_A, need_B, need_bias] = need;
  int64_t N = grad.size(1), K = x.size(1), R = layer.lora_A.size(0);
  Layer used = layer;
  if (!need_x) used.weight.reset();  // before it is copied
  Layer wide = padded(used);
  Tensor g = padded_columns(grad, layer.mask_out);
  std::array<Tensor, 4> out = linear_backward(g, padded_columns(x), padded_low(t), wide, need);
  if (need_x) out[0] = cut(out[0], x.size(0), K, layer.mask_in);
  // From the unmasked x: a NaN in a pruned lane ends in a pruned column.
  if (need_A) out[1] = cut(out[1], R, K, layer.mask_in);
  if (need_B) out[2] = cut(out[2], N, R, layer.mask_out, 0, true);
  if (need_bias) out[3] = out[3].narrow(0, 0, N).contiguous();
  return out;
}

}  // namespace apt
