// Implements adalora::importance_update_ for CPU and CUDA tensors, and adalora::prune_ for CPU
// tensors, on torch's stable ABI: one library for torch 2.11 and later. Python
// (adalora_kernels/ops.py) owns the schemas.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ops.h"
#include "tensors.h"

namespace adalora {
namespace {

using Tensors = std::vector<Owned>;

Type type_of(const Strided& t, const char* name) {
  const Codes& code = codes();
  if (t.dtype == code.float32) return Type::float32;
  if (t.dtype == code.bfloat16) return Type::bfloat16;
  if (t.dtype == code.float16) return Type::float16;
  STD_TORCH_CHECK(t.dtype == code.float64, name, " must be float32, float64, bfloat16 or float16");
  return Type::float64;
}

Type type_of_scores(const Strided& scores, int64_t total_rank) {
  const bool is_double = scores.dtype == codes().float64;
  STD_TORCH_CHECK(scores.numel() == total_rank && scores.is_contiguous() &&
                      (is_double || scores.dtype == codes().float32),
                  "scores must be (", total_rank, ",) in float32 or float64");
  return is_double ? Type::float64 : Type::float32;
}

int64_t* int64_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.dtype == codes().int64, name, " must be one int64");
  return static_cast<int64_t*>(t.data);
}

void check_device(const Strided& t, const char* name, const Strided& like) {
  STD_TORCH_CHECK(t.device_type == like.device_type && t.device_index == like.device_index, name,
                  " must be on the device of all the other tensors");
}

// One of a list. Tensors that are not strided, or on a GPU where others are on a CPU, have other
// dispatch keys, so they never come here; those on another GPU do.
Strided read_on_device(const Owned& t, const char* name, const Strided& like) {
  Strided found;
  bool is_read = read_strided(t.get(), found);
  if (like.device_type != codes().cpu) {
    is_read &= read_device(found);
    check_device(found, name, like);
  }
  STD_TORCH_CHECK(is_read, name, " can't be read");
  return found;
}

// An average of every parameter: one tensor for each, or flat ones (see reference.flat_views).
class Averages {
 public:
  struct Part {
    void* data;
    Type type;
  };

  Averages(const Tensors& list, size_t count, const char* name, const Strided& like)
      : list_(list), name_(name), like_(like), is_flat_(list.size() != count) {
    if (!is_flat_) return;
    STD_TORCH_CHECK(list.size() == 1 || list.size() == 2,
                    "params, grads, exp_avg_ipt and exp_avg_unc must be of one length, or the "
                    "averages flat; got ", count, " params and ", list.size(), " ", name);
    for (const Owned& flat : list) {
      const Strided t = read_on_device(flat, name, like);
      STD_TORCH_CHECK(t.dim == 1 && t.is_contiguous(), name,
                      " must be flat and contiguous, or of the shapes of params");
      flat_.push_back({static_cast<char*>(t.data), type_of(t, name), t.numel(), 0});
    }
    STD_TORCH_CHECK(flat_.size() == 1 || (flat_[0].type == Type::float64) !=
                                             (flat_[1].type == Type::float64),
                    "one of two flat ", name, " must be float64, that of float64 params");
  }

  // That of the next parameter, params[i].
  Part next(size_t i, int64_t rows, int64_t columns, Type weight_type) {
    if (!is_flat_) {
      const Strided t = read_on_device(list_[i], name_, like_);
      STD_TORCH_CHECK(t.is(rows, columns) && t.is_contiguous(), "the averages of params[", i,
                      "] must have its shape and be contiguous");
      return {t.data, type_of(t, name_)};
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

  const Tensors& list_;
  const char* name_;
  const Strided& like_;
  bool is_flat_;
  std::vector<Flat> flat_;
};

// Takes the parameters in turn.
class Parameters {
 public:
  Parameters(const Tensors& params, const Tensors& grads, const Tensors& exp_avg_ipt,
             const Tensors& exp_avg_unc, const Strided& like)
      : params_(params),
        grads_(grads),
        ipt_(exp_avg_ipt, params.size(), "exp_avg_ipt", like),
        unc_(exp_avg_unc, params.size(), "exp_avg_unc", like),
        like_(like) {}

  // The next adapter, whose first triplet has this place in the scores.
  ImportanceUpdate::Adapter next(int64_t first) {
    const Strided A = read_on_device(params_[next_], "params", like_);
    const Strided B = read_on_device(params_[next_ + 2], "params", like_);
    STD_TORCH_CHECK(A.dim == 2 && B.dim == 2, "params must be matrices (lora_A, lora_E, lora_B)");
    ImportanceUpdate::Adapter a{};
    a.r = A.sizes[0];
    a.in = A.sizes[1];
    a.out = B.sizes[0];
    a.first = first;
    a.A = parameter(A, a.r, a.in);
    a.E = parameter(read_on_device(params_[next_], "params", like_), a.r, 1);
    a.B = parameter(B, a.out, a.r);
    return a;
  }

  // To be called after the last one.
  void finish() const {
    ipt_.finish();
    unc_.finish();
  }

 private:
  ImportanceUpdate::Parameter parameter(const Strided& w, int64_t rows, int64_t columns) {
    const size_t i = next_++;
    ImportanceUpdate::Parameter p{};
    STD_TORCH_CHECK(w.is(rows, columns), "params[", i, "] must be ", rows, " x ", columns);
    p.weight_type = type_of(w, "params");
    p.weight = contiguous_data(w);
    if (grads_[i]) {
      const Strided g = read_on_device(grads_[i], "grads", like_);
      STD_TORCH_CHECK(g.is(rows, columns), "grads[", i, "] must have the shape of params");
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
  const void* contiguous_data(const Strided& t) {
    if (t.is_contiguous()) return t.data;
    copies_.push_back(contiguous(t.handle));
    STD_TORCH_CHECK(copies_.back(), "a parameter or gradient can't be copied");
    return read_on_device(copies_.back(), "a copy", like_).data;
  }

  const Tensors &params_, &grads_;
  Averages ipt_, unc_;
  const Strided& like_;
  size_t next_ = 0;
  Tensors copies_;
};

void update_on_cpu(const ImportanceUpdate& op, const Strided&) { cpu::importance_update(op); }

#ifdef ADALORA_WITH_CUDA
void update_on_cuda(const ImportanceUpdate& op, const Strided& like) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch has CUDA tensors but no libtorch_cuda");
  const torch::stable::accelerator::DeviceGuard guard(like.device_index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device_index, &stream));
  // Given back to torch's allocator at once, which hands it out again on this stream only.
  AtenTensorHandle memory = nullptr;
  const int64_t bytes = cuda::importance_update_workspace(op), stride = 1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, codes().uint8,
                                                  like.device_type, like.device_index, &memory));
  const Tensor workspace{Owned(memory)};
  const cudaError_t error =
      cuda::importance_update(op, workspace.data, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// Why this GPU can't run the code of cuda/, which is asked once for each; empty if it can.
const std::string& why_not_on(int32_t device_index) {
  static std::mutex mutex;
  static std::map<int32_t, std::string> answers;
  const std::lock_guard lock(mutex);
  const auto found = answers.find(device_index);
  if (found != answers.end()) return found->second;
  std::string& answer = answers[device_index];
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    answer = "this torch has no CUDA";
    return answer;
  }
  try {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    answer = cuda::why_not();
  } catch (const std::exception& error) {
    answer = error.what();
  }
  return answer;
}
#endif

template <void (*update)(const ImportanceUpdate&, const Strided& like)>
void importance_update_(StableIValue* stack, uint64_t, uint64_t) {
  Stack next(stack);
  const Tensors params = next.tensors(), grads = next.optionals(), exp_avg_ipt = next.tensors(),
                exp_avg_unc = next.tensors();
  const Tensor scores(next.tensor()), skipped(next.tensor());
  ImportanceUpdate op{};
  op.beta1 = next.number();
  op.beta2 = next.number();
  const Tensor grad_scale(next.optional());

  const size_t count = params.size();
  STD_TORCH_CHECK(count % 3 == 0, "params must be (A, E, B) of each adapter, got ", count);
  STD_TORCH_CHECK(grads.size() == count,
                  "params, grads, exp_avg_ipt and exp_avg_unc must be of one length");
  check_device(skipped, "skipped", scores);
  Parameters parameters(params, grads, exp_avg_ipt, exp_avg_unc, scores);
  op.adapters.reserve(count / 3);
  for (size_t i = 0; i < count; i += 3) {
    op.adapters.push_back(parameters.next(op.total_rank));
    op.total_rank += op.adapters.back().r;
  }
  parameters.finish();
  op.scores = scores.data;
  op.scores_type = type_of_scores(scores, op.total_rank);
  op.skipped = int64_of(skipped, "skipped");
  if (grad_scale.handle != nullptr) {
    check_device(grad_scale, "grad_scale", scores);
    STD_TORCH_CHECK(grad_scale.numel() == 1 && grad_scale.dtype == codes().float32,
                    "grad_scale must be one float32");
    op.grad_scale = static_cast<const float*>(grad_scale.data);
  }
  update(op, scores);
}

#ifdef ADALORA_WITH_CUDA
// On a GPU that can't run it, PyTorch does what it would do without this library.
void importance_update_on_cuda(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  constexpr int scores = 4;
  int32_t device_index = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(
      stable::to<AtenTensorHandle>(stack[scores]), &device_index));
  if (why_not_on(device_index).empty()) {
    importance_update_<update_on_cuda>(stack, inputs, outputs);
  } else {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("adalora::importance_update_plain_", "", stack,
                                                 TORCH_ABI_VERSION));
  }
}
#endif

bool* flags_of(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous() && t.dtype == codes().boolean, name,
                  " must be (", count, ",) in bool");
  return static_cast<bool*>(t.data);
}

void prune_(StableIValue* stack, uint64_t, uint64_t) {
  Stack next(stack);
  const Tensor scores(next.tensor()), budget(next.tensor()), prunes(next.tensor()),
      in_play(next.tensor()), kept_at_0(next.optional()), mask(next.tensor());
  const Tensors lora_E = next.tensors();
  Prune op{};
  op.again = next.flag();
  op.factors.reserve(lora_E.size());
  for (size_t i = 0; i < lora_E.size(); ++i) {
    const Strided E = read_on_device(lora_E[i], "lora_E", scores);
    STD_TORCH_CHECK(E.dim == 2 && E.sizes[1] == 1, "lora_E[", i, "] must be r x 1");
    op.factors.push_back({E.data, type_of(E, "lora_E"), E.sizes[0], E.strides[0]});
    op.total_rank += E.sizes[0];
  }
  op.scores = scores.data;
  op.scores_type = type_of_scores(scores, op.total_rank);
  op.budget = *int64_of(budget, "budget");
  op.prunes = *flags_of(prunes, 1, "prunes");
  op.in_play = flags_of(in_play, op.total_rank, "in_play");
  if (kept_at_0.handle != nullptr)
    op.kept_at_0 = flags_of(kept_at_0, op.total_rank, "kept_at_0");
  op.mask = flags_of(mask, op.total_rank, "mask");
  cpu::prune(op);
}

}  // namespace
}  // namespace adalora

STABLE_TORCH_LIBRARY_IMPL(adalora, CPU, m) {
  m.impl("importance_update_", &adalora::importance_update_<adalora::update_on_cpu>);
  m.impl("prune_", &adalora::prune_);
}
#ifdef ADALORA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(adalora, CUDA, m) {
  m.impl("importance_update_", &adalora::importance_update_on_cuda);
}
extern "C" __attribute__((visibility("default"))) const char* adalora_why_not_on_gpu(int32_t index) {
  return adalora::why_not_on(index).c_str();
}
#endif

// What this library holds, for adalora_kernels/_extension.py.
extern "C" __attribute__((visibility("default"))) const char* adalora_built_for() {
  return ADALORA_BUILT_FOR;
}
