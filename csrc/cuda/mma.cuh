// Wrap instructions, all from sm_80 on: asynchronous copies to shared memory, matrix loads and the 16-bit
// matrix product.
//
// A fragment is what a lane of a warp holds of a small matrix. With g = lane / 4 and q = lane % 4, of a 16 x
// 16 left operand: rows g and g + 8, columns 2q, 2q + 1 and 2q + 8, 2q + 9; of a 16 x 8 sum: rows g and g +
// 8, columns 2q and 2q + 1.
#pragma once

#include "vector.cuh"

namespace apt {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory past the registers; zeros, and no read, where `valid` is false.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}

// The same for 8 and 4 bytes, where rows are not aligned to more.
__device__ __forceinline__ void copy_async8(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 8 : 0));
}
__device__ __forceinline__ void copy_async4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0));
}

// Closes the group of copies issued since the last call.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kOpen` groups of this thread are still under way.
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kOpen) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane i names the row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

// An 8 x 8 matrix of 16-bit values that a warp holds, lane (g, q) columns 2q and 2q + 1 of row g, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(pair));
  return out;
}

// sum [16 x 8] += lhs [16 x 16] rhs [16 x 8], accumulated in float32.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&lhs)[4], uint32_t rhs0,
                                         uint32_t rhs1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "r"(rhs0), "r"(rhs1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "r"(rhs0), "r"(rhs1));
  }
}

// Return how many of the R ranks of a row travel in one copy.
__device__ __forceinline__ int ranks_a_copy(int64_t R) { return R % 8 == 0 ? 8 : R % 2 == 0 ? 2 : 1; }

// Copy `width` neighbouring ranks (8, 4, 2 or 1) to shared memory, or zeros where `valid` is false.
template <class T>
__device__ __forceinline__ void copy_ranks(T* to, const T* from, int width, bool valid) {
  if (width == 8) {
    copy_async16(to, from, valid);
  } else if (width == 4) {
    copy_async8(to, from, valid);
  } else if (width == 2) {
    copy_async4(to, from, valid);
  } else {
    *to = valid ? *from : narrow<T>(0);
  }
}

// Allow a kernel more than 48 KiB of shared memory, once a device.
template <auto kernel>
void allow_shared(int bytes) {
  static uint64_t asked = 0;  // one bit a device; a lost update only asks again
  int device = 0;
  cudaGetDevice(&device);
  if (device < 64 && (asked >> device & 1)) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (device < 64) asked |= uint64_t{1} << device;
}

// Return how many of its blocks the device holds at once, asked once a device. Calls allow_shared.
template <auto kernel>
int resident_blocks(int threads, int bytes) {
  static int known[64] = {};  // a lost update only asks again
  int device = 0;
  cudaGetDevice(&device);
  if (device < 64 && known[device] > 0) return known[device];
  allow_shared<kernel>(bytes);
  int each = 0, processors = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, bytes);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int blocks = std::max(1, each * processors);
  if (device < 64) known[device] = blocks;
  return blocks;
}

}  // namespace apt
