// Gather and scatter of kept lanes on the CPU. Both read an index a lane of the result, -1 for a zero; where
// most lanes have their neighbour beside them (heads, blocks of neurons) whole runs are copied instead.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include <ATen/Parallel.h>

#include <cstring>
#include <string>

#include "loops.h"

namespace apt {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
#define APT_VECTORS 1

#define APT_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")))

// A vector of 16-bit or 32-bit lanes: how it is loaded, stored, compressed and expanded under a mask of its
// lanes.
struct Lanes16 {
  using Word = uint16_t;
  static constexpr int kLanes = 32;
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

struct Lanes32 {
  using Word = uint32_t;
  static constexpr int kLanes = 16;
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

// The bits of one vector's lanes from c on.
template <class V>
[[gnu::always_inline]] inline uint32_t bits_at(const uint64_t* bits, int64_t c) {
  return static_cast<uint32_t>(bits[c / 64] >> (c % 64)) & (V::kLanes == 32 ? ~0u : 0xffffu);
}

// dst = the lanes of src that `bits` names, side by side.
template <class V>
APT_VBMI2 void compress(const typename V::Word* src, typename V::Word* dst, const uint64_t* bits,
                        int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += V::kLanes) {
    const uint32_t take = bits_at<V>(bits, c);  // none beyond the last lane
    const int count = __builtin_popcount(take);
    V::store(dst, _bzhi_u32(~0u, count), V::compress(take, V::load(take, src + c)));
    dst += count;
  }
}

// The way back: zeros between them.
template <class V>
APT_VBMI2 void expand(const typename V::Word* src, typename V::Word* dst, const uint64_t* bits,
                      int64_t lanes) {
  for (int64_t c = 0; c < lanes; c += V::kLanes) {
    const uint32_t take = bits_at<V>(bits, c);
    const int count = __builtin_popcount(take);
    const int64_t left = lanes - c;
    V::store(dst + c, left >= V::kLanes ? ~0u : _bzhi_u32(~0u, static_cast<uint32_t>(left)),
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

// Where each lane of a result row comes from, looked at once a call. An index of kept lanes ascends and then
// is negative: its row is the source's, compressed by `bits`. A position counts up from 0 with negative ones
// between: its row is the source's, expanded by `bits`. Both are one instruction a vector where the CPU has
// it; else runs of neighbours are copied, or each lane is looked up.
struct Route {
  enum class Way { kCompress, kExpand, kRuns, kLanes } way;
  struct Run {
    int64_t from, to, length;  // from -1: zeros
  };
  // As they were read once, for another thread may change them; what lies beyond the source is a zero.
  std::vector<int32_t> lanes;
  std::vector<int32_t> index;  // the same with negative ones replaced by 0, whose factor is 0
  std::vector<Run> runs;
  std::vector<uint64_t> bits;  // kCompress: of the source's lanes; kExpand: of the result's
  int64_t kept = 0, source;    // lanes that are no zeros; lanes of the source up to the last kept one
  bool has_zeros = false;

  Route(const int32_t* given, int64_t count, int64_t limit, int64_t word_bytes)
      : lanes(given, given + count) {
    for (int32_t& lane : lanes) lane = lane < limit ? std::max(lane, -1) : -1;
    index = lanes;
    bool ascends = true, counts_up = true;
    int32_t last = -1;
    for (int64_t j = 0; j < count; ++j) {
      const int32_t from = lanes[j];
      const bool goes_on =
          j > 0 && (from < 0 ? lanes[j - 1] < 0 : lanes[j - 1] >= 0 && lanes[j - 1] + 1 == from);
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
                                                            : Way::kLanes;
    if (way == Way::kCompress) {
      bits.assign((source + 63) / 64, 0);
      for (int64_t j = 0; j < kept; ++j) bits[lanes[j] / 64] |= uint64_t{1} << (lanes[j] % 64);
    } else if (way == Way::kExpand) {
      bits.assign((count + 63) / 64, 0);
      for (int64_t j = 0; j < count; ++j) bits[j / 64] |= uint64_t{lanes[j] >= 0} << (j % 64);
    }
  }
};

template <class T>
[[gnu::always_inline]] inline void pick_body(const Stored<T>* src, Stored<T>* dst, const int32_t* index,
                                             int64_t count) {
  for (int64_t j = 0; j < count; ++j) dst[j] = src[index[j]];
}

// dst = factor * (src[index] + bias), zeros selected
template <class T>
[[gnu::always_inline]] inline void pick_scaled_body(const Stored<T>* src, Stored<T>* dst,
                                                    const int32_t* index, const Wide<T>* factor,
                                                    const Wide<T>* bias, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const Wide<T> value = (widen<T>(src[index[j]]) + bias[j]) * factor[j];
    dst[j] = narrow<T>(factor[j] == 0 ? Wide<T>(0) : value);
  }
}

template <class T>
[[gnu::always_inline]] inline void scaled_body(const Stored<T>* src, Stored<T>* dst, const Wide<T>* factor,
                                               const Wide<T>* bias, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const Wide<T> value = (widen<T>(src[j]) + bias[j]) * factor[j];
    dst[j] = narrow<T>(factor[j] == 0 ? Wide<T>(0) : value);
  }
}

// target_clones takes no templates, so each type gets its overload.
#define APT_PICKS(T)                                                                                         \
  APT_CLONES void pick(const T* src, T* dst, const int32_t* index, int64_t count) {                          \
    pick_body<T>(reinterpret_cast<const Stored<T>*>(src), reinterpret_cast<Stored<T>*>(dst), index, count);  \
  }                                                                                                          \
  APT_CLONES void pick_scaled(const T* src, T* dst, const int32_t* index, const Wide<T>* factor,             \
                              const Wide<T>* bias, int64_t count) {                                          \
    pick_scaled_body<T>(reinterpret_cast<const Stored<T>*>(src), reinterpret_cast<Stored<T>*>(dst), index,   \
                        factor, bias, count);                                                                \
  }                                                                                                          \
  APT_CLONES void scaled(const T* src, T* dst, const Wide<T>* factor, const Wide<T>* bias, int64_t count) {  \
    scaled_body<T>(reinterpret_cast<const Stored<T>*>(src), reinterpret_cast<Stored<T>*>(dst), factor, bias, \
                   count);                                                                                   \
  }
APT_PICKS(double)
APT_PICKS(float)
APT_PICKS(at::Half)
APT_PICKS(at::BFloat16)
#undef APT_PICKS

// One row of a result from one row of its source; factor null: as it is. scratch: as long as the result.
template <class T>
void move_row(const Route& route, const T* src, T* dst, T* scratch, const Wide<T>* factor,
              const Wide<T>* bias) {
  const int64_t count = static_cast<int64_t>(route.index.size());
#ifdef APT_VECTORS
  if constexpr (sizeof(T) <= 4) {
    using V = std::conditional_t<sizeof(T) == 4, Lanes32, Lanes16>;
    using Word = typename V::Word;
    if (route.way == Route::Way::kCompress || route.way == Route::Way::kExpand) {
      const auto* from = reinterpret_cast<const Word*>(src);
      auto* to = reinterpret_cast<Word*>(factor == nullptr ? dst : scratch);
      if (route.way == Route::Way::kCompress) {
        compress<V>(from, to, route.bits.data(), route.source);
        std::memset(to + route.kept, 0, (count - route.kept) * sizeof(Word));
      } else {
        expand<V>(from, to, route.bits.data(), count);
      }
      if (factor != nullptr) scaled(scratch, dst, factor, bias, count);
      return;
    }
  }
#endif
  if (route.way == Route::Way::kLanes) {
    factor == nullptr ? pick(src, dst, route.index.data(), count)
                      : pick_scaled(src, dst, route.index.data(), factor, bias, count);
    return;
  }
  for (const Route::Run& run : route.runs) {
    T* to = dst + run.to;
    if (run.from < 0) {
      std::memset(static_cast<void*>(to), 0, run.length * sizeof(T));
    } else if (factor == nullptr) {
      std::memcpy(static_cast<void*>(to), src + run.from, run.length * sizeof(T));
    } else {
      scaled(src + run.from, to, factor + run.to, bias + run.to, run.length);
    }
  }
}

}  // namespace

void gather_kept(const GatherArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Route route(args.index, args.kept, args.C, sizeof(T));
    std::vector<Wide<T>> factor, bias;
    if (args.mask.data != nullptr || (route.has_zeros && route.way == Route::Way::kLanes)) {
      auto mask = widened<T>(args.mask, args.C);
      factor.resize(args.kept), bias.resize(args.kept, Wide<T>(0));
      for (int64_t j = 0; j < args.kept; ++j)
        factor[j] = route.lanes[j] < 0 ? Wide<T>(0) : mask[route.lanes[j]];
    }
    const Wide<T>* scale = factor.empty() ? nullptr : factor.data();
    const T* src = static_cast<const T*>(args.x);
    T* dst = static_cast<T*>(args.gathered);
    at::parallel_for(0, args.M, rows_a_task(args.kept), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(scale == nullptr ? 0 : args.kept);
      for (int64_t m = begin; m < end; ++m) {
        T* to = dst + m * args.kept;
        const int64_t row = args.row_index == nullptr ? m : args.row_index[m];
        if (row < 0) {
          std::fill_n(to, args.kept, T(0));
          continue;
        }
        const T* from = src + row * args.x_stride[0];
        if (args.x_stride[1] == 1) {
          move_row(route, from, to, scratch.data(), scale, bias.data());
          continue;
        }
        for (int64_t j = 0; j < args.kept; ++j) {
          if (route.lanes[j] < 0 || (scale != nullptr && scale[j] == 0)) {
            to[j] = T(0);
          } else {
            const T value = from[route.lanes[j] * args.x_stride[1]];
            to[j] = scale == nullptr || scale[j] == 1 ? value : T(Wide<T>(value) * scale[j]);
          }
        }
      }
    });
  });
}

void scatter_kept(const ScatterArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Route route(args.position, args.E, args.kept, sizeof(T));
    std::vector<Wide<T>> factor, bias;
    if (args.mask.data != nullptr || args.bias != nullptr ||
        (route.has_zeros && route.way == Route::Way::kLanes)) {
      factor = widened<T>(args.mask, args.E);
      bias.resize(args.E, Wide<T>(0));
      const T* added = static_cast<const T*>(args.bias);
      for (int64_t c = 0; c < args.E; ++c) {
        if (route.lanes[c] < 0) factor[c] = 0;
        if (added != nullptr && factor[c] != 0) bias[c] = Wide<T>(added[c]);
      }
    }
    const Wide<T>* scale = factor.empty() ? nullptr : factor.data();
    const T* src = static_cast<const T*>(args.values);
    T* dst = static_cast<T*>(args.out);
    at::parallel_for(0, args.M, rows_a_task(args.E), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(scale == nullptr ? 0 : args.E);
      for (int64_t m = begin; m < end; ++m) {
        move_row(route, src + m * args.kept, dst + m * args.E, scratch.data(), scale, bias.data());
      }
    });
  });
}

}  // namespace apt
