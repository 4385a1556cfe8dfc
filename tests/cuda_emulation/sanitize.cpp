// Every kernel once, on arrays that are exactly as large as they have to be: for the sanitizers.
#include <memory>

#include "../../csrc/cuda/ops.h"

namespace {

using namespace adalora;

class Arrays {
 public:
  void* make(Type type, int64_t count) {
    const int64_t bytes = count * size_of(type);
    arrays_.emplace_back(new char[bytes]);
    char* data = arrays_.back().get();
    for (int64_t i = 0; i < bytes; ++i) {
      // Numbers of moderate size in any of the types: no byte has all bits of an exponent.
      data[i] = static_cast<char>(i % 2 == 0 ? i * 37 % 251 : 0x3C + i % 3);
    }
    return data;
  }

  void* make_bytes(int64_t bytes) {
    arrays_.emplace_back(new char[bytes]);
    return arrays_.back().get();
  }

 private:
  std::vector<std::unique_ptr<char[]>> arrays_;
};

struct Sizes {
  int64_t r, in, out;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    emulation::fail("an op returned an error");
  }
}

void run_importance(const std::vector<Sizes>& model, Type type, Type state_type, bool gate_shut) {
  Arrays arrays;
  ImportanceUpdate op = {};
  op.scores_type = Type::float32;
  op.beta1 = op.beta2 = 0.85;
  auto parameter = [&](int64_t numel) -> ImportanceUpdate::Parameter {
    return {arrays.make(type, numel),       arrays.make(type, numel),
            arrays.make(state_type, numel), arrays.make(state_type, numel),
            type,                           type,
            state_type};
  };
  for (const Sizes& s : model) {
    op.adapters.push_back({parameter(s.r * s.in), parameter(s.r), parameter(s.out * s.r), s.r,
                           s.in, s.out, op.total_rank});
    op.total_rank += s.r;
  }
  if (gate_shut) {
    auto* bits = static_cast<uint16_t*>(const_cast<void*>(op.adapters.back().B.grad));
    bits[0] = bits[1] = 0x7FFF;
  }
  int64_t skipped = 0;
  op.skipped = &skipped;
  op.scores = arrays.make(Type::float32, op.total_rank);
  void* workspace = arrays.make_bytes(cuda::importance_update_workspace(op));
  check(cuda::importance_update(op, workspace, nullptr));
  if (skipped != gate_shut) {
    emulation::fail("wrong count of skipped steps");
  }
}

void run_orth_reg(const std::vector<Sizes>& model, Type type) {
  Arrays arrays;
  OrthReg op = {{}, Type::float32, nullptr, nullptr};
  OrthRegBackward backward = {{}, {}, Type::float32, nullptr, nullptr, nullptr, false};
  int64_t entries = 0;
  for (const Sizes& s : model) {
    op.matrices.push_back({arrays.make(type, s.r * s.in), type, s.r, s.in, s.in, 1});
    op.matrices.push_back({arrays.make(type, s.r * s.out), type, s.r, s.out, 1, s.r});
    backward.grads.push_back({arrays.make(type, s.r * s.in), type, s.r, s.in, s.in, 1});
    backward.grads.push_back({arrays.make(type, s.r * s.out), type, s.r, s.out, 1, s.r});
    entries += 2 * s.r * s.r;
  }
  const auto count = static_cast<int64_t>(op.matrices.size());
  op.norms = arrays.make(Type::float32, count);
  op.residuals = arrays.make(Type::float32, entries);
  check(cuda::orth_reg(op, arrays.make_bytes(cuda::orth_reg_workspace(op)), nullptr));
  backward.matrices = op.matrices;
  backward.norms = op.norms;
  backward.residuals = op.residuals;
  backward.grad_norms = arrays.make(Type::float32, count);
  for (const bool accumulate : {false, true}) {
    backward.accumulate = accumulate;
    check(cuda::orth_reg_backward(backward, nullptr));
  }
}

void run_allocate(const std::vector<Sizes>& model) {
  Arrays arrays;
  Allocate op = {{}, 0, nullptr, Type::float32, nullptr, nullptr};
  for (const Sizes& s : model) {
    op.targets.push_back({arrays.make(Type::float16, s.r), Type::float16, s.r, 1, op.total_rank});
    op.total_rank += s.r;
  }
  const int64_t budget = op.total_rank / 2;
  op.budget = &budget;
  op.scores = arrays.make(Type::float32, op.total_rank);
  op.mask = static_cast<bool*>(arrays.make_bytes(op.total_rank));
  check(cuda::allocate(op, nullptr));
}

}  // namespace

int main() {
  emulation::multiprocessors = 1;
  std::vector<Sizes> model = {{12, 24, 30}, {0, 4, 4}, {3, 7, 9}};
  run_importance(model, Type::float32, Type::float32, false);
  run_importance(model, Type::bfloat16, Type::bfloat16, false);
  run_importance(model, Type::float32, Type::float32, true);
  model.push_back({70, 12, 9});  // more than a tile
  run_orth_reg(model, Type::float32);
  run_orth_reg(model, Type::float16);
  run_allocate(model);
}
