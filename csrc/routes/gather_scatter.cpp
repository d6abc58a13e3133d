#include "gather_scatter.h"

#include <ATen/ops/empty.h>

#include "../device.h"

namespace apt {
namespace {

// Bring a mask into the form that a pass reads: staged ones read float32 (autocast brings 16 bits), aligned.
OptTensor held_mask(const OptTensor& mask, bool staged) {
  if (!mask.has_value()) return std::nullopt;
  return staged ? aligned_contiguous(mask, at::kFloat) : OptTensor(mask->contiguous());
}

Tensor gather(const Tensor& matrix, const Tensor& index, int64_t width, const OptTensor& mask, bool staged,
              const std::optional<GatheredLow>& low) {
  Tensor out = at::empty({matrix.size(0), width}, matrix.options());
  if (out.numel() == 0) return out;
  if (matrix.size(1) == 0) return out.zero_();
  Tensor from = staged ? aligned_rows(matrix) : matrix;
  OptTensor held = held_mask(mask, staged);
  GatherArgs args{};
  args.M = from.size(0), args.C = from.size(1), args.kept = width;
  args.x = from.const_data_ptr();
  args.x_stride[0] = from.stride(0), args.x_stride[1] = from.stride(1);
  args.index = index.const_data_ptr<int32_t>();
  if (held.has_value()) args.mask = {held->const_data_ptr(), dtype_of(*held)};
  args.gathered = out.mutable_data_ptr();
  args.dtype = dtype_of(from);
  args.staged = staged;
  if (low.has_value()) {
    args.low = low->low.mutable_data_ptr(), args.low_dtype = dtype_of(low->low);
    args.down = low->down.const_data_ptr(), args.R = low->low.size(1);
  }
  kernels_for(from).gather(args, current_stream(from));
  return out;
}

}  // namespace

Tensor gathered(const Tensor& matrix, const Tensor& index, int64_t width) {
  return gather(matrix, index, width, std::nullopt, /*staged=*/false, std::nullopt);
}

Tensor gathered(const Tensor& x, const KeptSide& side, const std::optional<GatheredLow>& low) {
  return gather(x, side.index, side.width, side.mask, can_stage(x, side.size), low);
}

Tensor scattered(const Tensor& values, const KeptSide& side, const OptTensor& bias,
                 const std::optional<ScatteredLow>& low) {
  Tensor out = at::empty({values.size(0), side.size}, values.options());
  if (out.numel() == 0) return out;
  const bool staged = can_stage(out, side.size);
  Tensor from = staged ? aligned_rows(values.contiguous()) : values.contiguous();
  OptTensor mask = held_mask(side.mask, staged);
  OptTensor added;
  if (bias.has_value()) added = bias->contiguous();
  ScatterArgs args{};
  args.M = out.size(0), args.E = side.size, args.kept = side.width;
  args.values = from.const_data_ptr();
  args.position = side.position.const_data_ptr<int32_t>();
  if (mask.has_value()) args.mask = {mask->const_data_ptr(), dtype_of(*mask)};
  if (added.has_value()) args.bias = added->const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.dtype = dtype_of(out);
  args.staged = staged;
  if (low.has_value()) {
    args.low = low->low.const_data_ptr(), args.low_dtype = dtype_of(low->low);
    args.up = low->up.const_data_ptr(), args.R = low->low.size(1), args.scaling = low->scaling;
  }
  kernels_for(out).scatter(args, current_stream(out));
  return out;
}

bool can_stage(const Tensor& x, int64_t columns) {
  bool sixteen = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  return sixteen && x.is_cuda() && columns % 8 == 0 && limits_of(x).shared_bytes >= kStagedBytes;
}

Tensor aligned_rows(const Tensor& matrix) {
  auto is_aligned = [](const Tensor& m) { return reinterpret_cast<uintptr_t>(m.const_data_ptr()) % 16 == 0; };
  bool dense = matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1);
  if (dense && is_aligned(matrix)) return matrix;
  Tensor copy = matrix.contiguous();
  return is_aligned(copy) ? copy : copy.clone();
}

Tensor aligned_contiguous(const Tensor& tensor, at::ScalarType dtype) {
  Tensor out = tensor.to(dtype).contiguous();
  return reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0 ? out : out.clone();
}

OptTensor aligned_contiguous(const OptTensor& tensor, at::ScalarType dtype) {
  return tensor.has_value() ? OptTensor(aligned_contiguous(*tensor, dtype)) : std::nullopt;
}

}  // namespace apt
