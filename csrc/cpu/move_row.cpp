#include "move_row.h"

#include <algorithm>
#include <cstring>

namespace apt::cpu {
namespace {

template <class T>
APT_INLINE void pick_body(const T* src, T* dst, const int32_t* index, int64_t count) {
  for (int64_t j = 0; j < count; ++j) dst[j] = src[index[j]];
}

template <class T>
APT_INLINE void pick_scaled_body(const T* src, T* dst, const int32_t* index, const Wide<T>* factor,
                                 const Wide<T>* bias, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const Wide<T> value = (widen(src[index[j]]) + bias[j]) * factor[j];
    dst[j] = narrow<T>(factor[j] == 0 ? Wide<T>(0) : value);
  }
}

template <class T>
APT_INLINE void scale_body(const T* src, T* dst, const Wide<T>* factor, const Wide<T>* bias, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const Wide<T> value = (widen(src[j]) + bias[j]) * factor[j];
    dst[j] = narrow<T>(factor[j] == 0 ? Wide<T>(0) : value);
  }
}

#define APT_PICKS(T)                                                                                       \
  APT_CLONES void pick(const T* src, T* dst, const int32_t* index, int64_t count) {                        \
    pick_body(src, dst, index, count);                                                                     \
  }                                                                                                        \
  APT_CLONES void pick_scaled(const T* src, T* dst, const int32_t* index, const Wide<T>* factor,           \
                              const Wide<T>* bias, int64_t count) {                                        \
    pick_scaled_body(src, dst, index, factor, bias, count);                                                \
  }                                                                                                        \
  APT_CLONES void scale(const T* src, T* dst, const Wide<T>* factor, const Wide<T>* bias, int64_t count) { \
    scale_body(src, dst, factor, bias, count);                                                             \
  }
APT_EACH_TYPE(APT_PICKS)
#undef APT_PICKS

}  // namespace

ChannelMoves::ChannelMoves(const int32_t* given, int64_t count, int64_t limit)
    : channels(given, given + count) {
  for (int32_t& channel : channels) channel = channel < limit ? std::max(channel, -1) : -1;
  index = channels;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t from = channels[j];
    const bool goes_on =
        j > 0 && (from < 0 ? channels[j - 1] < 0 : channels[j - 1] >= 0 && channels[j - 1] + 1 == from);
    if (goes_on) {
      ++runs.back().length;
    } else {
      runs.push_back({from < 0 ? -1 : from, j, 1});
    }
    if (from < 0) index[j] = 0, has_zeros = true;
  }
  in_runs = static_cast<int64_t>(runs.size()) * 16 <= count;
}

template <class T>
void move_row(const ChannelMoves& moves, const T* src, T* dst, const Wide<T>* factor, const Wide<T>* bias) {
  const int64_t count = static_cast<int64_t>(moves.index.size());
  if (!moves.in_runs) {
    factor == nullptr ? pick(src, dst, moves.index.data(), count)
                      : pick_scaled(src, dst, moves.index.data(), factor, bias, count);
    return;
  }
  for (const ChannelMoves::Run& run : moves.runs) {
    T* to = dst + run.to;
    if (run.from < 0) {
      std::memset(static_cast<void*>(to), 0, run.length * sizeof(T));
    } else if (factor == nullptr) {
      std::memcpy(static_cast<void*>(to), src + run.from, run.length * sizeof(T));
    } else {
      scale(src + run.from, to, factor + run.to, bias + run.to, run.length);
    }
  }
}

#define APT_MOVE_ROW(T) \
  template void move_row(const ChannelMoves&, const T*, T*, const Wide<T>*, const Wide<T>*);
APT_EACH_TYPE(APT_MOVE_ROW)
#undef APT_MOVE_ROW

}  // namespace apt::cpu
