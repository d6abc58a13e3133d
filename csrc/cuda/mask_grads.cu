// Mask every gradient of a call in one launch. The table of tensors travels by value in the kernel's
// arguments, so a captured CUDA graph holds it and no copy to the device is needed.
#include <algorithm>

#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

// 32,764 bytes of arguments are allowed from sm_70 on (CUDA 12.1); 640 tensors of 48 bytes and their block
// counts fit.
constexpr int kTableSize = 600;
constexpr int64_t kBlockElements = 16384;  // elements a block owns
constexpr int kThreads = 256;

struct Table {
  MaskedGrad grads[kTableSize];
  int32_t first_block[kTableSize];
  int32_t count;
};
static_assert(sizeof(Table) <= 32764);

// Index: 32 bits where the tensor allows, since a 64-bit division costs more than the access it serves.
template <class T, class Index>
__device__ void mask_span(const MaskedGrad& grad, Index begin, Index end) {
  T* data = static_cast<T*>(grad.grad);
  constexpr int width = kVector<T>;
  const Index inner = static_cast<Index>(grad.inner), channels = static_cast<Index>(grad.channels);
  bool vector = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                (inner % width == 0 || (inner == 1 && channels % width == 0));
  if (vector) {
    for (Index i = begin + threadIdx.x * width; i < end; i += kThreads * width) {
      Packed<T> values = load128(data + i);
      Index channel = (inner == 1 ? i : i / inner) % channels;
      Wide<T> factor[width];
      if (inner == 1) {
        masks_at(factor, grad.mask, grad.mask_dtype, channel);
      } else {
        factor[0] = mask_at<Wide<T>>(grad.mask, grad.mask_dtype, channel);
#pragma unroll
        for (int j = 1; j < width; ++j) factor[j] = factor[0];
      }
#pragma unroll
      for (int j = 0; j < width; ++j) values.at[j] = scaled(values.at[j], factor[j], false);
      store128(data + i, values);
    }
  } else {
    for (Index i = begin + threadIdx.x; i < end; i += kThreads) {
      data[i] = scaled(data[i], mask_at<Wide<T>>(grad.mask, grad.mask_dtype, i / inner % channels), false);
    }
  }
}

template <class T>
__device__ void mask_block(const MaskedGrad& grad, int64_t begin, int64_t end) {
  if (grad.size < 0x7fff0000) {
    mask_span<T, uint32_t>(grad, static_cast<uint32_t>(begin), static_cast<uint32_t>(end));
  } else {
    mask_span<T, uint64_t>(grad, static_cast<uint64_t>(begin), static_cast<uint64_t>(end));
  }
}

__global__ void __launch_bounds__(kThreads) apt_mask_grads(const __grid_constant__ Table table) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = table.count - 1;  // the last tensor whose first block is not beyond this one
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const MaskedGrad& grad = table.grads[low];
  int64_t begin = int64_t{block - table.first_block[low]} * kBlockElements;
  int64_t end = begin + kBlockElements < grad.size ? begin + kBlockElements : grad.size;
  switch (grad.dtype) {
    case DType::kFloat64:
      return mask_block<double>(grad, begin, end);
    case DType::kFloat32:
      return mask_block<float>(grad, begin, end);
    case DType::kFloat16:
      return mask_block<__half>(grad, begin, end);
    case DType::kBFloat16:
      return mask_block<__nv_bfloat16>(grad, begin, end);
  }
}

}  // namespace

void mask_grads(const MaskedGrad* grads, size_t count, Stream stream) {
  for (size_t start = 0; start < count; start += kTableSize) {
    Table table;
    table.count = static_cast<int32_t>(std::min<size_t>(kTableSize, count - start));
    int64_t blocks = 0;
    for (int32_t i = 0; i < table.count; ++i) {
      table.grads[i] = grads[start + i];
      table.first_block[i] = static_cast<int32_t>(blocks);
      blocks += (grads[start + i].size + kBlockElements - 1) / kBlockElements;
    }
    if (blocks > 0x7fffffff) throw std::runtime_error("mask_grads_: more than 2^45 elements in one call");
    apt_mask_grads<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table);
    check_launch("apt_mask_grads");
  }
}

}  // namespace apt::cuda
