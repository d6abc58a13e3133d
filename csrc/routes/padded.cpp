#include "padded.h"

#include "mask_channels.h"
#include "plan.h"
#include "resize_factors.h"

namespace apt {
namespace {

// Return the matrix under its mask along `dim`, with that many rows and columns: more are zeros. It is
// returned as it is where nothing is to do.
Tensor resized(const Tensor& matrix, int64_t rows, int64_t cols, const OptTensor& mask = std::nullopt,
               int64_t dim = 1, bool select_only = false) {
  if (matrix.size(0) == rows && matrix.size(1) == cols) return mask_channels(matrix, mask, dim, select_only);
  return mask_channels_resized(matrix, rows, cols, mask, dim, select_only);
}

Tensor padded_columns(const Tensor& matrix, const OptTensor& mask = std::nullopt) {
  return resized(matrix, matrix.size(0), padded_width(matrix.size(1)), mask);
}

// Cut a result to its own width, under its mask: in place where it has that width already.
Tensor cut(Tensor result, int64_t cols, const OptTensor& mask) {
  if (result.size(1) != cols) return mask_channels_resized(result, result.size(0), cols, mask, 1, false);
  mask_channels_(result, mask, 1, false);
  return result;
}

// Pad the layer to widths of whole 16 bytes. Pruned channels of the factors are selected. What else the masks
// do is done in the copies of x, g, y and dx.
Layer padded(const Layer& layer) {
  const int64_t N = padded_width(layer.lora_B.size(0)), K = padded_width(layer.lora_A.size(1)),
                R = padded_rank(layer.lora_A.size(0));
  Layer out;
  if (layer.weight.has_value()) out.weight = resized(*layer.weight, N, K);
  if (layer.bias.has_value()) out.bias = resized(layer.bias->unsqueeze(1), N, 1).squeeze(1);
  const ResizedFactor A{
      .from = layer.lora_A, .rows = R, .columns = K, .mask = layer.mask_in, .select_only = true},
      B{.from = layer.lora_B,
        .rows = N,
        .columns = R,
        .mask = layer.mask_out,
        .mask_dim = 0,
        .select_only = true};
  auto factors = resize_factors(A, B);
  out.lora_A = factors[0], out.lora_B = factors[1];
  out.scaling = layer.scaling, out.keep_low = layer.keep_low, out.drop = layer.drop;
  return out;
}

}  // namespace

Tensor low_of_rank(const Tensor& t, int64_t R) {
  const int64_t M = t.size(0);
  if (t.size(1) == R) return t;
  // Not in float32, which float16 travels in: its scale is decided by all entries.
  const bool has_room = M > 0 && t.element_size() == 2 && t.stride(1) == 1 && t.stride(0) == R &&
                        (t.storage_offset() + M * R) * 2 <= static_cast<int64_t>(t.storage().nbytes());
  return has_room ? t.as_strided({M, R}, {R, 1}) : mask_channels_resized(t, M, R, std::nullopt, 1, false);
}

std::tuple<Tensor, Tensor> padded_forward(const Tensor& x, const Layer& layer) {
  auto [y, t] = linear_forward(padded_columns(x, layer.mask_in), padded(layer));
  return {cut(y, layer.lora_B.size(0), layer.mask_out),
          layer.keep_low ? t.narrow(1, 0, layer.lora_A.size(0)) : Tensor()};
}

std::array<Tensor, 4> padded_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need) {
  auto [need_x, need_A, need_B, need_bias] = need;
  int64_t N = grad.size(1), K = x.size(1), R = layer.lora_A.size(0);
  Layer used = layer;
  if (!need_x) used.weight.reset();  // before it is copied
  Layer wide = padded(used);
  Tensor g = padded_columns(grad, layer.mask_out);
  std::array<Tensor, 4> out =
      linear_backward(g, padded_columns(x), low_of_rank(t, wide.lora_A.size(0)), wide, need);
  if (need_x) out[0] = cut(out[0], K, layer.mask_in);
  // From the unmasked x: a NaN in a pruned channel ends in a pruned column.
  const ResizedFactor dA{.from = out[1], .rows = R, .columns = K, .mask = layer.mask_in},
      dB{.from = out[2], .rows = N, .columns = R, .mask = layer.mask_out, .mask_dim = 0, .select_only = true};
  auto gradients = resize_factors(dA, dB);
  out[1] = gradients[0], out[2] = gradients[1];
  if (need_bias) out[3] = out[3].narrow(0, 0, N).contiguous();
  return out;
}

}  // namespace apt
