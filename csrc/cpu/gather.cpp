// Gather kept channels on the CPU, side by side.
#include <ATen/Parallel.h>

#include "move_row.h"

namespace apt::cpu {

void gather(const GatherArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ChannelMoves moves(args.index, args.kept, args.C);
    std::vector<Wide<T>> factor, bias;
    if (args.mask.data != nullptr || (moves.has_zeros && !moves.in_runs)) {
      auto mask = widened<T>(args.mask, args.C);
      factor.resize(args.kept), bias.resize(args.kept, Wide<T>(0));
      for (int64_t j = 0; j < args.kept; ++j)
        factor[j] = moves.channels[j] < 0 ? Wide<T>(0) : mask[moves.channels[j]];
    }
    const Wide<T>* scale = factor.empty() ? nullptr : factor.data();
    const T* src = static_cast<const T*>(args.x);
    T* dst = static_cast<T*>(args.gathered);
    at::parallel_for(0, args.M, rows_a_task(args.kept), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        T* to = dst + m * args.kept;
        const int64_t row = args.row_index == nullptr ? m : args.row_index[m];
        if (row < 0) {
          std::fill_n(to, args.kept, T(0));
          continue;
        }
        const T* from = src + row * args.x_stride[0];
        if (args.x_stride[1] == 1) {
          move_row(moves, from, to, scale, bias.data());
          continue;
        }
        for (int64_t j = 0; j < args.kept; ++j) {
          const int32_t channel = moves.channels[j];
          const T value = channel < 0 ? T(0) : from[channel * args.x_stride[1]];
          to[j] = scale == nullptr ? value : scaled(value, scale[j], /*select_only=*/scale[j] == 1);
        }
      }
    });
  });
}

}  // namespace apt::cpu
