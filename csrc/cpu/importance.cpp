// The importance averages of all adapters in one pass over memory, cut into chunks of fixed size.
//
// A chunk leaves sums of I * U by triplet; they are added in the order of the chunks afterwards, so
// that the scores do not depend on who computed which chunk.
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "../ops.h"
#include "simd.h"

namespace adalora::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // entries, about
constexpr int64_t kBlock = 1024;     // entries that are converted and summed at a time, about

// Entries of one parameter, either a row, or whole rows. Those of lora_A are each a triplet's; of
// lora_E and lora_B every column is one's.
struct Chunk {
  const ImportanceUpdate::Parameter* parameter;
  int64_t start, count;  // entries
  int64_t sums;          // as many triplets, in the order of the scores
  bool by_rows;          // whether each has count / sums entries in a row, or every sums-th entry
  int64_t triplet;       // the first one's place in the scores
  double weight;         // of an entry in the triplet's score
  int64_t partial;       // place of its `sums` sums
};

template <class T>
struct Factors {
  T grad_scale;
  T keep_ipt, take_ipt;  // beta1 and 1 - beta1, each rounded only once
  T keep_unc, take_unc;
};

template <class T>
ADALORA_INLINE void update_block(const T* w, const T* g, T* ipt, T* unc, int64_t count,
                                 Factors<T> f) {
  constexpr T largest = std::numeric_limits<T>::max();
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T x = std::abs(w[i] * g[i]) * f.grad_scale;
    // nan_to_num: what is not below the largest is replaced by it, and NaN by 0.
    const T bounded = x < largest ? x : largest;
    x = x == x ? bounded : T(0);
    // Sums of what is not negative: nothing cancels.
    const T average = f.keep_ipt * ipt[i] + f.take_ipt * x;
    unc[i] = f.keep_unc * unc[i] + f.take_unc * std::abs(x - average);
    ipt[i] = average;
  }
}

template <class T>
ADALORA_INLINE void score_block(const T* ipt, const T* unc, T* sums, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sums[i] += ipt[i] * unc[i];
}

// Adds up entries `columns` apart, halving; the sums are the first `columns` ones then.
template <class T>
ADALORA_INLINE void fold_block(T* sums, int64_t columns, int64_t count) {
  for (int64_t rows = count / columns; rows > 1;) {
    const int64_t half = (rows + 1) / 2, others = (rows - half) * columns;
#pragma GCC ivdep
    for (int64_t i = 0; i < others; ++i) sums[i] += sums[half * columns + i];
    rows = half;
  }
}

// scores[row] = the sum of I * U over a row, in the order of score_block and fold_block.
template <class T>
ADALORA_INLINE void score_rows_block(const T* ipt, const T* unc, T* sums, int64_t length,
                                     int64_t rows, double* scores) {
  for (int64_t row = 0; row < rows; ++row, ipt += length, unc += length) {
    std::fill(sums, sums + length, T(0));
    score_block(ipt, unc, sums, length);
    fold_block(sums, 1, length);
    scores[row] = sums[0];
  }
}

ADALORA_CLONES void update(const float* w, const float* g, float* ipt, float* unc, int64_t count,
                           Factors<float> factors) {
  update_block(w, g, ipt, unc, count, factors);
}
ADALORA_CLONES void update(const double* w, const double* g, double* ipt, double* unc,
                           int64_t count, Factors<double> factors) {
  update_block(w, g, ipt, unc, count, factors);
}
ADALORA_CLONES void score(const float* ipt, const float* unc, float* sums, int64_t count) {
  score_block(ipt, unc, sums, count);
}
ADALORA_CLONES void score(const double* ipt, const double* unc, double* sums, int64_t count) {
  score_block(ipt, unc, sums, count);
}
ADALORA_CLONES void fold(float* sums, int64_t columns, int64_t count) {
  fold_block(sums, columns, count);
}
ADALORA_CLONES void fold(double* sums, int64_t columns, int64_t count) {
  fold_block(sums, columns, count);
}
ADALORA_CLONES void score_rows(const float* ipt, const float* unc, float* sums, int64_t length,
                               int64_t rows, double* scores) {
  score_rows_block(ipt, unc, sums, length, rows, scores);
}
ADALORA_CLONES void score_rows(const double* ipt, const double* unc, double* sums, int64_t length,
                               int64_t rows, double* scores) {
  score_rows_block(ipt, unc, sums, length, rows, scores);
}
ADALORA_CLONES void widen(float* to, const void* from, Type type, int64_t start, int64_t count) {
  load(to, from, type, start, count);
}
ADALORA_CLONES void widen(double* to, const void* from, Type type, int64_t start, int64_t count) {
  load(to, from, type, start, count);
}
ADALORA_CLONES void narrow(const float* from, void* to, Type type, int64_t start, int64_t count) {
  store(from, to, type, start, count);
}
ADALORA_CLONES void narrow(const double* from, void* to, Type type, int64_t start, int64_t count) {
  store(from, to, type, start, count);
}

// A number is inf or NaN exactly when all bits of its exponent are set.
template <class Bits>
ADALORA_INLINE bool any_has_all(const Bits* p, Bits exponent, int64_t count) {
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) found |= (p[i] & exponent) == exponent;
  return found != 0;
}
ADALORA_CLONES bool holds_inf_or_nan(const void* grad, Type type, int64_t start, int64_t count) {
  switch (type) {
    case Type::float32:
      return any_has_all(static_cast<const uint32_t*>(grad) + start, 0x7f800000u, count);
    case Type::bfloat16:
      return any_has_all(static_cast<const uint16_t*>(grad) + start, uint16_t{0x7f80}, count);
    case Type::float16:
      return any_has_all(static_cast<const uint16_t*>(grad) + start, uint16_t{0x7c00}, count);
    case Type::float64:
      return any_has_all(static_cast<const uint64_t*>(grad) + start,
                         uint64_t{0x7ff0000000000000}, count);
  }
  return false;
}

// Entries of a tensor as T: in place where they are T already, else in the buffer.
template <class T>
T* as(const void* data, Type type, int64_t start, int64_t count, T* buffer) {
  if (type == type_of<T>()) return static_cast<T*>(const_cast<void*>(data)) + start;
  widen(buffer, data, type, start, count);
  return buffer;
}

// Both averages of some entries as T: in place, or in a buffer.
template <class T>
struct Averages {
  T *ipt, *unc;
};

// Updates the averages of entries of a parameter. `buffers` has room for four times as many.
template <class T>
Averages<T> update_averages(const ImportanceUpdate::Parameter& p, int64_t start, int64_t count,
                            Factors<T> factors, T* buffers) {
  T *w = buffers, *g = w + count, *i = g + count, *u = i + count;
  T* ipt = as(p.exp_avg_ipt, p.state_type, start, count, i);
  T* unc = as(p.exp_avg_unc, p.state_type, start, count, u);
  if (p.grad != nullptr) {
    update(as(p.weight, p.weight_type, start, count, w), as(p.grad, p.grad_type, start, count, g),
           ipt, unc, count, factors);
    if (ipt == i) {
      narrow(ipt, p.exp_avg_ipt, p.state_type, start, count);
      narrow(unc, p.exp_avg_unc, p.state_type, start, count);
      // The score is that of the averages as they are kept.
      widen(ipt, p.exp_avg_ipt, p.state_type, start, count);
      widen(unc, p.exp_avg_unc, p.state_type, start, count);
    }
  }
  return {ipt, unc};
}

// A chunk of which every column is a triplet's, or which is part of one row.
template <class T>
void run_columns(const Chunk& chunk, Factors<T> factors, double* partials) {
  // Every block starts with the first triplet of the chunk, and as well aligned as the chunk.
  const int64_t period = std::lcm(chunk.sums, kLanes);
  const int64_t block = std::min(std::max<int64_t>(1, kBlock / period) * period, chunk.count);
  T* sums = scratch<T>(5 * block);
  std::fill(sums, sums + block, T(0));
  for (int64_t done = 0; done < chunk.count; done += block) {
    const int64_t count = std::min(block, chunk.count - done);
    const auto [ipt, unc] =
        update_averages(*chunk.parameter, chunk.start + done, count, factors, sums + block);
    score(ipt, unc, sums, count);
  }
  fold(sums, chunk.sums, block);
  for (int64_t column = 0; column < chunk.sums; ++column) partials[column] = sums[column];
}

// A chunk of whole rows, each a triplet's. None is longer than a block.
template <class T>
void run_rows(const Chunk& chunk, Factors<T> factors, double* partials) {
  const int64_t length = chunk.count / chunk.sums, most = kBlock / length;
  T* sums = scratch<T>(5 * most * length);
  for (int64_t row = 0; row < chunk.sums; row += most) {
    const int64_t rows = std::min(most, chunk.sums - row);
    const auto [ipt, unc] =
        update_averages(*chunk.parameter, chunk.start + row * length, rows * length, factors,
                        sums + most * length);
    score_rows(ipt, unc, sums, length, rows, partials + row);
  }
}

template <class T>
void run_chunk(const Chunk& chunk, Factors<T> factors, double* partials) {
  double* own = partials + chunk.partial;
  chunk.by_rows ? run_rows(chunk, factors, own) : run_columns(chunk, factors, own);
  for (int64_t i = 0; i < chunk.sums; ++i) own[i] *= chunk.weight;
}

std::vector<Chunk> chunks_of(const ImportanceUpdate& op) {
  std::vector<Chunk> chunks;
  chunks.reserve(3 * op.adapters.size());
  int64_t partial = 0;
  auto add = [&](const ImportanceUpdate::Parameter& parameter, int64_t start, int64_t count,
                 int64_t sums, bool by_rows, int64_t triplet, double weight) {
    chunks.push_back({&parameter, start, count, sums, by_rows, triplet, weight, partial});
    partial += sums;
  };
  for (const auto& adapter : op.adapters) {
    const int64_t r = adapter.r, in = adapter.in, first = adapter.first;
    if (r == 0) continue;
    const bool short_rows = 0 < in && in <= kBlock;
    const int64_t together = short_rows ? kChunk / in : 1;
    for (int64_t row = 0; row < r; row += together) {
      const int64_t rows = std::min(together, r - row);
      for (int64_t k = 0; k < in; k += kChunk)
        add(adapter.A, row * in + k, std::min(kChunk, in - k) * rows, rows, short_rows, first + row,
            1.0 / in);
    }
    add(adapter.E, 0, r, r, false, first, 1.0);
    const int64_t rows = (kChunk / r + kLanes) / kLanes * kLanes;
    for (int64_t n = 0; n < adapter.out; n += rows)
      add(adapter.B, n * r, std::min(rows, adapter.out - n) * r, r, false, first,
          1.0 / adapter.out);
  }
  return chunks;
}

template <class T>
void run(const ImportanceUpdate& op) {
  const std::vector<Chunk> chunks = chunks_of(op);
  const auto count = static_cast<int64_t>(chunks.size());
  int64_t entries = 0, with_grad = 0;
  for (const Chunk& chunk : chunks) {
    entries += chunk.count;
    if (chunk.parameter->grad != nullptr) with_grad += chunk.count;
  }
  if (with_grad == 0) return;
  // Before anything is written. The gradients are still in a cache when they are needed again.
  std::atomic<bool> bad{op.grad_scale != nullptr && !std::isfinite(*op.grad_scale)};
  for_each(count, with_grad, [&](int64_t i) {
    const auto& p = *chunks[i].parameter;
    if (p.grad == nullptr || bad.load(std::memory_order_relaxed)) return;
    if (holds_inf_or_nan(p.grad, p.grad_type, chunks[i].start, chunks[i].count)) bad = true;
  });
  if (bad) {
    ++*op.skipped;
    return;
  }
  const Factors<T> factors{op.grad_scale == nullptr ? T(1) : T(*op.grad_scale), T(op.beta1),
                           T(1 - op.beta1), T(op.beta2), T(1 - op.beta2)};
  std::vector<double> partials(chunks.back().partial + chunks.back().sums);
  for_each(count, entries, [&](int64_t i) { run_chunk(chunks[i], factors, partials.data()); });
  std::vector<double> scores(op.total_rank, 0.0);
  for (const Chunk& chunk : chunks)
    for (int64_t i = 0; i < chunk.sums; ++i)
      scores[chunk.triplet + i] += partials[chunk.partial + i];
  narrow(scores.data(), op.scores, op.scores_type, 0, op.total_rank);
}

}  // namespace

void importance_update(const ImportanceUpdate& op) {
  holds_float64(op) ? run<double>(op) : run<float>(op);
}

}  // namespace adalora::cpu
