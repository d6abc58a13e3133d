// Sum over tokens on the CPU, one sum a channel, in one pass that reads the values once.
#include <ATen/Parallel.h>

#include "loops.h"

namespace apt::cpu {
namespace {

constexpr int64_t kRows = 4;    // rows of one pass over the sums: fewer loads and stores of those
constexpr int64_t kBlock = 64;  // passes summed by themselves first: rounding grows with a block's length

template <class T, bool kSigned>
APT_INLINE void add_rows_body(const T* const* rows, int64_t count, Wide<T>* __restrict__ sums,
                              int64_t channels) {
  const auto value = [](T stored) {
    const Wide<T> wide = widen(stored);
    return kSigned ? wide : std::abs(wide);
  };
  if (count == kRows) {
    const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    for (int64_t j = 0; j < channels; ++j)
      sums[j] += (value(a[j]) + value(b[j])) + (value(c[j]) + value(d[j]));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows[i];
    for (int64_t j = 0; j < channels; ++j) sums[j] += value(row[j]);
  }
}

#define APT_ADD_ROWS(T)                                                                             \
  APT_CLONES void add_rows(T, const T* const* rows, int64_t count, Wide<T>* sums, int64_t channels, \
                           bool is_signed) {                                                        \
    if (is_signed) {                                                                                \
      add_rows_body<T, true>(rows, count, sums, channels);                                          \
    } else {                                                                                        \
      add_rows_body<T, false>(rows, count, sums, channels);                                         \
    }                                                                                               \
  }
APT_EACH_TYPE(APT_ADD_ROWS)
#undef APT_ADD_ROWS

// Add the rows from `first` to `last` whose token counts to `sums`.
template <class T>
void sum_range(const T* values, int64_t stride, const bool* tokens, int64_t first, int64_t last,
               std::vector<Wide<T>>& sums, bool is_signed) {
  const int64_t channels = static_cast<int64_t>(sums.size());
  std::vector<Wide<T>> block(channels, Wide<T>(0));
  const T* rows[kRows];
  int64_t held = 0, passes = 0;
  const auto flush = [&] {
    for (int64_t j = 0; j < channels; ++j) sums[j] += block[j];
    std::fill(block.begin(), block.end(), Wide<T>(0));
    passes = 0;
  };
  for (int64_t row = first; row < last; ++row) {
    if (tokens != nullptr && !tokens[row]) continue;
    rows[held++] = values + row * stride;
    if (held == kRows) {
      add_rows(T{}, rows, held, block.data(), channels, is_signed);
      held = 0;
      if (++passes == kBlock) flush();
    }
  }
  add_rows(T{}, rows, held, block.data(), channels, is_signed);
  flush();
}

template <class T>
void sum_all(const ChannelSumArgs& args) {
  const auto* data = static_cast<const T*>(args.values);
  // As many parts as threads, added up in their order: the same bits for the same number of threads.
  const int64_t parts = std::clamp<int64_t>(args.M * args.C / kGrain, 1, at::get_num_threads());
  std::vector<std::vector<Wide<T>>> sums(parts);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      sums[part].assign(args.C, Wide<T>(0));
      sum_range<T>(data, args.stride, args.tokens, args.M * part / parts, args.M * (part + 1) / parts,
                   sums[part], args.is_signed);
    }
  });
  auto* result = static_cast<Wide<T>*>(args.out);
  std::fill(result, result + args.C, Wide<T>(0));
  for (const auto& part : sums) {
    for (int64_t j = 0; j < args.C; ++j) result[j] += part[j];
  }
}

}  // namespace

void channel_sums(const ChannelSumArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) { sum_all<decltype(zero)>(args); });
}

}  // namespace apt::cpu
