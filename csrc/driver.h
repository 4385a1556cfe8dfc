// The few functions of CUDA's driver that a launch needs. The library is opened when it is first
// needed, so nothing of CUDA has to be there to build or to load this.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace adalora {

class Driver {
 public:
  // Null if there is none.
  static const Driver* get() {
    static const Driver driver;
    return driver.library_ == nullptr ? nullptr : &driver;
  }

  // CPU tensors count as tensors of this device where a driver for tests says so, else it is null.
  const int* fake_device;

  // The calling thread gets the context that torch uses for this device, if it has none.
  void ensure_context(int32_t device_index) const {
    void* context = nullptr;
    check(get_context_(&context), "cuCtxGetCurrent");
    if (context != nullptr) return;
    int device = 0;
    check(get_device_(&device, device_index), "cuDeviceGet");
    check(retain_context_(&context, device), "cuDevicePrimaryCtxRetain");
    check(set_context_(context), "cuCtxSetCurrent");
  }

  // An `early` launch may begin before the one in front of it in the stream has ended, for which its
  // kernel waits itself (programmatic dependent launch).
  void launch(void* function, const uint32_t (&grid)[3], uint32_t threads, uint32_t shared,
              bool early, void* stream, void** parameters) const {
    Attribute attribute{};
    attribute.id = Attribute::programmatic_stream_serialization;
    attribute.value = 1;
    const Config config{{grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared, stream,
                        early ? &attribute : nullptr, early};
    check(launch_(&config, function, parameters, nullptr), "cuLaunchKernelEx");
  }

  // The map of a matrix of rows, which `to` gets as 128 bytes, aligned to 64.
  void encode(void* to, int type, int64_t element_bytes, void* address, const uint64_t (&sizes)[2],
              uint64_t row_bytes, const uint32_t (&block)[2], int swizzle, int fill) const {
    if (encode_ == nullptr) {
      throw std::runtime_error("this CUDA driver has no cuTensorMapEncodeTiled; it is too old");
    }
    // The second is not read, as the last dimension has none.
    const uint64_t strides[2] = {row_bytes, row_bytes * sizes[1]};
    const uint32_t ones[2] = {1, 1};
    constexpr int no_interleave = 0, promote_to_128_bytes = 2;
    check(encode_(to, type, 2, address, sizes, strides, block, ones, no_interleave, swizzle,
                  promote_to_128_bytes, fill),
          "cuTensorMapEncodeTiled");
    // Drivers up to 13.1 set a bit that is wrong for matrices of less than 128 KB. CUTLASS and
    // Triton clear it.
    const uint64_t last = (sizes[0] - 1) * element_bytes + (sizes[1] - 1) * row_bytes;
    if (version_ <= 13010 && last + 1 < 128 * 1024) {
      static_cast<uint64_t*>(to)[1] &= ~(uint64_t{1} << 21);
    }
  }

  // While there is one, its thread may load code although a graph is being captured, of which
  // loading is no part.
  class MayLoad {
   public:
    explicit MayLoad(const Driver& driver) : driver_(driver) { driver_.exchange_mode_(&mode_); }
    ~MayLoad() { driver_.exchange_mode_(&mode_); }
    MayLoad(const MayLoad&) = delete;
    MayLoad& operator=(const MayLoad&) = delete;

   private:
    const Driver& driver_;
    int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
  };

 private:
  // As cuda.h has them: CUlaunchAttribute, whose value is a union of 64 bytes, and CUlaunchConfig.
  struct Attribute {
    static constexpr int programmatic_stream_serialization = 6;
    int id;
    alignas(8) int value;
    char rest[60];
  };
  struct Config {
    uint32_t grid[3], block[3], shared;
    void* stream;
    Attribute* attributes;
    uint32_t attribute_count;
  };
  static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56);

  Driver() {
    library_ = dlopen("libcuda.so.1", RTLD_NOW);
    if (library_ == nullptr) return;
    find(get_error_, "cuGetErrorString");
    find(get_context_, "cuCtxGetCurrent");
    find(set_context_, "cuCtxSetCurrent");
    find(get_device_, "cuDeviceGet");
    find(retain_context_, "cuDevicePrimaryCtxRetain");
    find(launch_, "cuLaunchKernelEx");
    find(exchange_mode_, "cuThreadExchangeStreamCaptureMode");
    find(encode_, "cuTensorMapEncodeTiled");
    find(fake_device, "adalora_fake_device");
    int (*get_version)(int*) = nullptr;
    find(get_version, "cuDriverGetVersion");
    if (!get_error_ || !get_context_ || !set_context_ || !get_device_ || !retain_context_ ||
        !launch_ || !exchange_mode_ || !get_version || get_version(&version_) != 0) {
      library_ = nullptr;
    }
  }
  template <class Pointer>
  void find(Pointer& pointer, const char* name) {
    pointer = reinterpret_cast<Pointer>(dlsym(library_, name));
  }
  void check(int result, const char* function) const {
    if (result == 0) return;
    const char* text = nullptr;
    if (get_error_(result, &text) != 0 || text == nullptr) text = "unknown error";
    throw std::runtime_error(std::string(function) + " failed: " + text + " (CUDA error " +
                             std::to_string(result) + ")");
  }

  void* library_;
  int version_ = 0;
  int (*get_error_)(int, const char**);
  int (*get_context_)(void**);
  int (*set_context_)(void*);
  int (*get_device_)(int*, int);
  int (*retain_context_)(void**, int);
  int (*launch_)(const Config*, void*, void**, void**);
  int (*exchange_mode_)(int*);
  int (*encode_)(void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
                 const uint32_t*, int, int, int, int);
};

}  // namespace adalora
