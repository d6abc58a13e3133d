// What the loops of the CPU share: types, their rounding, and how work is cut.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../backend.h"

// One wheel for every x86-64: the loader picks the widest clone the CPU has. Elsewhere the compiler's default
// serves.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define APT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define APT_CLONES
#endif

namespace apt {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Body>
void visit(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(at::Half{});
    case DType::kBFloat16:
      return body(at::BFloat16{});
  }
}

// A mask as wide values, so that inner loops read one type. Masks are vectors: small beside any matrix.
template <class T>
std::vector<Wide<T>> widened(const Mask& mask, int64_t size) {
  std::vector<Wide<T>> values(size, Wide<T>(1));
  if (mask.data == nullptr) return values;
  visit(mask.dtype, [&](auto m) {
    const auto* source = static_cast<const decltype(m)*>(mask.data);
    std::copy(source, source + size, values.begin());
  });
  return values;
}

constexpr int64_t kGrain = 32768;  // elements: below this a second thread costs more than it does

inline int64_t rows_a_task(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

// bfloat16 as the bits it is: loops over at::BFloat16 objects are not vectorised, loops over integers are.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, at::BFloat16>, uint16_t, T>;

template <class T>
[[gnu::always_inline]] inline Wide<T> widen(Stored<T> value) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    return std::bit_cast<float>(uint32_t{value} << 16);
  } else {
    return Wide<T>(value);
  }
}

// Rounded to the nearest, ties to even; a NaN stays one.
template <class T>
[[gnu::always_inline]] inline Stored<T> narrow(Wide<T> value) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  } else {
    return T(value);
  }
}

}  // namespace apt
