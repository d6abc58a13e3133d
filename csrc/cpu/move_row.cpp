#include "move_row.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <cstring>
#include <string>

namespace apt::cpu {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define APT_VECTORS 1

#define APT_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")))

// Load, store, compress and expand a vector of 16-bit or 32-bit channels under a mask of them.
struct Vector16 {
  using Word = uint16_t;
  static constexpr int kChannels = 32;
  APT_VBMI2 [[gnu::always_inline]] static inline __m512i load(uint32_t m, const Word* at) {
    return _mm512_maskz_loadu_epi16(m, at);
  }
  APT_VBMI2 [[gnu::always_inline]] static inline void store(Word* at, uint32_t m, __m512i v) {
    _mm512_mask_storeu_epi16(at, m, v);
  }
  APT_VBMI2 [[gnu::always_inline]] static inline __m512i compress(uint32_t m, __m512i v) {
    return _mm512_maskz_compress_epi16(m, v);
  }
  APT_VBMI2 [[gnu::always_inline]] static inline __m512i expand(uint32_t m, __m512i v) {
    return _mm512_maskz_expand_epi16(m, v);
  }
};

struct Vector32 {
  using Word = uint32_t;
  static constexpr int kChannels = 16;
  APT_VBMI2 [[gnu::always_inline]] static inline __m512i load(uint32_t m, const Word* at) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(m), at);
  }
  APT_VBMI2 [[gnu::always_inline]] static inline void store(Word* at, uint32_t m, __m512i v) {
    _mm512_mask_storeu_epi32(at, static_cast<__mmask16>(m), v);
  }
  APT_VBMI2 [[gnu::always_inline]] static inline __m512i compress(uint32_t m, __m512i v) {
    return _mm512_maskz_compress_epi32(static_cast<__mmask16>(m), v);
  }
  APT_VBMI2 [[gnu::always_inline]] static inline __m512i expand(uint32_t m, __m512i v) {
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(m), v);
  }
};

// Return the bits of one vector's channels from c on.
template <class V>
APT_INLINE uint32_t bits_at(const uint64_t* bits, int64_t c) {
  return static_cast<uint32_t>(bits[c / 64] >> (c % 64)) & (V::kChannels == 32 ? ~0u : 0xffffu);
}

// Write the channels of src that `bits` names side by side.
template <class V>
APT_VBMI2 void compress(const typename V::Word* src, typename V::Word* dst, const uint64_t* bits,
                        int64_t channels) {
  for (int64_t c = 0; c < channels; c += V::kChannels) {
    const uint32_t take = bits_at<V>(bits, c);  // none beyond the last channel
    const int count = __builtin_popcount(take);
    V::store(dst, _bzhi_u32(~0u, count), V::compress(take, V::load(take, src + c)));
    dst += count;
  }
}

// Write them back to their places, with zeros between them.
template <class V>
APT_VBMI2 void expand(const typename V::Word* src, typename V::Word* dst, const uint64_t* bits,
                      int64_t channels) {
  for (int64_t c = 0; c < channels; c += V::kChannels) {
    const uint32_t take = bits_at<V>(bits, c);
    const int count = __builtin_popcount(take);
    const int64_t left = channels - c;
    V::store(dst + c, left >= V::kChannels ? ~0u : _bzhi_u32(~0u, static_cast<uint32_t>(left)),
             V::expand(take, V::load(_bzhi_u32(~0u, count), src)));
    src += count;
  }
}

bool can_compress(int64_t word_bytes) {
  static const bool has = at::get_cpu_capability() == "AVX512" && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
                          __builtin_cpu_supports("bmi2");
  return has && (word_bytes == 2 || word_bytes == 4);
}

#undef APT_VBMI2
#else
bool can_compress(int64_t) { return false; }
#endif

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

ChannelMoves::ChannelMoves(const int32_t* given, int64_t count, int64_t limit, int64_t word_bytes)
    : channels(given, given + count) {
  for (int32_t& channel : channels) channel = channel < limit ? std::max(channel, -1) : -1;
  index = channels;
  bool ascends = true, counts_up = true;
  int32_t last = -1;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t from = channels[j];
    const bool goes_on =
        j > 0 && (from < 0 ? channels[j - 1] < 0 : channels[j - 1] >= 0 && channels[j - 1] + 1 == from);
    if (goes_on) {
      ++runs.back().length;
    } else {
      runs.push_back({from < 0 ? -1 : from, j, 1});
    }
    if (from < 0) {
      index[j] = 0, has_zeros = true;
    } else {
      ascends = ascends && !has_zeros && from > last;
      counts_up = counts_up && from == kept;
      ++kept;
      last = std::max(last, from);
    }
  }
  source = last + 1;
  way = can_compress(word_bytes) && ascends               ? Way::kCompress
        : can_compress(word_bytes) && counts_up           ? Way::kExpand
        : static_cast<int64_t>(runs.size()) * 16 <= count ? Way::kRuns
                                                          : Way::kEach;
  if (way == Way::kCompress) {
    bits.assign((source + 63) / 64, 0);
    for (int64_t j = 0; j < kept; ++j) bits[channels[j] / 64] |= uint64_t{1} << (channels[j] % 64);
  } else if (way == Way::kExpand) {
    bits.assign((count + 63) / 64, 0);
    for (int64_t j = 0; j < count; ++j) bits[j / 64] |= uint64_t{channels[j] >= 0} << (j % 64);
  }
}

template <class T>
void move_row(const ChannelMoves& moves, const T* src, T* dst, T* scratch, const Wide<T>* factor,
              const Wide<T>* bias) {
  const int64_t count = static_cast<int64_t>(moves.index.size());
#ifdef APT_VECTORS
  if constexpr (sizeof(T) <= 4) {
    using V = std::conditional_t<sizeof(T) == 4, Vector32, Vector16>;
    using Word = typename V::Word;
    if (moves.way == ChannelMoves::Way::kCompress || moves.way == ChannelMoves::Way::kExpand) {
      const auto* from = reinterpret_cast<const Word*>(src);
      auto* to = reinterpret_cast<Word*>(factor == nullptr ? dst : scratch);
      if (moves.way == ChannelMoves::Way::kCompress) {
        compress<V>(from, to, moves.bits.data(), moves.source);
        std::memset(to + moves.kept, 0, (count - moves.kept) * sizeof(Word));
      } else {
        expand<V>(from, to, moves.bits.data(), count);
      }
      if (factor != nullptr) scale(scratch, dst, factor, bias, count);
      return;
    }
  }
#endif
  if (moves.way == ChannelMoves::Way::kEach) {
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
  template void move_row(const ChannelMoves&, const T*, T*, T*, const Wide<T>*, const Wide<T>*);
APT_EACH_TYPE(APT_MOVE_ROW)
#undef APT_MOVE_ROW

}  // namespace apt::cpu
