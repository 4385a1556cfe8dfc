"""The `adalora::` operators: schemas, fakes, implementations per device, and their autograd.

Python owns the schemas, so every op exists on every device, whether or not there is a compiled
library. The ops of one layer (`svd_linear`, `svd_delta`, `svd_linear_backward`) are one function
each, in which everything is decided: it launches the Triton kernels, or calls `cpu` or
`reference`. For the ops over a whole model, `importance_update_` and `prune_`, the dispatcher finds
the implementation: that of the compiled library where it has one for the device, else `importance`
or `reference`.

The layer ops have one more argument than their reference, `impl`. It is "auto", or it names what
the op and its backward must use: "triton", or one of the kernels' paths (see
`kernels.svd_linear`). An implementation that is named and cannot run raises a RuntimeError.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _extension, cpu, importance, reference
from .fusing import why_plain

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The kernels keep all ranks of a tile in registers.
MOST_RANKS = 256
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SCHEMAS = {
    "svd_linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor E, Tensor B, "
    "Tensor? mask, float scaling, float dropout_p, Tensor? seed, str impl='auto')"
    " -> (Tensor, Tensor)",
    "svd_delta": "(Tensor y, Tensor x, Tensor A, Tensor E, Tensor B, Tensor? mask, "
    "float scaling, float dropout_p, Tensor? seed, str impl='auto') -> (Tensor, Tensor)",
    "svd_linear_backward": "(Tensor grad_y, Tensor x, Tensor? weight, Tensor A, Tensor E, "
    "Tensor B, Tensor? mask, Tensor h, float scaling, float dropout_p, Tensor? seed, "
    "bool need_dx, str impl='auto') -> (Tensor, Tensor, Tensor, Tensor)",
    "importance_update_": "(Tensor[] params, Tensor?[] grads, Tensor(a!)[] exp_avg_ipt, "
    "Tensor(b!)[] exp_avg_unc, Tensor(c!) scores, Tensor(d!) skipped, float beta1, float beta2, "
    "Tensor? grad_scale=None) -> ()",
    "prune_": "(Tensor scores, Tensor budget, Tensor prunes, Tensor in_play, Tensor? kept_at_0, "
    "Tensor(a!) mask, Tensor(b!)[] lora_E, bool again=False) -> ()",
}


def outside_autocast(implementation: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with autocast off: its dtypes are decided before it is called."""

    @functools.wraps(implementation)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first: Any = args[0]
        tensor = first if isinstance(first, Tensor) else first[0]
        device_type = tensor.device.type
        available = torch.amp.is_autocast_available(device_type)
        if not (available and torch.is_autocast_enabled(device_type)):
            return implementation(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args, **kwargs)

    return run


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"adalora::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@functools.cache
def _why_no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the Triton kernels need a CUDA device (or TRITON_INTERPRET=1, to debug on a CPU)"
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, got {device}"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None


def _takes_triton(impl: str, x: Tensor, A: Tensor, B: Tensor, *others: Tensor) -> bool:
    """Whether a layer op launches its Triton kernels on these tensors, all of floating point.

    Raises:
        RuntimeError: `impl` names the kernels and they cannot run; the message says why.
    """
    if impl == "auto" and x.is_cpu:
        return False
    reason = _why_no_triton(x.device)
    if reason is None and A.shape[0] > MOST_RANKS:
        reason = f"the Triton kernels take ranks up to {MOST_RANKS}, got {A.shape[0]}"
    if reason is None:
        for t in (x, A, B, *others):
            if t.dtype not in _TRITON_DTYPES:
                reason = f"the Triton kernels take float32, bfloat16 and float16, got {t.dtype}"
    if reason is not None and impl != "auto":
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
    # Nothing is launched for tensors without entries.
    return reason is None and x.numel() > 0 and B.numel() > 0


def _path(impl: str) -> str:
    """The path of the kernels that `impl` names; "triton" leaves the choice to them."""
    return "auto" if impl == "triton" else impl


# The layer ops. Their `impl` has a default here as in the schema, because the dispatcher leaves
# out trailing arguments that have their default value.


@outside_autocast
def _svd_linear(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    if _takes_triton(impl, x, A, B, E):
        from .kernels.svd_linear import svd_linear_fwd

        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return svd_linear_fwd(
                x, weight, bias, A, E, B, mask, scaling, dropout_p, seed, _path(impl)
            )
    if x.is_cpu:
        return cpu.svd_linear(x, weight, bias, A, E, B, mask, scaling, dropout_p, seed)
    return reference.svd_linear(x, weight, bias, A, E, B, mask, scaling, dropout_p, seed)


@outside_autocast
def _svd_delta(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    if _takes_triton(impl, x, A, B, E, y):
        from .kernels.svd_linear import svd_delta_fwd

        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return svd_delta_fwd(y, x, A, E, B, mask, scaling, dropout_p, seed)
    if x.is_cpu:
        return cpu.svd_delta(y, x, A, E, B, mask, scaling, dropout_p, seed)
    return reference.svd_delta(y, x, A, E, B, mask, scaling, dropout_p, seed)


@outside_autocast
def _svd_linear_backward(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _takes_triton(impl, x, A, B, E, grad_y):
        from .kernels.svd_linear import svd_linear_bwd

        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return svd_linear_bwd(
                *(grad_y, x, weight, A, E, B, mask, h),
                *(scaling, dropout_p, seed, need_dx, _path(impl)),
            )
    if x.is_cpu:
        return cpu.svd_linear_backward(
            grad_y, x, weight, A, E, B, mask, h, scaling, dropout_p, seed, need_dx
        )
    return reference.svd_linear_backward(
        grad_y, x, weight, A, E, B, mask, h, scaling, dropout_p, seed, need_dx
    )


torch.library.impl("adalora::svd_linear", "default", _svd_linear)
torch.library.impl("adalora::svd_delta", "default", _svd_delta)
torch.library.impl("adalora::svd_linear_backward", "default", _svd_linear_backward)

# The ops over a whole model: the compiled library brings faster code for CPU and CUDA tensors, of
# `prune_` for those on a CPU.
torch.library.impl(
    "adalora::importance_update_", "default", outside_autocast(importance.importance_update_)
)
torch.library.impl("adalora::prune_", "default", reference.prune_)

library = _extension.load()


class Implementation(NamedTuple):
    """`name` is what runs for `op` on one device type.

    `why_not_faster` says why nothing faster does, and is empty where nothing faster is meant to.
    """

    op: str
    name: str
    why_not_faster: str


def implementations(device_type: str) -> list[Implementation]:
    """Say what runs for every op on tensors of `device_type` as long as `impl` is "auto"."""
    plain = "reference (plain PyTorch)"
    rows = []
    for op in _SCHEMAS:
        if op.startswith("svd_"):
            why = _why_no_triton(torch.device(device_type))
            if device_type == "cpu":
                why = "matrix products take nearly all of its time"
                rows.append(Implementation(op, "cpu (plain PyTorch)", why))
            else:
                rows.append(Implementation(op, plain if why else "triton", why or ""))
        elif op == "prune_" and device_type != "cpu":
            rows.append(Implementation(op, plain, ""))
        elif device_type in library.device_types:
            rows.append(Implementation(op, "C++" if device_type == "cpu" else "CUDA C++", ""))
        else:
            why = library.why_not or f"the library was built for {library.built_for} only"
            name = "torch._foreach" if op == "importance_update_" else plain
            rows.append(Implementation(op, name, why))
    return rows


def dropout_seed(x: Tensor) -> Tensor:
    """Draw the seed of one dropout mask, an int64 (1,), from torch's generator of x's device.

    It stays on the device: no host sync, a fresh value at every replay of a CUDA graph, and the
    same value again when activation checkpointing restores the generator.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


# Fakes: the shapes, dtypes and strides of the outputs.


def _h_fake(x: Tensor, A: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], A.shape[0]), dtype=torch.promote_types(x.dtype, A.dtype))


def _svd_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _h_fake(x, A)


def _svd_delta_fake(y: Tensor, x: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), _h_fake(x, A)


def _svd_linear_backward_fake(
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
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    return dx, A.new_empty(A.shape), E.new_empty(E.shape), B.new_empty(B.shape)


def _in_place_fake(*args: Any) -> None:
    return None


torch.library.register_fake("adalora::svd_linear", _svd_linear_fake)
torch.library.register_fake("adalora::svd_linear_backward", _svd_linear_backward_fake)
torch.library.register_fake("adalora::svd_delta", _svd_delta_fake)
torch.library.register_fake("adalora::importance_update_", _in_place_fake)
torch.library.register_fake("adalora::prune_", _in_place_fake)


# Autograd. Saved for the backward are the inputs and the small h: nothing of the size of y.


def _gradients(ctx: Any, need_dx: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dA, dE, dB), from the op unless they are to be differentiated or transformed.

    The tensors are grad_y, x, weight, A, E, B, mask, h and seed.
    """
    *arguments, seed = tensors
    why: str | None = "its gradient is not differentiable itself (create_graph=True)"
    if not torch.is_grad_enabled():
        why = why_plain(tensors[0])
    if why is None:
        return torch.ops.adalora.svd_linear_backward(  # type: ignore[no-any-return]
            *arguments, ctx.scaling, ctx.dropout_p, seed, need_dx, ctx.impl
        )
    if ctx.impl != "auto":
        raise RuntimeError(f"impl={ctx.impl!r} cannot run: {why}")
    return _plain_gradients(tensors, ctx.scaling, ctx.dropout_p, need_dx)


@outside_autocast
def _plain_gradients(
    tensors: tuple[Any, ...], scaling: float, dropout_p: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op returns where `impl` is "auto", as autograd can record it.

    h is computed again, because the one that was saved has no history. Dropout drops what it
    dropped in the forward, so its mask is that of the device's implementation.
    """
    grad_y, x, weight, A, E, B, mask, _, seed = tensors
    dropped, keep = x.to(torch.promote_types(x.dtype, A.dtype)), None
    if seed is not None:
        mask_of = cpu.dropout_mask if x.is_cpu else reference.philox_mask
        keep = mask_of(dropped, dropout_p, seed) / (1.0 - dropout_p)
        dropped = dropped * keep
    h = dropped @ A.T.to(dropped.dtype)
    dx, dA, dE, dB = reference.svd_linear_backward(
        grad_y, dropped, None, A, E, B, mask, h, scaling, 0.0, None, need_dx
    )
    if need_dx:
        dx = dx if keep is None else dx * keep
        dx = (dx if weight is None else grad_y @ weight + dx).to(x.dtype)
    return dx, dA, dE, dB


def _svd_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, A, E, B, mask, ctx.scaling, ctx.dropout_p, seed, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, A, E, B, mask, output[1], seed)


def _svd_linear_autograd(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 11
    x, weight, A, E, B, mask, h, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dA = dE = dB = dweight = dbias = None
    if needs[0] or any(needs[3:6]):
        dx, dA, dE, dB = _gradients(ctx, needs[0], grad_y, x, weight, A, E, B, mask, h, seed)
    if needs[1]:  # The weight is normally frozen; who thaws it gets its gradient all the same.
        dweight = reference.as_rows(grad_y).T @ reference.as_rows(x)
    if ctx.has_bias and needs[2]:
        dbias = reference.as_rows(grad_y).sum(dim=0)
    return dx if needs[0] else None, dweight, dbias, dA, dE, dB, *(None,) * 5


def _svd_delta_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, A, E, B, mask, ctx.scaling, ctx.dropout_p, seed, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, A, E, B, mask, output[1], seed)


def _svd_delta_autograd(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 10
    x, A, E, B, mask, h, seed = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[1]
    dx = dA = dE = dB = None
    if any(ctx.needs_input_grad[1:5]):
        dx, dA, dE, dB = _gradients(ctx, needs_dx, grad_y, x, None, A, E, B, mask, h, seed)
    return grad_y, dx if needs_dx else None, dA, dE, dB, *(None,) * 5


torch.library.register_autograd(
    "adalora::svd_linear", _svd_linear_autograd, setup_context=_svd_linear_setup
)
torch.library.register_autograd(
    "adalora::svd_delta", _svd_delta_autograd, setup_context=_svd_delta_setup
)
