// Tensors as the dispatcher hands them over, through torch's C interface.
//
// torch::stable::Tensor takes another allocation, and a count of references, for each of what may
// be a thousand tensors: that took most of an update of small matrices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "ops.h"

namespace adalora {

// A tensor, or none.
class TensorHandle {
 public:
  explicit TensorHandle(AtenTensorHandle handle) : handle_(handle) {}
  TensorHandle(TensorHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  TensorHandle& operator=(TensorHandle&&) = delete;
  ~TensorHandle() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t dim) const { return ask<int64_t*>(aoti_torch_get_sizes)[dim]; }
  int64_t stride(int64_t dim) const { return ask<int64_t*>(aoti_torch_get_strides)[dim]; }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  void* data() const { return ask<void*>(aoti_torch_get_data_ptr); }
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return ask<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return ask<int32_t>(aoti_torch_get_device_index); }

  bool has_shape(int64_t rows, int64_t columns) const {
    if (dim() != 2) return false;
    const int64_t* sizes = ask<int64_t*>(aoti_torch_get_sizes);
    return sizes[0] == rows && sizes[1] == columns;
  }

  bool is_there() const { return handle_ != nullptr; }

  // The same tensor, with all that torch has for it.
  torch::stable::Tensor tensor() const {
    AtenTensorHandle another = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &another));
    return torch::stable::Tensor(another);
  }

 private:
  template <class Answer>
  Answer ask(AOTITorchError (*question)(AtenTensorHandle, Answer*)) const {
    Answer answer{};
    TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }

  AtenTensorHandle handle_;
};

// The tensors of a Tensor[] or Tensor?[] argument, which this takes over, list and all. They live
// as long as it does: torch moves them out of the list, and so gives each only once.
class TensorList {
 public:
  enum class Of { tensors, maybe_tensors };

  TensorList(StableListHandle list, Of items) {
    const std::unique_ptr<StableListOpaque, decltype(&torch_delete_list)> owner(list,
                                                                                torch_delete_list);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    tensors_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      if (items == Of::maybe_tensors) item = unwrapped(item);
      tensors_.emplace_back(as<AtenTensorHandle>(item));
    }
  }

  size_t size() const { return tensors_.size(); }
  const TensorHandle& operator[](size_t i) const { return tensors_[i]; }

 private:
  template <class Pointer>
  static Pointer as(StableIValue value) {
    return reinterpret_cast<Pointer>(static_cast<uintptr_t>(value));
  }
  // What an optional value holds, which torch gives in memory of its own.
  static StableIValue unwrapped(StableIValue value) {
    const std::unique_ptr<StableIValue> inner(as<StableIValue*>(value));
    return inner == nullptr ? 0 : *inner;
  }

  std::vector<TensorHandle> tensors_;
};

// The type of what has this dtype of torch's.
inline std::optional<Type> type_of_dtype(int32_t dtype) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  static const int32_t float16 = aoti_torch_dtype_float16();
  static const int32_t float64 = aoti_torch_dtype_float64();
  if (dtype == float32) return Type::float32;
  if (dtype == bfloat16) return Type::bfloat16;
  if (dtype == float16) return Type::float16;
  if (dtype == float64) return Type::float64;
  return std::nullopt;
}

}  // namespace adalora
