// Implements ops of the namespace `adalora` for CPU and CUDA tensors, on torch's stable ABI: one
// library for torch 2.11 and later. Python (adalora_kernels/ops.py) owns the schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/ops.h"
#include "ops.h"
#ifdef ADALORA_WITH_CUDA
#include "cuda/ops.h"

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

bool is_single_or_double(Type type) { return type == Type::float32 || type == Type::float64; }

Type type_of_scores(const Tensor& scores, int64_t total_rank) {
  const Type type = type_of(scores, "scores");
  STD_TORCH_CHECK(
      scores.numel() == total_rank && scores.is_contiguous() && is_single_or_double(type),
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

// Carries out ops on the device of a tensor.
struct Cpu {
  // With a CUDA tensor among its arguments, the op would have been dispatched elsewhere.
  static constexpr bool mixes = false;

  explicit Cpu(const Tensor&) {}
  void operator()(const ImportanceUpdate& op) const { cpu::importance_update(op); }
  void operator()(const OrthReg& op) const { cpu::orth_reg(op); }
  void operator()(const OrthRegBackward& op) const { cpu::orth_reg_backward(op); }
  void operator()(const Allocate& op) const { cpu::allocate(op); }
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
  void operator()(const OrthReg& op) const {
    const Tensor workspace = bytes(cuda::orth_reg_workspace(op));
    check(cuda::orth_reg(op, workspace.data_ptr(), stream_));
  }
  void operator()(const OrthRegBackward& op) const { check(cuda::orth_reg_backward(op, stream_)); }
  void operator()(const Allocate& op) const { check(cuda::allocate(op, stream_)); }

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

Rows rows_of_A(const Tensor& t) {
  return {t.data_ptr(), type_of(t, "A"), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Rows rows_of_B(const Tensor& t) {
  return {t.data_ptr(), type_of(t, "B"), t.size(1), t.size(0), t.stride(1), t.stride(0)};
}

// lora_A and lora_B of each adapter in turn.
template <class Device>
std::vector<Rows> rows_of(const Tensors& A, const Tensors& B, const Tensor& like) {
  STD_TORCH_CHECK(A.size() == B.size(), "A and B must be of one length");
  std::vector<Rows> rows;
  rows.reserve(2 * A.size());
  for (size_t i = 0; i < A.size(); ++i) {
    STD_TORCH_CHECK(A[i].dim() == 2 && B[i].dim() == 2 && A[i].size(0) == B[i].size(1),
                    "A[", i, "] must be (r, in) and B[", i, "] (out, r)");
    check_device<Device>(A[i], like, "A");
    check_device<Device>(B[i], like, "B");
    rows.push_back(rows_of_A(A[i]));
    rows.push_back(rows_of_B(B[i]));
  }
  return rows;
}

template <class Device>
std::tuple<Tensor, Tensor> orth_reg(Tensors A, Tensors B) {
  STD_TORCH_CHECK(!A.empty(), "A must not be empty");
  OrthReg op{};
  op.matrices = rows_of<Device>(A, B, A[0]);
  op.type = Type::float32;
  int64_t entries = 0;
  for (const Rows& m : op.matrices) {
    if (m.type == Type::float64) op.type = m.type;
    entries += m.r * m.r;
  }
  const auto dtype = op.type == Type::float64 ? ScalarType::Double : ScalarType::Float;
  const auto count = static_cast<int64_t>(op.matrices.size());
  Tensor norms = torch::stable::new_empty(A[0], {count}, dtype);
  Tensor residuals = torch::stable::new_empty(A[0], {entries}, dtype);
  op.norms = norms.data_ptr();
  op.residuals = residuals.data_ptr();
  Device{A[0]}(op);
  return {norms, residuals};
}

template <class Device>
void run_backward(const Tensor& expanded, const Tensor& norms, const Tensor& residuals,
                  const Tensors& A, const Tensors& B, const Tensors& grad_A, const Tensors& grad_B,
                  bool accumulate) {
  OrthRegBackward op{};
  // As autograd makes it, the gradient of a sum is an expanded scalar.
  const Tensor grad_norms = torch::stable::contiguous(expanded);
  op.matrices = rows_of<Device>(A, B, norms);
  op.grads = rows_of<Device>(grad_A, grad_B, norms);
  STD_TORCH_CHECK(op.grads.size() == op.matrices.size(), "there must be a gradient of every matrix");
  int64_t entries = 0;
  for (size_t i = 0; i < op.matrices.size(); ++i) {
    const Rows &m = op.matrices[i], &g = op.grads[i];
    STD_TORCH_CHECK(m.r == g.r && m.length == g.length, "a gradient must have its matrix's shape");
    entries += m.r * m.r;
  }
  op.type = type_of(norms, "norms");
  const auto count = static_cast<int64_t>(op.matrices.size());
  for (const Tensor* t : {&grad_norms, &norms, &residuals}) {
    STD_TORCH_CHECK(t->numel() == (t == &residuals ? entries : count) && t->is_contiguous() &&
                        is_single_or_double(op.type) && type_of(*t, "norms") == op.type,
                    "grad_norms, norms and residuals must be those of orth_reg for these matrices");
    check_device<Device>(*t, norms, "grad_norms and residuals");
  }
  op.grad_norms = grad_norms.data_ptr();
  op.norms = norms.data_ptr();
  op.residuals = residuals.data_ptr();
  op.accumulate = accumulate;
  Device{norms}(op);
}

template <class Device>
std::tuple<Tensors, Tensors> orth_reg_backward(Tensor grad_norms, Tensor norms, Tensor residuals,
                                               Tensors A, Tensors B) {
  Tensors dA, dB;
  for (const Tensor& a : A) dA.push_back(torch::stable::new_empty(a, a.sizes()));
  for (const Tensor& b : B) dB.push_back(torch::stable::new_empty(b, b.sizes()));
  run_backward<Device>(grad_norms, norms, residuals, A, B, dA, dB, false);
  return {dA, dB};
}

template <class Device>
void orth_reg_grad_(Tensor grad_norms, Tensor norms, Tensor residuals, Tensors A, Tensors B,
                    Tensors grad_A, Tensors grad_B) {
  run_backward<Device>(grad_norms, norms, residuals, A, B, grad_A, grad_B, true);
}

template <class Device>
void allocate_(Tensor scores, std::optional<Tensor> budget, Tensor mask, Tensors lora_E) {
  Allocate op{};
  op.targets.reserve(lora_E.size());
  for (const Tensor& E : lora_E) {
    STD_TORCH_CHECK(E.dim() == 2 && E.size(1) == 1, "lora_E must be (r, 1)");
    check_device<Device>(E, scores, "lora_E");
    op.targets.push_back(
        {E.data_ptr(), type_of(E, "lora_E"), E.size(0), E.stride(0), op.total_rank});
    op.total_rank += E.size(0);
  }
  op.scores = scores.data_ptr();
  op.scores_type = type_of_scores(scores, op.total_rank);
  STD_TORCH_CHECK(mask.numel() == op.total_rank && mask.is_contiguous() &&
                      mask.scalar_type() == ScalarType::Bool,
                  "mask must be (", op.total_rank, ",) bool");
  check_device<Device>(mask, scores, "mask");
  op.mask = static_cast<bool*>(mask.data_ptr());
  if (budget.has_value()) {
    STD_TORCH_CHECK(budget->numel() == 1 && budget->scalar_type() == ScalarType::Long,
                    "budget must be one int64");
    check_device<Device>(*budget, scores, "budget");
    op.budget = static_cast<const int64_t*>(budget->data_ptr());
  }
  Device{scores}(op);
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("importance_update_", TORCH_BOX(&importance_update_<Device>));
  m.impl("orth_reg", TORCH_BOX(&orth_reg<Device>));
  m.impl("orth_reg_backward", TORCH_BOX(&orth_reg_backward<Device>));
  m.impl("orth_reg_grad_", TORCH_BOX(&orth_reg_grad_<Device>));
  m.impl("allocate_", TORCH_BOX(&allocate_<Device>));
}

}  // namespace
}  // namespace adalora

STABLE_TORCH_LIBRARY_IMPL(adalora, CPU, m) { adalora::register_ops<adalora::Cpu>(m); }
#ifdef ADALORA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adalora, CUDA, m) { adalora::register_ops<adalora::Cuda>(m); }
#endif

// What this library holds, for adalora_kernels/_extension.py.
extern "C" __attribute__((visibility("default"))) const char* adalora_built_for() {
  return ADALORA_BUILT_FOR;
}
