"""The short way of a layer's call: one `torch.autograd.Function` over one call of C++, or `cpu`.

It is for eager calls of "auto" on plain tensors, where nobody looks on. It asks no more than it has
to: whatever it does not serve, and whatever is wrong with a call, is for the long way round
(`functional`, `ops`), which also finds the words for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import cpu, launching
from .fusing import is_eager
from .ops import dropout_seed, gradients

_PLAIN = frozenset((Tensor, nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}
# Names of this module: attributes of another take time, and these are in every forward.
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled


def layer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Any,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor | None:
    """Return y of `functional.svd_linear`, or, given the output of a base layer, of `svd_delta`.

    It is None if the call has to go the long way.
    """
    if not (
        is_eager()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN_OR_NONE
        and type(bias) in _PLAIN_OR_NONE
        and type(base) in _PLAIN_OR_NONE
        and type(A) in _PLAIN
        and type(E) in _PLAIN
        and type(B) in _PLAIN
        and type(mask) in _PLAIN_OR_NONE
        and type(scaling) is float
        and type(dropout_p) is float
        and 0.0 <= dropout_p < 1.0
    ):
        return None
    y: Tensor | None
    tf32 = None
    if launching.is_on_gpu(x):
        if launching.why_not_library() is not None:
            return None
        if _is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            x, weight, bias = _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)
        tf32 = launching.allows_tf32(x, base)
    elif not _fits(x, weight, bias, base, A, E, B, mask):
        return None
    if _is_grad_enabled():
        apply = _svd_linear if base is None else _svd_delta
        y = apply(x, weight, bias, base, A, E, B, mask, scaling, dropout_p, tf32)
    elif tf32 is not None:
        y, _, _ = launching.launch_forward(
            x, weight, bias, base, A, E, B, mask, None, scaling, dropout_p, tf32
        )
    else:
        seed = dropout_seed(x) if dropout_p else None
        if weight is not None:
            y, _ = cpu.svd_linear(x, weight, bias, A, E, B, mask, scaling, dropout_p, seed)
        else:
            y, _ = cpu.svd_delta(base, x, A, E, B, mask, scaling, dropout_p, seed)
    return y


def _cast(t: Any, dtype: torch.dtype) -> Any:
    """Cast t, if there is one, as autocast casts an argument of `F.linear`.

    What is not of floating point stays as it is, so that the call is refused as it is without.
    """
    if t is None or t.dtype is torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


def _fits(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Any,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
) -> bool:
    """Whether `cpu` can compute a call; no more than that is asked."""
    if x.dim() == 0 or A.dim() != 2 or B.dim() != 2:
        return False
    (r, in_features), out_features = A.shape, B.shape[0]
    if weight is not None:
        fits = (
            weight.is_cpu
            and weight.dtype is x.dtype
            and weight.shape == (out_features, in_features)
            and (
                bias is None
                or (bias.is_cpu and bias.dtype is x.dtype and bias.shape == (out_features,))
            )
        )
    else:
        fits = (
            base is not None
            and base.is_cpu
            and base.is_floating_point()
            and base.shape == (*x.shape[:-1], out_features)
        )
    return (
        fits
        and x.shape[-1] == in_features
        and r > 0
        and E.shape == (r, 1)
        and B.shape[1] == r
        and A.dtype is B.dtype
        and x.is_floating_point()
        and A.is_floating_point()
        and E.is_floating_point()
        and x.is_cpu
        and A.is_cpu
        and E.is_cpu
        and B.is_cpu
        and (mask is None or (mask.is_cpu and mask.dtype is torch.bool and mask.shape == (r,)))
        and not _is_autocast_enabled("cpu")
    )


class SvdLinearFunction(Function):
    """`layer` as autograd records it; y is None where the library does not serve the call.

    `tf32` is whether a GPU may use TF32, and None on a CPU. The attributes of `ctx` are set as its
    methods set them, whose calls would cost more. What is saved is what the op saves, because
    checkpointing may compute one way what was the other: a kept mask goes along with its seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Any,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout_p: float,
        tf32: bool | None,
    ) -> Any:
        """y (..., out) of arguments as `layer` has them, or None; keeps what the backward needs."""
        seed: Any = None
        keep = None
        if tf32 is not None:
            y, h, seed = launching.launch_forward(
                x, weight, bias, base, A, E, B, mask, None, scaling, dropout_p, tf32
            )
        else:
            if dropout_p:
                seed = dropout_seed(x)
                keep = seed.kept_mask = cpu.small_mask(x, dropout_p, seed)
            if weight is not None:
                y, h = cpu.svd_linear(
                    x, weight, bias, A, E, B, mask, scaling, dropout_p, seed, keep
                )
            else:
                y, h = cpu.svd_delta(base, x, A, E, B, mask, scaling, dropout_p, seed, keep)
        ctx.to_save = x, weight, A, E, B, mask, h, seed
        ctx.options = scaling, dropout_p, "auto"
        ctx.materialize_grads = False
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
        """Gradients for the arguments of `forward`, and None for those that need none."""
        x, weight, bias, base, A, E, B = ctx.needs_input_grad[:7]
        dx, dweight, dbias, *others = gradients(ctx, grad_y, x, weight, bias, A or E or B)
        return dx, dweight, dbias, grad_y if base else None, *others, None, None, None, None


class SvdDeltaFunction(SvdLinearFunction):
    """The same with a base, by a name that tells them apart in a profile."""


# What Function.apply comes to outside the transforms of torch.func, for which `is_eager` has asked.
_svd_linear: Any = super(Function, SvdLinearFunction).apply
_svd_delta: Any = super(Function, SvdDeltaFunction).apply
