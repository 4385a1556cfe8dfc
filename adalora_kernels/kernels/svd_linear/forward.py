"""The forward makes h by the down projection, and y by one of three paths (see the package)."""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, launch, launch_cublas
from . import plans
from .common import NO_DROPOUT, LayerOperands, LowRank, all_aligned, as_rows, dot, keep_mask
from .gemm import gemm, low_rank_add


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
    R_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, s) writes rows block i of h[s] (M, R) = dropout(x)·Aᵀ over part s of K."""
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


def _down(layer: LayerOperands) -> tuple[Tensor, Tensor]:
    """Return parts of h (splits, M, R), and h (M, R), which with one split is their memory."""
    x = layer.x
    blocks = layer.blocks("down", x)
    row_blocks = ceil_div(layer.M, blocks.m)
    k_blocks = ceil_div(layer.K, blocks.k)
    # Enough programs to fill the GPU, each with at least four blocks to pipeline.
    splits = max(1, min(layer.device.sms // row_blocks, k_blocks // 4, plans.MOST_SPLITS))
    k_per_split = ceil_div(k_blocks, splits) * blocks.k
    splits = ceil_div(layer.K, k_per_split)
    h = layer.new(layer.M, layer.R, dtype=layer.h_dtype)
    parts = h.unsqueeze(0) if splits == 1 else layer.new(splits, layer.M, layer.R)
    arguments = {
        "x_ptr": x,
        "a_ptr": layer.A,
        "out_h_ptr": parts,
        "dropout": layer.dropout,
        "M": layer.M,
        "K": layer.K,
        "R": layer.R,
        "x_strides": x.stride(),
        "k_per_split": k_per_split,
        "ALIGNED": layer.dropout.is_aligned(layer.K),
        **layer.types(x),
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **blocks.options,
    }
    launch(_down_kernel, (row_blocks, splits), arguments)
    return parts, h


def _low_rank(layer: LayerOperands, parts: Tensor | None, h: Tensor) -> LowRank:
    """Return the operands of (h ⊙ e)·Bᵀ, whose kernel stores h unless the one part is h itself."""
    out_h = None if parts is not None and len(parts) == 1 else h
    right = layer.B.T
    return LowRank(parts, right, out_h, layer.R, *right.stride())


def svd_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    path: str | plans.Plan = "auto",
    device: plans.Device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (y, h) of `reference.svd_linear`, for sizes of at least 1 and R of at most 256.

    Args:
        path: a plan, the name of a path to plan for, or "auto".
        device: the GPU to plan for; that of x by default.
    """
    layer = LayerOperands(x, A, E, B, mask, scaling, dropout_p, seed, device)
    w, y = weight.T, layer.new(layer.M, layer.N, dtype=x.dtype)
    # One_pass would make the mask of dropout once for every tile.
    possible = plans.PATHS if seed is None else ("two_pass", "cublas")
    problem = plans.Problem(x.dtype, layer.M, layer.K, layer.N, layer.r_pad, "y")
    plan = plans.choose(layer.device, problem, path, possible, all_aligned(layer.x, w, y))
    if plan.path == "one_pass":
        h = layer.new(layer.M, layer.R, dtype=layer.h_dtype)
        low_rank = _low_rank(layer, None, h)
        gemm(layer, plan.gemm, layer.x, w, y, bias, low_rank, layer.e, NO_DROPOUT)
    elif plan.path == "two_pass":
        parts, h = _down(layer)
        low_rank = _low_rank(layer, parts, h)
        gemm(layer, plan.gemm, layer.x, w, y, bias, low_rank, layer.e, NO_DROPOUT)
    else:
        launch_cublas(layer.x, w, bias, y)
        parts, h = _down(layer)
        low_rank_add(layer, y, y, _low_rank(layer, parts, h), layer.e, NO_DROPOUT)
    return y.view(*x.shape[:-1], layer.N), h.view(*x.shape[:-1], layer.R)


def svd_delta_fwd(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    device: plans.Device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (y + delta, h) of `reference.svd_delta`, with the limits of `svd_linear_fwd`."""
    layer = LayerOperands(x, A, E, B, mask, scaling, dropout_p, seed, device)
    out = layer.new(layer.M, layer.N, dtype=y.dtype)
    parts, h = _down(layer)
    low_rank_add(layer, as_rows(y), out, _low_rank(layer, parts, h), layer.e, NO_DROPOUT)
    return out.view(y.shape), h.view(*x.shape[:-1], layer.R)
