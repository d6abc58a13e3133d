#include "plan.h"

#include <algorithm>

namespace apt {
namespace {

int64_t divided(int64_t size, int64_t by) { return (size + by - 1) / by; }

bool has_passes(const LinearProblem& p, const DeviceLimits& device) {
  constexpr int64_t kSharedBytes = 99 * 1024;  // what the low-rank pass takes
  bool sixteen = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  return sixteen && device.capability >= 80 && device.shared_bytes >= kSharedBytes && p.R > 0 &&
         p.R <= kMaxRank;
}

// Give a block 32 whole rows where then three quarters of the multiprocessors have so many blocks, else 16.
int rows_of(int64_t M, int64_t blocks_each, const DeviceLimits& device) {
  return divided(M, 32) * 4 >= device.multiprocessors * 3 * blocks_each ? 32 : 16;
}

// The rows of a block of the low-rank pass. 32 read the factor half as often, and have twice as much on its
// way. Shorter rows want more blocks than the chip holds at once, which take turns with reading and writing
// (docs/performance.md).
int rows_of_pass(const LinearProblem& p, const DeviceLimits& device) {
  constexpr int64_t kLong = 4096, kShort = 1024;
  const int64_t width = std::max(p.N, p.K);
  return width < kShort ? 16 : rows_of(p.M, width < kLong ? 4 : 2, device);
}

// Cut the columns of the up pass too, until there are two blocks for each multiprocessor.
int splits_of_up(int64_t M, int rows, int64_t columns, const DeviceLimits& device) {
  int64_t blocks = divided(M, rows);
  return static_cast<int>(std::clamp<int64_t>(2 * device.multiprocessors / blocks, 1,
                                              std::max<int64_t>(1, divided(columns, 512))));
}

// Tokens a block adds up: long spans mean few partial sums to write and add, and two blocks for each
// multiprocessor are enough.
int64_t span_of(int64_t M, int64_t channels, const DeviceLimits& device) {
  int64_t spans = std::max<int64_t>(1, 2 * device.multiprocessors / divided(channels, 128));
  return std::max<int64_t>(64, divided(divided(M, spans), 64) * 64);
}

}  // namespace

int64_t padded_width(int64_t size) { return divided(size, 8) * 8; }

int64_t padded_rank(int64_t R) { return R <= kMaxRank ? R : padded_width(R); }

LinearPlan launch_plan(const LinearProblem& p, const DeviceLimits& device) {
  LinearPlan plan;
  if (device.multiprocessors == 0 || p.M == 0 || p.N == 0 || p.K == 0) return plan;
  bool sixteen = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  bool aligned = padded_width(p.N) == p.N && padded_width(p.K) == p.K;
  // Below 64 tokens the copy of W costs more than the slow product does.
  plan.padded = sixteen && (!aligned || padded_rank(p.R) != p.R) && p.M >= 64;
  if (!has_passes(p, device) || !(aligned || plan.padded)) return plan;
  plan.route = LinearPlan::Route::kPasses;
  plan.rows = rows_of_pass(p, device);
  plan.up_splits_N = splits_of_up(p.M, plan.rows, p.N, device);
  plan.up_splits_K = splits_of_up(p.M, plan.rows, p.K, device);
  plan.span_N = span_of(p.M, p.N, device);
  plan.span_K = span_of(p.M, p.K, device);
  return plan;
}

MergePlan merge_plan(const LinearProblem& p, const DeviceLimits& device) {
  if (!has_passes(p, device) || p.K % 8 != 0) return {};
  const int rows = rows_of(p.N, 1, device);
  return {rows, splits_of_up(p.N, rows, p.K, device)};
}

int64_t channel_sum_spans(int64_t M, int64_t C, const DeviceLimits& device) {
  const int64_t blocks = divided(C, 256);  // of one span of 16-bit values
  return std::clamp<int64_t>(4 * device.multiprocessors / std::max<int64_t>(1, blocks), 1,
                             std::max<int64_t>(1, divided(M, 64)));
}

std::string LinearPlan::str() const {
  auto text = [](int64_t number) { return std::to_string(number); };
  std::string out = route == Route::kPasses ? "passes" : "library";
  if (padded) out += ", padded to multiples of 8";
  if (route == Route::kPasses) {
    out += ", " + text(rows) + " rows a block, the up pass cut in " + text(up_splits_N) + " (N) and " +
           text(up_splits_K) + " (K), sums over tokens: spans of " + text(span_N) + " (N) and " +
           text(span_K) + " (K)";
  }
  return out;
}

}  // namespace apt
