// What the ops over a whole model are asked to do, in plain types: no tensors, no torch library.
// library.cpp makes these from checked arguments; cpu/ and cuda/ carry them out.
#pragma once

#include <cstdint>
#include <vector>

namespace adalora {

enum class Type : int32_t { float32, bfloat16, float16, float64 };

inline int64_t size_of(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
}

// One step of the importance averages, and the triplet scores that follow (paper, eq. 7 to 11):
//   ipt = |w * g| * grad_scale;  I = beta1 I + (1 - beta1) ipt;  U = beta2 U + (1 - beta2) |ipt - I|
//   scores[i] = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji),  s = I * U
// ipt is 0 where that is NaN, and the largest finite number where it is infinite. If any gradient,
// or grad_scale, is inf or NaN, nothing changes but *skipped, which grows by one.
struct ImportanceUpdate {
  struct Parameter {
    const void* weight;  // this and all below: contiguous, rows x columns
    const void* grad;    // null: the averages stay, and still count in the scores
    void* exp_avg_ipt;
    void* exp_avg_unc;
    Type weight_type;
    Type grad_type;
    Type state_type;  // of both averages: float32, bfloat16 or float64
  };
  struct Adapter {
    Parameter A;  // r x in
    Parameter E;  // r x 1
    Parameter B;  // out x r
    int64_t r, in, out;
    int64_t first;  // scores[first + i] is that of triplet i
  };
  std::vector<Adapter> adapters;
  int64_t total_rank;
  void* scores;  // total_rank of scores_type: float32 or float64
  Type scores_type;
  int64_t* skipped;
  const float* grad_scale;  // null: 1
  double beta1, beta2;
};

// Whether any of it is float64: all of it is computed in that then.
inline bool holds_float64(const ImportanceUpdate& op) {
  bool found = op.scores_type == Type::float64;
  for (const auto& adapter : op.adapters)
    for (const auto* p : {&adapter.A, &adapter.E, &adapter.B})
      found |= p->weight_type == Type::float64 || p->state_type == Type::float64 ||
               (p->grad != nullptr && p->grad_type == Type::float64);
  return found;
}

// A matrix as the regulariser sees it: r rows of `length`, entry (i, k) at
// data[i * row_stride + k * stride]. lora_A (r, in) is that already, lora_B (out, r) transposed.
struct Rows {
  void* data;
  Type type;
  int64_t r, length;
  int64_t row_stride, stride;
};

// For every matrix M of `matrices`, one after the other: residual = M * M^T - I (r x r) and
// norm = ||residual||_F.
struct OrthReg {
  std::vector<Rows> matrices;
  Type type;        // of norms and residuals: float32 or float64
  void* norms;      // one per matrix
  void* residuals;  // r * r per matrix
};

// The gradient: 2 * grad_norm / norm * residual * M (0 where norm is 0), written to `grads`, or
// added to what is there.
struct OrthRegBackward {
  std::vector<Rows> matrices;
  std::vector<Rows> grads;  // shaped like matrices
  Type type;                // of grad_norms, norms and residuals
  const void* grad_norms;
  const void* norms;
  const void* residuals;
  bool accumulate;
};

// The `budget` best of all triplets stay (eq. 6): among equal scores the lower index, and NaN below
// everything. mask tells which; the lora_E of the others becomes 0.
struct Allocate {
  struct Target {
    void* lora_E;  // r entries, `stride` apart
    Type type;
    int64_t r, stride;
    int64_t first;  // its triplets are those from `first` on
  };
  std::vector<Target> targets;
  int64_t total_rank;
  const void* scores;
  Type scores_type;       // float32 or float64
  const int64_t* budget;  // null: the mask stays and is written; *budget < 0: nothing happens
  bool* mask;             // total_rank
};

}  // namespace adalora
