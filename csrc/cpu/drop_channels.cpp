// Drop elements of a matrix on the CPU, drawn by counters.
#include <ATen/Parallel.h>

#include "loops.h"

namespace apt::cpu {
namespace {

// The draws of a row, 16 bits a channel: what Draws::draw says, for all groups of eight.
APT_CLONES void draw_row(const Draws& draws, int64_t row, int64_t groups, uint16_t* drawn) {
  for (int64_t group = 0; group < groups; ++group) {
    uint32_t words[4];
    draws.draw(static_cast<uint32_t>(group), row, words);
    for (int i = 0; i < 4; ++i) {
      drawn[group * 8 + 2 * i] = static_cast<uint16_t>(words[i]);
      drawn[group * 8 + 2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
  }
}

template <class T>
APT_INLINE void drop_row_body(const T* src, T* dst, const uint16_t* drawn, uint16_t threshold,
                              int64_t count) {
  for (int64_t j = 0; j < count; ++j) dst[j] = drawn[j] < threshold ? T(0) : src[j];
}

#define APT_DROP_ROW(T)                                                                                      \
  APT_CLONES void drop_row(const T* src, T* dst, const uint16_t* drawn, uint16_t threshold, int64_t count) { \
    drop_row_body(src, dst, drawn, threshold, count);                                                        \
  }
APT_EACH_TYPE(APT_DROP_ROW)
#undef APT_DROP_ROW

// Call row(i, its draws, one a column) for every row.
template <class Row>
void for_each_row(const DropChannelsArgs& args, const Row& row) {
  std::vector<int32_t> channels;  // read once, for another thread may change them
  if (args.channel != nullptr) channels.assign(args.channel, args.channel + args.cols);
  const int64_t count =
      channels.empty() ? args.cols : 1 + std::max(0, *std::max_element(channels.begin(), channels.end()));
  const int64_t groups = (count + 7) / 8;
  const Draws draws(args.dropout);
  at::parallel_for(0, args.rows, rows_a_task(args.cols), [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> drawn(groups * 8), picked(channels.size(), uint16_t{0xffff});  // which is kept
    for (int64_t i = begin; i < end; ++i) {
      draw_row(draws, i, groups, drawn.data());
      for (size_t j = 0; j < channels.size(); ++j) {
        if (channels[j] >= 0) picked[j] = drawn[channels[j]];
      }
      row(i, channels.empty() ? drawn.data() : picked.data());
    }
  });
}

}  // namespace

void drop_channels(const DropChannelsArgs& args, Stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const auto threshold = static_cast<uint16_t>(args.dropout.threshold);
  if (args.keep != nullptr) {
    return for_each_row(args, [&](int64_t i, const uint16_t* drawn) {
      for (int64_t j = 0; j < args.cols; ++j) args.keep[i * args.cols + j] = drawn[j] >= threshold;
    });
  }
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool dense = args.src_stride[1] == 1 && args.dst_stride[1] == 1;
    for_each_row(args, [&](int64_t i, const uint16_t* drawn) {
      const T* from = static_cast<const T*>(args.src) + i * args.src_stride[0];
      T* to = static_cast<T*>(args.dst) + i * args.dst_stride[0];
      if (dense) return drop_row(from, to, drawn, threshold, args.cols);
      for (int64_t j = 0; j < args.cols; ++j) {
        const T value = from[j * args.src_stride[1]];
        to[j * args.dst_stride[1]] = drawn[j] < threshold ? T(0) : value;
      }
    });
  });
}

}  // namespace apt::cpu
