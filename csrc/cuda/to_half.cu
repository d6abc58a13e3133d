// Round a float32 activation to float16, inside its range by a power of two that is found on the device, so
// that nothing waits. Two launches: the largest entry, then all of them.
#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements a thread

// Without their signs, floats are ordered like the integers of their bits: Inf above all numbers, NaN above
// it.
__global__ void __launch_bounds__(kThreads) apt_largest(const __grid_constant__ ToHalfArgs args) {
  __shared__ uint32_t of_warp[kThreads / 32];
  uint32_t largest = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.count;
       i += int64_t{gridDim.x} * kThreads)
    largest = max(largest, __float_as_uint(args.wide[i]) & 0x7fffffffu);
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t other : of_warp) largest = max(largest, other);
  if (largest != 0) atomicMax(args.largest, largest);  // a maximum is the same in any order
}

__global__ void __launch_bounds__(kThreads) apt_to_half(const __grid_constant__ ToHalfArgs args) {
  const float inverse = half_divisor(__uint_as_float(*args.largest)), scale = 1.f / inverse;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x, stride = int64_t{gridDim.x} * kThreads;
  if (first == 0) *args.multiplier = static_cast<float>(args.scaling) * inverse;
  auto* half = static_cast<__half*>(args.half);
  for (int64_t i = first; i < args.count; i += stride) half[i] = narrow<__half>(args.wide[i] * scale);
  const auto* factor = static_cast<const __half*>(args.factor);
  auto* grown = static_cast<__half*>(args.grown);
  for (int64_t i = first; i < args.factor_count; i += stride)
    grown[i] = narrow<__half>(widen(factor[i]) * inverse);
}

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((count + kThreads * kEach - 1) / (kThreads * kEach), 1, kManyBlocks));
}

}  // namespace

void to_half(const ToHalfArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  if (cudaMemsetAsync(args.largest, 0, sizeof(*args.largest), queue) != cudaSuccess)
    check_launch("cudaMemsetAsync");
  apt_largest<<<blocks_for(args.count), kThreads, 0, queue>>>(args);
  check_launch("apt_largest");
  apt_to_half<<<blocks_for(std::max(args.count, args.factor_count)), kThreads, 0, queue>>>(args);
  check_launch("apt_to_half");
}

}  // namespace apt::cuda
