"""The forward makes h by a down projection, and y by one of three paths (see the package)."""

import torch
import triton
import triton.language as tl

from ..launch import ceil_div
from ..recipe import Array, Count, Part, Recipe, Step
from . import plans
from .common import (
    NO_DROPOUT,
    ROWS,
    Call,
    LowRank,
    best_split,
    dot,
    in_parts,
    keep_mask,
    let_next_start,
    wait_for_previous,
)
from .gemm import TYPES, Made, gemm, low_rank_product, rows_and_columns, store_tile


@triton.jit(do_not_specialize=["M", "dropout"])
def _down_kernel(
    x_ptr,
    a_ptr,
    out_h_ptr,
    dropout,
    M,
    K,
    R,
    x_strides,
    k_per_split,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s) writes rows block i of h[s] (M, R) = dropout(x)·Aᵀ over part s of K."""
    let_next_start(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    ranks = tl.arange(0, R_PAD)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_strides[0]
    a_rows = a_ptr + ranks.to(tl.int64)[:, None] * K
    start = split * k_per_split
    h = tl.zeros((BLOCK_M, R_PAD), tl.float32)
    for k in range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns[None, :] < K
        x = tl.load(
            x_rows + columns.to(tl.int64)[None, :] * x_strides[1],
            mask=(rows[:, None] < M) & inside,
            other=0.0,
        )
        if dropout.seed_ptr is not None:
            x = tl.where(keep_mask(dropout, rows, k, K, BLOCK_K, ALIGNED), x, 0.0)
        a = tl.load(a_rows + columns[None, :], mask=(ranks[:, None] < R) & inside, other=0.0)
        h = dot(x, tl.trans(a), h, WIDE, PRECISION)
    out = out_h_ptr + (split.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(out, h * dropout.keep_scale, mask=(rows[:, None] < M) & (ranks[None, :] < R))


def _down(call: Call) -> tuple[Step, Array]:
    """Make h, and return what it is written to: h as one part (1, M, R), or more (splits, M, R)."""
    blocks = call.blocks("down", call.x)
    k_blocks = ceil_div(call.K, blocks.k)
    most = plans.MOST_SPLITS_OF_FEW if call.M <= plans.FEWEST_ROWS else plans.MOST_SPLITS
    # Each program has at least four blocks to pipeline.
    slots = call.device.sms * blocks.programs
    splits = best_split(slots, ceil_div(call.M, blocks.m), k_blocks, min(k_blocks // 4, most))
    k_per_split = ceil_div(k_blocks, splits) * blocks.k
    splits = ceil_div(call.K, k_per_split)
    name, dtype = ("h", call.h.dtype) if splits == 1 else ("h_parts", torch.float32)
    parts = Array(name, dtype, (splits, ROWS, call.R))
    arguments = {
        "x_ptr": call.x,
        "a_ptr": call.A,
        "out_h_ptr": parts,
        "dropout": call.dropout,
        "M": ROWS,
        "K": call.K,
        "R": call.R,
        "x_strides": call.x.strides,
        "k_per_split": k_per_split,
        "ALIGNED": call.dropout.is_aligned(call.K),
        **call.types(call.x),
        "PDL": call.pdl,
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **blocks.options,
    }
    return Step(_down_kernel, (Count(blocks.m), splits), arguments), parts


@triton.jit(do_not_specialize=["M"])
def _low_rank_add_kernel(
    base_ptr,
    out_ptr,
    bias_ptr,
    low_rank,
    e,
    M,
    N,
    base_strides,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    SPLITS: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program i computes tile i of out = base + bias + (Σ_s left[s] ⊙ e)·right."""
    wait_for_previous(PDL)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) % tiles_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = low_rank_product(acc, low_rank, e, tile_m, tile_n, M, N, DTYPE, PRECISION, SPLITS, R_PAD)
    rows, columns = rows_and_columns(acc, tile_m, tile_n)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        base = base_ptr + rows.to(tl.int64)[:, None] * base_strides[0]
        base += columns.to(tl.int64)[None, :] * base_strides[1]
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        acc += tl.load(base, mask=inside, other=0.0).to(tl.float32)
    store_tile(acc, out_ptr, tile_m, tile_n, M, N, DTYPE, False)


def _low_rank_add(call: Call, base: Array | None, bias: Array | None, low_rank: LowRank) -> Step:
    """Make y (M, N) = base + bias + (Σ_s left[s] ⊙ e)·right, after a step that makes left."""
    y = call.y
    blocks = call.blocks("low_rank_add", base or y)
    arguments = {
        "base_ptr": base,
        "out_ptr": y,
        "bias_ptr": bias,
        "low_rank": low_rank,
        "e": call.e,
        "M": ROWS,
        "N": call.N,
        "base_strides": (0, 0) if base is None else base.strides,
        "DTYPE": TYPES[y.dtype],
        "PRECISION": call.precision(y),
        "PDL": call.pdl,
        "SPLITS": low_rank.splits,
        "R_PAD": call.r_pad,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        **call.after_another(blocks),
    }
    grid = (Count(blocks.m, ceil_div(call.N, blocks.n)),)
    return Step(_low_rank_add_kernel, grid, arguments)


@triton.jit(do_not_specialize=["row_blocks"])
def _split_kernel(
    a_ptr,
    out_parts_ptr,
    out_ready_ptr,
    K,
    R,
    row_blocks,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write A as a sum of PARTS matrices (R_PAD, K) of the type of x, and zeros to `ready`."""
    let_next_start(PDL)
    ranks = tl.arange(0, R_PAD)[:, None]
    columns = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    a = tl.load(a_ptr + ranks.to(tl.int64) * K + columns, mask=(ranks < R) & (columns < K), other=0)
    DTYPE: tl.constexpr = out_parts_ptr.dtype.element_ty
    parts = in_parts(a, DTYPE) if PARTS == 3 else (a.to(DTYPE),)
    for part in tl.static_range(PARTS):
        at = out_parts_ptr + (part * R_PAD + ranks).to(tl.int64) * K + columns
        tl.store(at, parts[part], mask=columns < K)
    for first in range(tl.program_id(0) * BLOCK_K, row_blocks, tl.num_programs(0) * BLOCK_K):
        blocks = first + tl.arange(0, BLOCK_K)
        tl.store(out_ready_ptr + blocks, tl.zeros_like(blocks), mask=blocks < row_blocks)


def _split(call: Call, blocks: plans.Blocks) -> tuple[Step, Made]:
    """Make from A what the GEMM makes h from."""
    parts = 3 if call.is_wide(call.x) else 1
    a_parts = Array("a_parts", call.x.dtype, (parts * call.r_pad, call.K), (call.K, 1))
    ready = Array("ready", torch.int32, (Count(blocks.m),))
    arguments = {
        "a_ptr": call.A,
        "out_parts_ptr": a_parts,
        "out_ready_ptr": ready,
        "K": call.K,
        "R": call.R,
        "row_blocks": Count(blocks.m),
        "PARTS": parts,
        "PDL": call.pdl,
        "R_PAD": call.r_pad,
        "BLOCK_K": 128,
        "num_warps": 4,
        "num_stages": 1,
    }
    return Step(_split_kernel, (ceil_div(call.K, 128),), arguments), Made(
        parts, a_parts, ready, call.h
    )


def _can_fuse(call: Call) -> bool:
    """Tell whether the GEMM can make h, if its tiles allow it."""
    # Parts of A that float16 can hold would not add up to A; and what the tensor cores read is x
    # as it is stored, without dropout.
    exact = not call.is_wide(call.x) or call.x.dtype == torch.bfloat16
    return exact and call.seed is None


def forward_recipe(call: Call) -> Recipe:
    """Make y and h, by svd_linear where there is a weight, by svd_delta where there is a base."""
    x, y, bias = call.x, call.y, call.bias
    plan = None
    if call.weight is not None:
        w = call.weight.T
        possible = plans.PATHS if _can_fuse(call) else ("two_pass", "cublas")
        plan = call.plan("y", possible, x, w, y)
        if plan.path == "fused":
            split, made = _split(call, plan.gemm)
            h = call.h._replace(shape=(1, *call.h.shape))
            term = LowRank(h, call.B, None, call.R, 1, call.R)
            made_from = (Part(made.a_parts, -1), Part(made.ready, 0))
            product = gemm(call, plan.gemm, x, w, y, bias, term, call.e, NO_DROPOUT, made)
            return Recipe(made_from, (split, product))
    down, parts = _down(call)
    # The kernel of the low-rank term stores h, unless the one part is h itself.
    out_h = None if parts.name == "h" else call.h
    workspace = () if out_h is None else (Part(parts, -1),)
    term = LowRank(parts, call.B, out_h, call.R, 1, call.R)
    if plan is None:
        return Recipe(workspace, (down, _low_rank_add(call, call.base, None, term)))
    if plan.path == "two_pass":
        product = gemm(call, plan.gemm, x, w, y, bias, term, call.e, NO_DROPOUT)
        return Recipe(workspace, (down, product))
    cublas = Step(None, (), {"x": x, "w": w, "out": y})
    return Recipe(workspace, (down, _low_rank_add(call, None, bias, term), cublas))
