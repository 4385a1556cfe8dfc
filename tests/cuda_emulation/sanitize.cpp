// Every kernel once, on arrays that are exactly as large as they have to be: for the sanitizers.
#include <memory>

#include "../../csrc/ops.h"

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

}  // namespace

int main() {
  emulation::multiprocessors = 1;
  const std::vector<Sizes> model = {{12, 24, 30}, {0, 4, 4}, {3, 7, 9}};
  run_importance(model, Type::float32, Type::float32, false);
  run_importance(model, Type::bfloat16, Type::bfloat16, false);
  run_importance(model, Type::float32, Type::float32, true);
}
