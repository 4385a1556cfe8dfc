// Cuts a whole model into the tasks of importance.cuh, and launches its kernels.
#include <algorithm>

#include "importance.cuh"

namespace adalora::cuda {
namespace {

bool is_aligned(const ImportanceUpdate::Parameter& p) {
  const bool states = cuda::is_aligned(p.exp_avg_ipt, p.state_type) &&
                      cuda::is_aligned(p.exp_avg_unc, p.state_type);
  return states && (p.grad == nullptr || (cuda::is_aligned(p.weight, p.weight_type) &&
                                          cuda::is_aligned(p.grad, p.grad_type)));
}

Strip make_strip(const ImportanceUpdate::Parameter& p) {
  Strip strip = {};
  strip.weight = p.weight;
  strip.grad = p.grad;
  strip.exp_avg_ipt = p.exp_avg_ipt;
  strip.exp_avg_unc = p.exp_avg_unc;
  strip.weight_type = static_cast<uint8_t>(p.weight_type);
  strip.grad_type = static_cast<uint8_t>(p.grad_type);
  strip.state_type = static_cast<uint8_t>(p.state_type);
  strip.vectors = is_aligned(p);
  return strip;
}

struct AdapterStrips {
  Strip A, B;
  int64_t chunks_A, chunks_B;
};

AdapterStrips make_strips(const ImportanceUpdate::Adapter& adapter) {
  const int64_t r = adapter.r;
  AdapterStrips strips = {make_strip(adapter.A), make_strip(adapter.B), 0, 0};
  Strip& A = strips.A;
  A.row_length = adapter.in;
  A.period = 1;
  A.vectors = A.vectors && adapter.in % 4 == 0;
  if (r > 0 && adapter.in > 0) {
    // Pieces of equal length: the last one of a row isn't a remnant.
    const int64_t pieces = ceil_div(adapter.in, kChunk);
    A.chunk = static_cast<int32_t>(round_up<int64_t>(ceil_div(adapter.in, pieces), 4));
    A.chunks_per_row = static_cast<int32_t>(ceil_div<int64_t>(adapter.in, A.chunk));
    strips.chunks_A = r * A.chunks_per_row;
  }
  Strip& B = strips.B;
  B.row_length = adapter.out * r;
  B.period = static_cast<int32_t>(r);
  if (B.row_length > 0) {
    const int64_t line = r % 4 == 0 ? r : r % 2 == 0 ? 2 * r : 4 * r;
    // A thread can hold no more columns than those of its four entries.
    B.vectors = B.vectors && line / 4 <= kThreads;
    B.chunk = static_cast<int32_t>(line * std::max<int64_t>(1, kChunk / line));
    B.chunks_per_row = static_cast<int32_t>(ceil_div<int64_t>(B.row_length, B.chunk));
    strips.chunks_B = B.chunks_per_row;
  }
  return strips;
}

int64_t flag_capacity(const ImportanceUpdate& op) {
  const int64_t gradients = 3 * static_cast<int64_t>(op.adapters.size());
  return ceil_div<int64_t>(gradients, Table<Gradient>::kCapacity) * kMostBlocks;
}

template <class Compute>
cudaError_t run(const ImportanceUpdate& op, void* workspace, cudaStream_t stream) {
  int32_t* flags = static_cast<int32_t*>(workspace);
  Compute* partials = reinterpret_cast<Compute*>(flags + flag_capacity(op));
  const Step<Compute> step = {
      Lerp<Compute>(1.0 - op.beta1), Lerp<Compute>(1.0 - op.beta2), op.grad_scale};

  uint32_t flag_count = 0;
  auto launch_gate = [&](const Table<Gradient>& table) {
    uint32_t blocks = 0;
    const cudaError_t error = count_blocks(table.tasks, kGateBlocks, &blocks);
    if (error != cudaSuccess) {
      return error;
    }
    int32_t* own_flags = flags + flag_count;
    flag_count += blocks;
    return launch(gate<Compute>, blocks, stream, table, op.grad_scale, own_flags);
  };
  TableWriter<Gradient, decltype(launch_gate)> gate_writer(launch_gate);
  for (const auto& adapter : op.adapters) {
    const int64_t numels[] = {adapter.r * adapter.in, adapter.r, adapter.out * adapter.r};
    const ImportanceUpdate::Parameter* parameters[] = {&adapter.A, &adapter.E, &adapter.B};
    for (int i = 0; i < 3; ++i) {
      const auto& p = *parameters[i];
      if (p.grad != nullptr) {
        gate_writer.add({p.grad, numels[i], 0, p.grad_type, cuda::is_aligned(p.grad, p.grad_type)},
                        ceil_div(numels[i], kChunk));
      }
    }
  }
  cudaError_t error = gate_writer.finish();
  if (error != cudaSuccess || flag_count == 0) {
    return error;
  }

  auto launch_update = [&](const Table<Strip>& table) {
    return launch_table(update<Compute>, kUpdateBlocks, stream, table, flags, flag_count, step,
                        partials);
  };
  TableWriter<Strip, decltype(launch_update)> update_writer(launch_update);
  int64_t* skipped = op.skipped;
  auto launch_score = [&](const Table<Triplets>& table) {
    // One launch counts, the first that is made.
    int64_t* const counter = skipped;
    skipped = table.tasks == 0 ? skipped : nullptr;
    return launch_table(score<Compute>, kScoreBlocks, stream, table, flags, flag_count, step,
                        partials, op.scores, op.scores_type, counter);
  };
  TableWriter<Triplets, decltype(launch_score)> score_writer(launch_score);
  int64_t used = 0;
  for (const auto& adapter : op.adapters) {
    AdapterStrips strips = make_strips(adapter);
    strips.A.partials = used;
    strips.B.partials = used + strips.chunks_A;
    used = strips.B.partials + strips.chunks_B * adapter.r;
    update_writer.add(strips.A, strips.chunks_A);
    update_writer.add(strips.B, strips.chunks_B);
  }
  error = update_writer.finish();
  if (error != cudaSuccess) {
    return error;
  }
  used = 0;
  for (const auto& adapter : op.adapters) {
    const AdapterStrips strips = make_strips(adapter);
    Triplets triplets = {};
    triplets.weight = adapter.E.weight;
    triplets.grad = adapter.E.grad;
    triplets.exp_avg_ipt = adapter.E.exp_avg_ipt;
    triplets.exp_avg_unc = adapter.E.exp_avg_unc;
    triplets.weight_type = adapter.E.weight_type;
    triplets.grad_type = adapter.E.grad_type;
    triplets.state_type = adapter.E.state_type;
    triplets.in = adapter.in;
    triplets.out = adapter.out;
    triplets.partials_A = used;
    triplets.partials_B = used + strips.chunks_A;
    used = triplets.partials_B + strips.chunks_B * adapter.r;
    triplets.chunks_A = strips.A.chunks_per_row;
    triplets.chunks_B = strips.B.chunks_per_row;
    triplets.r = static_cast<int32_t>(adapter.r);
    triplets.first = adapter.first;
    score_writer.add(triplets, ceil_div<int64_t>(adapter.r, kScoresPerTask));
  }
  return score_writer.finish();
}

}  // namespace

std::string why_not() {
  // It loads the code. That is harmless to a graph which is being captured, but not allowed in it
  // unless one says so.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, update<float>);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  int version = 0;
  cudaDriverGetVersion(&version);
  constexpr int with_large_parameters = 12010;
  if (version >= with_large_parameters) return "";
  return "the CUDA driver is too old for launches with 32 KB of parameters, which 12.1 brought";
}

int64_t importance_update_workspace(const ImportanceUpdate& op) {
  int64_t partials = 0;
  for (const auto& adapter : op.adapters) {
    const AdapterStrips strips = make_strips(adapter);
    partials += strips.chunks_A + strips.chunks_B * adapter.r;
  }
  return flag_capacity(op) * static_cast<int64_t>(sizeof(int32_t)) +
         partials * size_of(holds_float64(op) ? Type::float64 : Type::float32);
}

cudaError_t importance_update(const ImportanceUpdate& op, void* workspace, cudaStream_t stream) {
  return holds_float64(op) ? run<double>(op, workspace, stream) : run<float>(op, workspace, stream);
}

}  // namespace adalora::cuda
