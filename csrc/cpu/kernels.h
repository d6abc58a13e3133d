// The functions of the CPU's column of the table in ../kernels.h that have a file of their own.
#pragma once

#include "../kernels.h"

namespace apt {

// The kept lanes of a matrix side by side, and their way back (kept.cpp).
void gather_kept(const GatherArgs& args, Stream);
void scatter_kept(const ScatterArgs& args, Stream);

void channel_sums(const ChannelSumArgs& args, Stream);  // sums.cpp
void copies(const MatrixCopies& copies, Stream);        // copies.cpp

}  // namespace apt
