// Choose the route of a layer's arithmetic and cut its launches. A pure function of shape and device, so that
// it can be read, printed and tested without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "../backend.h"

namespace apt {

// What a plan may know of a device. A CPU has no multiprocessors.
struct DeviceLimits {
  int capability = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // the most shared memory a block may ask for
};

struct LinearProblem {
  int64_t M, N, K, R;
  DType dtype;
};

struct LinearPlan {
  // kLibrary: masks as passes of our own, every product by the library. kPasses: the low-rank products in
  // passes of our own around the library's dense product.
  enum class Route { kLibrary, kPasses } route = Route::kLibrary;
  // The library's 16-bit product is several times slower where a row is no multiple of 16 bytes: copy to one
  // that is. Ranks that our own passes take may be any.
  bool padded = false;
  int rows = 0;                          // of x or y a block of the low-rank pass owns
  int up_splits_N = 0, up_splits_K = 0;  // blocks that share the columns of such rows in an up pass alone
  int64_t span_N = 0, span_K = 0;        // tokens a block of the factors' gradients owns

  std::string str() const;
};

LinearPlan launch_plan(const LinearProblem& problem, const DeviceLimits& device);

// Pad a width, or a rank, to the next multiple of 8. Ranks of our own passes stay as they are.
int64_t padded_width(int64_t size);
int64_t padded_rank(int64_t R);

// Plan the merge of a weight [N, K]: an up pass over its rows, where the factors have its 16-bit dtype.
MergePlan merge_plan(const LinearProblem& problem, const DeviceLimits& device);

// Cut sums over tokens [M, C] -> [C] into so many spans that every multiprocessor has work.
int64_t channel_sum_spans(int64_t M, int64_t C, const DeviceLimits& device);

}  // namespace apt
