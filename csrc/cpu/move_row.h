// Move channels between rows of different widths: shared by gather and scatter on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace apt::cpu {

// Where each channel of a result row comes from, found once a call. Runs of neighbours are copied (heads,
// blocks of neurons) where they are long, else each channel is looked up.
struct ChannelMoves {
  ChannelMoves(const int32_t* given, int64_t count, int64_t limit);

  struct Run {
    int64_t from, to, length;  // from -1: zeros
  };
  // Read once, for another thread may change what was given. A channel beyond the source is a zero (-1).
  std::vector<int32_t> channels;
  std::vector<int32_t> index;  // the same with 0 for negative ones, whose factor is 0
  std::vector<Run> runs;
  bool in_runs = false, has_zeros = false;
};

// Write a row of the result: factor * (the source's channels + bias), zeros selected. Null factor: only move.
template <class T>
void move_row(const ChannelMoves& moves, const T* src, T* dst, const Wide<T>* factor, const Wide<T>* bias);

}  // namespace apt::cpu
