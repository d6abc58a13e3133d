// Gather and scatter of kept lanes on the CPU. Both read an index a lane of the result, -1 for a zero; where
// most lanes have their neighbour beside them (heads, blocks of neurons) whole runs are copied instead.
#include "kept.h"

#include <ATen/Parallel.h>

#include <cstring>

#include "loops.h"

namespace apt {
namespace {

// Where each lane of a result row comes from, looked at once a call.
struct Route {
  struct Run {
    int64_t from, to, length;  // from -1: zeros
  };
  std::vector<int32_t> index;  // -1 replaced by 0, whose factor is 0
  std::vector<Run> runs;
  bool by_runs, has_zeros;

  Route(const int32_t* given, int64_t count) : index(given, given + count), has_zeros(false) {
    for (int64_t j = 0; j < count; ++j) {
      const int32_t from = given[j];
      const bool goes_on =
          j > 0 && (from < 0 ? given[j - 1] < 0 : given[j - 1] >= 0 && given[j - 1] + 1 == from);
      if (goes_on) {
        ++runs.back().length;
      } else {
        runs.push_back({from < 0 ? -1 : from, j, 1});
      }
      if (from < 0) index[j] = 0, has_zeros = true;
    }
    by_runs = static_cast<int64_t>(runs.size()) * 16 <= count;
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

// One row of a result from one row of its source; factor null: as it is.
template <class T>
void move_row(const Route& route, const T* src, T* dst, const Wide<T>* factor, const Wide<T>* bias) {
  const int64_t count = static_cast<int64_t>(route.index.size());
  if (!route.by_runs) {
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
    const Route route(args.index, args.kept);
    std::vector<Wide<T>> factor, bias;
    if (args.mask.data != nullptr || (route.has_zeros && !route.by_runs)) {
      auto mask = widened<T>(args.mask, args.C);
      factor.resize(args.kept), bias.resize(args.kept, Wide<T>(0));
      for (int64_t j = 0; j < args.kept; ++j)
        factor[j] = args.index[j] < 0 ? Wide<T>(0) : mask[args.index[j]];
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
          move_row(route, from, to, scale, bias.data());
          continue;
        }
        for (int64_t j = 0; j < args.kept; ++j) {
          if (args.index[j] < 0 || (scale != nullptr && scale[j] == 0)) {
            to[j] = T(0);
          } else {
            const T value = from[args.index[j] * args.x_stride[1]];
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
    const Route route(args.position, args.E);
    std::vector<Wide<T>> factor, bias;
    if (args.mask.data != nullptr || args.bias != nullptr || (route.has_zeros && !route.by_runs)) {
      factor = widened<T>(args.mask, args.E);
      bias.resize(args.E, Wide<T>(0));
      const T* added = static_cast<const T*>(args.bias);
      for (int64_t c = 0; c < args.E; ++c) {
        if (args.position[c] < 0) factor[c] = 0;
        if (added != nullptr && factor[c] != 0) bias[c] = Wide<T>(added[c]);
      }
    }
    const Wide<T>* scale = factor.empty() ? nullptr : factor.data();
    const T* src = static_cast<const T*>(args.values);
    T* dst = static_cast<T*>(args.out);
    at::parallel_for(0, args.M, rows_a_task(args.E), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        move_row(route, src + m * args.kept, dst + m * args.E, scale, bias.data());
      }
    });
  });
}

}  // namespace apt
