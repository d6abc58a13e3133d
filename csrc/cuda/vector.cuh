// Shared by all kernels: accesses of 16 bytes, mask values, checked launches, and grids.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../backend.h"

namespace apt {

// The number of T in one 16-byte access.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// kVector<T> neighbours, aligned to 16 bytes.
template <class T>
struct alignas(16) Packed {
  T at[kVector<T>];
};

template <class T>
__device__ __forceinline__ Packed<T> load128(const T* from) {
  return *reinterpret_cast<const Packed<T>*>(from);
}

template <class T>
__device__ __forceinline__ void store128(T* to, const Packed<T>& value) {
  *reinterpret_cast<Packed<T>*>(to) = value;
}

// Four 32-bit words to global memory in one access. In PTX, because assigned through a union they became four
// accesses.
__device__ __forceinline__ void store_words(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// One mask value in the accumulation type. The branch is the same for the whole launch.
template <class W>
__device__ __forceinline__ W mask_at(const void* data, DType dtype, int64_t i) {
  if (data == nullptr) return W(1);
  switch (dtype) {
    case DType::kFloat64:
      return W(static_cast<const double*>(data)[i]);
    case DType::kFloat32:
      return W(static_cast<const float*>(data)[i]);
    case DType::kFloat16:
      return W(__half2float(static_cast<const __half*>(data)[i]));
    default:
      return W(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
  }
}

// `count` neighbouring mask values; float32 ones 16 bytes at a time where they are aligned.
template <int count, class W>
__device__ __forceinline__ void masks_at(W (&to)[count], const void* data, DType dtype, int64_t i) {
  const float* from = static_cast<const float*>(data) + i;
  if constexpr (count % 4 == 0) {
    if (data != nullptr && dtype == DType::kFloat32 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
      for (int j = 0; j < count; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + j);
        to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < count; ++j) to[j] = mask_at<W>(data, dtype, i + j);
}

// Return the smallest power of two, at least 1, that brings `largest` to at most 2^15; 1 for Inf and NaN, which
// stay what they are. float16 ends at 65504, before many a low-rank value does.
__device__ __forceinline__ float half_divisor(float largest) {
  const uint32_t bits = __float_as_uint(largest);
  if (!(largest > 32768.f) || bits >= 0x7f800000u) return 1.f;
  // Round up to a power of two: carry any fraction into the exponent, and clear it. Then divide by 2^15.
  return __uint_as_float(((bits + 0x7fffffu) & 0x7f800000u) - (15u << 23));
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Kernels are queued with their launch checked; the caller has set the device.
inline void check_launch(const char* kernel) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Call body with a value of the C++ type behind dtype.
template <class Body>
void visit(DType dtype, Body&& body) {
  visit_types<__half, __nv_bfloat16>(dtype, body);
}

// The same for kernels of 16-bit types alone.
template <class Body>
void visit_sixteen(DType dtype, Body&& body) {
  dtype == DType::kFloat16 ? body(__half{}) : body(__nv_bfloat16{});
}

// Call body with a value of the type that indices of `size` elements need. A 64-bit division costs more than the
// access it serves.
template <class Body>
void visit_index(int64_t size, Body&& body) {
  size < 0x7fff0000 ? body(uint32_t{}) : body(uint64_t{});
}

// Call body with two flags as types.
template <class Body>
void visit_flags(bool first, bool second, Body&& body) {
  if (first) {
    second ? body(std::true_type{}, std::true_type{}) : body(std::true_type{}, std::false_type{});
  } else {
    second ? body(std::false_type{}, std::true_type{}) : body(std::false_type{}, std::false_type{});
  }
}

constexpr int64_t kManyBlocks = 132 * 16;  // enough resident blocks for the largest chip this was measured on

// For kernels whose threads own columns (x) and walk down the rows (y).
constexpr int kColumnThreads = 128;
inline dim3 column_grid(int64_t columns, int64_t rows) {
  const int64_t across = (columns + kColumnThreads - 1) / kColumnThreads;
  const int64_t down = std::min<int64_t>({rows, 65535, std::max<int64_t>(1, kManyBlocks / across)});
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>(down));
}

}  // namespace apt
