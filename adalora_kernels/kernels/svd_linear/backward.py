"""The backward makes the adapter's gradients in one pass over grad_y and one over x, and dx.

Each pass is two kernels: the first has every program write its part of a sum, the second adds the
parts in a fixed order. g is grad_y as rows, u = g·B, and grad_h = u ⊙ e.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, launch, launch_cublas
from . import plans
from .common import NO_E, LayerOperands, LowRank, all_aligned, as_rows, dot, effective_e, keep_mask
from .gemm import gemm, low_rank_add

_SUM_BLOCK, _SUM_PARTS = 1024, 16


def _split_rows(layer: LayerOperands, column_blocks: int, blocks: plans.Blocks) -> tuple[int, int]:
    """Split M into (parts, rows per part) so that parts x column blocks fill the GPU about once."""
    row_blocks = ceil_div(layer.M, blocks.m)
    parts = max(1, min(layer.device.sms // column_blocks, row_blocks))
    per_part = ceil_div(row_blocks, parts) * blocks.m
    return ceil_div(layer.M, per_part), per_part


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


def _g_pass(layer: LayerOperands, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return parts of u (n_parts, M, R) and of dB (m_parts, N, R) from one read of g."""
    blocks = layer.blocks("g_pass", g)
    n_parts = ceil_div(layer.N, blocks.n)
    m_parts, m_per_split = _split_rows(layer, n_parts, blocks)
    u_parts = layer.new(n_parts, layer.M, layer.R)
    db_parts = layer.new(m_parts, layer.N, layer.R)
    arguments = {
        "g_ptr": g,
        "b_ptr": layer.B,
        "h_ptr": h,
        "e": layer.e,
        "out_u_ptr": u_parts,
        "out_db_ptr": db_parts,
        "M": layer.M,
        "N": layer.N,
        "R": layer.R,
        "g_strides": g.stride(),
        "m_per_split": m_per_split,
        **layer.types(g),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        **blocks.options,
    }
    launch(_g_pass_kernel, (n_parts, m_parts), arguments)
    return u_parts, db_parts


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


def _g_reduce(
    layer: LayerOperands, u_parts: Tensor, db_parts: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad_h as one part (1, M, R), parts of Σ_rows u ⊙ h (parts, R), and dB."""
    blocks = layer.blocks("g_reduce", layer.x)
    row_blocks = ceil_div(layer.M, blocks.m)
    grad_h = layer.new(1, layer.M, layer.R)
    de_parts = layer.new(row_blocks, layer.R)
    dB = torch.empty_like(layer.B)
    arguments = {
        "u_parts_ptr": u_parts,
        "db_parts_ptr": db_parts,
        "h_ptr": h,
        "e": layer.e,
        "out_grad_h_ptr": grad_h,
        "out_de_ptr": de_parts,
        "out_db_ptr": dB,
        "M": layer.M,
        "N": layer.N,
        "R": layer.R,
        "n_parts": len(u_parts),
        "m_parts": len(db_parts),
        "R_PAD": layer.r_pad,
        "BLOCK_M": blocks.m,
        **blocks.options,
    }
    grid = (row_blocks + ceil_div(layer.N, blocks.m),)
    launch(_g_reduce_kernel, grid, arguments)
    return grad_h, de_parts, dB


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


def _x_pass(layer: LayerOperands, grad_h: Tensor) -> Tensor:
    """Return parts of dA (m_parts, R, K) from one read of x."""
    x = layer.x
    blocks = layer.blocks("x_pass", x)
    k_blocks = ceil_div(layer.K, blocks.k)
    m_parts, m_per_split = _split_rows(layer, k_blocks, blocks)
    da_parts = layer.new(m_parts, layer.R, layer.K)
    arguments = {
        "x_ptr": x,
        "grad_h_ptr": grad_h,
        "out_da_ptr": da_parts,
        "dropout": layer.dropout,
        "M": layer.M,
        "K": layer.K,
        "R": layer.R,
        "x_strides": x.stride(),
        "m_per_split": m_per_split,
        "ALIGNED": layer.dropout.is_aligned(layer.K),
        **layer.types(x),
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **blocks.options,
    }
    launch(_x_pass_kernel, (k_blocks, m_parts), arguments)
    return da_parts


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


def _x_reduce(layer: LayerOperands, da_parts: Tensor, de_parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return dA and dE from their parts."""
    dA, dE = torch.empty_like(layer.A), torch.empty_like(layer.E)
    numel = layer.R * layer.K
    arguments = {
        "da_parts_ptr": da_parts,
        "de_parts_ptr": de_parts,
        "mask_ptr": layer.mask,
        "out_da_ptr": dA,
        "out_de_ptr": dE,
        "numel": numel,
        "R": layer.R,
        "scaling": layer.e.scaling,
        "m_parts": len(da_parts),
        "de_parts": len(de_parts),
        "R_PAD": layer.r_pad,
        "BLOCK": _SUM_BLOCK,
        "BLOCK_PARTS": _SUM_PARTS,
        "num_warps": 4,
        "num_stages": 1,
    }
    # One program more, for dE.
    launch(_x_reduce_kernel, (ceil_div(numel, _SUM_BLOCK) + 1,), arguments)
    return dA, dE


def _adapter_grads(
    layer: LayerOperands, g: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return grad_h as one part (1, M, R), dA, dE and dB; the workspace is free again then."""
    u_parts, db_parts = _g_pass(layer, g, h)
    grad_h, de_parts, dB = _g_reduce(layer, u_parts, db_parts, h)
    dA, dE = _x_reduce(layer, _x_pass(layer, grad_h), de_parts)
    return grad_h, dA, dE, dB


def _dx(
    layer: LayerOperands, g: Tensor, weight: Tensor | None, grad_h: Tensor, path: str | plans.Plan
) -> Tensor:
    """Return dx (M, K) = g·weight + dropout'(grad_h·A), without a weight its second term alone."""
    dx = layer.new(layer.M, layer.K, dtype=layer.x.dtype)
    low_rank = LowRank(grad_h, layer.A, None, layer.R, *layer.A.stride())
    if weight is None:
        low_rank_add(layer, None, dx, low_rank, NO_E, layer.dropout)
        return dx
    # cuBLAS would make a contiguous copy of an expanded gradient, as large as y.
    dense = 1 in g.stride() and 0 not in g.stride()
    possible = ("two_pass", "cublas") if dense else ("two_pass",)
    product = "dx" if layer.dropout.seed_ptr is None else "dropped dx"
    problem = plans.Problem(g.dtype, layer.M, layer.N, layer.K, layer.r_pad, product)
    plan = plans.choose(layer.device, problem, path, possible, all_aligned(g, weight, dx))
    if plan.path == "two_pass":
        gemm(layer, plan.gemm, g, weight, dx, None, low_rank, NO_E, layer.dropout)
    else:
        launch_cublas(g, weight, None, dx)
        low_rank_add(layer, dx, dx, low_rank, NO_E, layer.dropout)
    return dx


def svd_linear_bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    h: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    path: str | plans.Plan = "auto",
    device: plans.Device | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (dx, dA, dE, dB) of `reference.svd_linear_backward`, dx empty unless `need_dx`.

    The limits and the last two arguments are those of `svd_linear_fwd`.

    Args:
        weight: None for the backward of svd_delta, whose opaque base has a backward of its own.
    """
    layer = LayerOperands(x, A, E, B, mask, scaling, dropout_p, seed, device)
    g = as_rows(grad_y)
    grad_h, dA, dE, dB = _adapter_grads(layer, g, as_rows(h))
    if not need_dx:
        return x.new_empty(0), dA, dE, dB
    return _dx(layer, g, weight, grad_h, path).view(x.shape), dA, dE, dB
