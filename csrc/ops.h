// What the ops over a whole model are asked to do, in plain types: no tensors, no torch
// library. library.cpp makes it from checked arguments; cpu/ and cuda/ carry it out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#ifdef ADALORA_WITH_CUDA
#include <cuda_runtime.h>
#endif

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

// Keeps the `budget` best of the triplets that are in play, if it `prunes`, and writes 0 to the
// lora_E of the others (reference.prune_).
struct Prune {
  struct Factor {
    void* lora_E;  // r x 1
    Type type;
    int64_t r, stride;  // entries from one to the next
  };
  std::vector<Factor> factors;
  int64_t total_rank;  // so many scores and flags
  const void* scores;
  Type scores_type;  // float32 or float64
  int64_t budget;
  bool prunes, again;  // again: only the zeros of the mask that is there are written
  const bool* in_play;
  const bool* kept_at_0;  // null: none
  bool* mask;
};

namespace cpu {

// The result does not depend on the number of threads.
void importance_update(const ImportanceUpdate& op);
void prune(const Prune& op);

}  // namespace cpu

#ifdef ADALORA_WITH_CUDA
namespace cuda {

// Why the current device can't run what is below; empty if it can.
std::string why_not();

// Everything is launched on `stream`, nothing is read back, and nothing is copied from the host:
// what a launch needs to know travels in its arguments, so that a captured graph keeps it. The
// result does not depend on the device.
//
// `workspace` is device memory of at least importance_update_workspace(op) bytes, aligned to 256;
// only this call uses it, and it need not be initialised.
int64_t importance_update_workspace(const ImportanceUpdate& op);
cudaError_t importance_update(const ImportanceUpdate& op, void* workspace, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace adalora
