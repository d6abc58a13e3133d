// What a kernel may know: pointers, sizes, strides and a stream. Torch does not exist below this line, so
// every .cu file compiles in seconds and on a machine without a CUDA torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace apt {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// A mask along one side of a matrix: float32 or the matrix' own dtype; null data means "all ones".
struct Mask {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// dst[i, j] = mask == 0 ? 0 : src[i, j] * mask, the mask running over columns (or rows). With select_only the
// fractions do not scale: only the zeros act. src and dst may be the same matrix.
struct LanesArgs {
  const void* src;  // [rows, cols], strides in elements
  void* dst;        // [rows, cols]
  int64_t rows, cols;
  int64_t src_stride[2], dst_stride[2];
  Mask mask;
  bool along_rows;  // mask has one value a row instead of one a column
  bool select_only;
  DType dtype;
};

// weight <- diag(mask_out) (weight + scaling B A) diag(mask_in), accumulated in float32 (float64), rounded
// once.
struct MergeArgs {
  void* weight;        // [N, K], strides in elements; one of them is usually 1
  const void* lora_A;  // [R, K] contiguous
  const void* lora_B;  // [N, R] contiguous
  int64_t N, K, R;
  int64_t stride[2];
  Mask mask_in, mask_out;
  double scaling;
  DType dtype, factor_dtype;
  int32_t*
      not_finite;  // null: write. Else: write nothing, set *not_finite where a result would not be finite.
};

// One gradient of mask_grads_, seen as [outer, lanes, inner] contiguous.
struct MaskedGrad {
  void* grad;
  const void* mask;
  int64_t size, lanes, inner;
  DType dtype, mask_dtype;
};

using Stream = void*;  // cudaStream_t; null on the CPU

// A device is this table. ops.cpp looks it up once a call and knows nothing else of devices.
struct Kernels {
  void (*lanes)(const LanesArgs&, Stream);
  void (*merge)(const MergeArgs&, Stream);
  void (*mask_grads)(const MaskedGrad*, size_t count, Stream);
};

extern const Kernels kCpuKernels;
#ifdef APT_WITH_CUDA
extern const Kernels kCudaKernels;
#endif

}  // namespace apt
