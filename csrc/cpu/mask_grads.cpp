// Mask gradients on the CPU, one after the other.
#include "loops.h"

namespace apt::cpu {

void mask_grads(const MaskedGrad* grads, size_t count, Stream stream) {
  for (const MaskedGrad* grad = grads; grad != grads + count; ++grad) {
    // A matrix of rows of `channels` values, or for each outer index one with `inner` values a channel.
    const bool last = grad->inner == 1;
    const int64_t rows = last ? grad->size / grad->channels : grad->channels;
    const int64_t cols = last ? grad->channels : grad->inner;
    MaskChannelsArgs args{};
    args.rows = rows, args.cols = cols;
    args.src_stride[0] = args.dst_stride[0] = cols, args.src_stride[1] = args.dst_stride[1] = 1;
    args.mask = {grad->mask, grad->mask_dtype};
    args.along_rows = !last, args.dtype = grad->dtype;
    visit(grad->dtype, [&](auto zero) {
      auto* data = static_cast<decltype(zero)*>(grad->grad);
      for (auto* end = data + grad->size; data != end; data += rows * cols) {
        args.src = args.dst = data;
        mask_channels(args, stream);
      }
    });
  }
}

}  // namespace apt::cpu
