// Draw the dropout of a low-rank input (philox.h), and drop from matrices that the library multiplies.
#pragma once

#include "../backend.h"
#include "../tensor.h"

namespace apt {

// What of a matrix is dropped: nothing where there is no rng.
struct Drop {
  OptTensor rng;           // int64 [2] contiguous: seed, offset
  uint32_t threshold = 0;  // as in philox.h
  OptTensor channels;      // int32 [at least columns]: which channel a column is; none: the column itself

  explicit operator bool() const { return rng.has_value(); }
  Dropout own() const;  // for a pass whose columns are channels
};

// Draw with a probability `p` in [0, 1): it is rounded to a multiple of 2^-16, and 1 - 2^-16 at most.
Drop drop_of(double p, const OptTensor& rng);

// Return the matrix [rows, cols] without what is dropped of it, a new one; the matrix itself if nothing is.
Tensor drop_channels(const Tensor& matrix, const Drop& drop);

// The same in place.
void drop_channels_(Tensor& matrix, const Drop& drop);

// Write which entries are kept to `keep`, bool [rows, cols] contiguous.
void draw_kept_(Tensor& keep, const Drop& drop);

}  // namespace apt
