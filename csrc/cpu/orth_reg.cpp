// Gram matrices of all adapters, and their gradients, in tiles that stay in the first cache.
//
// lora_A lies along its long axis in memory and lora_B along its short one; each has its own loops,
// so that neither is transposed. Any other layout is brought to the first one, tile by tile.
#include <cmath>

#include "ops.h"
#include "simd.h"

namespace adalora::cpu {
namespace {

constexpr int64_t kTile = 1 << 13;     // entries of a tile, about
constexpr int64_t kSegment = 1 << 16;  // entries of a segment, which has a Gram matrix of its own
constexpr int64_t kSum = 128;          // products added up one by one: rounding errors stay small

int64_t padded(int64_t r) { return (r + kLanes - 1) / kLanes * kLanes; }

bool ranks_are_contiguous(const Rows& m) { return m.row_stride == 1 && m.stride == m.r && m.r > 1; }

int64_t tile_length(int64_t r) {
  return std::max<int64_t>(kLanes, kTile / padded(r) / kLanes * kLanes);
}

// How a tile of `length` columns lies in memory, entry (i, k).
//   along: at i * step + k, rows one after the other; a buffer pads them to a multiple of kLanes
//          with 0
//   across: at k * r + i, columns one after the other. Vectors of kLanes reach into what follows a
//          column; what they find there is not used.
template <class T>
ADALORA_INLINE void load_along(T* tile, int64_t step, const Rows& m, int64_t start,
                               int64_t length) {
  for (int64_t i = 0; i < m.r; ++i) {
    load(tile + i * step, m.data, m.type, i * m.row_stride + start * m.stride, m.stride, length);
    std::fill(tile + i * step + length, tile + i * step + padded(length), T(0));
  }
}

template <class T>
ADALORA_INLINE T sum_of(Lanes<T> v) {
  T sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

// G[i][j] += sum_k M(i, k) M(j, k) for i in [i0, i0 + I), j in [j0, j0 + J), from a tile "along".
template <int I, int J, class T>
ADALORA_INLINE void gram_along_block(T* G, int64_t r, const T* tile, int64_t step, int64_t length,
                                     int64_t i0, int64_t j0) {
  Lanes<T> sums[I][J] = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    Lanes<T> a[I], b[J];
    for (int i = 0; i < I; ++i) a[i] = lanes_at(tile + (i0 + i) * step + k);
    for (int j = 0; j < J; ++j) b[j] = lanes_at(tile + (j0 + j) * step + k);
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j) sums[i][j] += a[i] * b[j];
  }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) G[(i0 + i) * r + j0 + j] += sum_of<T>(sums[i][j]);
}

// The lower triangle, in blocks of 4 x 4, and single rows and columns where r is not divisible.
template <class T>
ADALORA_INLINE void gram_along(T* G, int64_t r, const T* tile, int64_t step, int64_t length) {
  const int64_t whole = r / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4)
    for (int64_t j = 0; j <= i; j += 4) gram_along_block<4, 4>(G, r, tile, step, length, i, j);
  for (int64_t i = whole; i < r; ++i) {
    for (int64_t j = 0; j < whole; j += 4) gram_along_block<1, 4>(G, r, tile, step, length, i, j);
    for (int64_t j = whole; j <= i; ++j) gram_along_block<1, 1>(G, r, tile, step, length, i, j);
  }
}

// The same from a tile "across", of which kLanes entries of a column are multiplied at once.
template <int I, class T>
ADALORA_INLINE void gram_across_block(T* G, int64_t r, const T* tile, int64_t length, int64_t i0,
                                      int64_t j0) {
  Lanes<T> sums[I] = {};
  for (int64_t k = 0; k < length; ++k) {
    const T* column = tile + k * r;
    const Lanes<T> b = lanes_at(column + j0);
    for (int i = 0; i < I; ++i) sums[i] += column[i0 + i] * b;
  }
  const int64_t count = std::min(kLanes, r - j0);
  for (int i = 0; i < I; ++i)
    for (int64_t j = 0; j < count; ++j) G[(i0 + i) * r + j0 + j] += sums[i][j];
}

template <class T>
ADALORA_INLINE void gram_across(T* G, int64_t r, const T* tile, int64_t length) {
  for (int64_t k = 0; k < length; k += kSum) {
    const int64_t n = std::min(kSum, length - k);
    for (int64_t j = 0; j < r; j += kLanes) {
      int64_t i = j;  // what is above the diagonal is not needed
      for (; i + 12 <= r; i += 12) gram_across_block<12>(G, r, tile + k * r, n, i, j);
      for (; i + 4 <= r; i += 4) gram_across_block<4>(G, r, tile + k * r, n, i, j);
      for (; i < r; ++i) gram_across_block<1>(G, r, tile + k * r, n, i, j);
    }
  }
}

// The part of a Gram matrix (its lower triangle) that columns [start, start + count) give.
template <class T>
ADALORA_INLINE void segment_gram(T* G, const Rows& m, int64_t start, int64_t count, T* buffer) {
  const int64_t r = m.r, length = tile_length(r);
  std::fill(G, G + r * r, T(0));
  if (ranks_are_contiguous(m) && m.type == type_of<T>()) {
    // In place, but for the last columns of the matrix: nothing may follow them.
    const int64_t last = (padded(r) - r + r - 1) / r;
    const int64_t whole = std::max<int64_t>(0, std::min(count, m.length - last - start));
    gram_across(G, r, static_cast<const T*>(m.data) + start * r, whole);
    start += whole;
    count -= whole;
  }
  for (int64_t done = 0; done < count; done += length) {
    const int64_t n = std::min(length, count - done);
    if (ranks_are_contiguous(m)) {
      load(buffer, m.data, m.type, (start + done) * r, 1, n * r);
      gram_across(G, r, buffer, n);
    } else if (m.type == type_of<T>() && m.stride == 1 && n % kLanes == 0) {
      gram_along(G, r, static_cast<const T*>(m.data) + start + done, m.row_stride, n);
    } else {
      load_along(buffer, length, m, start + done, n);
      gram_along(G, r, buffer, length, padded(n));
    }
  }
}

ADALORA_CLONES void gram(float* G, const Rows& m, int64_t start, int64_t count, float* buffer) {
  segment_gram(G, m, start, count, buffer);
}
ADALORA_CLONES void gram(double* G, const Rows& m, int64_t start, int64_t count, double* buffer) {
  segment_gram(G, m, start, count, buffer);
}

// out(i, k) = sum_j S(i, j) M(j, k), from a tile "along" to one like it. The rows of S are
// padded(r) apart.
template <int I, class T>
ADALORA_INLINE void product_along_block(T* out, const T* S, int64_t r, const T* tile, int64_t step,
                                        int64_t out_step, int64_t length, int64_t i0) {
  for (int64_t k = 0; k < length; k += 2 * kLanes) {
    // The last of an odd number is computed twice.
    const int64_t second = std::min(k + kLanes, length - kLanes);
    Lanes<T> sums[I][2] = {};
    for (int64_t j = 0; j < r; ++j) {
      const Lanes<T> b0 = lanes_at(tile + j * step + k), b1 = lanes_at(tile + j * step + second);
      for (int i = 0; i < I; ++i) {
        const T s = S[(i0 + i) * padded(r) + j];
        sums[i][0] += s * b0;
        sums[i][1] += s * b1;
      }
    }
    for (int i = 0; i < I; ++i) {
      lanes_at(out + (i0 + i) * out_step + k) = sums[i][0];
      lanes_at(out + (i0 + i) * out_step + second) = sums[i][1];
    }
  }
}

template <class T>
ADALORA_INLINE void product_along(T* out, const T* S, int64_t r, const T* tile, int64_t step,
                                  int64_t out_step, int64_t length) {
  int64_t i = 0;
  for (; i + 4 <= r; i += 4)
    product_along_block<4>(out, S, r, tile, step, out_step, length, i);
  for (; i < r; ++i) product_along_block<1>(out, S, r, tile, step, out_step, length, i);
}

// The same for tiles "across"; S has rows of padded(r) entries. A column of `out` is followed by
// entries that are written later, or by room for kLanes.
template <int K, class T>
ADALORA_INLINE void product_across_block(T* out, const T* S, int64_t r, const T* tile, int64_t k) {
  // From the last lanes to the first: what a vector writes beyond its column is put right.
  for (int64_t i = padded(r) - kLanes; i >= 0; i -= kLanes) {
    Lanes<T> sums[K] = {};
    for (int64_t j = 0; j < r; ++j) {
      const Lanes<T> s = lanes_at(S + j * padded(r) + i);
      for (int n = 0; n < K; ++n) sums[n] += tile[(k + n) * r + j] * s;
    }
    for (int n = 0; n < K; ++n) lanes_at(out + (k + n) * r + i) = sums[n];
  }
}

template <class T>
ADALORA_INLINE void product_across(T* out, const T* S, int64_t r, const T* tile, int64_t length) {
  int64_t k = 0;
  for (; k + 8 <= length; k += 8) product_across_block<8>(out, S, r, tile, k);
  for (; k < length; ++k) product_across_block<1>(out, S, r, tile, k);
}

// Columns [start, start + count) of the gradient; S is symmetric, its rows are padded(r) apart.
template <class T>
ADALORA_INLINE void segment_product(const T* S, const Rows& m, const Rows& grad, int64_t start,
                                    int64_t count, bool add, T* buffer) {
  const int64_t r = m.r, length = tile_length(r);
  const bool in_place = m.type == type_of<T>();
  T* out = buffer + length * padded(r);
  for (int64_t done = 0; done < count; done += length) {
    const int64_t n = std::min(length, count - done), first = start + done;
    if (ranks_are_contiguous(m)) {
      const T* tile = in_place ? static_cast<const T*>(m.data) + first * r : buffer;
      if (!in_place) load(buffer, m.data, m.type, first * r, 1, n * r);
      product_across(out, S, r, tile, n);
      if (ranks_are_contiguous(grad)) {
        store(out, grad.data, grad.type, first * r, 1, n * r, add);
      } else {
        for (int64_t k = 0; k < n; ++k)
          store(out + k * r, grad.data, grad.type, (first + k) * grad.stride, grad.row_stride, r,
                add);
      }
      continue;
    }
    if (in_place && m.stride == 1 && n % kLanes == 0) {
      const T* tile = static_cast<const T*>(m.data) + first;
      product_along(out, S, r, tile, m.row_stride, length, n);
    } else {
      load_along(buffer, length, m, first, n);
      product_along(out, S, r, buffer, length, length, padded(n));
    }
    for (int64_t i = 0; i < r; ++i)
      store(out + i * length, grad.data, grad.type, i * grad.row_stride + first * grad.stride,
            grad.stride, n, add);
  }
}

ADALORA_CLONES void product(const float* S, const Rows& m, const Rows& grad, int64_t start,
                            int64_t count, bool add, float* buffer) {
  segment_product(S, m, grad, start, count, add, buffer);
}
ADALORA_CLONES void product(const double* S, const Rows& m, const Rows& grad, int64_t start,
                            int64_t count, bool add, double* buffer) {
  segment_product(S, m, grad, start, count, add, buffer);
}

struct Segment {
  int64_t matrix, start, count;
  int64_t part;  // place of its r * r sums
};

std::vector<Segment> segments_of(const std::vector<Rows>& matrices) {
  std::vector<Segment> segments;
  int64_t part = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto& m = matrices[i];
    if (m.r == 0) continue;
    const int64_t tile = tile_length(m.r);
    const int64_t columns = std::max(tile, kSegment / m.r / tile * tile);
    for (int64_t start = 0; start < m.length; start += columns) {
      const int64_t count = std::min(columns, m.length - start);
      segments.push_back({static_cast<int64_t>(i), start, count, part});
      part += m.r * m.r;
    }
  }
  return segments;
}

int64_t entries_of(const std::vector<Rows>& matrices) {
  int64_t entries = 0;
  for (const Rows& m : matrices) entries += m.r * m.length;
  return entries;
}

std::vector<int64_t> residuals_of(const std::vector<Rows>& matrices) {
  std::vector<int64_t> starts{0};
  for (const Rows& m : matrices) starts.push_back(starts.back() + m.r * m.r);
  return starts;
}

template <class T>
void forward(const OrthReg& op) {
  const std::vector<Segment> segments = segments_of(op.matrices);
  const std::vector<int64_t> starts = residuals_of(op.matrices);
  int64_t parts = 0;
  for (const Segment& s : segments) parts += op.matrices[s.matrix].r * op.matrices[s.matrix].r;
  std::vector<T> sums(parts);
  const auto count = static_cast<int64_t>(segments.size());
  for_each(count, entries_of(op.matrices), [&](int64_t i) {
    const Segment& s = segments[i];
    const Rows& m = op.matrices[s.matrix];
    T* buffer = scratch<T>(tile_length(m.r) * padded(m.r) + kLanes);
    gram(sums.data() + s.part, m, s.start, s.count, buffer);
  });
  auto* residuals = static_cast<T*>(op.residuals);
  std::fill_n(residuals, starts.back(), T(0));
  for (const Segment& s : segments) {
    const int64_t r = op.matrices[s.matrix].r;
    const T* part = sums.data() + s.part;
    T* residual = residuals + starts[s.matrix];
    for (int64_t i = 0; i < r * r; ++i) residual[i] += part[i];
  }
  for (size_t i = 0; i < op.matrices.size(); ++i) {
    const int64_t r = op.matrices[i].r;
    T* residual = residuals + starts[i];
    double squares = 0;
    for (int64_t row = 0; row < r; ++row) {
      residual[row * r + row] -= 1;
      for (int64_t column = 0; column < row; ++column) {
        const T value = residual[row * r + column];
        residual[column * r + row] = value;
        squares += 2.0 * value * value;
      }
      squares += static_cast<double>(residual[row * r + row]) * residual[row * r + row];
    }
    static_cast<T*>(op.norms)[i] = static_cast<T>(std::sqrt(squares));
  }
}

template <class T>
void backward(const OrthRegBackward& op) {
  const std::vector<Segment> segments = segments_of(op.matrices);
  const std::vector<int64_t> starts = residuals_of(op.matrices);
  const auto* residuals = static_cast<const T*>(op.residuals);
  const auto count = static_cast<int64_t>(segments.size());
  for_each(count, entries_of(op.matrices), [&](int64_t n) {
    const Segment& s = segments[n];
    const Rows& m = op.matrices[s.matrix];
    const T norm = static_cast<const T*>(op.norms)[s.matrix];
    const T grad = static_cast<const T*>(op.grad_norms)[s.matrix];
    const T factor = norm > 0 ? 2 * grad / norm : T(0);
    const int64_t width = padded(m.r), tile = tile_length(m.r) * width;
    T* S = scratch<T>(m.r * width + 2 * tile + kLanes);
    for (int64_t i = 0; i < m.r; ++i)
      for (int64_t j = 0; j < width; ++j)
        S[i * width + j] = j < m.r ? factor * residuals[starts[s.matrix] + i * m.r + j] : T(0);
    product(S, m, op.grads[s.matrix], s.start, s.count, op.accumulate, S + m.r * width);
  });
}

}  // namespace

void orth_reg(const OrthReg& op) {
  op.type == Type::float64 ? forward<double>(op) : forward<float>(op);
}

void orth_reg_backward(const OrthRegBackward& op) {
  op.type == Type::float64 ? backward<double>(op) : backward<float>(op);
}

}  // namespace adalora::cpu
