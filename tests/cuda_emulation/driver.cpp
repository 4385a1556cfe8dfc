// The ops of csrc/cuda for ctypes: one row of integers per adapter, matrix or target.
#include "../../csrc/cuda/ops.h"

namespace {

using namespace adalora;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr int kParameterColumns = 7;
constexpr int kAdapterColumns = 3 * kParameterColumns + 4;
constexpr int kMatrixColumns = 6;
constexpr int kTargetColumns = 5;

ImportanceUpdate::Parameter parameter(const int64_t* row) {
  return {pointer<void>(row[0]), pointer<void>(row[1]), pointer<void>(row[2]),
          pointer<void>(row[3]), Type(row[4]),          Type(row[5]),
          Type(row[6])};
}

ImportanceUpdate importance(int64_t count, const int64_t* rows, int64_t total_rank, int64_t scores,
                            int64_t scores_type, int64_t skipped, int64_t grad_scale, double beta1,
                            double beta2) {
  ImportanceUpdate op = {{},
                         total_rank,
                         pointer<void>(scores),
                         Type(scores_type),
                         pointer<int64_t>(skipped),
                         pointer<float>(grad_scale),
                         beta1,
                         beta2};
  for (; count > 0; --count, rows += kAdapterColumns) {
    const int64_t* sizes = rows + 3 * kParameterColumns;
    op.adapters.push_back({parameter(rows), parameter(rows + kParameterColumns),
                           parameter(rows + 2 * kParameterColumns), sizes[0], sizes[1], sizes[2],
                           sizes[3]});
  }
  return op;
}

std::vector<Rows> matrices(int64_t count, const int64_t* rows) {
  std::vector<Rows> result;
  for (; count > 0; --count, rows += kMatrixColumns) {
    result.push_back({pointer<void>(rows[0]), Type(rows[1]), rows[2], rows[3], rows[4], rows[5]});
  }
  return result;
}

}  // namespace

extern "C" {

void set_device(int multiprocessors, unsigned shuffle_seed) {
  emulation::multiprocessors = multiprocessors;
  emulation::shuffle_seed = shuffle_seed;
}

int take_launches() {
  const int launches = emulation::launches;
  emulation::launches = 0;
  return launches;
}

int64_t importance_update_workspace(int64_t count, const int64_t* rows, int64_t scores_type) {
  return cuda::importance_update_workspace(
      importance(count, rows, 0, 0, scores_type, 0, 0, 0.0, 0.0));
}

int importance_update(int64_t count, const int64_t* rows, int64_t total_rank, int64_t scores,
                      int64_t scores_type, int64_t skipped, int64_t grad_scale, double beta1,
                      double beta2, int64_t workspace) {
  return cuda::importance_update(importance(count, rows, total_rank, scores, scores_type, skipped,
                                            grad_scale, beta1, beta2),
                                 pointer<void>(workspace), nullptr);
}

int64_t orth_reg_workspace(int64_t count, const int64_t* rows, int64_t type) {
  return cuda::orth_reg_workspace({matrices(count, rows), Type(type), nullptr, nullptr});
}

int orth_reg(int64_t count, const int64_t* rows, int64_t type, int64_t norms, int64_t residuals,
             int64_t workspace) {
  return cuda::orth_reg({matrices(count, rows), Type(type), pointer<void>(norms),
                         pointer<void>(residuals)},
                        pointer<void>(workspace), nullptr);
}

int orth_reg_backward(int64_t count, const int64_t* rows, const int64_t* grads, int64_t type,
                      int64_t grad_norms, int64_t norms, int64_t residuals, int64_t accumulate) {
  return cuda::orth_reg_backward(
      {matrices(count, rows), matrices(count, grads), Type(type), pointer<void>(grad_norms),
       pointer<void>(norms), pointer<void>(residuals), accumulate != 0},
      nullptr);
}

int allocate(int64_t count, const int64_t* rows, int64_t total_rank, int64_t scores,
             int64_t scores_type, int64_t budget, int64_t mask) {
  Allocate op = {{},
                 total_rank,
                 pointer<void>(scores),
                 Type(scores_type),
                 pointer<int64_t>(budget),
                 pointer<bool>(mask)};
  for (; count > 0; --count, rows += kTargetColumns) {
    op.targets.push_back({pointer<void>(rows[0]), Type(rows[1]), rows[2], rows[3], rows[4]});
  }
  return cuda::allocate(op, nullptr);
}

}  // extern "C"
