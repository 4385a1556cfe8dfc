"""The backward makes the adapter's gradients in one pass over grad_y and one over x, and dx.

In each pass every program writes its part of a sum, and the parts are added in a fixed order: those
of the pass over grad_y by a kernel of their own, since each program has a share in two sums, those
of the pass over x by whichever program is the last to write one. g is grad_y as rows, u = g·B, and
grad_h = u ⊙ e.
"""

import torch
import triton
import triton.language as tl

from ..launch import ceil_div
from ..recipe import Array, Count, Part, Recipe, Size, Step
from . import plans
from .common import (
    NO_E,
    ROWS,
    Call,
    LowRank,
    best_split,
    dot,
    dot_as_stored,
    effective_e,
    gradient,
    keep_mask,
    let_next_start,
    wait_for_previous,
)
from .gemm import drop, gemm, low_rank_product, store_tile


def _rows_per_part(call: Call, column_blocks: int, blocks: plans.Blocks) -> int:
    """Split M so that parts x column blocks are done soonest."""
    row_blocks = ceil_div(call.M, blocks.m)
    parts = best_split(call.device.sms * blocks.programs, column_blocks, row_blocks, row_blocks)
    return ceil_div(row_blocks, parts) * blocks.m


def _stacked(call: Call, t: Array) -> bool:
    """Tell whether the parts of a split operand are multiplied with `t` side by side.

    More ranks fill the tensor cores, so that reading `t` once would not be faster. Where it is in
    registers, after dropout or before sm_90, all products find it there.
    """
    in_registers = t.name == "x" and call.seed is not None
    return call.r_pad == 16 and call.device.family == "sm_90" and not in_registers


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
    STACKED: tl.constexpr,
    PDL: tl.constexpr,
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
        u = tl.zeros((BLOCK_M, R_PAD), tl.float32)
        u = dot(g, b, u, WIDE, PRECISION, STACKED)
        tl.store(u_block + h_offsets, u, mask=h_inside)
        db = dot(tl.trans(g), h, db, WIDE, PRECISION, STACKED)
    let_next_start(PDL)
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
        "STACKED": _stacked(call, g),
        "PDL": call.pdl,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        **blocks.options,
    }
    return Step(_g_pass_kernel, (n_parts, m_parts), arguments), u_parts, db_parts


@triton.jit
def _sum_of_parts(parts_ptr, parts, numel, offsets, inside):
    """Return the sum over `parts` arrays of `numel` entries each, at these offsets."""
    total = tl.zeros(offsets.shape, tl.float32)
    # Several parts are under way at a time.
    PARTS: tl.constexpr = max(1, 8192 // offsets.shape[0])
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        at = parts_ptr + part.to(tl.int64) * numel + offsets[None, :]
        total += tl.sum(tl.load(at, mask=inside[None, :] & (part < parts), other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["M", "n_parts", "m_parts"])
def _g_reduce_kernel(
    u_parts_ptr,
    db_parts_ptr,
    h_ptr,
    e,
    out_grad_h_ptr,
    out_de_ptr,
    out_db_ptr,
    out_written_ptr,
    M,
    N,
    R,
    n_parts,
    m_parts,
    x_columns,
    PDL: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The first programs write grad_h (M, R), float32, and parts of Σ_rows u ⊙ h; the others dB.

    All write zeros to `written`, of which each columns block of the pass over x has one.
    """
    wait_for_previous(PDL)
    program = tl.program_id(0)
    row_blocks = tl.cdiv(M, BLOCK_M)
    of_rows = program < row_blocks
    parts_ptr = u_parts_ptr if of_rows else db_parts_ptr
    length = M if of_rows else N
    parts = n_parts if of_rows else m_parts
    first = program if of_rows else program - row_blocks
    entries = tl.arange(0, BLOCK_M * R_PAD)
    rows, ranks = first * BLOCK_M + entries // R_PAD, entries % R_PAD
    inside = (rows < length) & (ranks < R)
    offsets = rows.to(tl.int64) * R + ranks
    total = _sum_of_parts(parts_ptr, parts, tl.cast(length, tl.int64) * R, offsets, inside)
    for column in range(program, x_columns, tl.num_programs(0)):
        tl.store(out_written_ptr + column, 0)
    let_next_start(PDL)
    if of_rows:
        tl.store(out_grad_h_ptr + offsets, total * effective_e(e, ranks, R), mask=inside)
        h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        de = tl.sum(tl.reshape(total * h, (BLOCK_M, R_PAD)), axis=0)
        columns = tl.arange(0, R_PAD)
        tl.store(out_de_ptr + program * R + columns, de, mask=columns < R)
    else:
        tl.store(out_db_ptr + offsets, total, mask=inside)


def _g_reduce(
    call: Call, u_parts: Array, db_parts: Array, written: Array
) -> tuple[Step, Array, Array]:
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
        "out_written_ptr": written,
        "M": ROWS,
        "N": call.N,
        "R": call.R,
        "n_parts": u_parts.shape[0],
        "m_parts": db_parts.shape[0],
        "x_columns": written.shape[0],
        "PDL": call.pdl,
        "R_PAD": call.r_pad,
        "BLOCK_M": blocks.m,
        **call.after_another(blocks),
    }
    grid = (Count(blocks.m, plus=ceil_div(call.N, blocks.m)),)
    return Step(_g_reduce_kernel, grid, arguments), grad_h, de_parts


@triton.jit
def _is_last(written_ptr):
    """Tell whether this program is the last of its column to have written, so that it may read."""
    tl.debug_barrier()
    return tl.atomic_add(written_ptr, 1, sem="acq_rel") == tl.num_programs(1) - 1


@triton.jit
def _store_da(
    parts_ptr, parts, out_da_ptr, first, K, R, R_PAD: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Write BLOCK_K columns of dA (R, K), from the first on, as the sum of their parts."""
    entries = tl.arange(0, R_PAD * BLOCK_K)
    ranks, columns = entries // BLOCK_K, first + entries % BLOCK_K
    inside = (ranks < R) & (columns < K)
    offsets = ranks.to(tl.int64) * K + columns
    numel = tl.cast(R, tl.int64) * K
    tl.store(out_da_ptr + offsets, _sum_of_parts(parts_ptr, parts, numel, offsets, inside), inside)


@triton.jit
def _store_de(de_parts_ptr, de_parts, out_de_ptr, e, R, R_PAD: tl.constexpr):
    """Write dE = scaling · mask ⊙ Σ parts."""
    ranks = tl.arange(0, R_PAD)
    de = _sum_of_parts(de_parts_ptr, de_parts, R, ranks, ranks < R) * e.scaling
    if e.mask_ptr is not None:
        unmasked = tl.load(e.mask_ptr + ranks, mask=ranks < R, other=0)
        de = tl.where(unmasked != 0, de, 0.0)
    tl.store(out_de_ptr + ranks, de, mask=ranks < R)


@triton.jit(do_not_specialize=["M", "m_per_split", "dropout", "de_parts"])
def _x_pass_kernel(
    x_ptr,
    grad_h_ptr,
    de_parts_ptr,
    inout_written_ptr,
    inout_parts_ptr,
    out_da_ptr,
    out_de_ptr,
    out_dx_ptr,
    low_rank,
    no_e,
    e,
    dropout,
    M,
    K,
    R,
    x_strides,
    m_per_split,
    de_parts,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    STACKED: tl.constexpr,
    PDL: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s) adds up columns block i of dA (R, K) = grad_hᵀ·dropout(x) over rows part s.

    The last program of a columns block adds the parts, and that of the first block dE. Each
    writes its part of the low-rank term of dx, dropout'(grad_h·A), if that is given.
    """
    wait_for_previous(PDL)
    column, split = tl.program_id(0), tl.program_id(1)
    columns = column * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, R_PAD)
    x_columns = x_ptr + columns.to(tl.int64)[None, :] * x_strides[1]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # With more ranks the two sums do not fit beside one another.
    AT_ONCE: tl.constexpr = out_dx_ptr is not None and R_PAD <= 64
    if AT_ONCE:
        a = low_rank.right_ptr + ranks.to(tl.int64)[:, None] * K + columns[None, :]
        a = tl.load(a, mask=(ranks[:, None] < R) & (columns[None, :] < K), other=0.0).to(DTYPE)
    da = tl.zeros((BLOCK_K, R_PAD), tl.float32)
    for m in range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < M) & (columns[None, :] < K)
        x = tl.load(x_columns + rows.to(tl.int64)[:, None] * x_strides[0], mask=inside, other=0.0)
        if dropout.seed_ptr is not None:
            keep = keep_mask(dropout, rows, column * BLOCK_K, K, BLOCK_K, ALIGNED)
            x = tl.where(keep, x, 0.0)
        grad_h = tl.load(
            grad_h_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :],
            mask=(rows[:, None] < M) & (ranks[None, :] < R),
            other=0.0,
        )
        da = dot(tl.trans(x), grad_h, da, WIDE, PRECISION, STACKED)
        if AT_ONCE:
            dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            dx = dot_as_stored(grad_h.to(DTYPE), a, dx, PRECISION)
            if dropout.seed_ptr is not None:
                dx = tl.where(keep, dx * dropout.keep_scale, 0.0)
            store_tile(dx, out_dx_ptr, m // BLOCK_M, column, M, K, DTYPE, False)
    if out_dx_ptr is not None and not AT_ONCE:
        for m in range(split * m_per_split, tl.minimum((split + 1) * m_per_split, M), BLOCK_M):
            tile = m // BLOCK_M
            dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            dx = low_rank_product(
                dx, low_rank, no_e, tile, column, M, K, DTYPE, PRECISION, 1, R_PAD
            )
            if dropout.seed_ptr is not None:
                dx = drop(dx, dropout, tile, column, K, ALIGNED)
            store_tile(dx, out_dx_ptr, tile, column, M, K, DTYPE, False)
    let_next_start(PDL)
    # Written as (R, K), like dA.
    part = inout_parts_ptr + (split.to(tl.int64) * R + ranks)[None, :] * K + columns[:, None]
    inside = (columns[:, None] < K) & (ranks[None, :] < R)
    tl.store(part, da * dropout.keep_scale, mask=inside)
    if _is_last(inout_written_ptr + column):
        parts = tl.num_programs(1)
        _store_da(inout_parts_ptr, parts, out_da_ptr, column * BLOCK_K, K, R, R_PAD, BLOCK_K)
        if column == 0:
            _store_de(de_parts_ptr, de_parts, out_de_ptr, e, R, R_PAD)


def _term_of_dx(call: Call, grad_h: Array) -> LowRank:
    return LowRank(grad_h, call.A, None, call.R, call.K, 1)


def _x_pass(
    call: Call,
    blocks: plans.Blocks,
    grad_h: Array,
    de_parts: Array,
    written: Array,
    dx: Array | None,
) -> tuple[Step, Array]:
    """Make dA and dE, and the low-rank term of dx if it is given, from one read of x."""
    x = call.x
    k_blocks = ceil_div(call.K, blocks.k)
    m_per_split = _rows_per_part(call, k_blocks, blocks)
    m_parts = Count(m_per_split)
    da_parts = _parts("da_parts", m_parts, call.R, call.K)
    arguments = {
        "x_ptr": x,
        "grad_h_ptr": grad_h,
        "de_parts_ptr": de_parts,
        "inout_written_ptr": written,
        "inout_parts_ptr": da_parts,
        "out_da_ptr": gradient(call.A),
        "out_de_ptr": gradient(call.E),
        "out_dx_ptr": dx,
        "low_rank": dx and _term_of_dx(call, grad_h),
        "no_e": NO_E,
        "e": call.e,
        "dropout": call.dropout,
        "M": ROWS,
        "K": call.K,
        "R": call.R,
        "x_strides": x.strides,
        "m_per_split": m_per_split,
        "de_parts": de_parts.shape[0],
        "ALIGNED": call.dropout.is_aligned(call.K),
        **call.types(x),
        "STACKED": _stacked(call, x),
        "PDL": call.pdl,
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **call.after_another(blocks),
    }
    return Step(_x_pass_kernel, (k_blocks, m_parts), arguments), da_parts


def _product_of_dx(call: Call, g: Array, grad_h: Array) -> Step | None:
    """Make dx (M, K) = g·weight + dropout'(grad_h·A), or add g·weight to the second term by cuBLAS.

    Without a weight dx is the second term alone.
    """
    w, dx = call.weight, gradient(call.x)
    if w is None:
        return None
    # cuBLAS would make a contiguous copy of an expanded gradient, as large as y.
    dense = g.strides is not None and 1 in g.strides and 0 not in g.strides
    possible = ("two_pass", "cublas") if dense else ("two_pass",)
    plan = call.plan("dx" if call.seed is None else "dropped dx", possible, g, w, dx)
    if plan.path == "cublas":
        return Step(None, (), {"x": g, "w": w, "out": dx})
    return gemm(call, plan.gemm, g, w, dx, None, _term_of_dx(call, grad_h), NO_E, call.dropout)


def backward_recipe(call: Call, g: Array) -> Recipe:
    """Make dA, dE, dB, and dx if it is needed."""
    blocks = call.blocks("x_pass", call.x)
    written = Array("written", torch.int32, (ceil_div(call.K, blocks.k),))
    g_pass, u_parts, db_parts = _g_pass(call, g)
    g_reduce, grad_h, de_parts = _g_reduce(call, u_parts, db_parts, written)
    product = _product_of_dx(call, g, grad_h) if call.need_dx else None
    # What cuBLAS adds to, or what there is without a weight, the pass over x writes.
    writes_dx = call.need_dx and (product is None or product.kernel is None)
    dx = gradient(call.x) if writes_dx else None
    x_pass, da_parts = _x_pass(call, blocks, grad_h, de_parts, written, dx)
    # Parts of dA lie where those of u and dB were.
    workspace = (
        *(Part(grad_h, -1), Part(de_parts, 0), Part(written, 1)),
        *(Part(u_parts, 2), Part(db_parts, 3)),
        Part(da_parts, 2),
    )
    steps = (g_pass, g_reduce, x_pass)
    return Recipe(workspace, steps if product is None else (*steps, product))
