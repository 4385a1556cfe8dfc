// Gram matrices of all adapters, and their gradients, in tiles that stay in the first cache.
//
// lora_A lies along its long axis in memory and lora_B along its short one; each has its own loops,
// so that neither is transposed. Any other layout is brought to the first one, tile by tile. Only
// the Gram matrix of many rows along their axis is computed from transposed tiles.
#include <cmath>

#include "ops.h"
#include "simd.h"

namespace adalora::cpu {
namespace {

constexpr int64_t kTile = 1 << 13;     // entries of a tile, about
constexpr int64_t kSegment = 1 << 16;  // entries of a segment, which has a Gram matrix of its own
constexpr int64_t kSum = 128;          // products added up one by one: rounding errors stay small
constexpr int64_t kMany = 32;          // rows; from there on a transpose of a tile pays

// Blocks that stay in registers: 16 of kBytes (8 sums hide how long an addition takes), or the 32
// of AVX-512.
template <int kRegister>
struct Narrow {
  static constexpr int kBytes = kRegister;
  static constexpr int kGramColumns = 2;     // gram_along: 4 rows x so many
  static constexpr int kGramRows = 4;        // gram_across: so many rows x kVectors
  static constexpr int kProductColumns = 4;  // product_across: so many columns x kVectors
  static constexpr int kVectors = 2;
};
struct Wide {
  static constexpr int kBytes = 64;
  static constexpr int kGramColumns = 4;
  static constexpr int kGramRows = 12;
  static constexpr int kProductColumns = 8;
  static constexpr int kVectors = 1;
};
template <class Registers, class T>
constexpr int kWidth = Registers::kBytes / sizeof(T);

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

int64_t padded(int64_t r) { return rounded_up(r, kLanes); }

bool ranks_are_contiguous(const Rows& m) { return m.row_stride == 1 && m.stride == m.r && m.r > 1; }

// At least 64: the Gram matrix and S, which are large where there are many rows, are gone through
// once for each tile or more.
int64_t tile_length(int64_t r) {
  return std::max<int64_t>(64, kTile / padded(r) / kLanes * kLanes);
}

// How a tile of `length` columns lies in memory, entry (i, k).
//   along: pages of kLanes columns, in each the rows one after the other. Few rows are read where
//          they are instead; more of them, a power of two apart, would not fit into the cache.
//   across: at k * r + i, columns one after the other. Vectors reach into what follows a column, up
//          to padded(r); what they find there is not used.
template <class T>
struct Along {
  const T* data;
  int64_t row, page;

  ADALORA_INLINE const T* at(int64_t i, int64_t k) const {
    return data + i * row + k / kLanes * page + k % kLanes;
  }
};

// Into a buffer, where entry (i, k) of a page is at i * row + k * column; padded with 0 up to
// padded(length).
template <class T>
ADALORA_INLINE void load_pages(T* buffer, const Rows& m, int64_t start, int64_t length, int64_t row,
                               int64_t column) {
  with_type(m.type, [&](auto zero) __attribute__((always_inline)) {
    const auto* p = static_cast<const decltype(zero)*>(m.data) + start * m.stride;
    for (int64_t i = 0; i < m.r; ++i) {
      for (int64_t k = 0; k < length; k += kLanes) {
        T* to = buffer + k * m.r + i * row;
        const auto* from = p + i * m.row_stride + k * m.stride;
        if (m.stride == 1 && k + kLanes <= length) {
          for (int64_t n = 0; n < kLanes; ++n) to[n * column] = static_cast<T>(from[n]);
        } else {
          for (int64_t n = 0; n < kLanes; ++n)
            to[n * column] = k + n < length ? static_cast<T>(from[n * m.stride]) : T(0);
        }
      }
    }
  });
}

// Columns [start, start + length), where they are or in the buffer.
template <class T>
ADALORA_INLINE Along<T> along(T* buffer, const Rows& m, int64_t start, int64_t length) {
  if (m.r <= 8 && m.type == type_of<T>() && m.stride == 1 && length % kLanes == 0)
    return {static_cast<const T*>(m.data) + start, m.row_stride, kLanes};
  load_pages(buffer, m, start, length, kLanes, 1);
  return {buffer, kLanes, m.r * kLanes};
}

template <int kCount, class T>
ADALORA_INLINE T sum_of(Lanes<T, kCount> v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    Lanes<T, kCount / 2> half;
    for (int n = 0; n < kCount / 2; ++n) half[n] = v[n] + v[n + kCount / 2];
    return sum_of<kCount / 2, T>(half);
  }
}

// G[i][j] += sum_k M(i, k) M(j, k) for i in [i0, i0 + I), j in [j0, j0 + J), from a tile "along".
template <int kW, int I, int J, class T>
ADALORA_INLINE void gram_along_block(T* G, int64_t r, Along<T> tile, int64_t length, int64_t i0,
                                     int64_t j0) {
  Lanes<T, kW> sums[I][J] = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    for (int64_t n = k; n < k + kLanes; n += kW) {
      Lanes<T, kW> b[J];
      for (int j = 0; j < J; ++j) b[j] = lanes_at<kW>(tile.at(j0 + j, n));
      for (int i = 0; i < I; ++i) {
        const Lanes<T, kW> a = lanes_at<kW>(tile.at(i0 + i, n));
        for (int j = 0; j < J; ++j) sums[i][j] += a * b[j];
      }
    }
  }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) G[(i0 + i) * r + j0 + j] += sum_of<kW, T>(sums[i][j]);
}

// The lower triangle, in blocks of 4 rows, and single rows and columns where r is not divisible.
template <class Registers, class T>
ADALORA_INLINE void gram_along(T* G, int64_t r, Along<T> tile, int64_t length) {
  constexpr int kW = kWidth<Registers, T>, J = Registers::kGramColumns;
  const int64_t whole = r / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4)
    for (int64_t j = 0; j < i + 4; j += J) gram_along_block<kW, 4, J>(G, r, tile, length, i, j);
  for (int64_t i = whole; i < r; ++i) {
    for (int64_t j = 0; j < whole; j += 4) gram_along_block<kW, 1, 4>(G, r, tile, length, i, j);
    for (int64_t j = whole; j <= i; ++j) gram_along_block<kW, 1, 1>(G, r, tile, length, i, j);
  }
}

// The same from a tile "across", of which J vectors of a column are multiplied at once.
template <int kW, int I, int J, class T>
ADALORA_INLINE void gram_across_block(T* G, int64_t r, const T* tile, int64_t length, int64_t i0,
                                      int64_t j0) {
  Lanes<T, kW> sums[I][J] = {};
  for (int64_t k = 0; k < length; ++k) {
    const T* column = tile + k * r;
    Lanes<T, kW> b[J];
    for (int j = 0; j < J; ++j) b[j] = lanes_at<kW>(column + j0 + j * kW);
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j) sums[i][j] += column[i0 + i] * b[j];
  }
  for (int i = 0; i < I; ++i) {
    T* row = G + (i0 + i) * r;
    for (int j = 0; j < J; ++j) {
      const int64_t first = j0 + j * kW;
      if (first + kW <= r) {
        lanes_at<kW>(row + first) += sums[i][j];
      } else {
        for (int64_t n = 0; first + n < r; ++n) row[first + n] += sums[i][j][n];
      }
    }
  }
}

template <class Registers, class T>
ADALORA_INLINE void gram_across(T* G, int64_t r, const T* tile, int64_t length) {
  constexpr int kW = kWidth<Registers, T>, J = Registers::kVectors, I = Registers::kGramRows;
  const int64_t step = std::clamp(kTile / r, kLanes, kSum);
  for (int64_t k = 0; k < length; k += step) {
    const int64_t n = std::min(step, length - k);
    for (int64_t j = 0; j < r; j += J * kW) {
      int64_t i = j;  // what is above the diagonal is not needed
      for (; i + I <= r; i += I) gram_across_block<kW, I, J>(G, r, tile + k * r, n, i, j);
      for (; i + 4 <= r; i += 4) gram_across_block<kW, 4, J>(G, r, tile + k * r, n, i, j);
      for (; i < r; ++i) gram_across_block<kW, 1, J>(G, r, tile + k * r, n, i, j);
    }
  }
}

// Adds to a Gram matrix (its lower triangle) what columns [start, start + count) give.
template <class Registers, class T>
ADALORA_INLINE void segment_gram(T* G, const Rows& m, int64_t start, int64_t count, T* buffer) {
  const int64_t r = m.r, length = tile_length(r);
  if (ranks_are_contiguous(m) && m.type == type_of<T>()) {
    // In place, but for the last columns of the matrix: nothing may follow them.
    const int64_t last = (padded(r) - r + r - 1) / r;
    const int64_t whole = std::max<int64_t>(0, std::min(count, m.length - last - start));
    gram_across<Registers>(G, r, static_cast<const T*>(m.data) + start * r, whole);
    start += whole;
    count -= whole;
  }
  for (int64_t done = 0; done < count; done += length) {
    const int64_t n = std::min(length, count - done);
    if (ranks_are_contiguous(m)) {
      load(buffer, m.data, m.type, (start + done) * r, 1, n * r);
      gram_across<Registers>(G, r, buffer, n);
    } else if (r > kMany) {
      load_pages(buffer, m, start + done, n, 1, r);
      gram_across<Registers>(G, r, buffer, n);
    } else {
      gram_along<Registers>(G, r, along(buffer, m, start + done, n), padded(n));
    }
  }
}

// S is symmetric, and lies in panels of kLanes rows: S(i, j) at j * kLanes of what this returns.
template <class T>
ADALORA_INLINE const T* panel_at(const T* S, int64_t r, int64_t i) {
  return S + i / kLanes * r * kLanes + i % kLanes;
}

// out(i, k) = sum_j S(i, j) M(j, k), from a tile "along" to rows that are out_step apart.
template <int kW, int I, class T>
ADALORA_INLINE void product_along_block(T* out, const T* S, int64_t r, Along<T> tile,
                                        int64_t out_step, int64_t i0, int64_t k, int64_t second) {
  const T *s = panel_at(S, r, i0), *b0 = tile.at(0, k), *b1 = tile.at(0, second);
  Lanes<T, kW> sums[I][2] = {};
  for (int64_t j = 0; j < r; ++j) {
    const Lanes<T, kW> v0 = lanes_at<kW>(b0 + j * tile.row), v1 = lanes_at<kW>(b1 + j * tile.row);
    for (int i = 0; i < I; ++i) {
      sums[i][0] += s[j * kLanes + i] * v0;
      sums[i][1] += s[j * kLanes + i] * v1;
    }
  }
  for (int i = 0; i < I; ++i) {
    lanes_at<kW>(out + (i0 + i) * out_step + k) = sums[i][0];
    lanes_at<kW>(out + (i0 + i) * out_step + second) = sums[i][1];
  }
}

template <class Registers, class T>
ADALORA_INLINE void product_along(T* out, const T* S, int64_t r, Along<T> tile, int64_t out_step,
                                  int64_t length) {
  constexpr int kW = kWidth<Registers, T>;
  for (int64_t k = 0; k < length; k += 2 * kW) {
    // The last of an odd number is computed twice.
    const int64_t second = std::min<int64_t>(k + kW, length - kW);
    int64_t i = 0;
    for (; i + 4 <= r; i += 4) product_along_block<kW, 4>(out, S, r, tile, out_step, i, k, second);
    for (; i < r; ++i) product_along_block<kW, 1>(out, S, r, tile, out_step, i, k, second);
  }
}

// The same for tiles "across". A column of `out` is followed by entries that are written later, or
// by room for kLanes.
template <int kW, int K, int J, class T>
ADALORA_INLINE void product_across_block(T* out, const T* S, int64_t r, const T* tile, int64_t i0,
                                         int64_t k) {
  const T* panel = panel_at(S, r, i0);
  Lanes<T, kW> sums[K][J] = {};
  for (int64_t j = 0; j < r; ++j) {
    Lanes<T, kW> s[J];
    for (int i = 0; i < J; ++i) s[i] = lanes_at<kW>(panel + j * kLanes + i * kW);
    for (int n = 0; n < K; ++n)
      for (int i = 0; i < J; ++i) sums[n][i] += tile[(k + n) * r + j] * s[i];
  }
  for (int n = 0; n < K; ++n)
    for (int i = 0; i < J; ++i) lanes_at<kW>(out + (k + n) * r + i0 + i * kW) = sums[n][i];
}

template <class Registers, class T>
ADALORA_INLINE void product_across(T* out, const T* S, int64_t r, const T* tile, int64_t length) {
  constexpr int kW = kWidth<Registers, T>, J = Registers::kVectors, K = Registers::kProductColumns;
  // From the last vectors to the first: what they write beyond their column is put right.
  for (int64_t i = rounded_up(r, J * kW) - J * kW; i >= 0; i -= J * kW) {
    int64_t k = 0;
    for (; k + K <= length; k += K) product_across_block<kW, K, J>(out, S, r, tile, i, k);
    for (; k < length; ++k) product_across_block<kW, 1, J>(out, S, r, tile, i, k);
  }
}

// Columns [start, start + count) of the gradient.
template <class Registers, class T>
ADALORA_INLINE void segment_product(const T* S, const Rows& m, const Rows& grad, int64_t start,
                                    int64_t count, bool add, T* buffer) {
  const int64_t r = m.r, length = tile_length(r);
  T* out = buffer + length * padded(r);
  for (int64_t done = 0; done < count; done += length) {
    const int64_t n = std::min(length, count - done), first = start + done;
    if (ranks_are_contiguous(m)) {
      const bool in_place = m.type == type_of<T>();
      const T* tile = in_place ? static_cast<const T*>(m.data) + first * r : buffer;
      if (!in_place) load(buffer, m.data, m.type, first * r, 1, n * r);
      product_across<Registers>(out, S, r, tile, n);
      if (ranks_are_contiguous(grad)) {
        store(out, grad.data, grad.type, first * r, 1, n * r, add);
      } else {
        for (int64_t k = 0; k < n; ++k)
          store(out + k * r, grad.data, grad.type, (first + k) * grad.stride, grad.row_stride, r,
                add);
      }
      continue;
    }
    product_along<Registers>(out, S, r, along(buffer, m, first, n), length, padded(n));
    for (int64_t i = 0; i < r; ++i)
      store(out + i * length, grad.data, grad.type, i * grad.row_stride + first * grad.stride,
            grad.stride, n, add);
  }
}

#define ADALORA_DEFINE(attribute, Registers)                                                     \
  attribute void gram(float* G, const Rows& m, int64_t start, int64_t count, float* buffer) {    \
    segment_gram<Registers>(G, m, start, count, buffer);                                         \
  }                                                                                              \
  attribute void gram(double* G, const Rows& m, int64_t start, int64_t count, double* buffer) {  \
    segment_gram<Registers>(G, m, start, count, buffer);                                         \
  }                                                                                              \
  attribute void product(const float* S, const Rows& m, const Rows& grad, int64_t start,         \
                         int64_t count, bool add, float* buffer) {                               \
    segment_product<Registers>(S, m, grad, start, count, add, buffer);                           \
  }                                                                                              \
  attribute void product(const double* S, const Rows& m, const Rows& grad, int64_t start,        \
                         int64_t count, bool add, double* buffer) {                              \
    segment_product<Registers>(S, m, grad, start, count, add, buffer);                           \
  }
ADALORA_VERSIONS(ADALORA_DEFINE)
#undef ADALORA_DEFINE

struct Segment {
  int64_t matrix, start, count;
  int64_t part;  // place of its r * r sums; those of a matrix's first segment are its residual
};

std::vector<Segment> segments_of(const std::vector<Rows>& matrices) {
  std::vector<Segment> segments;
  int64_t part = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto& m = matrices[i];
    if (m.r == 0) continue;
    const int64_t tile = tile_length(m.r);
    // Of many rows longer ones, for the r * r sums of each.
    const int64_t columns = std::max(tile, std::max(kSegment / m.r, 4 * m.r) / tile * tile);
    for (int64_t start = 0; start < m.length; start += columns) {
      const int64_t count = std::min(columns, m.length - start);
      segments.push_back({static_cast<int64_t>(i), start, count, part});
      if (start > 0) part += m.r * m.r;
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

// M * M^T, of which there is the lower triangle, to M * M^T - I; returns the norm.
template <class T>
double finish_residual(T* residual, int64_t r) {
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
  return std::sqrt(squares);
}

template <class T>
void forward(const OrthReg& op) {
  const std::vector<Segment> segments = segments_of(op.matrices);
  const std::vector<int64_t> starts = residuals_of(op.matrices);
  int64_t parts = 0;
  for (const Segment& s : segments)
    if (s.start > 0) parts += op.matrices[s.matrix].r * op.matrices[s.matrix].r;
  std::vector<T> sums(parts);
  auto* residuals = static_cast<T*>(op.residuals);
  std::fill_n(residuals, starts.back(), T(0));
  const auto count = static_cast<int64_t>(segments.size());
  for_each(count, entries_of(op.matrices), [&](int64_t i) {
    const Segment& s = segments[i];
    const Rows& m = op.matrices[s.matrix];
    T* buffer = scratch<T>(tile_length(m.r) * padded(m.r) + kLanes);
    T* G = s.start > 0 ? sums.data() + s.part : residuals + starts[s.matrix];
    gram(G, m, s.start, s.count, buffer);
  });
  for (const Segment& s : segments) {
    if (s.start == 0) continue;
    const int64_t r = op.matrices[s.matrix].r;
    const T* part = sums.data() + s.part;
    T* residual = residuals + starts[s.matrix];
    for (int64_t i = 0; i < r * r; ++i) residual[i] += part[i];
  }
  for_each(static_cast<int64_t>(op.matrices.size()), starts.back(), [&](int64_t i) {
    static_cast<T*>(op.norms)[i] =
        static_cast<T>(finish_residual(residuals + starts[i], op.matrices[i].r));
  });
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
    const int64_t r = m.r, width = padded(r), tile = tile_length(r) * width;
    T* S = scratch<T>(r * width + 2 * tile + kLanes);
    const T* residual = residuals + starts[s.matrix];
    for (int64_t i = 0; i < width; i += kLanes)
      for (int64_t j = 0; j < r; ++j)
        for (int64_t lane = 0; lane < kLanes; ++lane)
          S[i * r + j * kLanes + lane] = i + lane < r ? factor * residual[j * r + i + lane] : T(0);
    product(S, m, op.grads[s.matrix], s.start, s.count, op.accumulate, S + r * width);
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
