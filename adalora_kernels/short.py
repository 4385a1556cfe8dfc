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
from .ops import delta_gradients, dropout_seed, linear_gradients

_PLAIN = frozenset((Tensor, nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}
# Names of this module: attributes of another take time, and these are in every forward.
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled


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
) -> Tensor | None:
    """Return y of `functional.svd_linear`; None if the call has to go the long way."""
    if not (
        is_eager()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(bias) in _PLAIN_OR_NONE
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
        tf32 = launching.allows_tf32(x.dtype)
    elif not _fits_linear(x, weight, bias, A, E, B, mask):
        return None
    if _is_grad_enabled():
        y = _svd_linear(x, weight, bias, A, E, B, mask, scaling, dropout_p, tf32)
    elif tf32 is not None:
        y, _, _ = launching.launch_forward(
            x, weight, bias, None, A, E, B, mask, None, scaling, dropout_p, tf32
        )
    else:
        seed = dropout_seed(x) if dropout_p else None
        y, _ = cpu.svd_linear(x, weight, bias, A, E, B, mask, scaling, dropout_p, seed)
    return y


def svd_delta(
    base_output: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor | None:
    """Return what `functional.svd_delta` does; None if the call has to go the long way."""
    if not (
        is_eager()
        and type(base_output) in _PLAIN
        and type(x) in _PLAIN
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
            x = _cast(x, torch.get_autocast_dtype("cuda"))
        tf32 = launching.allows_tf32(x.dtype)
    elif not _fits_delta(base_output, x, A, E, B, mask):
        return None
    if _is_grad_enabled():
        y = _svd_delta(base_output, x, A, E, B, mask, scaling, dropout_p, tf32)
    elif tf32 is not None:
        y, _, _ = launching.launch_forward(
            x, None, None, base_output, A, E, B, mask, None, scaling, dropout_p, tf32
        )
    else:
        seed = dropout_seed(x) if dropout_p else None
        y, _ = cpu.svd_delta(base_output, x, A, E, B, mask, scaling, dropout_p, seed)
    return y


def _cast(t: Any, dtype: torch.dtype) -> Any:
    """Cast t, if there is one, as autocast casts an argument of `F.linear`.

    What is not of floating point stays as it is, so that the call is refused as it is without.
    """
    if t is None or t.dtype is torch.float64 or not t.is_floating_point():
        return t
    return t.to(dtype)


# Whether `cpu` can compute a call, which is all that these ask.


def _fits_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
) -> bool:
    if weight.dim() != 2:
        return False
    out_features, in_features = weight.shape
    if bias is not None and not (
        bias.is_cpu and bias.dtype is x.dtype and bias.shape == (out_features,)
    ):
        return False
    fits = weight.is_cpu and weight.dtype is x.dtype
    return fits and _fits(x, A, E, B, mask, in_features, out_features)


def _fits_delta(y: Tensor, x: Tensor, A: Tensor, E: Tensor, B: Tensor, mask: Tensor | None) -> bool:
    if not (y.is_cpu and y.is_floating_point() and x.dim() > 0 and y.dim() > 0):
        return False
    *rows, in_features = x.shape
    *rows_of_y, out_features = y.shape
    return rows == rows_of_y and _fits(x, A, E, B, mask, in_features, out_features)


def _fits(
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    in_features: int,
    out_features: int,
) -> bool:
    if A.dim() != 2 or x.dim() == 0:
        return False
    r, in_features_of_A = A.shape
    return (
        in_features_of_A == in_features == x.shape[-1]
        and r > 0
        and E.shape == (r, 1)
        and B.shape == (out_features, r)
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
    """`svd_linear` as autograd records it; y is None where the library does not serve the call.

    `tf32` is whether a GPU may use TF32, and None on a CPU. The attributes of `ctx` are set as its
    methods set them, whose calls would cost more. What is saved is what the op saves, because
    checkpointing may compute one way what was the other: a kept mask goes along with its seed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout_p: float,
        tf32: bool | None,
    ) -> Any:
        seed: Any = None
        keep = None
        if tf32 is not None:
            y, h, seed = launching.launch_forward(
                x, weight, bias, None, A, E, B, mask, None, scaling, dropout_p, tf32
            )
        else:
            if dropout_p:
                seed = dropout_seed(x)
                keep = seed.kept_mask = cpu.small_mask(x, dropout_p, seed)
            y, h = cpu.svd_linear(x, weight, bias, A, E, B, mask, scaling, dropout_p, seed, keep)
        ctx.to_save = x, weight, A, E, B, mask, h, seed
        ctx.options = scaling, dropout_p, "auto"
        ctx.materialize_grads = False
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
        return *linear_gradients(ctx, grad_y), None, None, None, None


class SvdDeltaFunction(Function):
    """`svd_delta` as autograd records it, as above."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout_p: float,
        tf32: bool | None,
    ) -> Any:
        seed: Any = None
        keep = None
        if tf32 is not None:
            out, h, seed = launching.launch_forward(
                x, None, None, y, A, E, B, mask, None, scaling, dropout_p, tf32
            )
        else:
            if dropout_p:
                seed = dropout_seed(x)
                keep = seed.kept_mask = cpu.small_mask(x, dropout_p, seed)
            out, h = cpu.svd_delta(y, x, A, E, B, mask, scaling, dropout_p, seed, keep)
        ctx.to_save = x, A, E, B, mask, h, seed
        ctx.options = scaling, dropout_p, "auto"
        ctx.materialize_grads = False
        return out

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
        return *delta_gradients(ctx, grad_y), None, None, None, None


# What Function.apply comes to outside the transforms of torch.func, for which `is_eager` has asked.
_svd_linear: Any = super(Function, SvdLinearFunction).apply
_svd_delta: Any = super(Function, SvdDeltaFunction).apply
