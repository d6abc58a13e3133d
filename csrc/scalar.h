// Types and arithmetic of single values, shared by the CPU's loops and the CUDA kernels. Free of torch.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define APT_INLINE __device__ __forceinline__
#else
#define APT_INLINE [[gnu::always_inline]] inline
#endif

namespace apt {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// The largest rank of our own passes. Beyond it the library's products are as fast (docs/performance.md).
constexpr int kMaxRank = 16;
constexpr int kLowPitch = kMaxRank + 8;  // elements between rows of low-rank values in shared memory

// bfloat16 on the host, as the integer it is: loops over at::BFloat16 objects are not vectorised.
enum class BFloat16Bits : uint16_t {};

// The type that values of T are accumulated in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
APT_INLINE Wide<T> widen(T value) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else
#endif
      if constexpr (std::is_same_v<T, BFloat16Bits>) {
    return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
  } else {
    return static_cast<Wide<T>>(value);
  }
}

// Round to the nearest, ties to even. NaN stays NaN.
template <class T>
APT_INLINE T narrow(Wide<T> value) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else
#endif
      if constexpr (std::is_same_v<T, BFloat16Bits>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<T>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  } else {
    return static_cast<T>(value);
  }
}

// Multiply by a mask's value. A value of 0 gives 0 whatever it meets, NaN included.
template <class T>
APT_INLINE T scaled(T value, Wide<T> factor, bool select_only) {
  if (factor == Wide<T>(0)) return narrow<T>(0);
  return select_only ? value : narrow<T>(widen(value) * factor);
}

// Call body with a value of the C++ type behind dtype.
template <class Half, class BFloat16, class Body>
void visit_types(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(Half{});
    case DType::kBFloat16:
      return body(BFloat16{});
  }
}

}  // namespace apt
