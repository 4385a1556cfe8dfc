"""The layer ops as they are tuned for CPUs: the signatures of `reference`, which defines them.

What differs is the order of the work, never the formula. A skinny product has its long axis last
unless the rows are few, the low-rank term is added in place, and dropout takes its bits from
torch's own generator, which costs far less here than Philox does. The backward makes the mask of
its forward again from the seed, so none is stored but small ones, which cost more to make.

With few rows a call of torch costs more than what it computes. So nothing is called that would do
nothing: a cast to the same dtype, a view of the same shape.

Nothing here is recorded by autograd: `ops` calls the backward.
"""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import as_rows, drop_below

# Up to so many rows a product whose long axis is not the last is the faster one: that with A, which
# lies as BLAS wants it, and those of the backward.
_FEW_ROWS, _FEW_ROWS_BACKWARD = 32, 8
# Up to so many entries (64 KB) the mask of dropout is kept for the backward.
_SMALL_MASK = 2**14


class _Own(threading.local):
    """A generator for every thread, seeded before every use. To make one takes time."""

    def __init__(self) -> None:
        self.generator = torch.Generator()


_own = _Own()


def dropout_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return which entries of `like` dropout keeps, as ones and zeros of its shape and dtype.

    A pure function of (seed, shape, p), as `reference.philox_mask` is, but from another stream:
    16 bits of torch's generator for each entry. p is meant to the nearest 2⁻¹⁶.
    """
    generator = _own.generator.manual_seed(int(seed))
    # A row of so many words has the bits of so many entries; else they are cut out of a long row.
    *rows, columns = like.shape
    shape = (*rows, columns // 4) if columns % 4 == 0 else ((like.numel() + 3) // 4,)
    words = torch.empty(shape, dtype=torch.int64, device="cpu")
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)
    if columns % 4:
        bits = bits[: like.numel()].view(like.shape)
    # Writing the comparison as numbers saves a pass over a bool tensor.
    return torch.ge(bits, _threshold(p), out=torch.empty_like(like))


@functools.lru_cache
def _threshold(p: float) -> Tensor:
    """What an entry's bits are at least if it is kept; as a tensor, which a number would become."""
    return torch.tensor(drop_below(p) - 2**15, dtype=torch.int16, device="cpu")


def small_mask(x: Tensor, p: float, seed: Tensor) -> Tensor | None:
    """Return the mask of the rows of x if it is one to be kept for the backward."""
    return dropout_mask(as_rows(x), p, seed) if x.numel() <= _SMALL_MASK else None


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _row(E: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return E ⊙ mask as one row (1, r)."""
    row = _to(E.T, dtype)
    return row if mask is None else row.masked_fill(~mask, 0.0)


def _project(
    x: Tensor,
    A: Tensor,
    E: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return h = dropout(x)·Aᵀ and h ⊙ E ⊙ mask, (rows, r), in the wider of the two dtypes."""
    rows, wide = as_rows(x), x.dtype
    if keep is None and seed is not None:
        keep = dropout_mask(rows, dropout_p, seed)
    if keep is not None:
        rows = rows * keep
    if A.dtype is not wide:
        wide = torch.promote_types(wide, A.dtype)
        rows, A = _to(rows, wide), _to(A, wide)
    row, few = _row(E, mask, wide), rows.shape[0] <= _FEW_ROWS
    if keep is None:
        h = F.linear(rows, A) if few else torch.mm(A, rows.T).T.contiguous()
    # Scaling h instead of dropout(x) costs r columns instead of all, and within a product nothing.
    elif few:
        h = torch.addmm(row, rows, A.T, beta=0.0, alpha=1.0 / (1.0 - dropout_p))
    else:
        h = torch.addmm(row.T, A, rows.T, beta=0.0, alpha=1.0 / (1.0 - dropout_p)).T.contiguous()
    return h, h * row


def svd_linear(
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
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, h) of `reference.svd_linear`; `keep` is `small_mask`, if it is there."""
    y = F.linear(x, weight, bias).contiguous()
    h, he = _project(x, A, E, mask, dropout_p, seed, keep)
    _add_product_(as_rows(y), he, B.T, scaling)
    return y, h if x.dim() == 2 else h.view(*x.shape[:-1], A.shape[0])


def _add_product_(out: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """Add scaling·a·b to out, all 2-D, in place: one GEMM where the dtypes allow it."""
    if out.dtype is a.dtype is b.dtype:
        out.addmm_(a, b, alpha=scaling)
    else:
        out.add_(torch.mm(a, _to(b, a.dtype)), alpha=scaling)


def svd_delta(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y + delta, h) of `reference.svd_delta`; `keep` as above."""
    h, he = _project(x, A, E, mask, dropout_p, seed, keep)
    rows = as_rows(y)
    if y.dtype is h.dtype is B.dtype:
        out = torch.addmm(rows, he, B.T, alpha=scaling)
    else:
        out = torch.add(rows, torch.mm(he, _to(B.T, h.dtype)), alpha=scaling).to(y.dtype)
    if x.dim() == 2:
        return out, h
    return out.view(y.shape), h.view(*x.shape[:-1], A.shape[0])


def svd_linear_backward(
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
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dA, dE, dB) of `reference.svd_linear_backward`; `keep` as above."""
    wide, keep_scale = h.dtype, 1.0 / (1.0 - dropout_p)
    rows, g, h = as_rows(x), as_rows(grad_y), as_rows(h)
    if seed is not None and keep is None:
        keep = dropout_mask(rows, dropout_p, seed)
    wide_g, wide_B, few = _to(g, wide), _to(B, wide), rows.shape[0] <= _FEW_ROWS_BACKWARD
    row = _row(E, mask, wide)
    # To scale within a product is free: with beta = 0 its first argument is not read.
    if few:
        u = torch.addmm(h, wide_g, wide_B, beta=0.0, alpha=scaling)
        dB = torch.addmm(wide_B, wide_g.T, h * row, beta=0.0, alpha=scaling)
    else:
        u = torch.addmm(h.T, wide_B.T, wide_g.T, beta=0.0, alpha=scaling).T
        dB = torch.addmm(wide_B.T, (h * row).T, wide_g, beta=0.0, alpha=scaling).T.contiguous()
    ue = u * row
    dE = (u * h).sum(0, keepdim=True).T
    if mask is not None:
        dE = dE.masked_fill(~mask.unsqueeze(1), 0.0)
    if keep is None:
        dA = torch.mm(ue.T, _to(rows, wide))
    else:
        # What is dropped has no name, which would keep its memory until dx is there, too.
        dA = torch.addmm(_to(A, wide), ue.T, _to(rows * keep, wide), beta=0.0, alpha=keep_scale)
    grads = _to(dA, A.dtype), _to(dE, E.dtype), _to(dB, B.dtype)
    if not need_dx:
        return x.new_empty(0), *grads
    if weight is None:
        dx = torch.mm(ue, _to(A, wide))
        if keep is not None:
            dx.mul_(keep).mul_(keep_scale)
        dx = _to(dx, x.dtype)
    else:
        dx = torch.mm(g, weight)
        if keep is None:
            _add_product_(dx, ue, A, 1.0)
        else:
            dx.addcmul_(_to(torch.mm(ue, _to(A, wide)), dx.dtype), keep, value=keep_scale)
    return dx if x.dim() == 2 else dx.view(x.shape), *grads
