// Draw dropout by counters: whether an element is dropped follows from (seed, offset), its row and its channel
// alone, so every pass of forward and backward, however it cuts the matrix, draws the same without keeping it.
//
// Philox4x32 (Salmon et al., SC 2011) with 7 rounds, the fewest that pass BigCrush there; 10 is the usual number,
// for a margin that a dropout mask does not need and three passes a layer would pay for. The key is the seed, the
// counter (channel / 8, row, offset), so one draw of 128 bits serves eight neighbours, 16 bits each.
#pragma once

#include "scalar.h"

namespace apt {

// What of a matrix is dropped, as kernels are told it.
struct Dropout {
  const int64_t* rng = nullptr;  // seed and offset, on the device; null: nothing is dropped
  uint32_t threshold = 0;        // of 2^16: what draws less is dropped
};

// The draws of a launch.
struct Draws {
  static constexpr int kRounds = 7;
  uint32_t keys[kRounds][2], offset[2];
  uint32_t threshold;  // in the upper 16 bits

  APT_INLINE explicit Draws(const Dropout& dropout) : threshold(dropout.threshold << 16) {
    const auto seed = static_cast<uint64_t>(dropout.rng[0]), start = static_cast<uint64_t>(dropout.rng[1]);
    offset[0] = static_cast<uint32_t>(start), offset[1] = static_cast<uint32_t>(start >> 32);
    for (uint32_t round = 0; round < kRounds; ++round) {
      keys[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      keys[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }

  // 16 bits for each of the channels 8 group to 8 group + 7 of a row: that of channel j in half j % 2 (0: the
  // lower) of word j / 2.
  APT_INLINE void draw(uint32_t group, int64_t row, uint32_t (&words)[4]) const {
    uint32_t a = group, b = static_cast<uint32_t>(row), c = offset[0],
             d = offset[1] + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t first = uint64_t{0xD2511F53u} * a, second = uint64_t{0xCD9E8D57u} * c;
      a = static_cast<uint32_t>(second >> 32) ^ b ^ keys[round][0], b = static_cast<uint32_t>(second);
      c = static_cast<uint32_t>(first >> 32) ^ d ^ keys[round][1], d = static_cast<uint32_t>(first);
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
  }

  // Return true if channel j of eight is kept.
  APT_INLINE bool keeps(const uint32_t (&words)[4], int j) const {
    return (j % 2 == 0 ? words[j / 2] << 16 : words[j / 2]) >= threshold;
  }
};

}  // namespace apt
