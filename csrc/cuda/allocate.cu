// The budget over a whole model. A triplet's rank is the number of triplets before it. Counting
// them takes n^2 comparisons: for the thousands of a model that is less than a sort's launches.
#include <limits>

#include "common.cuh"
#include "ops.h"

namespace adalora::cuda {
namespace {

constexpr int kBlocks = 8;

// Eight threads share the comparisons of each of 32 triplets.
constexpr int kTripletsPerBlock = 32;
constexpr int kSlices = kThreads / kTripletsPerBlock;
constexpr int kStaged = 1024;

struct Target {
  void* lora_E;
  int64_t stride;
  int64_t first;
  uint32_t first_task;  // a table's tasks are triplets here, of which a block takes 32 at a time
  Type type;
};

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <class Score>
__device__ Score ranked(Score score) {
  return score == score ? score : -kInfinity<Score>;
}

template <class Score>
__global__ void __launch_bounds__(kThreads)
    keep_best(__grid_constant__ const Table<Target> table, const Score* scores, int64_t total,
              const int64_t* budget, bool* mask) {
  __shared__ Score staged[kStaged];
  __shared__ int32_t counts[kThreads];
  if (budget != nullptr && *budget < 0) {
    return;
  }
  const int tid = static_cast<int>(threadIdx.x);
  const int slice = tid / kTripletsPerBlock;
  for (uint32_t first = blockIdx.x * kTripletsPerBlock; first < table.tasks;
       first += gridDim.x * kTripletsPerBlock) {
    const uint32_t n = first + tid % kTripletsPerBlock;
    const bool exists = n < table.tasks;
    const Target& target = table.entries[table.find(n)];
    const int64_t i = n - target.first_task;
    const int64_t triplet = target.first + i;
    if (budget != nullptr) {
      const Score own = exists ? ranked(scores[triplet]) : Score(0);
      int32_t before = 0;
      for (int64_t start = 0; start < total; start += kStaged) {
        const int size = static_cast<int>(total - start < kStaged ? total - start : kStaged);
        for (int e = tid; e < size; e += kThreads) {
          staged[e] = ranked(scores[start + e]);
        }
        __syncthreads();
        for (int e = slice; e < size; e += kSlices) {
          before += staged[e] > own || (staged[e] == own && start + e < triplet);
        }
        __syncthreads();
      }
      counts[tid] = before;
      __syncthreads();
    }
    if (slice == 0 && exists) {
      bool kept = true;
      if (budget == nullptr) {
        kept = mask[triplet];
      } else {
        int64_t rank = 0;
        for (int other = 0; other < kSlices; ++other) {
          rank += counts[other * kTripletsPerBlock + tid];
        }
        kept = rank < *budget;
        mask[triplet] = kept;
      }
      if (!kept) {
        store_entry(target.lora_E, target.type, i * target.stride, 0.0);
      }
    }
    __syncthreads();
  }
}

template <class Score>
cudaError_t run(const Allocate& op, cudaStream_t stream) {
  auto launch_keep_best = [&](const Table<Target>& table) {
    uint32_t blocks = 0;
    const cudaError_t error = count_blocks(
        ceil_div<uint32_t>(table.tasks, kTripletsPerBlock), kBlocks, &blocks);
    return error == cudaSuccess
               ? launch(keep_best<Score>, blocks, stream, table,
                        static_cast<const Score*>(op.scores), op.total_rank, op.budget, op.mask)
               : error;
  };
  TableWriter<Target, decltype(launch_keep_best)> writer(launch_keep_best);
  for (const Allocate::Target& target : op.targets) {
    writer.add({target.lora_E, target.stride, target.first, 0, target.type}, target.r);
  }
  return writer.finish();
}

}  // namespace

cudaError_t allocate(const Allocate& op, cudaStream_t stream) {
  return op.scores_type == Type::float64 ? run<double>(op, stream) : run<float>(op, stream);
}

}  // namespace adalora::cuda
