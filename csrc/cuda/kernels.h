// The CUDA column of the table in ../backend.h, one function a file.
#pragma once

#include "../backend.h"

namespace apt::cuda {

void lanes(const LanesArgs& args, Stream stream);
void merge(const MergeArgs& args, Stream stream);
void mask_grads(const MaskedGrad* grads, size_t count, Stream stream);
void gather(const GatherArgs& args, Stream stream);
void scatter(const ScatterArgs& args, Stream stream);
void channel_sums(const ChannelSumArgs& args, Stream stream);
void copies(const MatrixCopies& copies, Stream stream);
void low_rank(const LowRankArgs& args, Stream stream);
void token_sums(const TokenSumArgs& args, Stream stream);
void add_spans(const FactorGradPair& pair, Stream stream);
void to_half(const ToHalfArgs& args, Stream stream);

}  // namespace apt::cuda
