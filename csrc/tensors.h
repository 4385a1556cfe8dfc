// Tensors of torch by its C interface. torch::stable::Tensor takes another allocation, and a count
// of references, for each of what may be a thousand tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

// Of libtorch_cuda. Weak, so that a torch without CUDA can load this library, too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace adalora {

namespace stable = torch::stable::detail;

// Owns one tensor, or none.
class Owned {
 public:
  Owned() = default;
  explicit Owned(AtenTensorHandle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(other.release()) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// What torch calls the types that are used here.
struct Codes {
  int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  int32_t strided = aoti_torch_layout_strided();
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t boolean = aoti_torch_dtype_bool(), uint8 = aoti_torch_dtype_uint8();

  // What Triton's kernels take.
  bool is_floating(int32_t dtype) const {
    return dtype == float32 || dtype == bfloat16 || dtype == float16;
  }
  // torch.promote_types of two that are floating.
  int32_t promoted(int32_t a, int32_t b) const { return a == b ? a : float32; }
};

inline const Codes& codes() {
  static const Codes codes;
  return codes;
}

// What there is to know of a strided tensor, borrowed from it. Without one, data is null.
struct Strided {
  AtenTensorHandle handle = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  void* data = nullptr;
  int32_t dtype = -1, device_type = -1, device_index = -1;

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim; i++) count *= sizes[i];
    return count;
  }
  bool is(int64_t size) const { return dim == 1 && sizes[0] == size; }
  bool is(int64_t rows, int64_t columns) const {
    return dim == 2 && sizes[0] == rows && sizes[1] == columns;
  }
  // Whether it is (..., columns) with the leading dimensions of `other`.
  bool is_beside(const Strided& other, int64_t columns) const {
    return dim == other.dim && dim > 0 && std::equal(sizes, sizes + dim - 1, other.sizes) &&
           sizes[dim - 1] == columns;
  }
  // As Triton's kernels are compiled for, or else for any address.
  bool is_aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  bool is_contiguous() const {
    int64_t stride = 1;
    bool holds = true;
    for (int64_t i = dim - 1; i >= 0; stride *= sizes[i--]) {
      holds &= sizes[i] == 1 || strides[i] == stride;
    }
    return holds || stride == 0;
  }
  // The strides of its reshape to (rows, sizes[dim - 1]), or false where that copies. It has
  // entries and dimensions.
  bool row_strides(int64_t (&of_rows)[2]) const {
    of_rows[1] = strides[dim - 1];
    of_rows[0] = sizes[dim - 1] * strides[dim - 1];
    int64_t expected = 0;
    bool first = true;
    for (int64_t i = dim - 2; i >= 0; i--) {
      if (sizes[i] == 1) continue;
      if (first) of_rows[0] = expected = strides[i];
      if (strides[i] != expected) return false;
      expected *= sizes[i];
      first = false;
    }
    return true;
  }
};

// Reads all of a strided tensor but its device, each question to torch taking its time.
inline bool read_strided(AtenTensorHandle t, Strided& to) {
  to.handle = t;
  int64_t *sizes = nullptr, *strides = nullptr;
  const bool failed = aoti_torch_get_dim(t, &to.dim) || aoti_torch_get_sizes(t, &sizes) ||
                      aoti_torch_get_strides(t, &strides) || aoti_torch_get_dtype(t, &to.dtype) ||
                      aoti_torch_get_data_ptr(t, &to.data);
  to.sizes = sizes;
  to.strides = strides;
  return !failed;
}
inline bool read_device(Strided& of) {
  return !aoti_torch_get_device_type(of.handle, &of.device_type) &&
         !aoti_torch_get_device_index(of.handle, &of.device_index);
}

// False for what is not strided, for instance sparse: that has no dtype and no dimensions here.
inline bool read(AtenTensorHandle t, Strided& to) {
  to.handle = t;
  if (t == nullptr) return true;
  int32_t layout = -1;
  if (aoti_torch_get_layout(t, &layout) || layout != codes().strided) return false;
  return read_strided(t, to) && read_device(to);
}

// An op of torch's, whose arguments are on the stack and whose result is left there. False where it
// raises; the caller then takes the long way, on which Python sees the error.
inline bool call(const char* op, const char* overload, StableIValue* stack) {
  return torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION) == 0;
}

// Values of such a stack, which owns the tensors in them.
inline StableIValue optional_value(AtenTensorHandle t) {
  return t == nullptr ? stable::from(std::nullopt) : stable::from(std::make_optional(t));
}
inline AtenTensorHandle again(AtenTensorHandle t) {
  AtenTensorHandle handle = nullptr;
  if (t != nullptr) TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t, &handle));
  return handle;
}
inline StableIValue argument(AtenTensorHandle t) { return stable::from(again(t)); }
inline StableIValue optional_argument(AtenTensorHandle t) { return optional_value(again(t)); }

// A contiguous tensor that holds the same, maybe the same one; none where torch raises.
inline Owned contiguous(AtenTensorHandle t) {
  StableIValue stack[] = {argument(t),
                          stable::from(aoti_torch_memory_format_contiguous_format())};
  if (!call("aten::contiguous", "", stack)) return Owned();
  return Owned(stable::to<AtenTensorHandle>(stack[0]));
}

// A copy; none where torch raises.
inline Owned copy(AtenTensorHandle t) {
  StableIValue stack[] = {argument(t), stable::from(std::nullopt)};
  if (!call("aten::clone", "", stack)) return Owned();
  return Owned(stable::to<AtenTensorHandle>(stack[0]));
}

// A tensor that is owned, with what there is to know of it.
struct Tensor : Strided {
  Owned owned;

  explicit Tensor(Owned t) : owned(std::move(t)) { read(owned.get(), *this); }
};

// Reads the arguments of an op from the stack, all of which it owns then.
class Stack {
 public:
  explicit Stack(StableIValue* next) : next_(next) {}
  Owned tensor() { return tensor_of(*next_++); }
  Owned optional() { return optional_of(*next_++); }
  double number() { return stable::to<double>(*next_++); }
  bool flag() { return stable::to<bool>(*next_++); }
  std::vector<Owned> tensors() { return list(tensor_of); }
  std::vector<Owned> optionals() { return list(optional_of); }

 private:
  static Owned tensor_of(StableIValue value) {
    return Owned(stable::to<AtenTensorHandle>(value));
  }
  static Owned optional_of(StableIValue value) {
    return Owned(stable::to<std::optional<AtenTensorHandle>>(value).value_or(nullptr));
  }
  // Torch moves the tensors out of a list, and so gives each only once.
  std::vector<Owned> list(Owned (*item_of)(StableIValue)) {
    const std::unique_ptr<StableListOpaque, decltype(&torch_delete_list)> list(
        stable::to<StableListHandle>(*next_++), torch_delete_list);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
    std::vector<Owned> tensors;
    tensors.reserve(size);
    for (size_t i = 0; i < size; i++) {
      StableIValue item = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), i, &item));
      tensors.push_back(item_of(item));
    }
    return tensors;
  }

  StableIValue* next_;
};

}  // namespace adalora
