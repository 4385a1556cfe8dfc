"""svd_linear and svd_delta from Triton kernels: forward and backward of one layer.

Shapes throughout: x (M, K), weight (N, K), A (R, K), E (R, 1), B (N, R), mask (R,), y and g (M, N),
h (M, R); e = scaling · E ⊙ mask, u = g·B.

Forward, path "two_pass": `down_kernel` (h), then `gemm_kernel` over [x | h ⊙ e]·[weight | B]ᵀ.
Path "one_pass": `gemm_kernel` alone, in which every tile makes its own h: for few rows, where
reading the weight is all that counts. Path "cublas": cuBLAS, then `down_kernel` and
`low_rank_add_kernel` in place.

Backward: `g_pass_kernel` (parts of u and dB from one read of g), `g_reduce_kernel` (u ⊙ e, dB),
`x_pass_kernel` (parts of dA from one read of x), `x_reduce_kernel` (dA, dE), and for dx one of the
paths with operands exchanged, [g | u ⊙ e]·[weightᵀ | Aᵀ]ᵀ. Sums over programs go through a
workspace and are added in a fixed order, so that results are bitwise reproducible.

h is saved by the forward, not recomputed: M·R entries. Nothing else of M rows is allocated but y,
dx and parts of h and u, which are as narrow.

Adapters may be float32 over half-precision x. Products with them are then exact up to float32
rounding: gradients of float32 parameters must not be worse than eager's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import ceil_div, launch, launch_cublas
from .plans import (
    MOST_SPLITS,
    PATHS,
    Blocks,
    Device,
    Plan,
    Problem,
    choose,
    device_of,
    padded_rank,
    pass_blocks,
)
from .svd_linear_jit import (
    down_kernel,
    g_pass_kernel,
    g_reduce_kernel,
    gemm_kernel,
    low_rank_add_kernel,
    x_pass_kernel,
    x_reduce_kernel,
)

_Arguments: TypeAlias = Mapping[str, Any]

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rows(t: Tensor) -> Tensor:
    """(..., n) as (rows, n). A view wherever strides allow, so of every expanded gradient too."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _precision(dtype: torch.dtype) -> str:
    # allow_tf32, which is the same setting, raises where the newer name has been used.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _is_aligned(t: Tensor) -> bool:
    """Whether this matrix can be read by descriptors, and by vectors of 16 bytes and more."""
    rows = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    return rows and (t.stride(0) | t.shape[1] | t.data_ptr()) % 16 == 0


class _Problem:
    """The adapter and dropout of one call, in the form that the kernels take."""

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
        device: Device | None,
    ) -> None:
        self.x = _rows(x)
        self.A, self.E, self.B = A.contiguous(), E.contiguous(), B.contiguous()
        self.mask = None if mask is None else mask.contiguous()
        self.scaling = scaling
        self.M, self.K = self.x.shape
        self.R, self.N = A.shape[0], B.shape[0]
        self.r_pad = padded_rank(self.R)
        self.h_dtype = torch.promote_types(x.dtype, A.dtype)
        self.device = device or device_of(x.device)
        self.e = {"e_ptr": self.E, "mask_ptr": self.mask, "scaling": scaling}
        self.seed = seed
        self.dropout = {
            "seed_ptr": seed,
            "drop_below": min(round(dropout_p * 2**16), 2**16 - 1),
            "keep_scale": 1.0 / (1.0 - dropout_p),
            "ALIGNED": seed is None or self.K % 8 == 0,
        }

    def types(self, t: Tensor) -> _Arguments:
        """How the adapter is multiplied with the matrix `t`."""
        wide, precision = self._is_wide(t), _precision(t.dtype)
        return {"WIDE": wide, "PRECISION": precision, "R_PAD": self.r_pad}

    def blocks(self, kernel: str, t: Tensor) -> Blocks:
        """The configuration of a pass over the matrix `t`."""
        aligned = _is_aligned(t)
        return pass_blocks(kernel, self.device, self.r_pad, t.dtype, self._is_wide(t), aligned)

    def _is_wide(self, t: Tensor) -> bool:
        return self.h_dtype == torch.float32 != t.dtype


def _options(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}


def _new(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _down(p: _Problem) -> tuple[Tensor, Tensor]:
    """(parts of h (splits, M, R), h (M, R)); with one split they are the same memory."""
    blocks = p.blocks("down", p.x)
    row_blocks = ceil_div(p.M, blocks.m)
    k_blocks = ceil_div(p.K, blocks.k)
    # Enough programs to fill the GPU, each with at least four blocks to pipeline.
    splits = max(1, min(p.device.sms // row_blocks, k_blocks // 4, MOST_SPLITS))
    k_per_split = ceil_div(k_blocks, splits) * blocks.k
    splits = ceil_div(p.K, k_per_split)
    h = _new(p.x, (p.M, p.R), p.h_dtype)
    parts = h.unsqueeze(0) if splits == 1 else _new(p.x, (splits, p.M, p.R))
    arguments = {
        "x_ptr": p.x,
        "a_ptr": p.A,
        "h_ptr": parts,
        "M": p.M,
        "K": p.K,
        "R": p.R,
        "stride_xm": p.x.stride(0),
        "stride_xk": p.x.stride(1),
        "k_per_split": k_per_split,
        **p.dropout,
        **p.types(p.x),
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **_options(blocks),
    }
    launch(down_kernel, (row_blocks, splits), arguments, [p.x, p.A, p.seed], [parts])
    return parts, h


def _low_rank_add(
    p: _Problem,
    base: Tensor | None,
    out: Tensor,
    parts: Tensor,
    h: Tensor | None,
    v: Tensor,
    e: _Arguments,
    dropout: _Arguments,
) -> None:
    """out (M, n) = base + dropout'((Σ parts ⊙ e)·v) for v (R, n); writes h if there are parts."""
    blocks = p.blocks("low_rank_add", out if base is None else base)
    columns = out.shape[1]
    h = h if len(parts) > 1 else None
    arguments = {
        "base_ptr": base,
        "out_ptr": out,
        "low_ptr": parts,
        "h_ptr": h,
        **e,
        "v_ptr": v,
        "M": p.M,
        "N": columns,
        "R": p.R,
        "stride_bm": 0 if base is None else base.stride(0),
        "stride_bn": 0 if base is None else base.stride(1),
        "stride_vr": v.stride(0),
        "stride_vn": v.stride(1),
        **dropout,
        "DTYPE": _TYPES[out.dtype],
        "PRECISION": _precision(out.dtype),
        "SPLITS": len(parts),
        "R_PAD": p.r_pad,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        **_options(blocks),
    }
    grid = (ceil_div(p.M, blocks.m) * ceil_div(columns, blocks.n),)
    reads = [base, parts, v, e["e_ptr"], e["mask_ptr"], dropout["seed_ptr"]]
    launch(low_rank_add_kernel, grid, arguments, reads, [out] if h is None else [out, h])


def _gemm(
    p: _Problem,
    blocks: Blocks,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None,
    parts: Tensor | None,
    h: Tensor | None,
    v: Tensor,
    e: _Arguments,
    dropout: _Arguments,
) -> None:
    """out (M, n) = x (M, k)·w (k, n) + bias + dropout'((Σ parts ⊙ e)·v); h as in _low_rank_add.

    Without parts the kernel makes h itself.
    """
    k, n = w.shape
    by_rows = w.stride(1) != 1
    operands: tuple[object, object, object] = (x, w, out)
    if blocks.tma:
        w_block = [blocks.n, blocks.k] if by_rows else [blocks.k, blocks.n]
        operands = (
            TensorDescriptor.from_tensor(x, [blocks.m, blocks.k]),
            TensorDescriptor.from_tensor(w.T if by_rows else w, w_block),
            TensorDescriptor.from_tensor(out, [blocks.m, blocks.n // 2]),
        )
    splits = 0 if parts is None else len(parts)
    h = None if splits == 1 else h
    arguments = {
        **dict(zip(("x", "w", "out"), operands, strict=True)),
        "bias_ptr": bias,
        "low_ptr": parts,
        "h_ptr": h,
        "a_ptr": p.A if splits == 0 else None,
        **e,
        "v_ptr": v,
        "M": p.M,
        "N": n,
        "K": k,
        "R": p.R,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wk": w.stride(0),
        "stride_wn": w.stride(1),
        "stride_vr": v.stride(0),
        "stride_vn": v.stride(1),
        **dropout,
        "DTYPE": _TYPES[x.dtype],
        **p.types(x),
        "TMA": blocks.tma,
        "W_BY_ROWS": by_rows,
        "SPLITS": splits,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "GROUP_M": 8,
        "FLATTEN": blocks.flatten,
        **_options(blocks),
    }
    tiles = ceil_div(p.M, blocks.m) * ceil_div(n, blocks.n)
    grid = (min(tiles, p.device.sms) if blocks.tma else tiles,)
    reads = [x, w, bias, parts, v, arguments["a_ptr"], e["e_ptr"], e["mask_ptr"]]
    reads.append(dropout["seed_ptr"])
    launch(gemm_kernel, grid, arguments, reads, [out] if h is None else [out, h])


_NO_DROPOUT = {"seed_ptr": None, "drop_below": 0, "keep_scale": 1.0, "ALIGNED": True}
_NO_E = {"e_ptr": None, "mask_ptr": None, "scaling": 1.0}


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
    how: str | Plan = "auto",
    device: Device | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h) of `reference.svd_linear`, for sizes of at least 1 and R of at most 256.

    Args:
        how: a plan, the name of a path to plan for, or "auto".
        device: the GPU to plan for; that of x by default.
    """
    p = _Problem(x, A, E, B, mask, scaling, dropout_p, seed, device)
    w, y = weight.T, _new(x, (p.M, p.N), x.dtype)
    # One_pass would make the mask of dropout once for every tile.
    paths = PATHS if seed is None else ("two_pass", "cublas")
    plan = _plan(p, how, p.x, w, y, "y", paths)
    if plan.path == "one_pass":
        h = _new(x, (p.M, p.R), p.h_dtype)
        _gemm(p, plan.gemm, p.x, w, y, bias, None, h, p.B.T, p.e, _NO_DROPOUT)
    elif plan.path == "two_pass":
        parts, h = _down(p)
        _gemm(p, plan.gemm, p.x, w, y, bias, parts, h, p.B.T, p.e, _NO_DROPOUT)
    else:
        _cublas(p.x, w, bias, y)
        parts, h = _down(p)
        _low_rank_add(p, y, y, parts, h, p.B.T, p.e, _NO_DROPOUT)
    return y.view(*x.shape[:-1], p.N), h.view(*x.shape[:-1], p.R)


def _plan(
    p: _Problem,
    how: str | Plan,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    product: str,
    paths: tuple[str, ...],
) -> Plan:
    """The plan for x·w, which is `product`; `paths` are those that can compute it here.

    What a path that was named can't compute is left to two_pass, as the dx of one_pass.
    """
    if isinstance(how, Plan):
        return how
    if how != "auto":
        if how not in PATHS:
            raise ValueError(f"how must be 'auto' or one of {', '.join(PATHS)}, got {how!r}")
        paths = (how,) if how in paths else ("two_pass",)
    aligned = all(map(_is_aligned, (x, w if w.stride(1) == 1 else w.T, out)))
    k, n = w.shape
    return choose(p.device, Problem(x.dtype, p.M, k, n, p.r_pad, product), paths, aligned)


def _cublas(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        launch_cublas(lambda: torch.mm(x, w, out=out), [x, w], [out])
    else:
        launch_cublas(lambda: torch.addmm(bias, x, w, out=out), [x, w, bias], [out])


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
    how: str | Plan = "auto",
    device: Device | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dE, dB) of `reference.svd_linear_backward`; the limits of `svd_linear_fwd`."""
    p = _Problem(x, A, E, B, mask, scaling, dropout_p, seed, device)
    g = _rows(grad_y)
    ue, dA, dE, dB = _adapter_grads(p, g, _rows(h))
    if not need_dx:
        return x.new_empty(0), dA, dE, dB
    dx = _new(x, (p.M, p.K), x.dtype)
    if weight is None:
        _low_rank_add(p, None, dx, ue, None, p.A, _NO_E, p.dropout)
        return dx.view(x.shape), dA, dE, dB
    # cuBLAS would make a contiguous copy of an expanded gradient, as large as y.
    dense = 1 in g.stride() and 0 not in g.stride()
    paths = ("two_pass", "cublas") if dense else ("two_pass",)
    product = "dx" if seed is None else "dropped dx"
    plan = _plan(p, how, g, weight, dx, product, paths)
    if plan.path == "two_pass":
        _gemm(p, plan.gemm, g, weight, dx, None, ue, None, p.A, _NO_E, p.dropout)
    else:
        _cublas(g, weight, None, dx)
        _low_rank_add(p, dx, dx, ue, None, p.A, _NO_E, p.dropout)
    return dx.view(x.shape), dA, dE, dB


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
    device: Device | None = None,
) -> tuple[Tensor, Tensor]:
    """(y + delta, h) of `reference.svd_delta`; the limits of `svd_linear_fwd`."""
    p = _Problem(x, A, E, B, mask, scaling, dropout_p, seed, device)
    out = _new(y, (p.M, p.N), y.dtype)
    parts, h = _down(p)
    _low_rank_add(p, _rows(y), out, parts, h, p.B.T, p.e, _NO_DROPOUT)
    return out.view(y.shape), h.view(*x.shape[:-1], p.R)


def svd_delta_bwd(
    grad_y: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    h: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    device: Device | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dE, dB) of `reference.svd_delta_backward`; the limits of `svd_linear_fwd`."""
    p = _Problem(x, A, E, B, mask, scaling, dropout_p, seed, device)
    ue, dA, dE, dB = _adapter_grads(p, _rows(grad_y), _rows(h))
    if not need_dx:
        return x.new_empty(0), dA, dE, dB
    dx = _new(x, (p.M, p.K), x.dtype)
    _low_rank_add(p, None, dx, ue, None, p.A, _NO_E, p.dropout)
    return dx.view(x.shape), dA, dE, dB


def _adapter_grads(p: _Problem, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(u ⊙ e as parts (1, M, R), dA, dE, dB) from one read of g and one of x."""
    ue = _new(g, (1, p.M, p.R))
    dA, dE, dB = (torch.empty_like(t) for t in (p.A, p.E, p.B))

    blocks = p.blocks("g_pass", g)
    n_parts = ceil_div(p.N, blocks.n)
    m_parts, m_per_split = _split_rows(p, n_parts, blocks)
    u_parts, db_parts = _new(g, (n_parts, p.M, p.R)), _new(g, (m_parts, p.N, p.R))
    arguments = {
        "g_ptr": g,
        "b_ptr": p.B,
        "h_ptr": h,
        **p.e,
        "u_ptr": u_parts,
        "db_ptr": db_parts,
        "M": p.M,
        "N": p.N,
        "R": p.R,
        "stride_gm": g.stride(0),
        "stride_gn": g.stride(1),
        "m_per_split": m_per_split,
        **p.types(g),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        **_options(blocks),
    }
    reads = [g, p.B, h, p.E, p.mask]
    launch(g_pass_kernel, (n_parts, m_parts), arguments, reads, [u_parts, db_parts])

    blocks = p.blocks("g_reduce", p.x)
    row_blocks = ceil_div(p.M, blocks.m)
    de_parts = _new(g, (row_blocks, p.R))
    arguments = {
        "u_ptr": u_parts,
        "db_parts_ptr": db_parts,
        "h_ptr": h,
        **p.e,
        "ue_ptr": ue,
        "de_parts_ptr": de_parts,
        "db_ptr": dB,
        "M": p.M,
        "N": p.N,
        "R": p.R,
        "n_parts": n_parts,
        "m_parts": m_parts,
        "R_PAD": p.r_pad,
        "BLOCK_M": blocks.m,
        **_options(blocks),
    }
    grid = (row_blocks + ceil_div(p.N, blocks.m),)
    reads = [u_parts, db_parts, h, p.E, p.mask]
    launch(g_reduce_kernel, grid, arguments, reads, [ue, de_parts, dB])

    blocks = p.blocks("x_pass", p.x)
    k_blocks = ceil_div(p.K, blocks.k)
    m_parts, m_per_split = _split_rows(p, k_blocks, blocks)
    da_parts = _new(g, (m_parts, p.R, p.K))
    arguments = {
        "x_ptr": p.x,
        "ue_ptr": ue,
        "da_ptr": da_parts,
        "M": p.M,
        "K": p.K,
        "R": p.R,
        "stride_xm": p.x.stride(0),
        "stride_xk": p.x.stride(1),
        "m_per_split": m_per_split,
        **p.dropout,
        **p.types(p.x),
        "BLOCK_M": blocks.m,
        "BLOCK_K": blocks.k,
        **_options(blocks),
    }
    launch(x_pass_kernel, (k_blocks, m_parts), arguments, [p.x, ue, p.seed], [da_parts])

    arguments = {
        "da_parts_ptr": da_parts,
        "de_parts_ptr": de_parts,
        "mask_ptr": p.mask,
        "da_ptr": dA,
        "de_ptr": dE,
        "numel": p.R * p.K,
        "R": p.R,
        "scaling": p.scaling,
        "m_parts": m_parts,
        "de_parts": row_blocks,
        "R_PAD": p.r_pad,
        "BLOCK": 1024,
        "BLOCK_PARTS": 16,
        "num_warps": 4,
        "num_stages": 1,
    }
    grid = (ceil_div(p.R * p.K, 1024) + 1,)
    launch(x_reduce_kernel, grid, arguments, [da_parts, de_parts, p.mask], [dA, dE])
    return ue, dA, dE, dB


def _split_rows(p: _Problem, columns: int, blocks: Blocks) -> tuple[int, int]:
    """(parts, rows per part) of M, so that parts x column blocks fill the GPU about once."""
    row_blocks = ceil_div(p.M, blocks.m)
    parts = max(1, min(p.device.sms // columns, row_blocks))
    per_part = ceil_div(row_blocks, parts) * blocks.m
    return ceil_div(p.M, per_part), per_part
