"""This kernel computes y in the forward and dx in the backward, with their low-rank terms.

Both are out (M, N) = x (M, K)·w (K, N) + bias + dropout'((left ⊙ e)·right); dropout' is that of dx,
the mask and scale of dropout itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import ceil_div
from ..recipe import Array, Count, Step, Tile
from . import plans
from .common import (
    _INTERPRETED,
    ROWS,
    Call,
    Dropout,
    EffectiveE,
    LowRank,
    dot_as_stored,
    effective_e,
    keep_mask,
    wait_for_previous,
)
from .plans import Blocks

# Row blocks whose tiles are computed at the same time.
_GROUP_M = 8
# Ranks that are added at a time: the fewest that `tl.dot` takes, for they lie in registers beside a
# whole tile.
_RANKS = tl.constexpr(16)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Made(NamedTuple):
    """The operands of a GEMM that makes its own left = h = x·Aᵀ.

    a_parts (parts · R_PAD, K) are summands of A in the type of x, ready (row blocks,) zeros.
    """

    parts: int
    a_parts: Array
    ready: Array
    out_h: Array


@triton.jit
def rows_and_columns(acc, tile_m, tile_n):
    """Tell which rows and columns the tile `acc` holds."""
    rows = tile_m * acc.shape[0] + tl.arange(0, acc.shape[0])
    return rows, tile_n * acc.shape[1] + tl.arange(0, acc.shape[1])


@triton.jit
def low_rank_product(
    acc,
    low_rank,
    e,
    tile_m,
    tile_n,
    M,
    N,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    R_PAD: tl.constexpr,
):
    """Return acc + (Σ_s left[s] ⊙ e)·right for a tile; the first tile of its rows stores Σ."""
    rows, columns = rows_and_columns(acc, tile_m, tile_n)
    for first in tl.range(0, R_PAD, _RANKS, num_stages=1):
        ranks = first + tl.arange(0, _RANKS)
        inside = (rows[:, None] < M) & (ranks[None, :] < low_rank.R)
        offsets = rows.to(tl.int64)[:, None] * low_rank.R + ranks[None, :]
        left = tl.load(low_rank.left_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            part = low_rank.left_ptr + tl.cast(split, tl.int64) * M * low_rank.R
            left += tl.load(part + offsets, mask=inside, other=0.0).to(tl.float32)
        if low_rank.out_h_ptr is not None:
            tl.store(low_rank.out_h_ptr + offsets, left, mask=inside & (tile_n == 0))
        if e.E_ptr is not None:
            left *= effective_e(e, ranks, low_rank.R)[None, :]
        right = low_rank.right_ptr + ranks[:, None] * low_rank.stride_r
        right += columns.to(tl.int64)[None, :] * low_rank.stride_n
        inside = (ranks[:, None] < low_rank.R) & (columns[None, :] < N)
        v = tl.load(right, mask=inside, other=0.0)
        acc = dot_as_stored(left.to(DTYPE), v.to(DTYPE), acc, PRECISION)
    return acc


@triton.jit
def drop(acc, dropout, tile_m, tile_n, N, ALIGNED: tl.constexpr):
    """Apply dropout' to one tile."""
    rows, _ = rows_and_columns(acc, tile_m, tile_n)
    keep = keep_mask(dropout, rows, tile_n * acc.shape[1], N, acc.shape[1], ALIGNED)
    return tl.where(keep, acc * dropout.keep_scale, 0.0)


@triton.jit
def _tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Order tiles so that those of the same time share rows of x and columns of w in the L2."""
    group = tile // (GROUP_M * tiles_n)
    in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + tile % (GROUP_M * tiles_n) % in_group
    return tile_m, tile % (GROUP_M * tiles_n) // in_group


@triton.jit
def store_tile(acc, out, tile_m, tile_n, M, N, DTYPE: tl.constexpr, TMA: tl.constexpr):
    """Write one tile of out (M, N), which is a descriptor of half as many columns if TMA."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    if TMA:
        # In halves, so that the staging buffer leaves room for another pipeline stage.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N], first.to(DTYPE))
        out.store([tile_m * BLOCK_M, tile_n * BLOCK_N + BLOCK_N // 2], second.to(DTYPE))
    else:
        rows, columns = rows_and_columns(acc, tile_m, tile_n)
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], acc, mask=inside)


@triton.jit
def _make_h(
    x,
    a,
    out_h_ptr,
    ready_ptr,
    M,
    N,
    K,
    R,
    R_PAD: tl.constexpr,
    A_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first programs make h = x·Aᵀ for all, and tell for each row block that it is there.

    They are those with one tile less than the others, unless these are too few. That they are the
    first matters where not all programs run at once: none waits for one that has yet to start.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    programs = tl.num_programs(0)
    makers = programs - tiles_m * tl.cdiv(N, BLOCK_N) % programs
    # A row block takes nearly as long as a tile.
    if tl.cdiv(tiles_m, makers) > 2:
        makers = programs
    if _INTERPRETED:
        makers = 1  # One program after the other.
    blocks = tiles_m
    if tl.program_id(0) >= makers:
        blocks = 0
    ranks = tl.arange(0, R_PAD)
    for block in range(tl.program_id(0), blocks, makers):
        parts = tl.zeros((BLOCK_M, A_ROWS), tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([block * BLOCK_M, k])
            a_tile = a.load([0, k])
            fresh = tl.zeros((BLOCK_M, A_ROWS), tl.float32)
            fresh = dot_as_stored(x_tile, a_tile.T, fresh, "ieee")
            # As a sum it would be taken into the product.
            parts = tl.fma(fresh, 1.0, parts)
        h = tl.sum(tl.reshape(parts, (BLOCK_M, A_ROWS // R_PAD, R_PAD)), axis=1)
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < M) & (ranks[None, :] < R)
        tl.store(out_h_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], h, mask=inside)
        tl.debug_barrier()
        tl.atomic_xchg(ready_ptr + block, 1, sem="release")


@triton.jit(do_not_specialize=["M", "dropout"])
def _gemm_kernel(
    x,
    w,
    out,
    bias_ptr,
    a,
    out_h_ptr,
    ready_ptr,
    low_rank,
    e,
    dropout,
    M,
    N,
    K,
    x_strides,
    w_strides,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    A_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute out = x·w + bias + dropout'((Σ_s left[s] ⊙ e)·right), tile by tile; persistent.

    x, w and out are descriptors if TMA, else pointers; W_BY_ROWS: the descriptor of w is that of
    its transpose (N, K). With `a`, a descriptor of A_ROWS rows, left is made here, too.
    """
    if a is not None:
        wait_for_previous(PDL)
        _make_h(
            x, a, out_h_ptr, ready_ptr, M, N, K, low_rank.R,
            R_PAD, A_ROWS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    last = tl.num_programs(0) - 1
    for tile in range(last - tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _tile_order(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Without dropout the low-rank term comes last, so that the latency of its loads hides.
        # Dropout is that of the term alone. In half precision it comes first then, and one
        # accumulator is enough. In float32 each product would be rounded to the last place of the
        # term, which may be far larger, and so the term has an accumulator of its own.
        HALF: tl.constexpr = DTYPE.primitive_bitwidth == 16
        FIRST: tl.constexpr = dropout.seed_ptr is not None and HALF
        if FIRST:
            wait_for_previous(PDL)
            acc = low_rank_product(
                acc, low_rank, e, tile_m, tile_n, M, N, DTYPE, PRECISION, SPLITS, R_PAD
            )
            acc = drop(acc, dropout, tile_m, tile_n, N, ALIGNED)
        rows, columns = rows_and_columns(acc, tile_m, tile_n)
        if not TMA:
            reduced = tl.arange(0, BLOCK_K)
            x_tiles = x + rows.to(tl.int64)[:, None] * x_strides[0]
            x_tiles += reduced.to(tl.int64)[None, :] * x_strides[1]
            w_tiles = w + columns.to(tl.int64)[None, :] * w_strides[1]
            w_tiles += reduced.to(tl.int64)[:, None] * w_strides[0]
        for k in range(0, K, BLOCK_K):
            if TMA:
                x_tile = x.load([tile_m * BLOCK_M, k])
                n = tile_n * BLOCK_N
                w_tile = w.load([n, k]).T if W_BY_ROWS else w.load([k, n])
            else:
                inside = reduced < K - k
                x_tile = tl.load(x_tiles, mask=(rows[:, None] < M) & inside[None, :], other=0.0)
                w_tile = tl.load(w_tiles, mask=inside[:, None] & (columns[None, :] < N), other=0.0)
                x_tiles += BLOCK_K * tl.cast(x_strides[1], tl.int64)
                w_tiles += BLOCK_K * tl.cast(w_strides[0], tl.int64)
            acc = dot_as_stored(x_tile, w_tile, acc, PRECISION)
        if dropout.seed_ptr is None:
            wait_for_previous(PDL)
            if a is not None:
                while tl.atomic_add(ready_ptr + tile_m, 0, sem="acquire") == 0:
                    pass
            acc = low_rank_product(
                acc, low_rank, e, tile_m, tile_n, M, N, DTYPE, PRECISION, SPLITS, R_PAD
            )
        elif not FIRST:
            wait_for_previous(PDL)
            term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            term = low_rank_product(
                term, low_rank, e, tile_m, tile_n, M, N, DTYPE, PRECISION, SPLITS, R_PAD
            )
            acc += drop(term, dropout, tile_m, tile_n, N, ALIGNED)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        store_tile(acc, out, tile_m, tile_n, M, N, DTYPE, TMA)


def gemm(
    call: Call,
    blocks: Blocks,
    x: Array,
    w: Array,
    out: Array,
    bias: Array | None,
    low_rank: LowRank,
    e: EffectiveE,
    dropout: Dropout,
    made: Made | None = None,
) -> Step:
    """Compute out (M, n) = x (M, k)·w (k, n) + bias + dropout'((Σ_s left[s] ⊙ e)·right).

    It comes after a step that makes left, or, with `made`, what left is made from.
    """
    k, n = w.of(call.M)
    by_rows = w.strides is not None and w.strides[1] != 1
    a_rows = plans.padded_rank(made.parts * call.r_pad) if made else 0

    def tiles(matrix: Array, rows: int, columns: int) -> Array | Tile:
        return Tile(matrix, (rows, columns)) if blocks.tma else matrix

    arguments = {
        "x": tiles(x, blocks.m, blocks.k),
        "w": tiles(w.T, blocks.n, blocks.k) if by_rows else tiles(w, blocks.k, blocks.n),
        "out": tiles(out, blocks.m, blocks.n // 2),
        "bias_ptr": bias,
        "a": made and Tile(made.a_parts, (a_rows, blocks.k)),
        "out_h_ptr": made and made.out_h,
        "ready_ptr": made and made.ready,
        "low_rank": low_rank,
        "e": e,
        "dropout": dropout,
        "M": ROWS,
        "N": n,
        "K": k,
        "x_strides": x.strides,
        "w_strides": w.strides,
        "ALIGNED": dropout.is_aligned(n),
        "DTYPE": TYPES[x.dtype],
        "PRECISION": call.precision(x),
        "PDL": call.pdl,
        "TMA": blocks.tma,
        "W_BY_ROWS": by_rows,
        "A_ROWS": a_rows,
        "R_PAD": call.r_pad,
        "SPLITS": low_rank.splits,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "GROUP_M": _GROUP_M,
        **call.after_another(blocks),
    }
    programs = Count(blocks.m, ceil_div(n, blocks.n))
    if made:
        programs = Count(times=0, plus=call.device.sms)
    elif blocks.is_large:
        programs = programs._replace(most=call.device.sms)
    return Step(_gemm_kernel, (programs,), arguments)
