// The orthogonality regulariser of a whole model: Gram matrices and their norms in one launch, the
// gradient in another. Tiles pass through shared memory as [row][k] whichever way the matrix lies
// in global memory, so that both are read and written in whole lines.
#include <algorithm>
#include <limits>

#include "common.cuh"
#include "ops.h"

namespace adalora::cuda {
namespace {

// Blocks of a multiprocessor: as many as registers allow without spilling.
constexpr int kBlocks = 3;
constexpr int kDoubleBlocks = 2;

// A thread keeps kSide x kSide entries of a product in registers.
constexpr int kSide = 4;

// At most kRows rows of a matrix are worked on at once, kEntries of it are in shared memory.
template <class Compute>
struct Tile {
  static constexpr int kRows = sizeof(Compute) == 4 ? 64 : 32;
  static constexpr int kEntries = sizeof(Compute) == 4 ? 4096 : 2048;
  static constexpr int kTilesPerTask = 4;

  // Rows are kSide entries longer than what they hold: they then start in different banks.
  static constexpr int kPadded = kEntries + kRows * kSide;

  // The entries of each row that are in shared memory at once. `rows` is a multiple of kSide.
  __host__ __device__ static constexpr int length(int rows) { return kEntries / rows / 32 * 32; }
};

// Of a matrix as Rows has it: entry (i, k) at data[i * row_stride + k * stride].
struct View {
  void* data;
  int64_t row_stride, stride;
};

// along_k: neighbours in memory are neighbours along k, not along i. vectors: four of them may be
// moved at once.
struct Layout {
  uint8_t type : 4;
  uint8_t along_k : 1;
  uint8_t vectors : 1;
};

// What a tile in shared memory shows of a matrix: `rows` x `length` entries from (row, column) on.
// The matrix ends before row_end and column_end.
struct Window {
  int row, row_end, rows;
  int column, column_end, length;
  int pitch;  // in shared memory
};

struct GramTask {
  View matrix;
  int64_t residual;  // offset into residuals
  int64_t parts;     // offset into the workspace: r * r entries for every split
  int32_t r, length;
  int32_t index;     // among all matrices
  uint32_t first_task;
  Layout layout;
};

struct ProductTask {
  View matrix, grad;
  int64_t residual;
  int32_t r, length;
  uint32_t first_task;
  Layout layout, grad_layout;
};

// 224 adapters have to fit into one launch.
static_assert(Table<GramTask>::kCapacity >= 2 * 224);
static_assert(Table<ProductTask>::kCapacity >= 2 * 224);

template <class Compute>
struct alignas(16) Quad {
  Compute at[kSide];
};

template <class Compute>
__device__ Quad<Compute> read_quad(const Compute* from) {
  return *reinterpret_cast<const Quad<Compute>*>(from);
}

template <class Compute>
__device__ void write_quad(Compute* to, const Quad<Compute>& quad) {
  *reinterpret_cast<Quad<Compute>*>(to) = quad;
}

__device__ int smaller(int a, int b) { return a < b ? a : b; }

// The vectors of V entries of a window that this thread moves, in batches. Neighbouring threads get
// neighbours in memory.
template <class Compute, int V, bool kAlongK>
class Walk {
 public:
  static constexpr int kVectors = Tile<Compute>::kEntries / V / kThreads;
  // More loads than these in flight don't fit into the registers.
  static constexpr int kBatch = kVectors < 8 ? kVectors : 8;

  __device__ explicit Walk(const Window& window)
      : fast_extent_((kAlongK ? window.length : window.rows) / V),
        slow_extent_(kAlongK ? window.rows : window.length),
        slow_(static_cast<int>(threadIdx.x) / fast_extent_),
        fast_(static_cast<int>(threadIdx.x) - slow_ * fast_extent_) {}

  // visit(n, i, k) for the next kBatch vectors, the n-th of which starts at (i, k).
  template <class Visit>
  __device__ void next(Visit visit) {
    const int slow_step = kThreads / fast_extent_;
    const int fast_step = kThreads - slow_step * fast_extent_;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (slow_ < slow_extent_) {
        visit(n, kAlongK ? slow_ : fast_ * V, kAlongK ? fast_ * V : slow_);
      }
      slow_ += slow_step;
      fast_ += fast_step;
      if (fast_ >= fast_extent_) {
        fast_ -= fast_extent_;
        ++slow_;
      }
    }
  }

 private:
  int fast_extent_, slow_extent_;
  int slow_, fast_;
};

__device__ bool is_inside(const Window& window, int i, int k) {
  return window.row + i < window.row_end && window.column + k < window.column_end;
}

__device__ int64_t index_of(const View& view, const Window& window, int i, int k) {
  return (window.row + i) * view.row_stride + (window.column + k) * view.stride;
}

// shared[i * pitch + k] = what the window shows at (i, k), 0 outside of the matrix.
template <class Compute, int V, bool kAlongK>
__device__ void stage_vectors(const View& view, Type type, const Window& window, Compute* shared) {
  using Way = Walk<Compute, V, kAlongK>;
  Way reading(window);
  Way writing(window);
#pragma unroll 1
  for (int start = 0; start < Way::kVectors; start += Way::kBatch) {
    Bits<Compute, V> bits[Way::kBatch] = {};
    reading.next([&](int n, int i, int k) {
      if (is_inside(window, i, k)) {
        bits[n] = load<Compute, V, false>(view.data, type, index_of(view, window, i, k));
      }
    });
    writing.next([&](int n, int i, int k) {
      Compute* to = shared + i * window.pitch + k;
      if constexpr (V == kSide && kAlongK) {
        Quad<Compute> quad;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          quad.at[e] = decode(bits[n], type, e);
        }
        write_quad(to, quad);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          to[kAlongK ? e : e * window.pitch] = decode(bits[n], type, e);
        }
      }
    });
  }
}

template <class Compute>
__device__ void stage(const View& view, Layout layout, const Window& window, Compute* shared) {
  const Type type = static_cast<Type>(layout.type);
  if (layout.vectors) {
    if (layout.along_k) {
      stage_vectors<Compute, kWidth<Compute>, true>(view, type, window, shared);
    } else {
      stage_vectors<Compute, kWidth<Compute>, false>(view, type, window, shared);
    }
  } else if (layout.along_k) {
    stage_vectors<Compute, 1, true>(view, type, window, shared);
  } else {
    stage_vectors<Compute, 1, false>(view, type, window, shared);
  }
}

// The way back: what the window shows of the matrix = shared, plus what was there.
template <class Compute, int V, bool kAlongK>
__device__ void write_vectors(const View& view, Type type, const Window& window, bool accumulate,
                              const Compute* shared) {
  using Way = Walk<Compute, V, kAlongK>;
  Way reading(window);
  Way writing(window);
#pragma unroll 1
  for (int start = 0; start < Way::kVectors; start += Way::kBatch) {
    Bits<Compute, V> bits[Way::kBatch] = {};
    if (accumulate) {
      reading.next([&](int n, int i, int k) {
        if (is_inside(window, i, k)) {
          bits[n] = load<Compute, V, false>(view.data, type, index_of(view, window, i, k));
        }
      });
    }
    writing.next([&](int n, int i, int k) {
      if (is_inside(window, i, k)) {
        const Compute* from = shared + i * window.pitch + k;
        Bits<Compute, V> sum = {};
#pragma unroll
        for (int e = 0; e < V; ++e) {
          encode(sum, type, e, decode(bits[n], type, e) + from[kAlongK ? e : e * window.pitch]);
        }
        store(view.data, type, index_of(view, window, i, k), sum);
      }
    });
  }
}

template <class Compute>
__device__ void write(const View& view, Layout layout, const Window& window, bool accumulate,
                      const Compute* shared) {
  const Type type = static_cast<Type>(layout.type);
  if (layout.vectors) {
    if (layout.along_k) {
      write_vectors<Compute, kWidth<Compute>, true>(view, type, window, accumulate, shared);
    } else {
      write_vectors<Compute, kWidth<Compute>, false>(view, type, window, accumulate, shared);
    }
  } else if (layout.along_k) {
    write_vectors<Compute, 1, true>(view, type, window, accumulate, shared);
  } else {
    write_vectors<Compute, 1, false>(view, type, window, accumulate, shared);
  }
}

// How a Gram matrix is cut: into tiles of kRows x kRows on and above the diagonal, each of these
// into sums over `split` entries of the rows.
template <class Compute>
struct Cut {
  int split, splits, tiles;

  __host__ __device__ Cut(int r, int length) {
    const int most = Tile<Compute>::kRows;
    const int rows = r == 0 ? kSide : r < most ? round_up(r, kSide) : most;
    split = Tile<Compute>::kTilesPerTask * Tile<Compute>::length(rows);
    splits = length == 0 ? 1 : ceil_div(length, split);
    tiles = r == 0 ? 1 : ceil_div(r, most);
  }

  __host__ __device__ int64_t tasks() const {
    return int64_t{splits} * tiles * (tiles + 1) / 2;
  }
};

struct Pair {
  int i, j;
};

// The n-th pair i <= j < extent.
__device__ Pair unrank_pair(int n, int extent) {
  int i = 0;
  for (; n >= extent - i; ++i) {
    n -= extent - i;
  }
  return {i, i + n};
}

// One tile of the Gram matrix, summed over columns begin .. end - 1, to part (r x r).
template <class Compute>
__device__ void add_gram_tile(const GramTask& task, Pair tile, int begin, int end, Compute* shared,
                              Compute* part) {
  constexpr int kRows = Tile<Compute>::kRows;
  const int tid = static_cast<int>(threadIdx.x);
  const bool diagonal = tile.i == tile.j;
  const int row_i = tile.i * kRows;
  const int row_j = tile.j * kRows;
  const int rows_i = round_up(smaller(kRows, task.r - row_i), kSide);
  const int rows_j = round_up(smaller(kRows, task.r - row_j), kSide);
  const int staged = diagonal ? rows_i : rows_i + rows_j;
  const int length = smaller(Tile<Compute>::length(staged), round_up(end - begin, 32));
  const int pitch = length + kSide;
  const Compute* shared_j = diagonal ? shared : shared + rows_i * pitch;

  // A unit is kSide x kSide entries of the tile. As many threads as there is room for share one,
  // each with its own slice of k.
  const int side_i = rows_i / kSide;
  const int side_j = rows_j / kSide;
  const int units = diagonal ? side_i * (side_i + 1) / 2 : side_i * side_j;
  const int slices = Tile<Compute>::kEntries / (kSide * kSide) / units;
  const int active = units * slices;
  const int slice = tid % slices;
  auto unit_at = [&](int n) {
    return diagonal ? unrank_pair(n, side_i) : Pair{n / side_j, n % side_j};
  };
  const Pair own = tid < active ? unit_at(tid / slices) : Pair{0, 0};

  Compute sums[kSide][kSide] = {};
  for (int column = begin; column < end; column += length) {
    // A loop, because the code of `stage` is long.
#pragma unroll 1
    for (int side = 0; side < (diagonal ? 1 : 2); ++side) {
      const int row = side == 0 ? row_i : row_j;
      const int rows = side == 0 ? rows_i : rows_j;
      stage(task.matrix, task.layout, {row, task.r, rows, column, end, length, pitch},
            shared + side * rows_i * pitch);
    }
    __syncthreads();
    if (tid < active) {
      const Compute* x = shared + own.i * kSide * pitch;
      const Compute* y = shared_j + own.j * kSide * pitch;
      const int used = smaller(length, end - column);
      for (int k = slice * kSide; k < used; k += slices * kSide) {
        Quad<Compute> rows_y[kSide];
#pragma unroll
        for (int b = 0; b < kSide; ++b) {
          rows_y[b] = read_quad(y + b * pitch + k);
        }
#pragma unroll
        for (int a = 0; a < kSide; ++a) {
          const Quad<Compute> row_x = read_quad(x + a * pitch + k);
#pragma unroll
          for (int b = 0; b < kSide; ++b) {
#pragma unroll
            for (int e = 0; e < kSide; ++e) {
              sums[a][b] = std::fma(row_x.at[e], rows_y[b].at[e], sums[a][b]);
            }
          }
        }
      }
    }
    __syncthreads();
  }

  if (tid < active) {
#pragma unroll
    for (int e = 0; e < kSide * kSide; ++e) {
      shared[e * active + tid] = sums[e / kSide][e % kSide];
    }
  }
  __syncthreads();
  for (int n = tid; n < units * kSide * kSide; n += kThreads) {
    const int e = n / units;
    const int unit = n % units;
    const Pair at = unit_at(unit);
    const int i = row_i + at.i * kSide + e / kSide;
    const int j = row_j + at.j * kSide + e % kSide;
    Compute sum = 0;
    for (int s = 0; s < slices; ++s) {
      sum += shared[e * active + unit * slices + s];
    }
    if (i < task.r && j < task.r) {
      part[int64_t{i} * task.r + j] = sum;
    }
  }
}

// The parts of one matrix, all there, become its residual and norm.
template <class Compute>
__device__ void finish_matrix(const GramTask& task, int splits, const Compute* parts,
                              Compute* residual, Compute* norm, Compute* shared, Compute* scratch) {
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t size = int64_t{task.r} * task.r;
  Compute squares = 0;
  for (int64_t n = tid; n < size; n += kThreads) {
    const int64_t i = n / task.r;
    const int64_t j = n % task.r;
    // Below the diagonal is what is above it.
    const Compute* part = parts + (i < j ? n : j * task.r + i);
    Compute sum = 0;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      sum += part[split * size];
    }
    const Compute value = i == j ? sum - 1 : sum;
    residual[n] = value;
    squares = std::fma(value, value, squares);
  }
  shared[tid] = squares;
  sum_columns(shared, kThreads, 1, scratch, [&](int, Compute sum) { *norm = std::sqrt(sum); });
}

// The block that is the last to add its part to a matrix finishes it.
template <class Compute>
__global__ void __launch_bounds__(kThreads, sizeof(Compute) == 4 ? kBlocks : kDoubleBlocks)
    gram(__grid_constant__ const Table<GramTask> table, uint32_t* counters, Compute* workspace,
         Compute* residuals, Compute* norms) {
  // Two windows have to fit, each with its own padding.
  alignas(16) __shared__ Compute shared[Tile<Compute>::kPadded + Tile<Compute>::kRows * kSide];
  __shared__ Compute scratch[kThreads];
  for (uint32_t n = blockIdx.x; n < table.tasks; n += gridDim.x) {
    const GramTask& task = table.entries[table.find(n)];
    const Cut<Compute> cut(task.r, task.length);
    const int pairs = cut.tiles * (cut.tiles + 1) / 2;
    const int own = static_cast<int>(n - task.first_task);
    Compute* parts = workspace + task.parts;
    if (task.r > 0) {
      const int split = own / pairs;
      const int begin = split * cut.split;
      add_gram_tile(task, unrank_pair(own % pairs, cut.tiles), begin,
                    smaller(cut.split, task.length - begin) + begin, shared,
                    parts + int64_t{split} * task.r * task.r);
    }
    __threadfence();
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      last = atomicAdd(&counters[task.index], 1u) == static_cast<uint32_t>(cut.tasks()) - 1;
    }
    if (__syncthreads_or(last)) {
      __threadfence();
      finish_matrix(task, cut.splits, parts, residuals + task.residual, norms + task.index, shared,
                    scratch);
    }
  }
}

// How the product residual * M is cut: into rows as Tile has them, and into kTilesPerTask tiles.
template <class Compute>
struct ProductCut {
  int length, per_task, splits, tiles;

  __host__ __device__ ProductCut(int r, int columns) {
    const int most = Tile<Compute>::kRows;
    const int rows = r == 0 ? kSide : r < most ? round_up(r, kSide) : most;
    length = Tile<Compute>::length(rows);
    per_task = Tile<Compute>::kTilesPerTask * length;
    splits = ceil_div(columns, per_task);
    tiles = ceil_div(r, most);
  }
};

// grads = 2 * grad_norm / norm * residual * M, or that added.
template <class Compute>
__global__ void __launch_bounds__(kThreads, sizeof(Compute) == 4 ? kBlocks : kDoubleBlocks)
    multiply(__grid_constant__ const Table<ProductTask> table, const Compute* grad_norms,
             const Compute* norms, const Compute* residuals, bool accumulate) {
  constexpr int kRows = Tile<Compute>::kRows;
  constexpr int kResidualPitch = kRows + kSide;
  alignas(16) __shared__ Compute shared[Tile<Compute>::kPadded];
  alignas(16) __shared__ Compute residual[kRows * kResidualPitch];  // transposed: [j][i]
  const int tid = static_cast<int>(threadIdx.x);
  for (uint32_t n = blockIdx.x; n < table.tasks; n += gridDim.x) {
    const int index = table.find(n);
    const ProductTask& task = table.entries[index];
    const ProductCut<Compute> cut(task.r, task.length);
    const int own = static_cast<int>(n - task.first_task);
    const int row_i = own % cut.tiles * kRows;
    const int rows_i = round_up(smaller(kRows, task.r - row_i), kSide);
    const int begin = own / cut.tiles * cut.per_task;
    const int end = begin + smaller(cut.per_task, task.length - begin);
    const int pitch = cut.length + kSide;
    const Compute norm = norms[index];
    const Compute factor = norm > 0 ? 2 * grad_norms[index] / norm : 0;

    const int units = cut.length / kSide;
    const int unit_i = tid / units * kSide;
    const int unit_k = tid % units * kSide;
    for (int column = begin; column < end; column += cut.length) {
      Compute sums[kSide][kSide] = {};
      for (int row_j = 0; row_j < task.r; row_j += kRows) {
        const int rows_j = round_up(smaller(kRows, task.r - row_j), kSide);
        // A matrix of one tile needs it once.
        if (column == begin || task.r > kRows) {
          for (int e = tid; e < rows_i * rows_j; e += kThreads) {
            const int i = e / rows_j;
            const int j = e % rows_j;
            const bool inside = row_i + i < task.r && row_j + j < task.r;
            const int64_t at = int64_t{row_i + i} * task.r + row_j + j;
            residual[j * kResidualPitch + i] =
                inside ? factor * residuals[task.residual + at] : Compute(0);
          }
        }
        stage(task.matrix, task.layout,
              {row_j, task.r, rows_j, column, end, cut.length, pitch}, shared);
        __syncthreads();
        if (unit_i < rows_i) {
          for (int j = 0; j < rows_j; ++j) {
            const Quad<Compute> x = read_quad(residual + j * kResidualPitch + unit_i);
            const Quad<Compute> y = read_quad(shared + j * pitch + unit_k);
#pragma unroll
            for (int a = 0; a < kSide; ++a) {
#pragma unroll
              for (int b = 0; b < kSide; ++b) {
                sums[a][b] = std::fma(x.at[a], y.at[b], sums[a][b]);
              }
            }
          }
        }
        __syncthreads();
      }
      if (unit_i < rows_i) {
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
          write_quad(shared + (unit_i + i) * pitch + unit_k,
                     Quad<Compute>{sums[i][0], sums[i][1], sums[i][2], sums[i][3]});
        }
      }
      __syncthreads();
      write(task.grad, task.grad_layout,
            {row_i, task.r, rows_i, column, end, cut.length, pitch}, accumulate, shared);
      __syncthreads();
    }
  }
}

Layout layout_of(const Rows& rows) {
  Layout layout = {};
  layout.type = static_cast<uint8_t>(rows.type);
  layout.along_k = rows.r <= 1 || rows.stride <= rows.row_stride;
  const int64_t near = layout.along_k ? rows.stride : rows.row_stride;
  const int64_t far = layout.along_k ? rows.row_stride : rows.stride;
  const int64_t extent = layout.along_k ? rows.length : rows.r;
  const bool starts_aligned = is_aligned(rows.data, rows.type) && (rows.r == 1 || far % 4 == 0);
  layout.vectors = near == 1 && extent % 4 == 0 && starts_aligned;
  return layout;
}

// Whether the kernels' integers can hold the sizes and their arithmetic the entries.
bool is_supported(const std::vector<Rows>& matrices, Type type) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  return std::all_of(matrices.begin(), matrices.end(), [type](const Rows& rows) {
    return rows.r < kMost && rows.length < kMost &&
           (rows.type != Type::float64 || type == Type::float64);
  });
}

template <class Compute>
Cut<Compute> cut_of(const Rows& rows) {
  return Cut<Compute>(static_cast<int>(rows.r), static_cast<int>(rows.length));
}

int64_t counter_bytes(const OrthReg& op) {
  return round_up<int64_t>(static_cast<int64_t>(op.matrices.size()) * 4, 256);
}

template <class Compute>
int64_t part_bytes(const OrthReg& op) {
  int64_t entries = 0;
  for (const Rows& rows : op.matrices) {
    entries += cut_of<Compute>(rows).splits * rows.r * rows.r;
  }
  return entries * static_cast<int64_t>(sizeof(Compute));
}

template <class Compute>
cudaError_t run(const OrthReg& op, void* workspace, cudaStream_t stream) {
  auto* counters = static_cast<uint32_t*>(workspace);
  auto* parts =
      reinterpret_cast<Compute*>(static_cast<char*>(workspace) + counter_bytes(op));
  const cudaError_t error = cudaMemsetAsync(counters, 0, 4 * op.matrices.size(), stream);
  if (error != cudaSuccess) {
    return error;
  }
  auto launch_gram = [&](const Table<GramTask>& table) {
    return launch_table(gram<Compute>, sizeof(Compute) == 4 ? kBlocks : kDoubleBlocks, stream,
                        table, counters, parts, static_cast<Compute*>(op.residuals),
                        static_cast<Compute*>(op.norms));
  };
  TableWriter<GramTask, decltype(launch_gram)> writer(launch_gram);
  GramTask task = {};
  for (const Rows& rows : op.matrices) {
    task.matrix = {rows.data, rows.row_stride, rows.stride};
    task.layout = layout_of(rows);
    task.r = static_cast<int32_t>(rows.r);
    task.length = static_cast<int32_t>(rows.length);
    const Cut<Compute> cut = cut_of<Compute>(rows);
    writer.add(task, cut.tasks());
    ++task.index;
    task.residual += rows.r * rows.r;
    task.parts += cut.splits * rows.r * rows.r;
  }
  return writer.finish();
}

template <class Compute>
cudaError_t run(const OrthRegBackward& op, cudaStream_t stream) {
  const auto* grad_norms = static_cast<const Compute*>(op.grad_norms);
  const auto* norms = static_cast<const Compute*>(op.norms);
  auto launch_multiply = [&](const Table<ProductTask>& table) {
    const cudaError_t error =
        launch_table(multiply<Compute>, sizeof(Compute) == 4 ? kBlocks : kDoubleBlocks, stream,
                     table, grad_norms, norms, static_cast<const Compute*>(op.residuals),
                     op.accumulate);
    grad_norms += table.count;
    norms += table.count;
    return error;
  };
  TableWriter<ProductTask, decltype(launch_multiply)> writer(launch_multiply);
  ProductTask task = {};
  for (size_t i = 0; i < op.matrices.size(); ++i) {
    const Rows& rows = op.matrices[i];
    const Rows& grad = op.grads[i];
    task.matrix = {rows.data, rows.row_stride, rows.stride};
    task.grad = {grad.data, grad.row_stride, grad.stride};
    task.layout = layout_of(rows);
    task.grad_layout = layout_of(grad);
    task.r = static_cast<int32_t>(rows.r);
    task.length = static_cast<int32_t>(rows.length);
    const ProductCut<Compute> cut(task.r, task.length);
    writer.add(task, int64_t{cut.splits} * cut.tiles);
    task.residual += rows.r * rows.r;
  }
  return writer.finish();
}

}  // namespace

int64_t orth_reg_workspace(const OrthReg& op) {
  return counter_bytes(op) +
         (op.type == Type::float64 ? part_bytes<double>(op) : part_bytes<float>(op));
}

cudaError_t orth_reg(const OrthReg& op, void* workspace, cudaStream_t stream) {
  if (!is_supported(op.matrices, op.type)) {
    return cudaErrorInvalidValue;
  }
  return op.type == Type::float64 ? run<double>(op, workspace, stream)
                                  : run<float>(op, workspace, stream);
}

cudaError_t orth_reg_backward(const OrthRegBackward& op, cudaStream_t stream) {
  if (!is_supported(op.matrices, op.type) || !is_supported(op.grads, op.type)) {
    return cudaErrorInvalidValue;
  }
  return op.type == Type::float64 ? run<double>(op, stream) : run<float>(op, stream);
}

}  // namespace adalora::cuda
