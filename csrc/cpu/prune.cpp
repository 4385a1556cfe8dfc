// Which triplets stay, and the zeros of the others.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "../ops.h"

namespace adalora::cpu {
namespace {

// What the triplets are ranked by. Out of play, and not a number, rank below everything.
std::vector<double> keys_of(const Prune& op) {
  std::vector<double> keys(op.total_rank, -std::numeric_limits<double>::infinity());
  auto fill = [&](const auto* scores) {
    for (int64_t i = 0; i < op.total_rank; ++i)
      if (op.in_play[i] && !std::isnan(scores[i])) keys[i] = scores[i];
  };
  op.scores_type == Type::float64 ? fill(static_cast<const double*>(op.scores))
                                  : fill(static_cast<const float*>(op.scores));
  return keys;
}

// Of equals the first ones stay.
void keep_best(const Prune& op) {
  const int64_t budget = std::clamp<int64_t>(op.budget, 0, op.total_rank);
  const std::vector<double> keys = keys_of(op);
  double least = std::numeric_limits<double>::infinity();
  int64_t equals = 0;
  if (budget > 0) {
    std::vector<double> sorted = keys;
    std::nth_element(sorted.begin(), sorted.begin() + (budget - 1), sorted.end(), std::greater<>());
    least = sorted[budget - 1];
    equals = budget - std::count_if(keys.begin(), keys.end(), [&](double k) { return k > least; });
  }
  for (int64_t i = 0; i < op.total_rank; ++i) {
    const bool stays = keys[i] > least || (keys[i] == least && equals-- > 0);
    if (op.in_play[i]) op.mask[i] = stays;
  }
}

}  // namespace

void prune(const Prune& op) {
  const bool changes = op.again || op.prunes;
  if (op.prunes && !op.again) keep_best(op);
  int64_t i = 0;
  for (const auto& factor : op.factors) {
    const int64_t bytes = size_of(factor.type);
    char* entry = static_cast<char*>(factor.lora_E);
    for (int64_t k = 0; k < factor.r; ++k, ++i, entry += factor.stride * bytes) {
      const bool dead = (changes && op.in_play[i] && !op.mask[i]) ||
                        (op.kept_at_0 != nullptr && op.kept_at_0[i]);
      if (dead) std::memset(entry, 0, bytes);
    }
  }
}

}  // namespace adalora::cpu
