#include "drop_channels.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "../device.h"

namespace apt {
namespace {

DropChannelsArgs arguments_of(const Tensor& rows, const Drop& drop) {
  DropChannelsArgs args{};
  args.rows = rows.size(0), args.cols = rows.size(1);
  args.dropout = {drop.rng->const_data_ptr<int64_t>(), drop.threshold};
  if (drop.channels.has_value()) args.channel = drop.channels->const_data_ptr<int32_t>();
  return args;
}

void run(const Tensor& src, Tensor& dst, const Drop& drop) {
  if (dst.numel() == 0) return;
  DropChannelsArgs args = arguments_of(src, drop);
  args.src = src.const_data_ptr(), args.dst = dst.mutable_data_ptr();
  for (int i : {0, 1}) args.src_stride[i] = src.stride(i), args.dst_stride[i] = dst.stride(i);
  args.dtype = dtype_of(src);
  kernels_for(src).drop_channels(args, current_stream(src));
}

}  // namespace

Dropout Drop::own() const {
  return rng.has_value() ? Dropout{rng->const_data_ptr<int64_t>(), threshold} : Dropout{};
}

Drop drop_of(double p, const OptTensor& rng) {
  if (p == 0.0) return {};
  const auto threshold = static_cast<uint32_t>(std::min(65535L, std::lround(p * 65536)));
  return {rng->contiguous(), threshold, std::nullopt};
}

Tensor drop_channels(const Tensor& matrix, const Drop& drop) {
  if (!drop) return matrix;
  Tensor out = at::empty({matrix.size(0), matrix.size(1)}, matrix.options());
  run(matrix, out, drop);
  return out;
}

void drop_channels_(Tensor& matrix, const Drop& drop) {
  if (drop) run(matrix, matrix, drop);
}

void draw_kept_(Tensor& keep, const Drop& drop) {
  if (keep.numel() == 0) return;
  DropChannelsArgs args = arguments_of(keep, drop);
  args.keep = keep.mutable_data_ptr<bool>();
  args.dtype = DType::kFloat32;
  kernels_for(keep).drop_channels(args, current_stream(keep));
}

}  // namespace apt
