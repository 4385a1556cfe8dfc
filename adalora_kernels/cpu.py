"""The layer ops as they are tuned for CPUs: the signatures of `reference`, which defines them.

What differs is the order of the work, never the formula. A skinny product has its long axis last,
the low-rank term is added in place, and dropout takes its bits from torch's own generator, which
costs far less here than Philox does. The backward still makes the mask of its forward again from
the seed, so none is stored.

Nothing here is recorded by autograd: `ops` calls the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import as_rows, drop_below, effective_E


def dropout_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return which entries of `like` dropout keeps, as ones and zeros of its shape and dtype.

    A pure function of (seed, shape, p), as `reference.philox_mask` is, but from another stream:
    16 bits of torch's generator for each entry. p is meant to the nearest 2⁻¹⁶.
    """
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    keep = torch.empty(like.numel(), dtype=like.dtype, device="cpu")
    # Writing the comparison as numbers saves a pass over a bool tensor.
    bits = words.view(torch.int16)[: like.numel()]
    return torch.ge(bits, drop_below(p) - 2**15, out=keep).view(like.shape)


def _mask_of_rows(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    return None if seed is None else dropout_mask(as_rows(x), dropout_p, seed)


def _skinny(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows (M, n) · matrix (n, r). Long axis last, BLAS takes half the time for small r."""
    return (matrix.T @ rows.T).T


def _project(x: Tensor, A: Tensor, dropout_p: float, keep: Tensor | None) -> Tensor:
    """Return h = dropout(x)·Aᵀ (rows, r) for 2-D x, in the wider of the two dtypes."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    if keep is None:
        return _skinny(x.to(dtype), A.T.to(dtype)).contiguous()
    h = _skinny((x * keep).to(dtype), A.T.to(dtype))
    # Scaling h instead of dropout(x) costs r columns instead of all.
    return (h * (1.0 / (1.0 - dropout_p))).contiguous()


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a·b to out, all 2-D, in place: one GEMM with beta = 1 where the dtypes allow it."""
    if out.dtype == a.dtype == b.dtype:
        return out.addmm_(a, b)
    return out.add_(a @ b.to(a.dtype))


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
) -> tuple[Tensor, Tensor]:
    """Return (y, h) of `reference.svd_linear`."""
    y = F.linear(x, weight, bias).contiguous()
    h = _project(as_rows(x), A, dropout_p, _mask_of_rows(x, dropout_p, seed))
    _add_product_(as_rows(y), h * effective_E(E, mask, scaling, h.dtype), B.T)
    return y, h.view(*x.shape[:-1], A.shape[0])


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
) -> tuple[Tensor, Tensor]:
    """Return (y + delta, h) of `reference.svd_delta`."""
    h = _project(as_rows(x), A, dropout_p, _mask_of_rows(x, dropout_p, seed))
    he = h * effective_E(E, mask, scaling, h.dtype)
    if y.dtype == h.dtype == B.dtype:
        out = torch.addmm(as_rows(y), he, B.T)
    else:
        out = (as_rows(y) + he @ B.T.to(h.dtype)).to(y.dtype)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dA, dE, dB) of `reference.svd_linear_backward`."""
    wide, keep_scale = h.dtype, 1.0 / (1.0 - dropout_p)
    keep = _mask_of_rows(x, dropout_p, seed)
    g, h = as_rows(grad_y), as_rows(h)
    e = effective_E(E, mask, scaling, wide)
    u = _skinny(g.to(wide), B.to(wide))
    ue = u * e
    if keep is None:
        dA = ue.T @ as_rows(x).to(wide)
    else:
        dA = (ue.T @ (as_rows(x) * keep).to(wide)) * keep_scale
    dE = (u * h).sum(dim=0) * scaling
    if mask is not None:
        dE = dE.masked_fill(~mask, 0.0)
    dB = _skinny(g.to(wide).T, h * e).contiguous()
    grads = dA.to(A.dtype), dE.view(E.shape).to(E.dtype), dB.to(B.dtype)
    if not need_dx:
        return x.new_empty(0), *grads
    if weight is None:
        dx = ue @ A.to(wide)
        if keep is not None:
            dx = dx * keep * keep_scale
        return dx.to(x.dtype).view(x.shape), *grads
    dx = g @ weight
    if keep is None:
        _add_product_(dx, ue, A)
    else:
        dx.addcmul_((ue @ A.to(wide)).to(dx.dtype), keep, value=keep_scale)
    return dx.view(x.shape), *grads
