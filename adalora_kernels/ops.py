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

An eager call of a layer need not go through the layer ops: `short` has the way past them. What
they compute, and their gradients, stand here for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import cpu, importance, launching, reference
from .fusing import autocast_dtype, is_eager, is_plain_tensor, why_plain

_P = ParamSpec("_P")
_R = TypeVar("_R")

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
        if autocast_dtype(device_type) is None:
            return implementation(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args, **kwargs)

    return run


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"adalora::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

# What the compiled library asks when it has no plan for a call: the launches, as numbers.
torch.library.define(
    "adalora::plan_launches",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor E, Tensor B, "
    "Tensor? mask, Tensor? seed, Tensor? h, Tensor? grad_y, bool need_dx) -> Tensor",
)

# What it calls where it has no code for a GPU.
torch.library.define("adalora::importance_update_plain_", _SCHEMAS["importance_update_"])


def _plan_launches(x: Tensor, *others: Any) -> Tensor:
    # Whether there are kernels for this GPU is asked here, once for a plan and not at every call.
    if launching.why_no_triton(x.device) is not None:
        # No workspace and no steps: the library leaves such calls alone, for good.
        return torch.zeros(2, dtype=torch.int64, device="cpu")
    return _planner()(x, *others)


@functools.cache
def _planner() -> Callable[..., Tensor]:
    from .kernels.encode import plan_launches
    from .kernels.svd_linear import plans

    plans.when_forgotten(library.forget_plans)
    return plan_launches


torch.library.impl("adalora::plan_launches", "default", _plan_launches)


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
    if launching.takes_triton(impl, x, A, B, E):
        return launching.forward(
            x, weight, bias, None, A, E, B, mask, scaling, dropout_p, seed, _path(impl)
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
    if launching.takes_triton(impl, x, A, B, E, y):
        return launching.forward(
            x, None, None, y, A, E, B, mask, scaling, dropout_p, seed, _path(impl)
        )
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
    if launching.takes_triton(impl, x, A, B, E, grad_y):
        return launching.backward(
            grad_y, x, weight, A, E, B, mask, h, scaling, dropout_p, seed, need_dx, _path(impl)
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
for _name in ("importance_update_", "importance_update_plain_"):
    torch.library.impl(
        f"adalora::{_name}", "default", outside_autocast(importance.importance_update_)
    )
torch.library.impl("adalora::prune_", "default", reference.prune_)

library = launching.library
_PLAIN = "reference (plain PyTorch)"


class Implementation(NamedTuple):
    """`name` is what runs for `op` on one device type.

    `why_not_faster` says why nothing faster does, and is empty where nothing faster is meant to.
    """

    op: str
    name: str
    why_not_faster: str


def implementations(device: str | torch.device) -> list[Implementation]:
    """Say what runs for every op on tensors of this device as long as `impl` is "auto"."""
    device = torch.device(device)
    why_not = library.why_not_on(device)
    rows = []
    for op in _SCHEMAS:
        if op.startswith("svd_"):
            rows.append(Implementation(op, *_of_layer(device)))
        elif op == "prune_" and device.type != "cpu":
            rows.append(Implementation(op, _PLAIN, ""))
        elif why_not is None:
            rows.append(Implementation(op, "C++" if device.type == "cpu" else "CUDA C++", ""))
        else:
            name = "torch._foreach" if op == "importance_update_" else _PLAIN
            rows.append(Implementation(op, name, why_not))
    return rows


def _of_layer(device: torch.device) -> tuple[str, str]:
    """Return the name and the reason in an `Implementation` of a layer op."""
    if device.type == "cpu":
        return "cpu (plain PyTorch)", "matrix products take nearly all of its time"
    if why := launching.why_no_triton(device):
        return _PLAIN, why
    if why := launching.why_not_library():
        return "triton, launched by Triton", why
    return "triton, launched by the compiled library", ""


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


def _gradients(ctx: Any, need_dx: bool, *tensors: Any) -> tuple[Tensor | None, ...]:
    """Return (dx, dA, dE, dB), of the op unless they are to be differentiated or transformed.

    The tensors are grad_y, x, weight, A, E, B, mask, h and seed. Where nobody looks on, what the op
    calls is called without it.
    """
    grad_y, x, weight, A, E, B, mask, h, seed = tensors
    scaling, dropout_p, impl = ctx.options
    why: str | None = "its gradient is not differentiable itself (create_graph=True)"
    if not torch.is_grad_enabled():
        if impl == "auto" and is_plain_tensor(grad_y) and is_eager():
            if launching.is_on_gpu(x):
                if launching.why_not_library() is None:
                    tf32 = launching.allows_tf32(x, grad_y)
                    grads: tuple[Tensor, ...] = launching.launch_backward(
                        grad_y, x, weight, A, E, B, mask, seed, h, scaling, dropout_p, need_dx, tf32
                    )
                    if grads[1] is not None:
                        return grads
            elif x.is_cpu and not torch.is_autocast_enabled("cpu"):
                keep = getattr(seed, "kept_mask", None)
                return cpu.svd_linear_backward(
                    grad_y, x, weight, A, E, B, mask, h, scaling, dropout_p, seed, need_dx, keep
                )
        why = why_plain(grad_y)
    if why is None:
        return torch.ops.adalora.svd_linear_backward(  # type: ignore[no-any-return]
            grad_y, x, weight, A, E, B, mask, h, scaling, dropout_p, seed, need_dx, impl
        )
    if impl != "auto":
        raise RuntimeError(f"impl={impl!r} cannot run: {why}")
    return _plain_gradients(tensors, scaling, dropout_p, need_dx)


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


def gradients(
    ctx: Any,
    grad_y: Tensor | None,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
    for_adapter: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, A, E and B; that of a base is grad_y.

    `ctx` has saved x, weight, A, E, B, mask, h and seed, and its `options` are scaling, dropout_p
    and impl. The seed may have `cpu.small_mask` as an attribute.
    """
    if grad_y is None:
        return (None,) * 6
    x, weight, A, E, B, mask, h, seed = ctx.saved_tensors
    dx = dA = dE = dB = dweight = dbias = None
    if for_x or for_adapter:
        dx, dA, dE, dB = _gradients(ctx, for_x, grad_y, x, weight, A, E, B, mask, h, seed)
    if for_weight:  # It is normally frozen; who thaws it gets its gradient all the same.
        dweight = reference.as_rows(grad_y).T @ reference.as_rows(x)
    if for_bias:
        dbias = reference.as_rows(grad_y).sum(dim=0)
    return dx if for_x else None, dweight, dbias, dA, dE, dB


def _svd_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, E, B, mask, scaling, dropout_p, seed, impl = inputs
    ctx.options = scaling, dropout_p, impl
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, E, B, mask, output[1], seed)


def _svd_linear_autograd(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, *adapter = ctx.needs_input_grad[:6]
    return *gradients(ctx, grad_y, x, weight, bias, any(adapter)), *(None,) * 5


def _svd_delta_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, A, E, B, mask, scaling, dropout_p, seed, impl = inputs
    ctx.options = scaling, dropout_p, impl
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, None, A, E, B, mask, output[1], seed)


def _svd_delta_autograd(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    dx, _, _, *others = gradients(ctx, grad_y, needs[1], False, False, any(needs[2:5]))
    return grad_y, dx, *others, *(None,) * 5


torch.library.register_autograd(
    "adalora::svd_linear", _svd_linear_autograd, setup_context=_svd_linear_setup
)
torch.library.register_autograd(
    "adalora::svd_delta", _svd_delta_autograd, setup_context=_svd_delta_setup
)
