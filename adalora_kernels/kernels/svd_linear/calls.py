"""From the tensors of a call to its recipe, and to its results by Triton's launch."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..recipe import Array, Recipe, Size, run
from . import plans
from .backward import backward_recipe
from .common import ROWS, Call, gradient
from .forward import forward_recipe

# Those that are taken as rows, and those that keep their strides.
_OF_ROWS = frozenset(("x", "base", "h", "grad_y"))
_STRIDED = frozenset(("x", "weight", "base", "grad_y"))
_ALIGNED = frozenset(("mask", "seed"))
_NAMES = ("x", "weight", "bias", "base", "A", "E", "B", "mask", "seed", "h", "grad_y")


def operands(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Return those tensors of a call that are not None, as the kernels take them.

    x, base, h and grad_y (..., n) become rows (M, n): views wherever strides allow, also of
    expanded gradients. All but x, weight, base and grad_y become contiguous, mask and seed aligned.
    """
    given = {}
    for name, t in tensors.items():
        if t is not None:
            if t.dim() != 2 and name in _OF_ROWS:
                t = t.reshape(t.shape[:-1].numel(), t.shape[-1])
            t = t if name in _STRIDED else t.contiguous()
            # Copied it is: kernels would be compiled for either, which is chance where callers keep
            # the masks of all layers in one tensor.
            given[name] = t.clone() if name in _ALIGNED and t.data_ptr() % 16 else t
    return given


def call_of(
    operands: Mapping[str, Tensor],
    need_dx: bool = False,
    path: str | plans.Plan = "auto",
    device: plans.Device | None = None,
) -> Call:
    """Describe a call with these `operands`.

    Args:
        path: a plan, the name of a path to plan for, or "auto".
        device: the GPU to plan for; that of x by default.
    """
    x, A, B = operands["x"], operands["A"], operands["B"]
    (M, K), N, R = x.shape, B.shape[0], A.shape[0]
    aligned = {name for name, n in (("y", N), ("dx", K)) if n % 16 == 0}
    arrays: dict[str, Any] = dict.fromkeys(_NAMES)
    arrays["h"] = Array("h", torch.promote_types(x.dtype, A.dtype), (ROWS, R))
    for name, t in operands.items():
        shape: tuple[Size, ...] = t.shape
        strides = None
        if name in _OF_ROWS:
            shape = (ROWS, t.shape[1])
        if name in _STRIDED:
            n, strides = t.shape[1], t.stride()
            if name != "weight" and M == 1 and strides[1] == 1:
                # The first stride of a single row may be any number.
                strides = (n, 1)
            outer, inner = strides
            if name == "weight" and inner != 1:
                # It may lie by columns.
                n, outer, inner = t.shape[0], inner, outer
            if inner == 1 and outer >= n and (outer | n | t.data_ptr()) % 16 == 0:
                aligned.add(name)
        arrays[name] = Array(name, t.dtype, shape, strides)
    return Call(
        M=plans.rows_bucket(M),
        N=N,
        K=K,
        R=R,
        **arrays,
        aligned=frozenset(aligned),
        need_dx=need_dx,
        # allow_tf32, which is the same setting, raises where the newer name has been used.
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        path=path,
        device=device or plans.device_of(x.device),
    )


@functools.lru_cache(maxsize=4096)
def recipe_of(call: Call) -> Recipe:
    """Return the recipe of a call: of the backward where it has grad_y, else of the forward."""
    return forward_recipe(call) if call.grad_y is None else backward_recipe(call, call.grad_y)


plans.when_forgotten(recipe_of.cache_clear)


def _carry_out(
    call: Call, tensors: Mapping[str, Tensor], scaling: float, dropout_p: float, *results: Array
) -> list[Tensor]:
    """Carry the recipe of a call out on its operands, and return its results in their order."""
    x = tensors["x"]
    M = len(x)
    new = {a.name: torch.empty(a.of(M), dtype=a.dtype, device=x.device) for a in results}
    scalars = {
        "scaling": scaling,
        "drop_below": min(round(dropout_p * 2**16), 2**16 - 1),
        "keep_scale": 1.0 / (1.0 - dropout_p),
    }
    run(recipe_of(call), M, {**tensors, **new}, scalars)
    return list(new.values())


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
    path: str | plans.Plan = "auto",
    device: plans.Device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (y, h) of `reference.svd_linear`, for sizes of at least 1 and R of at most 256.

    Args:
        path: a plan, the name of a path to plan for, or "auto".
        device: the GPU to plan for; that of x by default.
    """
    given = operands(x=x, weight=weight, bias=bias, A=A, E=E, B=B, mask=mask, seed=seed)
    call = call_of(given, path=path, device=device)
    y, h = _carry_out(call, given, scaling, dropout_p, call.y, call.h)
    return y.view(*x.shape[:-1], call.N), h.view(*x.shape[:-1], call.R)


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
    device: plans.Device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (y + delta, h) of `reference.svd_delta`, with the limits of `svd_linear_fwd`."""
    given = operands(base=y, x=x, A=A, E=E, B=B, mask=mask, seed=seed)
    call = call_of(given, device=device)
    out, h = _carry_out(call, given, scaling, dropout_p, call.y, call.h)
    return out.view(y.shape), h.view(*x.shape[:-1], call.R)


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
    path: str | plans.Plan = "auto",
    device: plans.Device | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (dx, dA, dE, dB) of `reference.svd_linear_backward`, dx empty unless `need_dx`.

    The limits and the last two arguments are those of `svd_linear_fwd`.

    Args:
        weight: None for the backward of svd_delta, whose opaque base has a backward of its own.
    """
    given = operands(x=x, weight=weight, A=A, E=E, B=B, mask=mask, seed=seed, h=h, grad_y=grad_y)
    call = call_of(given, need_dx, path, device)
    results = map(gradient, (call.A, call.E, call.B, *((call.x,) if need_dx else ())))
    dA, dE, dB, *dx = _carry_out(call, given, scaling, dropout_p, *results)
    return dx[0].view(x.shape) if need_dx else x.new_empty(0), dA, dE, dB
