// Move channels between rows of different widths: shared by gather and scatter on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace apt::cpu {

// Where each channel of a result row comes from, found once a call. An index of kept channels ascends and
// then is negative: its row is the source's, compressed by `bits`. A position counts up from 0 with negative
// ones between: its row is the source's, expanded by `bits`. Both take one instruction a vector where the CPU
// has it. Else runs of neighbours are copied (heads, blocks of neurons), or each channel is looked up.
struct ChannelMoves {
  ChannelMoves(const int32_t* given, int64_t count, int64_t limit, int64_t word_bytes);

  enum class Way { kCompress, kExpand, kRuns, kEach } way;
  struct Run {
    int64_t from, to, length;  // from -1: zeros
  };
  // Read once, for another thread may change what was given. A channel beyond the source is a zero (-1).
  std::vector<int32_t> channels;
  std::vector<int32_t> index;  // the same with 0 for negative ones, whose factor is 0
  std::vector<Run> runs;
  std::vector<uint64_t> bits;  // kCompress: of the source's channels; kExpand: of the result's
  int64_t kept = 0, source;    // channels that are no zeros; channels of the source up to the last kept one
  bool has_zeros = false;
};

// Write a row of the result: factor * (the source's channels + bias), zeros selected. Null factor: only move.
// scratch is as long as the result.
template <class T>
void move_row(const ChannelMoves& moves, const T* src, T* dst, T* scratch, const Wide<T>* factor,
              const Wide<T>* bias);

}  // namespace apt::cpu
