// Implements adalora::importance_update_ for CPU and CUDA tensors, and adalora::prune_ for CPU
// tensors, on torch's stable ABI: one library for torch 2.11 and later. Python
// (adalora_kernels/ops.py) owns the schemas.
#include <optional>
#include <vector>

#include "ops.h"
#include "handles.h"
#ifdef ADALORA_WITH_CUDA

// Of libtorch_cuda. Weak, so that a torch without CUDA can load this library, too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));
#endif

namespace adalora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const TensorHandle& t, const char* name) {
  const std::optional<Type> type = type_of_dtype(t.dtype());
  STD_TORCH_CHECK(type.has_value(), name, " must be float32, float64, bfloat16 or float16");
  return *type;
}

Type type_of_scores(const Tensor& scores, int64_t total_rank) {
  const ScalarType type = scores.scalar_type();
  STD_TORCH_CHECK(scores.numel() == total_rank && scores.is_contiguous() &&
                      (type == ScalarType::Float || type == ScalarType::Double),
                  "scores must be (", total_rank, ",) in float32 or float64");
  return type == ScalarType::Double ? Type::float64 : Type::float32;
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

// Checks that everything is on one device.
template <class Device>
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& like)
      : type_(ask(aoti_torch_get_device_type, like)), index_(like.get_device_index()) {}

  void check(const TensorHandle& t, const char* name) const {
    if constexpr (Device::mixes) check(t.device_type(), t.device_index(), name);
  }
  void check(const Tensor& t, const char* name) const {
    if constexpr (Device::mixes)
      check(ask(aoti_torch_get_device_type, t), t.get_device_index(), name);
  }

 private:
  static int32_t ask(AOTITorchError (*question)(AtenTensorHandle, int32_t*), const Tensor& t) {
    int32_t answer = 0;
    TORCH_ERROR_CODE_CHECK(question(t.get(), &answer));
    return answer;
  }
  void check(int32_t type, int32_t index, const char* name) const {
    STD_TORCH_CHECK(type == type_ && index == index_, name,
                    " must be on the device of all the other tensors");
  }

  int32_t type_, index_;
};

// An average of every parameter: one tensor for each, or flat ones (see reference.flat_views).
template <class Device>
class Averages {
 public:
  struct Part {
    void* data;
    Type type;
  };

  Averages(const TensorList& list, size_t count, const char* name, const OnDeviceOf<Device>& device)
      : list_(list), name_(name), device_(device), is_flat_(list.size() != count) {
    if (!is_flat_) return;
    STD_TORCH_CHECK(list_.size() == 1 || list_.size() == 2,
                    "params, grads, exp_avg_ipt and exp_avg_unc must be of one length, or the "
                    "averages flat; got ", count, " params and ", list_.size(), " ", name_);
    for (size_t i = 0; i < list_.size(); ++i) {
      const TensorHandle& t = list_[i];
      device_.check(t, name_);
      STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name_,
                      " must be flat and contiguous, or of the shapes of params");
      flat_.push_back({static_cast<char*>(t.data()), type_of(t, name_), t.numel(), 0});
    }
    STD_TORCH_CHECK(flat_.size() == 1 || (flat_[0].type == Type::float64) !=
                                             (flat_[1].type == Type::float64),
                    "one of two flat ", name_, " must be float64, that of float64 params");
  }

  // That of the next parameter, params[i].
  Part next(size_t i, int64_t rows, int64_t columns, Type weight_type) {
    if (!is_flat_) {
      const TensorHandle& t = list_[i];
      STD_TORCH_CHECK(t.has_shape(rows, columns) && t.is_contiguous(), "the averages of params[", i,
                      "] must have its shape and be contiguous");
      device_.check(t, name_);
      return {t.data(), type_of(t, name_)};
    }
    const bool is_double = weight_type == Type::float64;
    Flat& flat = flat_[flat_.size() == 2 && (flat_[0].type == Type::float64) != is_double];
    char* const data = flat.data + flat.used * size_of(flat.type);
    flat.used += (rows * columns + kFlatUnit - 1) / kFlatUnit * kFlatUnit;
    STD_TORCH_CHECK(flat.used <= flat.numel, name_, " must have entries for all params");
    return {data, flat.type};
  }

  // To be called after the last one.
  void finish() const {
    for (const Flat& flat : flat_)
      STD_TORCH_CHECK(flat.used == flat.numel, name_, " must have entries for params only: has ",
                      flat.numel, ", they take ", flat.used);
  }

 private:
  // A parameter begins at a multiple of so many entries, and so well aligned.
  static constexpr int64_t kFlatUnit = 16;
  struct Flat {
    char* data;
    Type type;
    int64_t numel, used;
  };

  const TensorList& list_;
  const char* name_;
  const OnDeviceOf<Device>& device_;
  bool is_flat_;
  std::vector<Flat> flat_;
};

// Takes the parameters in turn.
template <class Device>
class Parameters {
 public:
  Parameters(const TensorList& params, const TensorList& grads, Averages<Device> exp_avg_ipt,
             Averages<Device> exp_avg_unc, const OnDeviceOf<Device>& device)
      : params_(params), grads_(grads), ipt_(exp_avg_ipt), unc_(exp_avg_unc), device_(device) {}

  // The next adapter, whose first triplet has this place in the scores.
  ImportanceUpdate::Adapter next(int64_t first) {
    const TensorHandle &A = params_[next_], &B = params_[next_ + 2];
    STD_TORCH_CHECK(A.dim() == 2 && B.dim() == 2,
                    "params must be matrices (lora_A, lora_E, lora_B)");
    ImportanceUpdate::Adapter a{};
    a.r = A.size(0);
    a.in = A.size(1);
    a.out = B.size(0);
    a.first = first;
    a.A = parameter(A, a.r, a.in);
    a.E = parameter(params_[next_], a.r, 1);
    a.B = parameter(B, a.out, a.r);
    return a;
  }

  // To be called after the last one.
  void finish() const {
    ipt_.finish();
    unc_.finish();
  }

 private:
  ImportanceUpdate::Parameter parameter(const TensorHandle& w, int64_t rows, int64_t columns) {
    const size_t i = next_++;
    ImportanceUpdate::Parameter p{};
    STD_TORCH_CHECK(w.has_shape(rows, columns), "params[", i, "] must be ", rows, " x ", columns);
    device_.check(w, "params");
    p.weight_type = type_of(w, "params");
    p.weight = contiguous_data(w);
    if (const TensorHandle& g = grads_[i]; g.is_there()) {
      STD_TORCH_CHECK(g.has_shape(rows, columns), "grads[", i, "] must have the shape of params");
      device_.check(g, "grads");
      p.grad_type = type_of(g, "grads");
      p.grad = contiguous_data(g);
    }
    const auto ipt = ipt_.next(i, rows, columns, p.weight_type);
    const auto unc = unc_.next(i, rows, columns, p.weight_type);
    p.exp_avg_ipt = ipt.data;
    p.exp_avg_unc = unc.data;
    p.state_type = ipt.type;
    STD_TORCH_CHECK(unc.type == ipt.type && ipt.type != Type::float16,
                    "exp_avg_ipt and exp_avg_unc must be float32, float64 or bfloat16, both alike");
    return p;
  }

  // Either as it is, or of a copy that is kept as long as this.
  const void* contiguous_data(const TensorHandle& t) {
    if (t.is_contiguous()) return t.data();
    copies_.push_back(torch::stable::contiguous(t.tensor()));
    return copies_.back().data_ptr();
  }

  const TensorList &params_, &grads_;
  Averages<Device> ipt_, unc_;
  const OnDeviceOf<Device>& device_;
  size_t next_ = 0;
  std::vector<Tensor> copies_;
};

template <class Device>
void importance_update_(StableListHandle params_list, StableListHandle grads_list,
                        StableListHandle ipt_list, StableListHandle unc_list, Tensor scores,
                        Tensor skipped, double beta1, double beta2,
                        std::optional<Tensor> grad_scale) {
  using Of = TensorList::Of;
  const TensorList params(params_list, Of::tensors), grads(grads_list, Of::maybe_tensors),
      exp_avg_ipt(ipt_list, Of::tensors), exp_avg_unc(unc_list, Of::tensors);
  const size_t count = params.size();
  STD_TORCH_CHECK(count % 3 == 0, "params must be (A, E, B) of each adapter, got ", count);
  STD_TORCH_CHECK(grads.size() == count,
                  "params, grads, exp_avg_ipt and exp_avg_unc must be of one length");
  const OnDeviceOf<Device> device(scores);
  Parameters<Device> parameters(params, grads, {exp_avg_ipt, count, "exp_avg_ipt", device},
                                {exp_avg_unc, count, "exp_avg_unc", device}, device);
  ImportanceUpdate op{};
  op.adapters.reserve(count / 3);
  for (size_t i = 0; i < count; i += 3) {
    op.adapters.push_back(parameters.next(op.total_rank));
    op.total_rank += op.adapters.back().r;
  }
  parameters.finish();
  op.scores = scores.data_ptr();
  op.scores_type = type_of_scores(scores, op.total_rank);
  STD_TORCH_CHECK(skipped.numel() == 1 && skipped.scalar_type() == ScalarType::Long,
                  "skipped must be one int64");
  device.check(skipped, "skipped");
  op.skipped = static_cast<int64_t*>(skipped.data_ptr());
  if (grad_scale.has_value()) {
    STD_TORCH_CHECK(grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Float,
                    "grad_scale must be one float32");
    device.check(*grad_scale, "grad_scale");
    op.grad_scale = static_cast<const float*>(grad_scale->data_ptr());
  }
  op.beta1 = beta1;
  op.beta2 = beta2;
  Device{scores}(op);
}

template <class T>
T* flags(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous() && t.scalar_type() == type, name,
                  " must be (", count, ",) in ", type == ScalarType::Bool ? "bool" : "int64");
  return static_cast<T*>(t.data_ptr());
}

void prune_(Tensor scores, Tensor budget, Tensor prunes, Tensor in_play,
            std::optional<Tensor> kept_at_0, Tensor mask, StableListHandle list, bool again) {
  const TensorList lora_E(list, TensorList::Of::tensors);
  Prune op{};
  op.factors.reserve(lora_E.size());
  for (size_t i = 0; i < lora_E.size(); ++i) {
    const TensorHandle& E = lora_E[i];
    STD_TORCH_CHECK(E.dim() == 2 && E.size(1) == 1, "lora_E[", i, "] must be r x 1");
    op.factors.push_back({E.data(), type_of(E, "lora_E"), E.size(0), E.stride(0)});
    op.total_rank += E.size(0);
  }
  op.scores = scores.data_ptr();
  op.scores_type = type_of_scores(scores, op.total_rank);
  op.budget = *flags<int64_t>(budget, ScalarType::Long, 1, "budget");
  op.prunes = *flags<bool>(prunes, ScalarType::Bool, 1, "prunes");
  op.again = again;
  op.in_play = flags<bool>(in_play, ScalarType::Bool, op.total_rank, "in_play");
  if (kept_at_0.has_value())
    op.kept_at_0 = flags<bool>(*kept_at_0, ScalarType::Bool, op.total_rank, "kept_at_0");
  op.mask = flags<bool>(mask, ScalarType::Bool, op.total_rank, "mask");
  cpu::prune(op);
}

}  // namespace
}  // namespace adalora

STABLE_TORCH_LIBRARY_IMPL(adalora, CPU, m) {
  m.impl("importance_update_", TORCH_BOX(&adalora::importance_update_<adalora::Cpu>));
  m.impl("prune_", TORCH_BOX(&adalora::prune_));
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
