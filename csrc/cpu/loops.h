// Shared by the loops of the CPU: types, wide masks, and how work is cut.
#pragma once

#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../backend.h"

// Compile a function for several instruction sets. The loader picks the widest that the CPU has, so one wheel
// serves every x86-64. Elsewhere the compiler's default serves.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define APT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define APT_CLONES
#endif

// Define something for each type: target_clones takes no templates, so each type gets its overload.
#define APT_EACH_TYPE(define) define(double) define(float) define(c10::Half) define(BFloat16Bits)

namespace apt::cpu {

template <class Body>
void visit(DType dtype, Body&& body) {
  visit_types<c10::Half, BFloat16Bits>(dtype, body);
}

// Widen a mask, so that inner loops read one type.
template <class T>
void widen_mask(const Mask& mask, int64_t size, Wide<T>* values) {
  std::fill_n(values, size, Wide<T>(1));
  if (mask.data == nullptr) return;
  visit(mask.dtype, [&](auto zero) {
    using M = decltype(zero);
    const auto* source = static_cast<const M*>(mask.data);
    std::transform(source, source + size, values, [](M value) { return Wide<T>(widen(value)); });
  });
}

// The same in memory of its own: masks are small beside any matrix.
template <class T>
std::vector<Wide<T>> widened(const Mask& mask, int64_t size) {
  std::vector<Wide<T>> values(size);
  widen_mask<T>(mask, size, values.data());
  return values;
}

constexpr int64_t kGrain = 32768;  // elements: below this a second thread costs more than it does

inline int64_t rows_a_task(int64_t columns) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
}

}  // namespace apt::cpu
