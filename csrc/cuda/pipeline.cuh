// Load 16 bytes a lane ahead of their use: a queue in shared memory, eight 16-bit neighbours in registers,
// and their masks.
#pragma once

#include "mma.cuh"

namespace apt {

// Eight 16-bit neighbours as the fragments see them: four pairs.
union Eight {
  uint4 all;
  uint32_t pair[4];
};

// Copy what a thread will need to shared memory ahead of it, past the registers: kPieces of 16 bytes a step,
// kStages steps. No other thread reads it, so a thread waits for its own copies only: no barrier, and as much
// on its way as shared memory holds.
template <int kStages, int kPieces, int kThreads>
struct Queue {
  unsigned char* memory;  // [kStages][kPieces][kThreads] pieces of 16 bytes

  __device__ __forceinline__ unsigned char* piece(int stage, int i) const {
    return memory + ((stage * kPieces + i) * kThreads + int(threadIdx.x)) * 16;
  }
  __device__ __forceinline__ void push(int stage, int i, const void* from, const void* safe,
                                       bool valid) const {
    copy_async16(piece(stage, i), valid ? from : safe, valid);
  }
  __device__ __forceinline__ Eight pop(int stage, int i) const {
    Eight out;
    out.all = *reinterpret_cast<const uint4*>(piece(stage, i));
    return out;
  }

  // Runs body(step, stage) for step = begin, begin + by, ... < end, its copies complete; fill(step, stage)
  // starts those of a later one, early(step) what else it can begin before it waits.
  template <class Fill, class Early, class Body>
  __device__ __forceinline__ void run(int begin, int end, int by, Fill fill, Early early, Body body) const {
    int ahead = begin;
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage, ahead += by) {
      if (ahead < end) fill(ahead, stage);
      commit_copies();
    }
    int stage = 0;
    for (int step = begin; step < end; step += by, ahead += by) {
      early(step);
      wait_copies<kStages - 2>();
      const int free = stage == 0 ? kStages - 1 : stage - 1;  // its values have been used
      if (ahead < end) fill(ahead, free);
      commit_copies();
      body(step, stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    wait_copies<0>();
  }
};

// Ranks [r, r + 4) of a row that holds R of them, in half a piece; zeros behind R.
template <class T>
__device__ __forceinline__ void push_ranks(unsigned char* to, const T* row, const T* safe, int r, int64_t R,
                                           bool valid) {
  if (R % 4 == 0) {
    const bool inside = valid && r < R;
    copy_ranks(reinterpret_cast<T*>(to), inside ? row + r : safe, 4, inside);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) copy_ranks(reinterpret_cast<T*>(to) + j, row + r + j, 1, valid && r + j < R);
  }
}

// Round two values to 16 bits, side by side.
template <class T>
__device__ __forceinline__ uint32_t two(float low, float high) {
  union {
    T at[2];
    uint32_t both;
  } out{{narrow<T>(low), narrow<T>(high)}};
  return out.both;
}

// Undo two(low, high).
template <class T>
__device__ __forceinline__ float2 two_of(uint32_t both) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
  } else {
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
  }
}

struct Mask8 {
  float at[8];

  __device__ __forceinline__ void load(const float* from, bool valid) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = valid ? reinterpret_cast<const float4*>(from)[half] : float4{1.f, 1.f, 1.f, 1.f};
      at[4 * half] = four.x, at[4 * half + 1] = four.y, at[4 * half + 2] = four.z, at[4 * half + 3] = four.w;
    }
  }
};

template <class T>
__device__ __forceinline__ void mask_eight(Eight& values, const Mask8& mask, bool select_only) {
  auto* at = reinterpret_cast<T*>(values.pair);
#pragma unroll
  for (int j = 0; j < 8; ++j) at[j] = scaled(at[j], mask.at[j], select_only);
}

// Draws where a kernel drops something, and nothing where it does not.
struct NoDraws {
  __device__ __forceinline__ explicit NoDraws(const Dropout&) {}
};
template <bool kDrops>
using DrawsIf = std::conditional_t<kDrops, Draws, NoDraws>;

// Keep the keys of all rounds in registers; the compiler would rather add them up in every draw.
__device__ __forceinline__ void hold_keys(Draws& draws) {
#pragma unroll
  for (int round = 0; round < Draws::kRounds; ++round)
    asm volatile("" : "+r"(draws.keys[round][0]), "+r"(draws.keys[round][1]));
}

// Drop of eight neighbours, by what was drawn for them.
__device__ __forceinline__ void drop_eight(Eight& values, const Draws& draws, const uint32_t (&words)[4]) {
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    if (!draws.keeps(words, 2 * p)) values.pair[p] &= 0xffff0000u;
    if (!draws.keeps(words, 2 * p + 1)) values.pair[p] &= 0xffffu;
  }
}

}  // namespace apt
