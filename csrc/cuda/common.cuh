// What the kernels share: loads and stores of any type, tables of work that travel in a launch's
// arguments, sums in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../ops.h"

namespace adalora::cuda {

constexpr int kThreads = 256;

// The arguments of a launch may take 32,764 bytes; what stands beside a table needs few of them.
constexpr size_t kTableBytes = 32'764 - 300;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

template <class Integer>
__host__ __device__ constexpr Integer round_up(Integer a, Integer b) {
  return ceil_div(a, b) * b;
}

// Pieces of work over many tensors, numbered through. An Entry is a tensor; its pieces are those
// from `first_task` on.
template <class Entry>
struct Table {
  static constexpr int kCapacity = (kTableBytes - 8) / sizeof(Entry);

  Entry entries[kCapacity];
  int32_t count;
  uint32_t tasks;

  // Which entry `task` belongs to: the last with first_task <= task.
  __device__ int find(uint32_t task) const {
    int low = 0;
    for (int high = count; high - low > 1;) {
      const int middle = (low + high) / 2;
      (entries[middle].first_task <= task ? low : high) = middle;
    }
    return low;
  }
};

// Fills tables and launches each as it gets full. Entries without tasks keep their place.
template <class Entry, class Launch>
class TableWriter {
 public:
  explicit TableWriter(Launch launch) : launch_(launch) {
    static_assert(sizeof(Table<Entry>) <= kTableBytes);
  }

  void add(Entry entry, int64_t tasks) {
    if (table_.count == Table<Entry>::kCapacity) {
      finish();
    }
    entry.first_task = table_.tasks;
    table_.entries[table_.count++] = entry;
    table_.tasks += static_cast<uint32_t>(tasks);
  }

  cudaError_t finish() {
    if (table_.count > 0 && error_ == cudaSuccess) {
      error_ = launch_(table_);
    }
    table_.count = 0;
    table_.tasks = 0;
    return error_;
  }

 private:
  Launch launch_;
  Table<Entry> table_ = {};
  cudaError_t error_ = cudaSuccess;
};

// No device keeps this many blocks resident.
constexpr uint32_t kMostBlocks = 4096;

// As many blocks as there are tasks, but no more than `per_multiprocessor` for each of those. The
// blocks share the tasks, whose results don't depend on who does them.
inline cudaError_t count_blocks(uint32_t tasks, int per_multiprocessor, uint32_t* blocks) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const uint32_t most = static_cast<uint32_t>(multiprocessors * per_multiprocessor);
  *blocks = std::min({tasks, most, kMostBlocks});
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), uint32_t blocks, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) {
    return cudaSuccess;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches a kernel whose first parameter is a table.
template <class Entry, class... Parameters, class... Arguments>
cudaError_t launch_table(void (*kernel)(Parameters...), int per_multiprocessor, cudaStream_t stream,
                         const Table<Entry>& table, const Arguments&... arguments) {
  uint32_t blocks = 0;
  const cudaError_t error = count_blocks(table.tasks, per_multiprocessor, &blocks);
  return error == cudaSuccess ? launch(kernel, blocks, stream, table, arguments...) : error;
}

// V neighbouring entries of any type no wider than Compute, as they are in memory. Loading them is
// one thing and decoding another, so that many loads can be in flight before the first is needed.
template <class Compute, int V>
struct Bits {
  uint32_t word[V * sizeof(Compute) / 4];
};

// How many entries are loaded at once where they lie well. Float64 is rare, and not worth the code.
template <class Compute>
constexpr int kWidth = sizeof(Compute) == 4 ? 4 : 1;

// Streaming says that nobody is going to read the entries again soon.
template <bool kStreaming, class Word>
__device__ Word load_word(const Word* from) {
  return kStreaming ? __ldcs(from) : *from;
}

template <bool kStreaming, int kBytes>
__device__ void load_words(const char* from, uint32_t* word) {
  if constexpr (kBytes >= 16) {
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 quad = load_word<kStreaming>(reinterpret_cast<const uint4*>(from) + i);
      word[4 * i] = quad.x;
      word[4 * i + 1] = quad.y;
      word[4 * i + 2] = quad.z;
      word[4 * i + 3] = quad.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 pair = load_word<kStreaming>(reinterpret_cast<const uint2*>(from));
    word[0] = pair.x;
    word[1] = pair.y;
  } else if constexpr (kBytes == 4) {
    word[0] = load_word<kStreaming>(reinterpret_cast<const unsigned int*>(from));
  } else {
    word[0] = load_word<kStreaming>(reinterpret_cast<const unsigned short*>(from));
  }
}

template <int kBytes>
__device__ void store_words(char* to, const uint32_t* word) {
  if constexpr (kBytes >= 16) {
    for (int i = 0; i < kBytes / 16; ++i) {
      __stcs(reinterpret_cast<uint4*>(to) + i,
             make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]));
    }
  } else if constexpr (kBytes == 8) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
  } else if constexpr (kBytes == 4) {
    __stcs(reinterpret_cast<unsigned int*>(to), word[0]);
  } else {
    __stcs(reinterpret_cast<unsigned short*>(to), static_cast<unsigned short>(word[0]));
  }
}

// Entries index .. index + V - 1 of an array, whose address is aligned to V entries (16 bytes are
// always enough).
template <class Compute, int V, bool kStreaming = true>
__device__ Bits<Compute, V> load(const void* base, Type type, int64_t index) {
  const char* bytes = static_cast<const char*>(base);
  Bits<Compute, V> bits = {};
  if (type == Type::float32) {
    load_words<kStreaming, 4 * V>(bytes + 4 * index, bits.word);
  } else if (sizeof(Compute) == 8 && type == Type::float64) {
    if constexpr (sizeof(Compute) == 8) {
      load_words<kStreaming, 8 * V>(bytes + 8 * index, bits.word);
    }
  } else {
    load_words<kStreaming, 2 * V>(bytes + 2 * index, bits.word);
  }
  return bits;
}

template <class Compute, int V>
__device__ void store(void* base, Type type, int64_t index, const Bits<Compute, V>& bits) {
  char* bytes = static_cast<char*>(base);
  if (type == Type::float32) {
    store_words<4 * V>(bytes + 4 * index, bits.word);
  } else if (sizeof(Compute) == 8 && type == Type::float64) {
    if constexpr (sizeof(Compute) == 8) {
      store_words<8 * V>(bytes + 8 * index, bits.word);
    }
  } else {
    store_words<2 * V>(bytes + 2 * index, bits.word);
  }
}

// Entry `e` of those that were loaded.
template <class Compute, int V>
__device__ Compute decode(const Bits<Compute, V>& bits, Type type, int e) {
  if (type == Type::float32) {
    return c10::bit_cast<float>(bits.word[e]);
  }
  if constexpr (sizeof(Compute) == 8) {
    if (type == Type::float64) {
      return c10::bit_cast<double>(static_cast<uint64_t>(bits.word[2 * e + 1]) << 32 |
                                   bits.word[2 * e]);
    }
  }
  const uint16_t half = static_cast<uint16_t>(bits.word[e / 2] >> 16 * (e % 2));
  return type == Type::bfloat16
             ? static_cast<float>(c10::BFloat16(half, c10::BFloat16::from_bits()))
             : static_cast<float>(c10::Half(half, c10::Half::from_bits()));
}

// Sets entry `e`; the words were zero before.
template <class Compute, int V>
__device__ void encode(Bits<Compute, V>& bits, Type type, int e, Compute value) {
  if (type == Type::float32) {
    bits.word[e] = c10::bit_cast<uint32_t>(static_cast<float>(value));
    return;
  }
  if constexpr (sizeof(Compute) == 8) {
    if (type == Type::float64) {
      const uint64_t whole = c10::bit_cast<uint64_t>(value);
      bits.word[2 * e] = static_cast<uint32_t>(whole);
      bits.word[2 * e + 1] = static_cast<uint32_t>(whole >> 32);
      return;
    }
  }
  const float single = static_cast<float>(value);
  const uint32_t half = type == Type::bfloat16 ? c10::BFloat16(single).x : c10::Half(single).x;
  bits.word[e / 2] |= half << 16 * (e % 2);
}

template <class Compute>
__device__ Compute load_entry(const void* base, Type type, int64_t index) {
  return decode(load<Compute, 1>(base, type, index), type, 0);
}

template <class Compute>
__device__ void store_entry(void* base, Type type, int64_t index, Compute value) {
  Bits<Compute, 1> bits = {};
  encode(bits, type, 0, value);
  store(base, type, index, bits);
}

inline bool is_aligned(const void* address, Type type) {
  const int64_t bytes = 4 * size_of(type) < 16 ? 4 * size_of(type) : 16;
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// sink(c, sum) for every column c < columns of `values`, which holds whole rows, `count` entries
// in all. The order of summation depends on count and columns only. All threads of the block call
// it, with `values` (shared) just written, and may write that again at once. `scratch` (shared) is
// for kThreads values, and for nothing else: the next call writes it behind a barrier.
template <class Compute, class Sink>
__device__ void sum_columns(const Compute* values, int count, int columns, Compute* scratch,
                            Sink sink) {
  const int tid = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (columns > kThreads) {
    for (int column = tid; column < columns; column += kThreads) {
      Compute sum = 0;
      for (int i = column; i < count; i += columns) {
        sum += values[i];
      }
      sink(column, sum);
    }
    __syncthreads();
  } else {
    // More groups than this and the second stage takes longer than the first.
    const int groups = kThreads / columns < 32 ? kThreads / columns : 32;
    if (tid < groups * columns) {
      Compute sum = 0;
      for (int i = tid; i < count; i += groups * columns) {
        sum += values[i];
      }
      scratch[tid] = sum;
    }
    __syncthreads();
    if (tid < columns) {
      Compute sum = 0;
      for (int group = 0; group < groups; ++group) {
        sum += scratch[group * columns + tid];
      }
      sink(tid, sum);
    }
  }
}

}  // namespace adalora::cuda
