#include "mask_channels.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../device.h"

namespace apt {
namespace {

// dst may have more rows and columns than src: they become zero.
void run(const Tensor& src, Tensor& dst, const OptTensor& mask, int64_t dim, bool select_only) {
  if (dst.numel() == 0) return;
  OptTensor held = mask.has_value() ? OptTensor(mask->contiguous()) : std::nullopt;
  MaskChannelsArgs args{src.const_data_ptr(),
                        dst.mutable_data_ptr(),
                        src.size(0),
                        src.size(1),
                        dst.size(0) - src.size(0),
                        dst.size(1) - src.size(1),
                        {src.stride(0), src.stride(1)},
                        {dst.stride(0), dst.stride(1)},
                        held.has_value() ? Mask{held->const_data_ptr(), dtype_of(*held)} : Mask{},
                        /*along_rows=*/dim == 0,
                        select_only,
                        dtype_of(src)};
  kernels_for(src).mask_channels(args, current_stream(src));
}

}  // namespace

Tensor mask_channels(const Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only) {
  if (!mask.has_value()) return matrix;
  Tensor out = at::empty({matrix.size(0), matrix.size(1)}, matrix.options());
  run(matrix, out, mask, dim, select_only);
  return out;
}

Tensor mask_channels_resized(const Tensor& matrix, int64_t rows, int64_t cols, const OptTensor& mask,
                             int64_t dim, bool select_only) {
  Tensor out = at::empty({rows, cols}, matrix.options());
  run(matrix.narrow(0, 0, std::min(rows, matrix.size(0))).narrow(1, 0, std::min(cols, matrix.size(1))), out,
      mask, dim, select_only);
  return out;
}

void mask_channels_(Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only) {
  if (mask.has_value()) run(matrix, matrix, mask, dim, select_only);
}

}  // namespace apt
