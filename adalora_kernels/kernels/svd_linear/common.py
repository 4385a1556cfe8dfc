"""The forward and the backward share this arithmetic, and what their recipes are made from.

All sizes M, N, K, R may be odd: blocks are padded and masked. R_PAD is R rounded up to a power of
two that `tl.dot` takes, at least 16. Rows of matrices are addressed with 64 bits. A pointer that is
None switches off what it is for.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import INTERPRETED, ceil_div
from ..recipe import Array, Count, Scalar, Size
from . import plans

# Rounds of Philox-4x32; seven are the fewest that pass BigCrush (Salmon et al., SC 2011).
_ROUNDS = tl.constexpr(7)
_INTERPRETED = tl.constexpr(INTERPRETED)
# M, the number of rows.
ROWS = Count()


class EffectiveE(NamedTuple):
    """The kernels make e = scaling · E ⊙ mask from these; without E it is 1."""

    E_ptr: Array | None
    mask_ptr: Array | None
    scaling: Scalar | float


class Dropout(NamedTuple):
    """The kernels make the dropout of x from these; without a seed there is none."""

    seed_ptr: Array | None
    drop_below: Scalar | int  # of the 2¹⁶ values of an entry's random number
    keep_scale: Scalar | float

    def is_aligned(self, columns: int) -> bool:
        """Tell whether the mask of a matrix can be made for eight neighbours at once."""
        return self.seed_ptr is None or columns % 8 == 0


class LowRank(NamedTuple):
    """These are the operands of (Σ_s left[s] ⊙ e)·right, for left (S, M, R) and right (R, N).

    The kernel stores the sum, before e, in out_h (M, R), where that is not None.
    """

    left_ptr: Array | None
    right_ptr: Array
    out_h_ptr: Array | None
    R: int
    stride_r: int
    stride_n: int

    @property
    def splits(self) -> Size:
        """Return S, which is 0 where left is not there yet."""
        return 0 if self.left_ptr is None else self.left_ptr.shape[0]


def gradient(t: Array) -> Array:
    """Return the array of the gradient of x, A, E or B."""
    return Array(f"d{t.name}", t.dtype, t.shape, (*t.of(1)[1:], 1))


# What the start of a program, and writing and adding its part, take in blocks of its loop.
_ENDS = 4


def best_split(slots: int, columns: int, blocks: int, most: int) -> int:
    """Split `blocks` into at most `most` parts, for each of so many columns of programs.

    Return the fewest parts for which all are done soonest, if `slots` programs run at a time.
    """
    return min(
        range(1, max(1, min(blocks, most)) + 1),
        key=lambda parts: ceil_div(columns * parts, slots) * (ceil_div(blocks, parts) + _ENDS),
    )


NO_E = EffectiveE(None, None, 1.0)
NO_DROPOUT = Dropout(None, 0, 1.0)


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start where this one leaves room: programmatic dependent launch.

    Such a kernel may read what the call was given. What a kernel before it in the same recipe has
    written it may read, and anything at all it may write, after `wait_for_previous`, which every
    program of it has to call, so that its own end means the end of all before it.
    """
    if PDL and not _INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended and what it wrote can be read."""
    if PDL and not _INTERPRETED:
        tl.extra.cuda.gdc_wait()


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
def in_parts(w, DTYPE: tl.constexpr):
    """Return three parts whose sum is w, each exact in the type that tensor cores take it in.

    bfloat16 has the range for that; float16 has not, and takes TF32, in which its values are exact.
    """
    w = w.to(tl.float32)
    if tl.bfloat16 == DTYPE:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        return (rest - middle.to(tl.float32)).to(tl.bfloat16), middle, high
    else:
        high = _clear_low_bits(w)
        middle = _clear_low_bits(w - high)
        return (w - high) - middle, middle, high


@triton.jit
def dot(x, w, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr, STACKED: tl.constexpr = False):
    """Return acc + x·w, for w (an adapter, h or grad_h) of any floating type.

    Not WIDE: w is rounded to the type of x. WIDE: x is half precision and w counts in float32. It
    is split into three parts, whose products with x give what a float32 product would. Tensor cores
    cut off what they add, and what they cut off grows with the sum: these products are added in a
    fresh accumulator, and that to acc in float32. STACKED: the parts are side by side in one
    operand, for which x is read once instead of three times.
    """
    if not WIDE:
        return dot_as_stored(x, w.to(x.dtype), acc, PRECISION)
    low, middle, high = in_parts(w, x.dtype)
    EXACT: tl.constexpr = "ieee" if x.dtype == tl.bfloat16 else "tf32"
    x = x if x.dtype == tl.bfloat16 else x.to(tl.float32)
    if STACKED:
        four = tl.join(tl.join(low, high), tl.join(middle, tl.zeros_like(low)))  # [K, R, 2, 2]
        parts = tl.reshape(tl.permute(four, (0, 2, 3, 1)), (w.shape[0], 4 * w.shape[1]))
        product = tl.zeros((x.shape[0], 4 * w.shape[1]), tl.float32)
        product = dot_as_stored(x, parts, product, EXACT)
        return acc + tl.sum(tl.reshape(product, (x.shape[0], 4, w.shape[1])), axis=1)
    else:
        part = dot_as_stored(x, low, tl.zeros(acc.shape, tl.float32), EXACT)
        part = dot_as_stored(x, middle, part, EXACT)
        return acc + dot_as_stored(x, high, part, EXACT)


@triton.jit
def _philox(seed, counters):
    """Return four random words, uint32, for each int64 counter: Philox-4x32.

    Triton's own takes two products where one of 64 bits has both halves.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(_ROUNDS):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1, p0.to(tl.uint32)
        key0, key1 = _add(key0, 0x9E3779B9), _add(key1, 0xBB67AE85)
    return c0, c1, c2, c3


@triton.jit
def _add(key, constant: tl.constexpr):
    """Return key + constant modulo 2³². The interpreter warns of an overflow."""
    return (key.to(tl.uint64) + constant).to(tl.uint32)


@triton.jit
def keep_mask(dropout, rows, first_column, K, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Tell which entries of (rows, COLUMNS from first_column) of a (·, K) matrix dropout keeps.

    This is the twin of `reference.philox_mask`: entry i takes half i % 2 of lane i // 2 % 4 of
    counter i // 8. ALIGNED: K and first_column are multiples of 8, so that a counter serves eight
    neighbours.
    """
    seed = tl.load(dropout.seed_ptr)
    rows = rows.to(tl.int64)[:, None]
    # Halves are compared as the upper ones of words, whose lower half then makes no difference.
    if ALIGNED:
        counters = first_column // 8 + tl.arange(0, COLUMNS // 8)
        w0, w1, w2, w3 = _philox(seed, rows * (K // 8) + counters[None, :])
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [·, COLUMNS / 8, 2, 2]
        halves = tl.reshape(tl.join(words << 16, words), (rows.shape[0], COLUMNS))
    else:
        i = rows * K + (first_column + tl.arange(0, COLUMNS))[None, :]
        w0, w1, w2, w3 = _philox(seed, i // 8)
        lane = i // 2 % 4
        words = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        halves = tl.where(i % 2 == 0, words << 16, words)
    return halves >= dropout.drop_below.to(tl.uint32) << 16


@triton.jit
def effective_e(e, ranks, R):
    """Return e for these ranks in float32, and 0 for padding."""
    values = tl.load(e.E_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32) * e.scaling
    if e.mask_ptr is not None:
        unmasked = tl.load(e.mask_ptr + ranks, mask=ranks < R, other=0)
        values = tl.where(unmasked != 0, values, 0.0)
    return values


class Call(NamedTuple):
    """A `Call` is all that a recipe depends on, of one forward (without grad_y) or backward.

    x, weight, base and grad_y have strides; all other arrays are contiguous.
    """

    M: int  # as `plans.rows_bucket` has it
    N: int
    K: int
    R: int
    x: Array
    weight: Array | None
    bias: Array | None
    base: Array | None  # of svd_delta, which has no weight
    A: Array
    E: Array
    B: Array
    mask: Array | None
    seed: Array | None
    h: Array
    grad_y: Array | None
    aligned: frozenset[str]  # the names of matrices that descriptors, or wide vectors, can read
    need_dx: bool
    tf32: bool
    path: str | plans.Plan
    device: plans.Device

    @property
    def y(self) -> Array:
        """Return the result of the forward."""
        return Array("y", (self.base or self.x).dtype, (ROWS, self.N), (self.N, 1))

    @property
    def e(self) -> EffectiveE:
        """Return the operands of e."""
        return EffectiveE(self.E, self.mask, Scalar("scaling"))

    @property
    def dropout(self) -> Dropout:
        """Return the operands of dropout."""
        return Dropout(self.seed, Scalar("drop_below"), Scalar("keep_scale"))

    @property
    def pdl(self) -> bool:
        """Tell whether the GPU has programmatic dependent launch."""
        return self.device.family in ("sm_90", "sm_100")

    @property
    def r_pad(self) -> int:
        """Return the R_PAD of the kernels."""
        return plans.padded_rank(self.R)

    def is_wide(self, t: Array) -> bool:
        """Tell whether the adapter counts in float32 although the matrix `t` does not."""
        return torch.promote_types(self.x.dtype, self.A.dtype) == torch.float32 != t.dtype

    def precision(self, t: Array) -> str:
        """Return the PRECISION of products in the type of `t`."""
        return "tf32" if self.tf32 and t.dtype == torch.float32 else "ieee"

    def types(self, t: Array) -> dict[str, object]:
        """Tell kernels how they multiply the matrix `t` with the adapter."""
        return {"WIDE": self.is_wide(t), "PRECISION": self.precision(t), "R_PAD": self.r_pad}

    def blocks(self, kernel: str, t: Array) -> plans.Blocks:
        """Look up the configuration of a pass over the matrix `t`."""
        aligned = t.name in self.aligned
        wide, M = self.is_wide(t), self.M
        return plans.pass_blocks(kernel, self.device, M, self.r_pad, t.dtype, wide, aligned)

    def after_another(self, blocks: plans.Blocks) -> dict[str, int]:
        """Return the launch options of a step that is not the first one of its recipe."""
        overlaps = self.grad_y is None or self.M <= plans.MOST_OVERLAPPING_ROWS
        return {**blocks.options, "launch_pdl": True} if self.pdl and overlaps else blocks.options

    def plan(
        self, product: str, possible: tuple[str, ...], x: Array, w: Array, out: Array
    ) -> plans.Plan:
        """Choose the plan for out (M, n) = x (M, k)·w (k, n)."""
        k, n = w.of(self.M)
        problem = plans.Problem(x.dtype, self.M, k, n, self.r_pad, product)
        aligned = self.aligned.issuperset((x.name, w.name, out.name))
        return plans.choose(self.device, problem, self.path, possible, aligned)
