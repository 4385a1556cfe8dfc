"""The `adalora::` operators: schemas, fakes, implementations per device, and their autograd.

Python owns the schemas, so every op exists on every device; what a device runs is looked up by
the torch dispatcher. For the layer ops it is always a function of this file, which launches Triton
kernels or calls `reference`. For `importance_update_`, the op over a whole model, it is the
compiled library where that has code for the device, else `importance`.

The layer ops have one more argument than their reference, `impl`: "auto", or what the caller named
and the backward must use too: "triton", or one of its paths (see `kernels.svd_linear`). What is
named and cannot run raises a RuntimeError.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _extension, importance, reference

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The kernels keep all ranks of a tile in registers.
MOST_RANKS = 256
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SCHEMAS = {
    "svd_linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor E, Tensor B, "
    "Tensor? mask, float scaling, float dropout_p, Tensor? seed, str impl='auto')"
    " -> (Tensor, Tensor)",
    "svd_linear_backward": "(Tensor grad_y, Tensor x, Tensor weight, Tensor A, Tensor E, Tensor B, "
    "Tensor? mask, Tensor h, float scaling, float dropout_p, Tensor? seed, bool need_dx, "
    "str impl='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "svd_delta": "(Tensor y, Tensor x, Tensor A, Tensor E, Tensor B, Tensor? mask, "
    "float scaling, float dropout_p, Tensor? seed, str impl='auto') -> (Tensor, Tensor)",
    "svd_delta_backward": "(Tensor grad_y, Tensor x, Tensor A, Tensor E, Tensor B, Tensor? mask, "
    "Tensor h, float scaling, float dropout_p, Tensor? seed, bool need_dx, "
    "str impl='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "importance_update_": "(Tensor[] params, Tensor?[] grads, Tensor(a!)[] exp_avg_ipt, "
    "Tensor(b!)[] exp_avg_unc, Tensor(c!) scores, Tensor(d!) skipped, float beta1, float beta2, "
    "Tensor? grad_scale=None) -> ()",
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


# Of the layer ops: the launcher of their Triton kernels, and which argument A is.
_LAYER_OPS = {
    "svd_linear": ("svd_linear_fwd", 3),
    "svd_linear_backward": ("svd_linear_bwd", 3),
    "svd_delta": ("svd_delta_fwd", 2),
    "svd_delta_backward": ("svd_delta_bwd", 2),
}


def _layer_op(name: str) -> Callable[..., Any]:
    """Triton on a GPU that it supports, or where it is named; else the reference."""
    plain = getattr(reference, name)
    launcher, position_of_A = _LAYER_OPS[name]
    paths = name.startswith("svd_linear")

    def run(*args: Any) -> Any:
        # The dispatcher leaves out trailing arguments that have their default value.
        impl = "auto"
        if isinstance(args[-1], str):
            *args, impl = args  # type: ignore[assignment]
        first = args[0]
        if impl == "auto" and not first.is_cuda:
            return plain(*args)
        tensors = [t for t in args if isinstance(t, Tensor)]
        reason = _why_not(args[position_of_A], tensors)
        if reason is not None and impl != "auto":
            raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
        if reason is not None or any(t.numel() == 0 for t in tensors):
            return plain(*args)
        from .kernels import svd_linear

        how = ["auto" if impl == "triton" else impl] if paths else []
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return getattr(svd_linear, launcher)(*args, *how)

    return run


for _name in _LAYER_OPS:
    torch.library.impl(f"adalora::{_name}", "default", outside_autocast(_layer_op(_name)))

# The op over a whole model: the compiled library brings faster code for CPU and CUDA tensors.
torch.library.impl(
    "adalora::importance_update_",
    "default",
    outside_autocast(importance.importance_update_),
)

library = _extension.load()


class Implementation(NamedTuple):
    """What one op runs on one device type, and why nothing faster (empty where it is)."""

    op: str
    name: str
    why_not_faster: str


def _why_not(lora_A: Tensor, tensors: Sequence[Tensor]) -> str | None:
    """Why a layer op cannot run its Triton kernels on these tensors of a device; None if it can."""
    reason = _why_no_triton(lora_A.device)
    if reason is not None:
        return reason
    if lora_A.shape[0] > MOST_RANKS:
        return f"the Triton kernels take ranks up to {MOST_RANKS}, got {lora_A.shape[0]}"
    for t in tensors:
        if t.is_floating_point() and t.dtype not in _TRITON_DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, got {t.dtype}"
    return None


@functools.cache
def _why_no_triton(device: torch.device) -> str | None:
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


def implementations(device_type: str) -> list[Implementation]:
    """The implementation that the dispatcher picks for every op on `device_type`."""
    plain = "reference (plain PyTorch)"
    rows = []
    for op in _SCHEMAS:
        if op in _LAYER_OPS:
            why = _why_no_triton(torch.device(device_type))
            if device_type == "cpu":
                why = "matrix products take nearly all of its time"
            rows.append(Implementation(op, plain if why else "triton", why or ""))
        elif device_type in library.device_types:
            rows.append(Implementation(op, "C++" if device_type == "cpu" else "CUDA C++", ""))
        else:
            why = library.why_not or f"the library was built for {library.built_for} only"
            rows.append(Implementation(op, "torch._foreach", why))
    return rows


def dropout_seed(x: Tensor) -> Tensor:
    """One int64 from torch's generator of the device of x: the seed of one dropout mask.

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
    grad_y: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _svd_delta_backward_fake(grad_y, x, *rest)


def _svd_delta_backward_fake(
    grad_y: Tensor, x: Tensor, A: Tensor, E: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dx: bool = rest[5]
    dx = x.new_empty(x.shape if need_dx else 0)
    return dx, A.new_empty(A.shape), E.new_empty(E.shape), B.new_empty(B.shape)


def _importance_update_fake(*args: Any) -> None:
    return None


torch.library.register_fake("adalora::svd_linear", _svd_linear_fake)
torch.library.register_fake("adalora::svd_linear_backward", _svd_linear_backward_fake)
torch.library.register_fake("adalora::svd_delta", _svd_delta_fake)
torch.library.register_fake("adalora::svd_delta_backward", _svd_delta_backward_fake)
torch.library.register_fake("adalora::importance_update_", _importance_update_fake)


# Autograd. Saved for the backward are the inputs and the small h: nothing of the size of y.


def _reject_double_backward(op: str) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"the gradient of adalora::{op} is not differentiable itself "
            "(create_graph=True); impl='reference' is"
        )


def _svd_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, A, E, B, mask, ctx.scaling, ctx.dropout_p, seed, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, A, E, B, mask, output[1], seed)


def _svd_linear_autograd(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    _reject_double_backward("svd_linear")
    if grad_y is None:
        return (None,) * 11
    x, weight, A, E, B, mask, h, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = dA = dE = dB = dweight = dbias = None
    if needs[0] or any(needs[3:6]):
        dx, dA, dE, dB = torch.ops.adalora.svd_linear_backward(
            *(grad_y, x, weight, A, E, B, mask, h),
            *(ctx.scaling, ctx.dropout_p, seed, needs[0], ctx.impl),
        )
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
    _reject_double_backward("svd_delta")
    if grad_y is None:
        return (None,) * 10
    x, A, E, B, mask, h, seed = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[1]
    dx = dA = dE = dB = None
    if any(ctx.needs_input_grad[1:5]):
        dx, dA, dE, dB = torch.ops.adalora.svd_delta_backward(
            *(grad_y, x, A, E, B, mask, h),
            *(ctx.scaling, ctx.dropout_p, seed, needs_dx, ctx.impl),
        )
    return grad_y, dx if needs_dx else None, dA, dE, dB, *(None,) * 5


torch.library.register_autograd(
    "adalora::svd_linear", _svd_linear_autograd, setup_context=_svd_linear_setup
)
torch.library.register_autograd(
    "adalora::svd_delta", _svd_delta_autograd, setup_context=_svd_delta_setup
)
