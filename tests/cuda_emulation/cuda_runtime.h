// As much of CUDA as csrc/cuda uses, on a CPU: g++ finds this in place of the real header. A
// block's threads are fibers that meet at barriers; blocks run one after the other, in any order.
#pragma once

#include <ucontext.h>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
struct cudaFuncAttributes {};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace emulation {

inline int multiprocessors = 2;
inline unsigned shuffle_seed = 0;  // 0: blocks and threads run in order
inline int launches = 0;
inline int driver_version = 13000;
inline bool has_code = true;  // for this device
inline cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated CUDA: %s\n", why);
  std::abort();
}

// Relaxed, so that the thread sanitizer takes reading it for no meeting of threads.
class Index {
 public:
  operator unsigned() const { return value_.load(std::memory_order_relaxed); }
  void operator=(unsigned value) { value_.store(value, std::memory_order_relaxed); }

 private:
  std::atomic<unsigned> value_ = 0;
};

struct Index3 {
  Index x;
};

// To the thread sanitizer, fibers are threads that meet at barriers only.
#ifdef __SANITIZE_THREAD__
inline void* this_fiber() { return __tsan_get_current_fiber(); }
inline void* new_fiber() { return __tsan_create_fiber(0); }
inline void announce_switch(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
inline void before_barrier(void* barrier) { __tsan_release(barrier); }
inline void after_barrier(void* barrier) { __tsan_acquire(barrier); }
#else
inline void* this_fiber() { return nullptr; }
inline void* new_fiber() { return nullptr; }
inline void announce_switch(void*) {}
inline void before_barrier(void*) {}
inline void after_barrier(void*) {}
#endif

// The threads of one block after another. Each runs until it comes to a barrier or to its end, then
// the next one does.
class Block {
 public:
  enum Stop { kStart, kSync, kSyncOr, kEnd };

  static constexpr int kThreads = 256;

  Block() : fiber_(this_fiber()) {
    for (Thread& thread : threads_) {
      thread.stack.reset(new char[kStackBytes]);
      thread.fiber = new_fiber();
    }
  }

  Index3 thread_index, block_index;

  void run(unsigned block, const std::function<void()>& kernel) {
    block_index.x = block;
    kernel_ = &kernel;
    for (Thread& thread : threads_) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
      thread.stop = kStart;
    }
    while (threads_[0].stop != kEnd) {
      any_ = 0;
      before_barrier(&barriers_[pass_ % 2]);
      for (int n = 0; n < kThreads; ++n) {
        const int i = shuffle_seed == 0 ? n : kThreads - 1 - n;
        thread_index.x = i;
        announce_switch(threads_[i].fiber);
        swapcontext(&context_, &threads_[i].context);
      }
      // Two, in turn: who leaves one has nothing to do with who is already at the next.
      pass_ = pass_ + 1;
      after_barrier(&barriers_[pass_ % 2]);
      result_ = any_;
      for (const Thread& thread : threads_) {
        if (thread.stop != threads_[0].stop) {
          fail("the threads of a block are at different barriers");
        }
      }
    }
  }

  int wait(Stop stop, int predicate) {
    Thread& thread = threads_[thread_index.x];
    thread.stop = stop;
    before_barrier(&barriers_[(pass_ + 1) % 2]);
    any_.fetch_or(predicate, std::memory_order_relaxed);
    announce_switch(fiber_);
    swapcontext(&thread.context, &context_);
    after_barrier(&barriers_[pass_ % 2]);
    return result_;
  }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;

  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fiber;
    Stop stop;
  };

  static void enter();

  Thread threads_[kThreads];
  ucontext_t context_;
  void* fiber_;
  const std::function<void()>* kernel_ = nullptr;
  std::atomic<int> any_ = 0;
  int result_ = 0;
  Index pass_;
  char barriers_[2] = {};
};

inline Block block;

inline void Block::enter() {
  after_barrier(&block.barriers_[block.pass_ % 2]);
  (*block.kernel_)();
  block.wait(kEnd, 0);
}

}  // namespace emulation

inline emulation::Index3& threadIdx = emulation::block.thread_index;
inline emulation::Index3& blockIdx = emulation::block.block_index;
inline dim3 gridDim, blockDim;

inline void __syncthreads() { emulation::block.wait(emulation::Block::kSync, 0); }

inline int __syncthreads_or(int predicate) {
  return emulation::block.wait(emulation::Block::kSyncOr, predicate != 0);
}

template <class Word>
Word __ldcs(const Word* from) {
  return *from;
}

template <class Word>
void __stcs(Word* to, Word value) {
  *to = value;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::multiprocessors;
  return cudaSuccess;
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emulation::capture_mode);
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::driver_version;
  return cudaSuccess;
}

// Loads the code, as if a graph were being captured.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  if (emulation::capture_mode != cudaStreamCaptureModeRelaxed) {
    emulation::fail("code is loaded in a capture");
  }
  return emulation::has_code ? cudaSuccess : cudaErrorInvalidValue;
}

inline const char* cudaGetErrorString(cudaError_t) { return "no kernel image is available"; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ...) + 8 * sizeof...(Parameters) <= 32'764);
  if (config->gridDim.x == 0 || config->blockDim.x != emulation::Block::kThreads) {
    return cudaErrorInvalidValue;
  }
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  std::vector<unsigned> blocks(gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (emulation::shuffle_seed != 0) {
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(emulation::shuffle_seed));
  }
  const std::function<void()> call = [&] { kernel(arguments...); };
  for (const unsigned block : blocks) {
    emulation::block.run(block, call);
  }
  ++emulation::launches;
  return cudaSuccess;
}
