// Scatter kept channels on the CPU, with zeros between them.
#include <ATen/Parallel.h>

#include "move_row.h"

namespace apt::cpu {

void scatter(const ScatterArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ChannelMoves moves(args.position, args.E, args.kept);
    std::vector<Wide<T>> factor, bias;
    if (args.mask.data != nullptr || args.bias != nullptr || (moves.has_zeros && !moves.in_runs)) {
      factor = widened<T>(args.mask, args.E);
      bias.resize(args.E, Wide<T>(0));
      const T* added = static_cast<const T*>(args.bias);
      for (int64_t c = 0; c < args.E; ++c) {
        if (moves.channels[c] < 0) factor[c] = 0;
        if (added != nullptr && factor[c] != 0) bias[c] = widen(added[c]);
      }
    }
    const Wide<T>* scale = factor.empty() ? nullptr : factor.data();
    const T* src = static_cast<const T*>(args.values);
    T* dst = static_cast<T*>(args.out);
    at::parallel_for(0, args.M, rows_a_task(args.E), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        move_row(moves, src + m * args.kept, dst + m * args.E, scale, bias.data());
      }
    });
  });
}

}  // namespace apt::cpu
