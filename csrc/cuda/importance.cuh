// The importance averages of a whole model and the scores that follow, in three launches:
// `gate` looks for inf and NaN in the gradients, `update` goes over lora_A and lora_B, and `score`
// adds what update left of their I * U, and does lora_E on the way.
#pragma once

#include <limits>

#include "common.cuh"

namespace adalora::cuda {
namespace {

constexpr int64_t kChunk = 8192;

// Resident blocks of a multiprocessor: as many as registers allow without spilling. Eight loads of
// 16 bytes in flight per thread are then 96 KB, three times what hides the latency of the memory.
constexpr int kGateBlocks = 4;
constexpr int kUpdateBlocks = 3;
constexpr int kDoubleBlocks = 2;
constexpr int kScoreBlocks = 4;

struct Gradient {
  const void* data;
  int64_t numel;
  uint32_t first_task;
  Type type;
  bool vectors;  // whether four entries may be loaded at once
};

// lora_A or lora_B as rows of entries: lora_A has its own, each with one sum of I * U; lora_B is a
// single row of out * r entries, with one sum per column, that is for every r-th entry.
struct Strip {
  const void* weight;
  const void* grad;
  void* exp_avg_ipt;
  void* exp_avg_unc;
  int64_t row_length;
  int64_t partials;  // where the sums of its first chunk go; `period` for each chunk
  int32_t chunk;     // entries of a chunk, a multiple of 4 and of period
  int32_t chunks_per_row;
  uint32_t first_task;
  int32_t period;
  uint8_t weight_type, grad_type, state_type;
  bool vectors;  // whether every chunk starts where four entries may be loaded at once
};

struct Triplets {
  const void* weight;
  const void* grad;
  void* exp_avg_ipt;
  void* exp_avg_unc;
  int64_t in, out;
  int64_t partials_A, partials_B;
  int64_t first;
  int32_t chunks_A, chunks_B;  // of a row of lora_A, and of lora_B
  int32_t r;
  uint32_t first_task;
  Type weight_type, grad_type, state_type;
};

// 224 adapters have to fit into one launch.
static_assert(Table<Gradient>::kCapacity >= 3 * 224);
static_assert(Table<Strip>::kCapacity >= 2 * 224);
static_assert(Table<Triplets>::kCapacity >= 224);

// a + weight * (b - a), from the nearer end as torch does it.
template <class Compute>
struct Lerp {
  Compute factor;
  bool from_b;

  explicit Lerp(double weight)
      : factor(static_cast<Compute>(weight < 0.5 ? weight : weight - 1.0)), from_b(weight >= 0.5) {}

  __device__ Compute operator()(Compute a, Compute b) const {
    return std::fma(factor, b - a, from_b ? b : a);
  }
};

template <class Compute>
struct Step {
  Lerp<Compute> ipt, unc;
  const float* grad_scale;
};

template <class Real>
constexpr Real kLargest = std::numeric_limits<Real>::max();

template <class Compute>
__device__ void step_averages(const Step<Compute>& step, Compute scale, Type state_type,
                              Compute weight, Compute grad, Compute& avg_ipt, Compute& avg_unc) {
  const Compute largest =
      state_type == Type::float64 ? kLargest<Compute> : Compute(kLargest<float>);
  const Compute ipt = std::fabs(weight * grad) * scale;
  // Both comparisons are false for NaN.
  const Compute clean = ipt <= largest ? ipt : ipt > largest ? largest : Compute(0);
  avg_ipt = step.ipt(avg_ipt, clean);
  avg_unc = step.unc(avg_unc, std::fabs(clean - avg_ipt));
}

template <class Compute>
__device__ Compute read_scale(const float* grad_scale) {
  return grad_scale == nullptr ? Compute(1) : static_cast<Compute>(*grad_scale);
}

template <class Compute, int V>
__device__ bool has_non_finite(const Gradient& gradient, int64_t begin, int length) {
  constexpr int kInFlight = 8;
  const int vectors = length / V;
  bool found = false;
  for (int start = static_cast<int>(threadIdx.x); start < vectors; start += kInFlight * kThreads) {
    Bits<Compute, V> bits[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int vector = start + i * kThreads;
      if (vector < vectors) {
        bits[i] = load<Compute, V, false>(gradient.data, gradient.type, begin + vector * V);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const Compute value = decode(bits[i], gradient.type, e);
        found |= !(std::fabs(value) <= kLargest<Compute>);
      }
    }
  }
  return found;
}

// flags[blockIdx.x] = whether this block saw a gradient, or the scale, that is not finite.
template <class Compute>
__global__ void __launch_bounds__(kThreads, sizeof(Compute) == 4 ? kGateBlocks : kDoubleBlocks)
    gate(__grid_constant__ const Table<Gradient> table, const float* grad_scale, int32_t* flags) {
  bool found = false;
  for (uint32_t task = blockIdx.x; task < table.tasks; task += gridDim.x) {
    const Gradient& gradient = table.entries[table.find(task)];
    const int64_t begin = (task - gradient.first_task) * kChunk;
    const int64_t rest = gradient.numel - begin;
    const int length = static_cast<int>(rest < kChunk ? rest : kChunk);
    found |= gradient.vectors && length % 4 == 0
                 ? has_non_finite<Compute, kWidth<Compute>>(gradient, begin, length)
                 : has_non_finite<Compute, 1>(gradient, begin, length);
  }
  const int any = __syncthreads_or(found);
  if (threadIdx.x == 0) {
    flags[blockIdx.x] = any || !(std::fabs(read_scale<float>(grad_scale)) <= kLargest<float>);
  }
}

__device__ bool any_flag(const int32_t* flags, uint32_t count) {
  int32_t any = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    any |= flags[i];
  }
  return __syncthreads_or(any) != 0;
}

// N vectors of V entries, `distance` entries apart. All loads stand before the first use.
template <class Compute, int V, int N>
__device__ void update_vectors(const Strip& strip, const Step<Compute>& step, Compute scale,
                               int64_t index, int64_t distance, Compute* sums) {
  const Type weight_type = static_cast<Type>(strip.weight_type);
  const Type grad_type = static_cast<Type>(strip.grad_type);
  const Type state_type = static_cast<Type>(strip.state_type);
  Bits<Compute, V> weight[N], grad[N], ipt[N], unc[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    ipt[i] = load<Compute, V>(strip.exp_avg_ipt, state_type, index + i * distance);
    unc[i] = load<Compute, V>(strip.exp_avg_unc, state_type, index + i * distance);
  }
  if (strip.grad != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      weight[i] = load<Compute, V>(strip.weight, weight_type, index + i * distance);
      grad[i] = load<Compute, V>(strip.grad, grad_type, index + i * distance);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Bits<Compute, V> new_ipt = {};
      Bits<Compute, V> new_unc = {};
#pragma unroll
      for (int e = 0; e < V; ++e) {
        Compute avg_ipt = decode(ipt[i], state_type, e);
        Compute avg_unc = decode(unc[i], state_type, e);
        step_averages(step, scale, state_type, decode(weight[i], weight_type, e),
                      decode(grad[i], grad_type, e), avg_ipt, avg_unc);
        encode(new_ipt, state_type, e, avg_ipt);
        encode(new_unc, state_type, e, avg_unc);
        // The score is that of the averages as they are kept.
        sums[e] = std::fma(decode(new_ipt, state_type, e), decode(new_unc, state_type, e), sums[e]);
      }
      store(strip.exp_avg_ipt, state_type, index + i * distance, new_ipt);
      store(strip.exp_avg_unc, state_type, index + i * distance, new_unc);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sums[e] = std::fma(decode(ipt[i], state_type, e), decode(unc[i], state_type, e), sums[e]);
      }
    }
  }
}

// One chunk: the averages, and partials[c] = the sum of I * U over entries c, c + period, ...
//
// The vectors of V entries repeat their columns every `line` vectors. A thread that steps by a
// multiple of that meets the same V columns each time and sums them in registers, for any period.
template <class Compute, int V>
__device__ void update_chunk(const Strip& strip, const Step<Compute>& step, Compute scale,
                             int64_t begin, int length, Compute* values, Compute* scratch,
                             Compute* partials) {
  const int tid = static_cast<int>(threadIdx.x);
  const int period = strip.period;
  const int common = V == 1 ? 1 : period % 4 == 0 ? 4 : period % 2 == 0 ? 2 : 1;
  const int line = period / common;
  const bool wide = line > kThreads;
  const int stride = wide ? line : kThreads / line * line;
  const int vectors = length / V;
  for (int slot = 0; slot < line; slot += kThreads) {
    Compute sums[V] = {};
    if (slot + tid < stride) {
      int vector = slot + tid;
      for (; vector + stride < vectors; vector += 2 * stride) {
        update_vectors<Compute, V, 2>(strip, step, scale, begin + vector * V, stride * V, sums);
      }
      if (vector < vectors) {
        update_vectors<Compute, V, 1>(strip, step, scale, begin + vector * V, 0, sums);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
        values[tid * V + e] = sums[e];
      }
    }
    // Wide lines come with V = 1: a slot is a column.
    const int columns = !wide ? period : line - slot < kThreads ? line - slot : kThreads;
    sum_columns(values, wide ? columns : stride * V, columns, scratch,
                [&](int column, Compute sum) { partials[slot + column] = sum; });
  }
}

// Nothing if the gate found something. Goes backwards: the gradients that the gate read last are
// still in the cache.
template <class Compute>
__global__ void __launch_bounds__(kThreads, sizeof(Compute) == 4 ? kUpdateBlocks : kDoubleBlocks)
    update(__grid_constant__ const Table<Strip> table, const int32_t* flags, uint32_t flag_count,
           __grid_constant__ const Step<Compute> step, Compute* partials) {
  alignas(16) __shared__ Compute values[4 * kThreads];
  __shared__ Compute scratch[kThreads];
  if (any_flag(flags, flag_count)) {
    return;
  }
  const Compute scale = read_scale<Compute>(step.grad_scale);
  for (uint32_t done = blockIdx.x; done < table.tasks; done += gridDim.x) {
    const uint32_t task = table.tasks - 1 - done;
    const Strip& strip = table.entries[table.find(task)];
    const uint32_t chunk = task - strip.first_task;
    const int64_t row = chunk / strip.chunks_per_row;
    const int64_t offset = static_cast<int64_t>(chunk % strip.chunks_per_row) * strip.chunk;
    const int64_t rest = strip.row_length - offset;
    const int length = static_cast<int>(rest < strip.chunk ? rest : strip.chunk);
    const int64_t begin = row * strip.row_length + offset;
    Compute* sums = partials + strip.partials + static_cast<int64_t>(chunk) * strip.period;
    if (strip.vectors && length % 4 == 0) {
      constexpr int kVector = kWidth<Compute>;
      update_chunk<Compute, kVector>(strip, step, scale, begin, length, values, scratch, sums);
    } else {
      update_chunk<Compute, 1>(strip, step, scale, begin, length, values, scratch, sums);
    }
  }
}

// A task is 32 triplets of one adapter; eight threads add up the partial sums of each.
constexpr int kScoresPerTask = 32;
constexpr int kSlices = kThreads / kScoresPerTask;

template <class Compute>
__device__ Compute update_E(const Triplets& triplets, const Step<Compute>& step, int i) {
  const Type state_type = triplets.state_type;
  if (triplets.grad != nullptr) {
    Compute avg_ipt = load_entry<Compute>(triplets.exp_avg_ipt, state_type, i);
    Compute avg_unc = load_entry<Compute>(triplets.exp_avg_unc, state_type, i);
    step_averages(step, read_scale<Compute>(step.grad_scale), state_type,
                  load_entry<Compute>(triplets.weight, triplets.weight_type, i),
                  load_entry<Compute>(triplets.grad, triplets.grad_type, i), avg_ipt, avg_unc);
    store_entry(triplets.exp_avg_ipt, state_type, i, avg_ipt);
    store_entry(triplets.exp_avg_unc, state_type, i, avg_unc);
  }
  return load_entry<Compute>(triplets.exp_avg_ipt, state_type, i) *
         load_entry<Compute>(triplets.exp_avg_unc, state_type, i);
}

template <class Compute>
__global__ void __launch_bounds__(kThreads)
    score(__grid_constant__ const Table<Triplets> table, const int32_t* flags, uint32_t flag_count,
          __grid_constant__ const Step<Compute> step, const Compute* partials, void* scores,
          Type scores_type, int64_t* skipped) {
  __shared__ Compute sums_A[kThreads];
  __shared__ Compute sums_B[kThreads];
  if (any_flag(flags, flag_count)) {
    if (skipped != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
      ++*skipped;
    }
    return;
  }
  const int tid = static_cast<int>(threadIdx.x);
  const int slice = tid / kScoresPerTask;
  for (uint32_t task = blockIdx.x; task < table.tasks; task += gridDim.x) {
    const Triplets& triplets = table.entries[table.find(task)];
    const int i = static_cast<int>(task - triplets.first_task) * kScoresPerTask +
                  tid % kScoresPerTask;
    Compute sum_A = 0;
    Compute sum_B = 0;
    if (i < triplets.r) {
      const Compute* row = partials + triplets.partials_A + int64_t{i} * triplets.chunks_A;
      for (int chunk = slice; chunk < triplets.chunks_A; chunk += kSlices) {
        sum_A += row[chunk];
      }
      const Compute* column = partials + triplets.partials_B + i;
#pragma unroll 4
      for (int chunk = slice; chunk < triplets.chunks_B; chunk += kSlices) {
        sum_B += column[int64_t{chunk} * triplets.r];
      }
    }
    sums_A[tid] = sum_A;
    sums_B[tid] = sum_B;
    __syncthreads();
    if (slice == 0 && i < triplets.r) {
      for (int other = 1; other < kSlices; ++other) {
        sum_A += sums_A[other * kScoresPerTask + tid];
        sum_B += sums_B[other * kScoresPerTask + tid];
      }
      const Compute mean_A = sum_A / static_cast<Compute>(triplets.in);
      const Compute mean_B = sum_B / static_cast<Compute>(triplets.out);
      store_entry(scores, scores_type, triplets.first + i,
                  update_E(triplets, step, i) + (mean_A + mean_B));
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace adalora::cuda
