"""Plain-PyTorch twins of the ops: the definition, the test oracle, and the CPU implementation.

Equation numbers are those of the AdaLoRA paper (Zhang et al., ICLR 2023, arXiv 2303.10512).
Everything here is differentiable where the mathematics is, works in float64, and reads no value
from the device, so the same code runs on any device.

Shapes throughout: x (..., in), weight (out, in), A = lora_A (r, in), E = lora_E (r, 1),
B = lora_B (out, r), mask (r,) bool, h (..., r).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

# Philox-4x32 (Salmon et al., SC 2011): two round multipliers and two key increments.
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def philox_uint32(seed: Tensor, numel: int, rounds: int = 10) -> Tensor:
    """The first `numel` words of the Philox-4x32 stream of `seed`, as int64 (numel,).

    Word i is lane i % 4 of counter i // 4. `seed` is one int64 on the device that the stream is
    wanted on.
    """
    counter = torch.arange((numel + 3) // 4, device=seed.device)
    lanes = [counter & _U32, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    seed = seed.reshape(())
    keys = [seed & _U32, (seed >> 32) & _U32]
    for _ in range(rounds):
        # The int64 product wraps, but its bits are those of the unsigned one.
        p0, p1 = lanes[0] * _PHILOX_M[0], lanes[2] * _PHILOX_M[1]
        lanes = [
            ((p1 >> 32) & _U32) ^ lanes[1] ^ keys[0],
            p1 & _U32,
            ((p0 >> 32) & _U32) ^ lanes[3] ^ keys[1],
            p0 & _U32,
        ]
        keys = [(key + w) & _U32 for key, w in zip(keys, _PHILOX_W, strict=True)]
    return torch.stack(lanes, dim=1).flatten()[:numel]


def philox_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """Which entries of `like` dropout keeps, as ones and zeros of its shape and dtype.

    A pure function of (seed, shape, p) on any device. Entry i has 16 bits of its own, the low or
    (odd i) the high half of word i // 2, so that a kernel gets the bits of eight neighbours from
    one counter; p is meant to the nearest 2⁻¹⁶. Seven rounds are the fewest with which
    Philox-4x32 passes BigCrush.
    """
    words = philox_uint32(seed, (like.numel() + 1) // 2, rounds=7)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=1).flatten()[: like.numel()]
    return (halves >= _drop_below(p)).reshape(like.shape).to(like.dtype)


def dropout_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """`philox_mask` but on a CPU, where 16 bits of torch's own generator cost far less.

    There, too, a pure function of (seed, shape, p), so that the backward regenerates the mask of
    the forward instead of storing it. Off the CPU the seed is never read back.
    """
    if like.device.type != "cpu":
        return philox_mask(like, p, seed)
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    keep = torch.empty(like.numel(), dtype=like.dtype)
    # Writing the comparison as numbers saves a pass over a bool tensor.
    bits = words.view(torch.int16)[: like.numel()]
    return torch.ge(bits, _drop_below(p) - 2**15, out=keep).view(like.shape)


def _drop_below(p: float) -> int:
    """Of 2¹⁶ equally likely values, those below this are dropped: never all of them."""
    return min(round(p * 2**16), 2**16 - 1)


def as_rows(t: Tensor) -> Tensor:
    """(..., n) as (rows, n); `reshape(-1, n)` cannot do it for zero rows."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _keep_rows(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    return None if seed is None else as_rows(dropout_mask(x, dropout_p, seed))


def _skinny(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (M, n) · matrix (n, r), long axis last: BLAS takes half the time for small r."""
    return (matrix.T @ rows.T).T


def _effective_E(E: Tensor, mask: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """e = scaling · E ⊙ mask, (r,): the scale costs nothing once it is folded in here."""
    e = E.reshape(-1) * scaling
    if mask is not None:
        e = e.masked_fill(~mask, 0.0)
    return e.to(dtype)


def _project(x: Tensor, A: Tensor, dropout_p: float, keep: Tensor | None) -> Tensor:
    """h = dropout(x)·Aᵀ (rows, r) for 2-D x, in the wider of the two dtypes."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    if keep is None:
        return _skinny(x.to(dtype), A.T.to(dtype)).contiguous()
    h = _skinny((x * keep).to(dtype), A.T.to(dtype))
    return (h * (1.0 / (1.0 - dropout_p))).contiguous()


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a·b, 2-D, in place: one GEMM with beta = 1 where the dtypes allow it."""
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
    """Eq. (3): y = x·W0ᵀ + bias + ((dropout(x)·Aᵀ) ⊙ e)·Bᵀ with e = scaling·E ⊙ mask.

    Returns (y, h): y (..., out) in the dtype of x, and h = dropout(x)·Aᵀ (..., r), which the
    backward needs. `seed` (one int64 on the device of x) is None exactly when there is no dropout.
    """
    y = F.linear(x, weight, bias).contiguous()
    h = _project(as_rows(x), A, dropout_p, _keep_rows(x, dropout_p, seed))
    _add_product_(as_rows(y), h * _effective_E(E, mask, scaling, h.dtype), B.T)
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
    """The low-rank term of `svd_linear` added to y (..., out), the output of any base layer.

    Returns (y + delta, h), the sum in the dtype of y. y itself is left alone: the layer that made
    it may have saved it, and it may be a view that autograd does not allow to be written to.
    """
    h = _project(as_rows(x), A, dropout_p, _keep_rows(x, dropout_p, seed))
    he = h * _effective_E(E, mask, scaling, h.dtype)
    if y.dtype == h.dtype == B.dtype:
        out = torch.addmm(as_rows(y), he, B.T)
    else:
        out = (as_rows(y) + he @ B.T.to(h.dtype)).to(y.dtype)
    return out.view(y.shape), h.view(*x.shape[:-1], A.shape[0])


def _adapter_grads(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    h: Tensor,
    scaling: float,
    dropout_p: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(u ⊙ e, dA, dE, dB) for 2-D g, x, h and keep, where u = g·B."""
    e = _effective_E(E, mask, scaling, h.dtype)
    g = g.to(h.dtype)
    u = _skinny(g, B.to(h.dtype))
    ue = u * e
    if keep is None:
        dA = ue.T @ x.to(h.dtype)
    else:
        dA = (ue.T @ (x * keep).to(h.dtype)) * (1.0 / (1.0 - dropout_p))
    dE = (u * h).sum(dim=0) * scaling
    if mask is not None:
        dE = dE.masked_fill(~mask, 0.0)
    dB = _skinny(g.T, h * e).contiguous()
    return ue, dA.to(A.dtype), dE.view(E.shape).to(E.dtype), dB.to(B.dtype)


def svd_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
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
    """(dx, dA, dE, dB) of `svd_linear` for the gradient grad_y of y, weight being frozen.

    dx = g·W0 + dropout'((u ⊙ e)·A) with u = g·B, or an empty (0,) tensor unless `need_dx`;
    dA = (u ⊙ e)ᵀ·dropout(x); dE = scaling · mask ⊙ Σ_rows u ⊙ h; dB = gᵀ·(h ⊙ e).
    """
    g, keep = as_rows(grad_y), _keep_rows(x, dropout_p, seed)
    ue, dA, dE, dB = _adapter_grads(
        g, as_rows(x), A, E, B, mask, as_rows(h), scaling, dropout_p, keep
    )
    if not need_dx:
        return x.new_empty(0), dA, dE, dB
    dx = g @ weight
    if keep is None:
        _add_product_(dx, ue, A)
    else:
        dx.addcmul_((ue @ A.to(ue.dtype)).to(dx.dtype), keep, value=1.0 / (1.0 - dropout_p))
    return dx.view(x.shape), dA, dE, dB


def svd_delta_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dE, dB) of `svd_delta`, as in `svd_linear_backward` but for the base layer's dx.

    The gradient of y is grad_y itself.
    """
    keep = _keep_rows(x, dropout_p, seed)
    ue, dA, dE, dB = _adapter_grads(
        as_rows(grad_y), as_rows(x), A, E, B, mask, as_rows(h), scaling, dropout_p, keep
    )
    if not need_dx:
        return x.new_empty(0), dA, dE, dB
    dx = ue @ A.to(ue.dtype)
    if keep is not None:
        dx = dx * keep * (1.0 / (1.0 - dropout_p))
    return dx.to(x.dtype).view(x.shape), dA, dE, dB


def importance_update_(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avg_ipt: list[Tensor],
    exp_avg_unc: list[Tensor],
    scores: Tensor,
    skipped: Tensor,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of the importance averages, in place, and the triplet scores that follow.

    Eq. (8)-(10): ipt = |w·∂L/∂w|; Ī ← β1·Ī + (1-β1)·ipt; then, with the new Ī,
    Ū ← β2·Ū + (1-β2)·|ipt - Ī|.
    The lists hold A_0, E_0, B_0, A_1, …; a parameter whose gradient is None keeps its averages.
    The averages are float32 or bfloat16 (float64 for float64 parameters), contiguous. If any
    gradient holds inf or NaN, nothing changes but `skipped` (int64, one element), which counts
    such steps. `scores` is flat, (total rank,), in float32 or float64. `grad_scale` (one float32)
    is what ∂L/∂w is of the gradients: 1 / 1024 if the loss was multiplied by 1024. Where it is
    inf or NaN, the step is skipped as well.
    """
    # The extremes are finite exactly when everything is; the decision stays on the device.
    extremes = [e for g in grads if g is not None and g.numel() > 0 for e in torch.aminmax(g)]
    if not extremes:
        return
    finite = torch.stack(extremes).isfinite().all()
    if grad_scale is not None:
        finite = finite & grad_scale.isfinite().all()
    skipped += ~finite
    step = finite.to(scores.dtype)
    for w, g, avg_ipt, avg_unc in zip(params, grads, exp_avg_ipt, exp_avg_unc, strict=True):
        if g is None:
            continue
        ipt = (_widen(w) * _widen(g)).abs_()
        if grad_scale is not None:
            ipt.mul_(grad_scale)
        # A weight of 0 leaves an average as it was, but only against a finite end.
        ipt.nan_to_num_()
        new_ipt = torch.lerp(avg_ipt.to(ipt.dtype), ipt, (step * (1.0 - beta1)).to(ipt.dtype))
        distance = ipt.sub_(new_ipt).abs_()
        new_unc = torch.lerp(avg_unc.to(ipt.dtype), distance, (step * (1.0 - beta2)).to(ipt.dtype))
        avg_ipt.copy_(new_ipt)
        avg_unc.copy_(new_unc)
    scores.copy_(triplet_scores(exp_avg_ipt, exp_avg_unc))


def triplet_scores(exp_avg_ipt: list[Tensor], exp_avg_unc: list[Tensor]) -> Tensor:
    """Eq. (7) and (11): S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji) with s = Ī·Ū, flat.

    The lists are those of `importance_update_`; the result is (total rank,), in module order.
    """

    def mean(ipt: Tensor, unc: Tensor, dim: int) -> Tensor:
        # A dot product, so that Ī·Ū itself is never written to memory.
        total: Tensor = torch.linalg.vecdot(_widen(ipt), _widen(unc), dim=dim)
        return total / ipt.shape[dim]

    return torch.cat(
        [
            (_widen(iE) * uE).view(-1) + (mean(iA, uA, 1) + mean(iB, uB, 0))
            for iA, iE, iB, uA, uE, uB in zip(
                *(exp_avg_ipt[i::3] for i in range(3)),
                *(exp_avg_unc[i::3] for i in range(3)),
                strict=True,
            )
        ]
    )


def top_b_mask(scores: Tensor, budget: int | Tensor) -> Tensor:
    """Eq. (6), over all matrices at once: which `budget` of the flat `scores` (n,) are kept, bool.

    Exactly min(budget, n) stay. Among equals the lower index wins, and NaN ranks below everything.
    `budget` may be a scalar tensor on the device of `scores`; nothing is read back either way.
    """
    ranked = torch.where(scores.isnan(), -math.inf, scores)
    order = ranked.argsort(descending=True, stable=True)
    position = torch.arange(scores.numel(), device=scores.device)
    return torch.empty_like(scores, dtype=torch.bool).scatter_(0, order, position < budget)


def orth_reg(
    pairs: Iterable[tuple[Tensor, Tensor]], weight: float = 0.1, squared: bool = False
) -> Tensor:
    """Eq. (4): weight · mean of ‖A·Aᵀ - I‖_F and ‖Bᵀ·B - I‖_F over all (A, B) (loralib, PEFT).

    If `squared`, the paper's weight · Σ ‖A·Aᵀ - I‖²_F + ‖Bᵀ·B - I‖²_F. The result is a scalar in
    float32, or float64 for float64 adapters. The gradient at a norm of 0 is 0.
    """
    norms = []
    for A, B in pairs:
        for rows in (_widen(A), _widen(B).T):
            eye = torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
            norms.append(torch.linalg.vector_norm(rows @ rows.T - eye))
    every = torch.stack(norms)
    return weight * (every.square().sum() if squared else every.mean())


def _widen(t: Tensor) -> Tensor:
    """Half precision as float32, in which its products and sums are formed."""
    return t if t.dtype == torch.float64 else t.float()
