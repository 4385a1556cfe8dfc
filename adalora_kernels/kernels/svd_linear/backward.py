"""The backward makes the adapter's gradients in one pass over grad_y and one over x, and dx.

Each pass is two kernels: the first has every program write its part of a sum, the second adds the
parts in a fixed order. g is grad_y as rows, u = g·B, and grad_h = u ⊙ e.
"""

import torch
import triton
import triton.language as tl

from ..launch import ceil_div
from ..recipe import Array, Count, Part, Recipe, Size, Step
from . import plans
from .common import NO_E, ROWS, Call, LowRank, dot, effective_e, gradient, keep_mask
from .gemm import gemm, low_rank_add

_SUM_BLOCK, _SUM_PARTS = 1024, 16


def _rows_per_part(call: Call, column_blocks: int, blocks: plans.Blocks) -> int:
    """Split M so that parts x column blocks fill the GPU about once."""
    row_blocks = ceil_div(call.M, blocks.m)
    parts = max(1, min(call.device.sms // column_blocks, row_blocks))
    return ceil_div(row_blocks, parts) * blocks.m


def _parts(name: str, *shape: Size) -> Array:
    return Array(name, torch.float32, shape)


@triton.jit(do_not_specialize=["M", "m_per_split"])
def _g_pass_kernel(
    g_ptr,
    b_ptr,
    h_ptr,
    e,
    out_u_ptr,
    out_db_ptr,
    M,
    N,
    R,
    g_strides,
    m_per_split,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (i, s) makes u[i] (M, R) and dB[s] (N, R) of columns block i and rows part s of g."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ranks = tl.arange(0, R_PAD)
    ranks_inside = ranks[None, :] < R
    b_inside = (columns[:, None] < N) & ranks_inside
    b_offsets = columns.to(tl.int64)[:, None] * R + ranks[None, :]
    b = tl.load(b_ptr + b_offsets, mask=b_inside, other=0.0)
    e_row = effective_e(e, ranks, R)[None, :]
    g_columns = g_ptr + columns.to(tl.int64)[None, :] * g_strides[1]
    u_block = out_u_ptr + tl.program_id(0).to(tl.int64) * M * R
    db = tl.zeros((BLOCK_N, R_PAD), tl.float32)
    for m in range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        g = tl.load(
            g_columns + rows.to(tl.int64)[:, None] * g_strides[0],
            mask=(rows[:, None] < M) & (columns[None, :] < N),
            other=0.0,
        )
        h_inside = (rows[:, None] < M) & ranks_inside
        h_offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        h = tl.load(h_ptr + h_offsets, mask=h_inside, other=0.0).to(tl.float32) * e_row
        u = dot(g, b, tl.zeros((BLOCK_M, R_PAD), tl.float32), WIDE, PRECISION)
        tl.store(u_block + h_offsets, u, mask=h_inside)
        db = dot(tl.trans(g), h, db, WIDE, PRECISION)
    tl.store(out_db_ptr + split.to(tl.int64) * N * R + b_offsets, db, mask=b_inside)


def _g_pass(call: Call, g: Array) -> tuple[Step, Array, Array]:
    """Make parts of u (n_parts, M, R) and of dB (m_parts, N, R) from one read of g."""
    blocks = call.blocks("g_pass", g)
    n_parts = ceil_div(call.N, blocks.n)
    m_per_split = _rows_per_part(call, n_parts, blocks)
    m_parts = Count(m_per_split)
    u_parts = _parts("u_parts", n_parts, ROWS, call.R)
    db_parts = _parts("db_parts", m_parts, call.N, call.R)
    arguments = {
        "g_ptr": g,
        "b_ptr": call.B,
        "h_ptr": call.h,
        "e": call.e,
        "out_u_ptr": u_parts,
        "out_db_ptr": db_parts,
        "M": ROWS,
        "N": call.N,
        "R": call.R,
        "g_strides": g.strides,
        "m_per_split": m_per_split,
        **call.types(g),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        **blocks.options,
    }
    return Step(_g_pass_kernel, (n_parts, m_parts), arguments), u_parts, db_parts


@triton.jit(do_not_specialize=["M", "n_parts", "m_parts"])
def _g_reduce_kernel(
    u_parts_ptr,
    db_parts_ptr,
    h_ptr,
    e,
    out_grad_h_ptr,
    out_de_ptr,
    out_db_ptr,
    M,
    N,
    R,
    n_parts,
    m_parts,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The first programs write grad_h (M, R), float32, and parts of Σ_rows u ⊙ h; the others dB."""
    ranks = tl.arange(0, R_PAD)
    program = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    of_rows = program < row_blocks
    parts_ptr = u_parts_ptr if of_rows else db_parts_ptr
    length = M if of_rows else N
    parts = n_parts if of_rows else m_parts
    first = program if of_rows else program - row_blocks
    rows = first * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows[:, None] < length) & (ranks[None, :] < R)
    offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    total = tl.zeros((BLOCK_M, R_PAD), tl.float32)
    for part in range(parts):
        at = parts_ptr + tl.cast(part, tl.int64) * length * R + offsets
        total += tl.load(at, mask=inside, other=0.0)
    if of_rows:
        grad_h = total * effective_e(e, ranks, R)[None, :]
        tl.store(out_grad_h_ptr + offsets, grad_h, mask=inside)
        h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        de = tl.sum(total * h, axis=0)
        tl.store(out_de_ptr + program * R + ranks, de, mask=ranks < R)
    else:
        tl.store(out_db_ptr + offsets, total, mask=inside)


def _g_reduce(call: Call, u_parts: Array, db_parts: Array) -> tuple[Step, Array, Array]:
    """Make grad_h as one part (1, M, R), parts of Σ_rows u ⊙ h (parts, R), and dB."""
    blocks = call.blocks("g_reduce", call.x)
    grad_h = _parts("grad_h", 1, ROWS, call.R)
    de_parts = _parts("de_parts", Count(blocks.m), call.R)
    arguments = {
        "u_parts_ptr": u_parts,
        "db_parts_ptr": db_parts,
        "h_ptr": call.h,
        "e": call.e,
        "out_grad_h_ptr": grad_h,
        "out_de_ptr": de_parts,
        "out_db_ptr": gradient(call.B),
        "M": ROWS,
        "N": call.N,
        "R": call.R,
        "n_parts": u_parts.shape[0],
        "m_parts": db_parts.shape[0],
        "R_PAD": call.r_pad,
        "BLOCK_M": blocks.m,
        **blocks.options,
    }
    grid = (Count(blocks.m, plus=ceil_div(call.N, blocks.m)),)
    return Step(_g_reduce_kernel, grid, arguments), grad_h, de_parts


@triton.jit(do_not_specialize=["M", "m_per_split", "dropout"])
def _x_pass_kernel(
    x_ptr,
    grad_h_ptr,
    out_da_ptr,
    dropout,
    M,
    K,
    R,
    x_strides,
    m_per_split,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s) makes columns block i of dA[s] (R, K) = grad_hᵀ·dropout(x) of rows part s."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    ranks = tl.arange(0, R_PAD)
    x_columns = x_ptr + columns.to(tl.int64)[None, :] * x_strides[1]
    da = tl.zeros((BLOCK_K, R_PAD), tl.float32)
    for m in range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        x = tl.load(
            x_columns + rows.to(tl.int64)[:, None] * x_strides[0],
            mask=(rows[:, None] < M) & (columns[None, :] < K),
            other=0.0,
        )
        if dropout.seed_ptr is not None:
            first = tl.program_id(0) * BLOCK_K
            x = tl.where(keep_mask(dropout, rows, first, K, BLOCK_K, ALIGNED), x, 0.0)
        grad_h = tl.load(
            grad_h_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :],
            mask=(rows[:, None] < M) & (ranks[None, :] < R),
            other=0.0,
        )
        da = dot(tl.trans(x), grad_h, da, WIDE, PRECISION)
    # Written as (R, K), like dA.
    out = out_da_ptr + (split.to(tl.int64) * R + ranks)[None, :] * K + columns[:, None]
    inside = (columns[:, None] < K) & (ranks[None, :] < R)
    tl.store(out, da * dropout.keep_scale, mask=inside)


def _x_pass(call: Call, grad_h: Array) -> tuple[Step, Array]:
    """Make parts of dA (m_parts, R, K) from one read of x."""
    x = call.x
    blocks = call.blocks("x_pass", x)
    k_blocks = ceil_div(call.K, blocks.k)
    m_per_split = _rows_per_part(call, k_blocks, blocks)
    m_parts = Count(m_per_split)
    da_parts = _parts("da_parts", m_parts, call.R, call.K)
    arguments = {
        "x_ptr": x,
        "grad_h_ptr": grad_h,
        "out_da_ptr": da_parts,
        "dropout": call.dropout,
        "M": ROWS,
        "K": call.K,
        "R": call.R,
        "x_strides": x.strides,
        "m_per_split": m_per_split,
        "ALIGNED": call.dropout.is_aligned(call.K),
        **call.types(x),
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **blocks.options,
    }
    return Step(_x_pass_kernel, (k_blocks, m_parts), arguments), da_parts


@triton.jit(do_not_specialize=["m_parts", "de_parts"])
def _x_reduce_kernel(
    da_parts_ptr,
    de_parts_ptr,
    mask_ptr,
    out_da_ptr,
    out_de_ptr,
    numel,
    R,
    scaling,
    m_parts,
    de_parts,
    R_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The last program writes dE = scaling · mask ⊙ Σ parts; the others dA, `numel` entries."""
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(m_parts):
            at = da_parts_ptr + tl.cast(part, tl.int64) * numel + offsets
            total += tl.load(at, mask=offsets < numel, other=0.0)
        tl.store(out_da_ptr + offsets, total, mask=offsets < numel)
    else:
        ranks = tl.arange(0, R_PAD)
        de = tl.zeros((BLOCK_PARTS, R_PAD), tl.float32)
        for first in range(0, de_parts, BLOCK_PARTS):
            parts = first + tl.arange(0, BLOCK_PARTS)
            inside = (parts[:, None] < de_parts) & (ranks[None, :] < R)
            at = de_parts_ptr + parts[:, None] * R + ranks[None, :]
            de += tl.load(at, mask=inside, other=0.0)
        sums = tl.sum(de, axis=0) * scaling
        if mask_ptr is not None:
            unmasked = tl.load(mask_ptr + ranks, mask=ranks < R, other=0)
            sums = tl.where(unmasked != 0, sums, 0.0)
        tl.store(out_de_ptr + ranks, sums, mask=ranks < R)


def _x_reduce(call: Call, da_parts: Array, de_parts: Array) -> Step:
    """Make dA and dE from their parts."""
    numel = call.R * call.K
    arguments = {
        "da_parts_ptr": da_parts,
        "de_parts_ptr": de_parts,
        "mask_ptr": call.mask,
        "out_da_ptr": gradient(call.A),
        "out_de_ptr": gradient(call.E),
        "numel": numel,
        "R": call.R,
        "scaling": call.e.scaling,
        "m_parts": da_parts.shape[0],
        "de_parts": de_parts.shape[0],
        "R_PAD": call.r_pad,
        "BLOCK": _SUM_BLOCK,
        "BLOCK_PARTS": _SUM_PARTS,
        "num_warps": 4,
        "num_stages": 1,
    }
    # One program more, for dE.
    return Step(_x_reduce_kernel, (ceil_div(numel, _SUM_BLOCK) + 1,), arguments)


def _dx(call: Call, g: Array, grad_h: Array) -> tuple[Step, ...]:
    """Make dx (M, K) = g·weight + dropout'(grad_h·A), without a weight its second term alone."""
    w, dx = call.weight, gradient(call.x)
    # The last three operands of a kernel with a low-rank term.
    term = (LowRank(grad_h, call.A, None, call.R, call.K, 1), NO_E, call.dropout)
    if w is None:
        return (low_rank_add(call, None, dx, None, *term),)
    # cuBLAS would make a contiguous copy of an expanded gradient, as large as y.
    dense = g.strides is not None and 1 in g.strides and 0 not in g.strides
    possible = ("two_pass", "cublas") if dense else ("two_pass",)
    plan = call.plan("dx" if call.seed is None else "dropped dx", possible, g, w, dx)
    if plan.path == "two_pass":
        return (gemm(call, plan.gemm, g, w, dx, None, *term),)
    cublas = Step(None, (), {"x": g, "w": w, "out": dx})
    return low_rank_add(call, None, dx, None, *term), cublas


def backward_recipe(call: Call, g: Array) -> Recipe:
    """Make dA, dE, dB, and dx if it is needed."""
    g_pass, u_parts, db_parts = _g_pass(call, g)
    g_reduce, grad_h, de_parts = _g_reduce(call, u_parts, db_parts)
    x_pass, da_parts = _x_pass(call, grad_h)
    steps = (g_pass, g_reduce, x_pass, _x_reduce(call, da_parts, de_parts))
    # Parts of dA lie where those of u and dB were.
    workspace = (
        *(Part(grad_h, -1), Part(de_parts, 0)),
        *(Part(u_parts, 1), Part(db_parts, 2)),
        Part(da_parts, 1),
    )
    return Recipe(workspace, (*steps, *_dx(call, g, grad_h)) if call.need_dx else steps)
