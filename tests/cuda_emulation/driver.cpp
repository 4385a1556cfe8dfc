// The op of csrc/cuda for ctypes: one row of integers per adapter.
#include "../../csrc/ops.h"

namespace {

using namespace adalora;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr int kParameterColumns = 7;
constexpr int kAdapterColumns = 3 * kParameterColumns + 4;

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

}  // namespace

extern "C" {

void set_device(int multiprocessors, unsigned shuffle_seed) {
  emulation::multiprocessors = multiprocessors;
  emulation::shuffle_seed = shuffle_seed;
}

// What the code says of a device that has code or not, and of such a driver.
const char* why_not(bool has_code, int driver_version) {
  emulation::has_code = has_code;
  emulation::driver_version = driver_version;
  static std::string answer;
  answer = cuda::why_not();
  return emulation::capture_mode == cudaStreamCaptureModeGlobal ? answer.c_str() : "the mode stays";
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

}  // extern "C"
