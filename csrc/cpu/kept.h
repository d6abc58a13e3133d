#pragma once

#include "../kernels.h"

namespace apt {

// The kept lanes of a matrix side by side, and their way back (kept.cpp).
void gather_kept(const GatherArgs& args, Stream);
void scatter_kept(const ScatterArgs& args, Stream);

}  // namespace apt
