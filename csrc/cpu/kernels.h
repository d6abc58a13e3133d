// The functions of the CPU's column of the table in ../backend.h that have a file of their own.
#pragma once

#include "../backend.h"

namespace apt {

// The kept lanes of a matrix side by side, and their way back (gather.cpp).
void gather_kept(const GatherArgs& args, Stream);
void scatter_kept(const ScatterArgs& args, Stream);

void channel_sums(const ChannelSumArgs& args, Stream);  // channel_sums.cpp
void copies(const MatrixCopies& copies, Stream);        // copy_factors.cpp

}  // namespace apt
