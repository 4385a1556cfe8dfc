// One call of a layer, and whether the launcher can serve it: every check that keeps a kernel from
// reading out of bounds is here. A function returns false where the call can't be served.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "recipe.h"
#include "tensors.h"

namespace adalora {

// Kernels count rows and columns, up to the end of a block, in 32 bits.
constexpr int64_t most_dims = 16, most_ranks = 256, most_size = INT32_MAX - 4095;

// One call of a layer: what it gets, what it makes, and what the recipe needs to know of both.
struct Call {
  Owned owned[of_workspace];      // what it gets (or a copy), and what it makes
  Strided tensors[of_workspace];  // the same
  void* data[of_workspace + most_parts] = {};
  Owned workspace;
  Scalars scalars{};
  int64_t rows = 0, in = 0, out = 0, ranks = 0;
  int32_t device = -1;
  bool is_backward = false, need_dx = false, tf32 = false, has_dropout = false;
  // Rows of x, weight, base and grad_y.
  int64_t x_strides[2] = {}, weight_strides[2] = {}, base_strides[2] = {}, grad_strides[2] = {};

  const Strided& operator[](Array array) const { return tensors[array]; }
  bool has(Array array) const { return tensors[array].handle != nullptr; }
  bool take(Array array, Owned tensor) {
    owned[array] = std::move(tensor);
    tensors[array] = Strided{};
    if (!read(owned[array].get(), tensors[array])) return false;
    data[array] = tensors[array].data;
    return true;
  }
};

// Makes a tensor contiguous that is not.
inline bool make_contiguous(Call& call, Array array) {
  if (!call.has(array) || call[array].is_contiguous()) return true;
  Owned copy = contiguous(call[array].handle);
  return copy && call.take(array, std::move(copy));
}

// Copies a tensor that is not aligned. Callers may keep the masks of all layers in one tensor, and
// whether one of them is aligned is chance, for which no kernel is to be compiled.
inline bool make_aligned(Call& call, Array array) {
  if (!call.has(array) || call[array].is_aligned()) return true;
  Owned copied = copy(call[array].handle);
  return copied && call.take(array, std::move(copied));
}

// The strides of a tensor as rows, made contiguous where they have none.
inline bool as_rows(Call& call, Array array, int64_t (&strides)[2]) {
  if (!call.has(array) || call[array].row_strides(strides)) return true;
  return make_contiguous(call, array) && call[array].row_strides(strides);
}

// Whether shapes, dtypes and devices are such that no kernel reads out of bounds.
inline bool fits(Call& call) {
  const Strided &x = call[of_x], &A = call[of_A], &B = call[of_B];
  if (x.dim < 1 || x.dim > most_dims || A.dim != 2 || B.dim != 2) return false;
  call.in = x.sizes[x.dim - 1];
  call.ranks = A.sizes[0];
  call.out = B.sizes[0];
  call.rows = 1;
  for (int64_t i = 0; i < x.dim - 1; i++) {
    if (x.sizes[i] < 1 || x.sizes[i] > most_size) return false;
    call.rows *= x.sizes[i];
    if (call.rows > most_size) return false;
  }
  if (call.in < 1 || call.in > most_size || call.out < 1 || call.out > most_size) return false;
  if (call.ranks < 1 || call.ranks > most_ranks) return false;
  const bool shapes = A.is(call.ranks, call.in) && call[of_E].is(call.ranks, 1) &&
                      B.is(call.out, call.ranks) &&
                      (!call.has(of_weight) || call[of_weight].is(call.out, call.in)) &&
                      (!call.has(of_bias) || call[of_bias].is(call.out)) &&
                      (!call.has(of_base) || call[of_base].is_beside(x, call.out)) &&
                      (!call.has(of_mask) || call[of_mask].is(call.ranks)) &&
                      (!call.has(of_seed) || call[of_seed].is(1)) &&
                      (!call.has(of_h) || call[of_h].is_beside(x, call.ranks)) &&
                      (!call.has(of_grad_y) || call[of_grad_y].is_beside(x, call.out));
  if (!shapes) return false;
  const Codes& code = codes();
  for (const Array array : {of_x, of_base, of_A, of_E, of_grad_y}) {
    if (call.has(array) && !code.is_floating(call[array].dtype)) return false;
  }
  const bool dtypes =
      B.dtype == A.dtype && (!call.has(of_weight) || call[of_weight].dtype == x.dtype) &&
      (!call.has(of_bias) || call[of_bias].dtype == x.dtype) &&
      (!call.has(of_weight) || !call.has(of_grad_y) || call[of_grad_y].dtype == x.dtype) &&
      (!call.has(of_mask) || call[of_mask].dtype == code.boolean) &&
      (!call.has(of_seed) || call[of_seed].dtype == code.int64) &&
      (!call.has(of_h) || call[of_h].dtype == code.promoted(x.dtype, A.dtype));
  if (!dtypes) return false;
  for (const Strided& t : call.tensors) {
    if (t.handle != nullptr &&
        (t.device_type != x.device_type || t.device_index != x.device_index)) {
      return false;
    }
  }
  return true;
}

// Makes contiguous what has to be, and finds the strides of the rest.
inline bool make_readable(Call& call) {
  for (const Array array : {of_bias, of_A, of_E, of_B, of_mask, of_seed, of_h}) {
    if (!make_contiguous(call, array)) return false;
  }
  if (!make_aligned(call, of_mask) || !make_aligned(call, of_seed)) return false;
  if (call.has(of_weight)) std::copy_n(call[of_weight].strides, 2, call.weight_strides);
  return as_rows(call, of_x, call.x_strides) && as_rows(call, of_base, call.base_strides) &&
         as_rows(call, of_grad_y, call.grad_strides);
}

// An uninitialised contiguous tensor on the device of x; false where there is no memory.
inline bool allocate(const Call& call, int64_t dim, const int64_t* sizes, int32_t dtype,
                     Owned& to) {
  int64_t strides[most_dims];
  for (int64_t i = dim - 1, stride = 1; i >= 0; stride *= std::max<int64_t>(sizes[i--], 1)) {
    strides[i] = stride;
  }
  AtenTensorHandle handle = nullptr;
  const Strided& x = call[of_x];
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, x.device_type, x.device_index, &handle))
    return false;
  to = Owned(handle);
  return true;
}

// One that the call makes: (..., columns) with the leading dimensions of x, or `sizes`.
inline bool make(Call& call, Array array, int64_t columns, int32_t dtype) {
  int64_t sizes[most_dims];
  const Strided& x = call[of_x];
  std::copy(x.sizes, x.sizes + x.dim - 1, sizes);
  sizes[x.dim - 1] = columns;
  Owned made;
  return allocate(call, x.dim, sizes, dtype, made) && call.take(array, std::move(made));
}
inline bool make_like(Call& call, Array array, Array like) {
  Owned made;
  return allocate(call, 2, call[like].sizes, call[like].dtype, made) &&
         call.take(array, std::move(made));
}

inline bool set_scalars(Call& call, double scaling, double dropout_p) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) return false;
  call.has_dropout = call.has(of_seed) || dropout_p > 0.0;
  call.scalars.scaling = static_cast<float>(scaling);
  // Half to even, as Python rounds.
  call.scalars.drop_below =
      static_cast<int32_t>(std::min(std::nearbyint(dropout_p * 65536.0), 65535.0));
  call.scalars.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  return true;
}

inline bool make_forward(Call& call) {
  const int32_t of_output = call.has(of_base) ? call[of_base].dtype : call[of_x].dtype;
  const int32_t of_sums = codes().promoted(call[of_x].dtype, call[of_A].dtype);
  return make(call, of_y, call.out, of_output) && make(call, of_h, call.ranks, of_sums);
}

inline bool make_backward(Call& call) {
  return make_like(call, of_dA, of_A) && make_like(call, of_dE, of_E) &&
         make_like(call, of_dB, of_B) &&
         (!call.need_dx || make(call, of_dx, call.in, call[of_x].dtype));
}

}  // namespace adalora
