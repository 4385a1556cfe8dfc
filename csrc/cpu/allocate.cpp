#include <limits>
#include <numeric>

#include "ops.h"
#include "simd.h"

namespace adalora::cpu {
namespace {

void choose(const Allocate& op) {
  std::vector<double> scores(op.total_rank);
  load(scores.data(), op.scores, op.scores_type, 0, 1, op.total_rank);
  for (double& score : scores)
    if (score != score) score = -std::numeric_limits<double>::infinity();
  std::vector<int64_t> order(op.total_rank);
  std::iota(order.begin(), order.end(), 0);
  const int64_t kept = std::min(*op.budget, op.total_rank);
  std::nth_element(order.begin(), order.begin() + kept, order.end(), [&](int64_t a, int64_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  std::fill_n(op.mask, op.total_rank, false);
  for (int64_t i = 0; i < kept; ++i) op.mask[order[i]] = true;
}

}  // namespace

void allocate(const Allocate& op) {
  if (op.budget != nullptr) {
    if (*op.budget < 0) return;
    choose(op);
  }
  for (const auto& target : op.targets)
    with_type(target.type, [&](auto zero) {
      auto* E = static_cast<decltype(zero)*>(target.lora_E);
      for (int64_t i = 0; i < target.r; ++i)
        if (!op.mask[target.first + i]) E[i * target.stride] = zero;
    });
}

}  // namespace adalora::cpu
