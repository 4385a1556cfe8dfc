"""The forward and the backward share this arithmetic, and the operands of one call.

All sizes M, N, K, R may be odd: blocks are padded and masked. R_PAD is R rounded up to a power of
two that `tl.dot` takes, at least 16. Rows of matrices are addressed with 64 bits. A pointer that is
None switches off what it is for.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED
from . import plans

# Rounds of Philox-4x32; seven are the fewest that pass BigCrush (Salmon et al., SC 2011).
_ROUNDS = tl.constexpr(7)
_INTERPRETED = tl.constexpr(INTERPRETED)


class EffectiveE(NamedTuple):
    """The kernels make e = scaling · E ⊙ mask from these; without E it is 1."""

    E_ptr: Tensor | None
    mask_ptr: Tensor | None
    scaling: float


class Dropout(NamedTuple):
    """The kernels make the dropout of x from these; without a seed there is none."""

    seed_ptr: Tensor | None
    drop_below: int  # of the 2¹⁶ values of an entry's random number
    keep_scale: float

    def is_aligned(self, columns: int) -> bool:
        """Tell whether the mask of a matrix can be made for eight neighbours at once."""
        return self.seed_ptr is None or columns % 8 == 0


class LowRank(NamedTuple):
    """These are the operands of (Σ_s left[s] ⊙ e)·right, for left (S, M, R) and right (R, N).

    The kernel stores the sum, before e, in out_h (M, R), where that is not None.
    """

    left_ptr: Tensor | None
    right_ptr: Tensor
    out_h_ptr: Tensor | None
    R: int
    stride_r: int
    stride_n: int

    @property
    def splits(self) -> int:
        """Return S, which is 0 where left is not there yet."""
        return 0 if self.left_ptr is None else len(self.left_ptr)


NO_E = EffectiveE(None, None, 1.0)
NO_DROPOUT = Dropout(None, 0, 1.0)


@triton.jit
def dot_as_stored(x, w, acc, PRECISION: tl.constexpr):
    """Return acc + x·w. The interpreter multiplies the raw bits of bfloat16 (triton #11584)."""
    if _INTERPRETED:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def _clear_low_bits(w):
    """Cut float32 to the 11 significant bits that TF32 has."""
    return (w.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(x, w, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x·w, for w (an adapter, h or grad_h) of any floating type.

    Not WIDE: w is rounded to the type of x. WIDE: x is half precision and w counts in float32. It
    is split into three parts of the tensor cores' own type, whose sum is w, so that three products
    give what a float32 product would. bfloat16 has the range for that; float16 has not, and takes
    TF32, in which its values are exact.
    """
    if not WIDE:
        return dot_as_stored(x, w.to(x.dtype), acc, PRECISION)
    w = w.to(tl.float32)
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = dot_as_stored(x, low, acc, "ieee")
        acc = dot_as_stored(x, middle, acc, "ieee")
        return dot_as_stored(x, high, acc, "ieee")
    x = x.to(tl.float32)
    high = _clear_low_bits(w)
    middle = _clear_low_bits(w - high)
    acc = dot_as_stored(x, (w - high) - middle, acc, "tf32")
    acc = dot_as_stored(x, middle, acc, "tf32")
    return dot_as_stored(x, high, acc, "tf32")


@triton.jit
def keep_mask(dropout, rows, first_column, K, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Tell which entries of (rows, COLUMNS from first_column) of a (·, K) matrix dropout keeps.

    This is the twin of `reference.philox_mask`: entry i takes half i % 2 of lane i // 2 % 4 of
    counter i // 8. ALIGNED: K and first_column are multiples of 8, so that a counter serves eight
    neighbours.
    """
    seed = tl.load(dropout.seed_ptr)
    rows = rows.to(tl.int64)[:, None]
    if ALIGNED:
        counters = first_column // 8 + tl.arange(0, COLUMNS // 8)
        w0, w1, w2, w3 = tl.randint4x(seed, rows * (K // 8) + counters[None, :], _ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [·, COLUMNS / 8, 2, 2]
        halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
        halves = tl.reshape(halves, (rows.shape[0], COLUMNS))
    else:
        i = rows * K + (first_column + tl.arange(0, COLUMNS))[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, i // 8, _ROUNDS)
        lane = i // 2 % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        halves = (tl.where(i % 2 == 0, word, word >> 16)) & 0xFFFF
    return halves.to(tl.int32) >= dropout.drop_below


@triton.jit
def effective_e(e, ranks, R):
    """Return e for these ranks in float32, and 0 for padding."""
    values = tl.load(e.E_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32) * e.scaling
    if e.mask_ptr is not None:
        unmasked = tl.load(e.mask_ptr + ranks, mask=ranks < R, other=0)
        values = tl.where(unmasked != 0, values, 0.0)
    return values


def as_rows(t: Tensor) -> Tensor:
    """Reshape (..., n) to (rows, n): a view wherever strides allow, also of expanded gradients."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def precision(dtype: torch.dtype) -> str:
    """Return the PRECISION of products in this type, which is what torch allows its own."""
    # allow_tf32, which is the same setting, raises where the newer name has been used.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def is_aligned(t: Tensor) -> bool:
    """Tell whether this matrix can be read by descriptors, and by vectors of at least 16 bytes."""
    rows = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    return rows and (t.stride(0) | t.shape[1] | t.data_ptr()) % 16 == 0


def all_aligned(x: Tensor, w: Tensor, out: Tensor) -> bool:
    """Tell whether all of out = x·w are aligned, w by its rows or by its columns."""
    return is_aligned(x) and is_aligned(w if w.stride(1) == 1 else w.T) and is_aligned(out)


class LayerOperands:
    """`LayerOperands` are x, the adapter and the dropout of one call, as the kernels take them."""

    def __init__(
        self,
        x: Tensor,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        device: plans.Device | None,
    ) -> None:
        self.x = as_rows(x)
        self.A, self.E, self.B = A.contiguous(), E.contiguous(), B.contiguous()
        self.mask = None if mask is None else mask.contiguous()
        self.e = EffectiveE(self.E, self.mask, scaling)
        drop_below = min(round(dropout_p * 2**16), 2**16 - 1)
        self.dropout = Dropout(seed, drop_below, 1.0 / (1.0 - dropout_p))
        self.M, self.K = self.x.shape
        self.R, self.N = A.shape[0], B.shape[0]
        self.r_pad = plans.padded_rank(self.R)
        self.h_dtype = torch.promote_types(x.dtype, A.dtype)
        self.device = device or plans.device_of(x.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate a tensor, and leave it as it is."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def is_wide(self, t: Tensor) -> bool:
        """Tell whether the adapter counts in float32 although the matrix `t` does not."""
        return self.h_dtype == torch.float32 != t.dtype

    def blocks(self, kernel: str, t: Tensor) -> plans.Blocks:
        """Look up the configuration of a pass over the matrix `t`."""
        return plans.pass_blocks(
            kernel, self.device, self.r_pad, t.dtype, self.is_wide(t), is_aligned(t)
        )

    def types(self, t: Tensor) -> dict[str, object]:
        """Tell kernels how they multiply the matrix `t` with the adapter."""
        return {"WIDE": self.is_wide(t), "PRECISION": precision(t.dtype), "R_PAD": self.r_pad}
