"""The ops as their equations define them, in plain PyTorch: what every implementation must give.

It is the oracle of the tests, what `impl="reference"` records by autograd, and what runs on a
device that has nothing faster. Nothing here is tuned.

Equation numbers are those of the AdaLoRA paper (Zhang et al., ICLR 2023, arXiv 2303.10512).
Everything here is differentiable where the mathematics is, works in float64, and reads no value
from the device, so the same code runs on any device.

Shapes throughout: x (..., in), weight (out, in), A = lora_A (r, in), E = lora_E (r, 1),
B = lora_B (out, r), mask (r,) bool, h (..., r).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Philox-4x32 (Salmon et al., SC 2011): two round multipliers and two key increments.
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF
# In flat averages a parameter begins at a multiple of so many entries, that is of 64 bytes in
# float32, so that it lies as well as in a tensor of its own.
_FLAT_UNIT = 16


def philox_4x32(seed: Tensor, counters: Tensor, rounds: int) -> Tensor:
    """Return the four words of each counter (n,) int64 under the key `seed`, as int64 (n, 4).

    `seed` is one int64 on the device of the counters.
    """
    lanes = [counters & _U32, counters >> 32, *torch.zeros_like(counters).expand(2, -1)]
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
    return torch.stack(lanes, dim=1)


def philox_uint32(seed: Tensor, numel: int, rounds: int = 10) -> Tensor:
    """Return the first `numel` words of the Philox-4x32 stream of `seed`, as int64 (numel,).

    Word i is lane i % 4 of counter i // 4. `seed` is one int64 on the device that the stream is
    wanted on.
    """
    counters = torch.arange((numel + 3) // 4, device=seed.device)
    return philox_4x32(seed, counters, rounds).flatten()[:numel]


def philox_mask(like: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return which entries of `like` dropout keeps, as ones and zeros of its shape and dtype.

    A pure function of (seed, shape, p) on any device. Entry i has 16 bits of its own, the low or
    (odd i) the high half of word i // 2, so that a kernel gets the bits of eight neighbours from
    one counter; p is meant to the nearest 2⁻¹⁶. Seven rounds are the fewest with which
    Philox-4x32 passes BigCrush.
    """
    words = philox_uint32(seed, (like.numel() + 1) // 2, rounds=7)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=1).flatten()[: like.numel()]
    return (halves >= drop_below(p)).reshape(like.shape).to(like.dtype)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return x ⊙ keep / (1 - p), where keep is `philox_mask`; x itself where seed is None.

    It is linear in x and its own transpose, so the backward applies it to a gradient.
    """
    return x if seed is None else x * philox_mask(x, p, seed) / (1.0 - p)


def drop_below(p: float) -> int:
    """Of 2¹⁶ equally likely values, dropout drops those below this; never all of them."""
    return min(round(p * 2**16), 2**16 - 1)


def as_rows(t: Tensor) -> Tensor:
    """Reshape (..., n) to (rows, n); it is a view where the strides allow one."""
    if t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def effective_E(E: Tensor, mask: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return e = scaling · E ⊙ mask, (r,), in `dtype`."""
    e = E.reshape(-1) * scaling
    return (e if mask is None else e.masked_fill(~mask, 0.0)).to(dtype)


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
    """Eq. (3): y = x·W0ᵀ + bias + (h ⊙ e)·Bᵀ with h = dropout(x)·Aᵀ and e = scaling·E ⊙ mask.

    Returns (y, h): y (..., out) in the dtype of x, and h (..., r), which the backward needs, in
    the wider of the dtypes of x and A. `seed` (one int64 on the device of x) is None exactly when
    there is no dropout.
    """
    return svd_delta(F.linear(x, weight, bias), x, A, E, B, mask, scaling, dropout_p, seed)


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
    """Add the low-rank term of `svd_linear` to y (..., out), the output of any base layer.

    Returns (y + (h ⊙ e)·Bᵀ, h), the sum in the dtype of y. y itself is left alone: the layer that
    made it may have saved it, and it may be a view that autograd does not allow to be written to.
    """
    wide = torch.promote_types(x.dtype, A.dtype)
    h = dropout(x.to(wide), dropout_p, seed) @ A.T.to(wide)
    delta = (h * effective_E(E, mask, scaling, wide)) @ B.T.to(wide)
    return (y + delta).to(y.dtype), h


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
    """Return (dx, dA, dE, dB) of `svd_linear` for the gradient grad_y of y, weight being frozen.

    With u = g·B: dA = (u ⊙ e)ᵀ·dropout(x), dE = scaling · mask ⊙ Σ_rows u ⊙ h, dB = gᵀ·(h ⊙ e),
    and dx = g·W0 + dropout((u ⊙ e)·A), or an empty (0,) tensor unless `need_dx`.

    Without a weight they are those of `svd_delta`: dx then lacks g·W0, which is the base layer's,
    and the gradient of its y is grad_y itself.
    """
    wide = h.dtype
    g, h = as_rows(grad_y).to(wide), as_rows(h)
    e = effective_E(E, mask, scaling, wide)
    u = g @ B.to(wide)
    dA = (u * e).T @ dropout(as_rows(x).to(wide), dropout_p, seed)
    dE = scaling * (u * h).sum(dim=0)
    if mask is not None:
        dE = dE.masked_fill(~mask, 0.0)
    dB = g.T @ (h * e)
    dx = x.new_empty(0)
    if need_dx:
        dx = dropout((u * e) @ A.to(wide), dropout_p, seed)
        if weight is not None:
            dx = as_rows(grad_y) @ weight + dx
        dx = dx.to(x.dtype).reshape(x.shape)
    return dx, dA.to(A.dtype), dE.reshape(E.shape).to(E.dtype), dB.to(B.dtype)


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
    The averages are float32 or bfloat16 (float64 for float64 parameters), contiguous: one of each
    parameter, in its shape, or flat ones of all of them (see `flat_views`). If any
    gradient holds inf or NaN, nothing changes but `skipped` (int64, one element), which counts
    such steps. `scores` is flat, (total rank,), in float32 or float64. `grad_scale` (one float32)
    is what ∂L/∂w is of the gradients: 1 / 1024 if the loss was multiplied by 1024. Where it is
    inf or NaN, the step is skipped as well.
    """
    exp_avg_ipt, exp_avg_unc = (flat_views(avg, params) for avg in (exp_avg_ipt, exp_avg_unc))
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


def flat_averages(params: Sequence[Tensor], narrow_dtype: torch.dtype) -> list[Tensor]:
    """Return an average of all parameters as few tensors (n,) of zeros; see `flat_views`.

    That of float64 parameters is float64, that of all others `narrow_dtype`. There is one for each
    dtype, on the device of the parameters.
    """
    sizes: dict[torch.dtype, int] = {}
    for p in params:
        dtype = torch.float64 if p.dtype == torch.float64 else narrow_dtype
        sizes[dtype] = sizes.get(dtype, 0) + _flat_size(p)
    return [torch.zeros(n, dtype=dtype, device=params[0].device) for dtype, n in sizes.items()]


def flat_views(averages: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return an average of each parameter in its shape, as views where they lie in flat tensors.

    `averages` holds one for each parameter, which come back as they are; or one flat tensor in
    which all lie in turn, each from a multiple of 16 entries on; or two such, of which that in
    float64 is the float64 parameters'. Empty, if there are none.
    """
    if len(averages) in (0, len(params)):
        return list(averages)
    starts, views = [0] * len(averages), []
    for p in params:
        is_double = p.dtype == torch.float64
        k = 0 if len(averages) == 1 or (averages[0].dtype == torch.float64) == is_double else 1
        views.append(averages[k].as_strided(p.shape, (p.shape[1], 1), starts[k]))
        starts[k] += _flat_size(p)
    return views


def _flat_size(parameter: Tensor) -> int:
    return -(-parameter.numel() // _FLAT_UNIT) * _FLAT_UNIT


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


def triplet_norms(params: list[Tensor]) -> Tensor:
    """‖lora_A_i‖ · |lora_E_i| · ‖lora_B_i‖: the Frobenius norm of a triplet's ΔW, but for scaling.

    Args:
        params: lora_A (r, in), lora_E (r, 1) and lora_B (out, r) of each adapter in turn.

    Returns:
        (total rank,), in module order, float64 if the parameters are, else float32.
    """
    norm = torch.linalg.vector_norm
    return torch.cat(
        [
            norm(_widen(A), dim=1) * _widen(E).abs().squeeze(1) * norm(_widen(B), dim=0)
            for A, E, B in zip(*(params[i::3] for i in range(3)), strict=True)
        ]
    )


def top_b_mask(scores: Tensor, budget: int | Tensor) -> Tensor:
    """Eq. (6), over all matrices at once: which `budget` of the flat `scores` (n,) are kept, bool.

    Exactly min(budget, n) stay. Among equals the lower index wins, and NaN ranks below everything.
    `budget` may be a scalar tensor on the device of `scores`; nothing is read back either way.
    """
    ranked = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    order = ranked.argsort(descending=True, stable=True)
    position = torch.arange(scores.numel(), device=scores.device)
    return torch.empty_like(scores, dtype=torch.bool).scatter_(0, order, position < budget)


def prune_(
    scores: Tensor,
    budget: Tensor,
    prunes: Tensor,
    in_play: Tensor,
    kept_at_0: Tensor | None,
    mask: Tensor,
    lora_E: list[Tensor],
    again: bool = False,
) -> None:
    """Write 0 into every lora_E (r, 1) whose triplet is not among the best, in place.

    If `prunes` (one bool), `mask` (n,) bool becomes `top_b_mask` of the `scores` (n,) for the
    `budget` (one int64), among the triplets that are `in_play` (n,) bool; only those are compared
    and changed. Nothing is read from the device: one captured call serves steps of all kinds.
    `again` only writes the zeros of the mask that is there. What is `kept_at_0` (n,) bool is 0
    after every call.
    """
    if again:
        dead = in_play > mask
    else:
        best = top_b_mask(scores.masked_fill(~in_play, -torch.inf), budget)
        changes = in_play & prunes
        torch.where(changes, best, mask, out=mask)
        dead = changes > mask
    if kept_at_0 is not None:
        dead |= kept_at_0
    flat = torch.cat(lora_E).masked_fill_(dead.unsqueeze(1), 0.0)
    torch._foreach_copy_(lora_E, flat.split_with_sizes([len(E) for E in lora_E]))


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
