// Implements adalora::importance_update_ for CPU and CUDA tensors, on torch's stable ABI: one library
// for torch 2.11 and later. Python (adalora_kernels/ops.py) owns the schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "ops.h"
#ifdef ADALORA_WITH_CUDA

// Of libtorch_cuda. Weak, so that a torch without CUDA can load this library, too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));
#endif

namespace adalora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<std::optional<Tensor>>;

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::Double:
      return Type::float64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

Type type_of_scores(const Tensor& scores, int64_t total_rank) {
  const Type type = type_of(scores, "scores");
  STD_TORCH_CHECK(scores.numel() == total_rank && scores.is_contiguous() &&
                      (type == Type::float32 || type == Type::float64),
                  "scores must be (", total_rank, ",) in float32 or float64");
  return type;
}

bool has_shape(const Tensor& t, int64_t rows, int64_t columns) {
  const auto sizes = t.sizes();
  return sizes.size() == 2 && sizes[0] == rows && sizes[1] == columns;
}

// Contiguous, either as it is or as a copy that `copies` keeps.
const void* contiguous_data(const Tensor& t, Tensors& copies) {
  if (t.is_contiguous()) return t.data_ptr();
  copies.push_back(torch::stable::contiguous(t));
  return copies.back().data_ptr();
}

// Carries out the op on the device of a tensor.
struct Cpu {
  // With a CUDA tensor among its arguments, the op would have been dispatched elsewhere.
  static constexpr bool mixes = false;

  explicit Cpu(const Tensor&) {}
  void operator()(const ImportanceUpdate& op) const { cpu::importance_update(op); }
};

#ifdef ADALORA_WITH_CUDA
class Cuda {
 public:
  static constexpr bool mixes = true;

  explicit Cuda(const Tensor& t) : like_(t), guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this torch has CUDA tensors but no libtorch_cuda");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  void operator()(const ImportanceUpdate& op) const {
    const Tensor workspace = bytes(cuda::importance_update_workspace(op));
    check(cuda::importance_update(op, workspace.data_ptr(), stream_));
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
  }
  // Given back to torch's allocator at once, which hands it out again on this stream only.
  Tensor bytes(int64_t count) const {
    return torch::stable::new_empty(like_, {count}, ScalarType::Byte);
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

template <class Device>
void check_device(const Tensor& t, const Tensor& like, const char* name) {
  if constexpr (!Device::mixes) return;
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  name, " must be on the device of all the other tensors");
}

template <class Device>
void importance_update_(Tensors params, MaybeTensors grads, Tensors exp_avg_ipt,
                        Tensors exp_avg_unc, Tensor scores, Tensor skipped, double beta1,
                        double beta2, std::optional<Tensor> grad_scale) {
  const size_t count = params.size();
  STD_TORCH_CHECK(count % 3 == 0, "params must be (A, E, B) of each adapter, got ", count);
  STD_TORCH_CHECK(
      grads.size() == count && exp_avg_ipt.size() == count && exp_avg_unc.size() == count,
      "params, grads, exp_avg_ipt and exp_avg_unc must be of one length");
  Tensors copies;
  auto parameter = [&](size_t i, int64_t rows, int64_t columns) {
    const Tensor &w = params[i], &ipt = exp_avg_ipt[i], &unc = exp_avg_unc[i];
    ImportanceUpdate::Parameter p{};
    STD_TORCH_CHECK(has_shape(w, rows, columns), "params[", i, "] must be ", rows, " x ", columns);
    for (const Tensor* average : {&ipt, &unc}) {
      STD_TORCH_CHECK(has_shape(*average, rows, columns) && average->is_contiguous(),
                      "the averages of params[", i, "] must have its shape and be contiguous");
      check_device<Device>(*average, scores, "exp_avg_ipt and exp_avg_unc");
    }
    check_device<Device>(w, scores, "params");
    p.weight = contiguous_data(w, copies);
    p.weight_type = type_of(w, "params");
    if (grads[i].has_value()) {
      const Tensor& g = *grads[i];
      STD_TORCH_CHECK(has_shape(g, rows, columns), "grads[", i, "] must have the shape of params");
      check_device<Device>(g, scores, "grads");
      p.grad = contiguous_data(g, copies);
      p.grad_type = type_of(g, "grads");
    }
    p.exp_avg_ipt = ipt.data_ptr();
    p.exp_avg_unc = unc.data_ptr();
    p.state_type = type_of(ipt, "exp_avg_ipt");
    STD_TORCH_CHECK(type_of(unc, "exp_avg_unc") == p.state_type && p.state_type != Type::float16,
                    "exp_avg_ipt and exp_avg_unc must be float32, float64 or bfloat16, both alike");
    return p;
  };
  ImportanceUpdate op{};
  op.adapters.reserve(count / 3);
  copies.reserve(2 * count);
  for (size_t i = 0; i < count; i += 3) {
    STD_TORCH_CHECK(params[i].dim() == 2 && params[i + 2].dim() == 2,
                    "params must be matrices (lora_A, lora_E, lora_B)");
    ImportanceUpdate::Adapter a{};
    a.r = params[i].size(0);
    a.in = params[i].size(1);
    a.out = params[i + 2].size(0);
    a.first = op.total_rank;
    a.A = parameter(i, a.r, a.in);
    a.E = parameter(i + 1, a.r, 1);
    a.B = parameter(i + 2, a.out, a.r);
    op.total_rank += a.r;
    op.adapters.push_back(a);
  }
  op.scores = scores.data_ptr();
  op.scores_type = type_of_scores(scores, op.total_rank);
  STD_TORCH_CHECK(skipped.numel() == 1 && skipped.scalar_type() == ScalarType::Long,
                  "skipped must be one int64");
  check_device<Device>(skipped, scores, "skipped");
  op.skipped = static_cast<int64_t*>(skipped.data_ptr());
  if (grad_scale.has_value()) {
    STD_TORCH_CHECK(grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Float,
                    "grad_scale must be one float32");
    check_device<Device>(*grad_scale, scores, "grad_scale");
    op.grad_scale = static_cast<const float*>(grad_scale->data_ptr());
  }
  op.beta1 = beta1;
  op.beta2 = beta2;
  Device{scores}(op);
}

}  // namespace
}  // namespace adalora

STABLE_TORCH_LIBRARY_IMPL(adalora, CPU, m) {
  m.impl("importance_update_", TORCH_BOX(&adalora::importance_update_<adalora::Cpu>));
}
#ifdef ADALORA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adalora, CUDA, m) {
  m.impl("importance_update_", TORCH_BOX(&adalora::importance_update_<adalora::Cuda>));
}
#endif

// What this library holds, for adalora_kernels/_extension.py.
extern "C" __attribute__((visibility("default"))) const char* adalora_built_for() {
  return ADALORA_BUILT_FOR;
}
