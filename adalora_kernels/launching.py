"""Who launches the kernels of a layer: the compiled library, or Triton's own launcher.

Both launch what Triton has compiled, with the same parameters. The library does it in one call in
each direction. Triton's launcher does it where there is no library, in the interpreter, and while
somebody watches Triton's launches (Proton, a profiler), because only Triton tells of them.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension

# The kernels keep all ranks of a tile in registers.
MOST_RANKS = 256
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

library = _extension.load()

# Whether a tensor is where the kernels run, unless they are interpreted. It is in every forward.
is_on_gpu: Callable[[Tensor], bool] = operator.attrgetter("is_cuda")


def _op_of_library(name: str) -> Any:
    """Return the op as C++ has it, without what Python puts around it; None if it is not there."""
    packet = getattr(torch.ops.adalora, name, None)
    return None if packet is None else packet.default.op


# (…) -> (y, h, seed) and (…) -> (dx, dA, dE, dB). The library returns None for y and for dA where
# it cannot serve the call; it does not say why, and whoever called goes the long way round.
launch_forward = _op_of_library("launch_forward")
launch_backward = _op_of_library("launch_backward")


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """Say why the Triton kernels cannot run on `device`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if _is_interpreted():
            return None
        return "the Triton kernels need a CUDA device (or TRITON_INTERPRET=1, to debug on a CPU)"
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, got {device}"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or later"
    return None


def takes_triton(impl: str, x: Tensor, A: Tensor, B: Tensor, *others: Tensor) -> bool:
    """Whether a layer op launches its Triton kernels on these tensors, all of floating point.

    Raises:
        RuntimeError: `impl` names the kernels and they cannot run; the message says why.
    """
    if impl == "auto" and not is_on_gpu(x):
        return False
    reason = why_no_triton(x.device)
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


@functools.cache
def _is_interpreted() -> bool:
    # Triton reads this once, too.
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_never_library() -> str | None:
    if launch_forward is None:
        return library.why_not
    return "TRITON_INTERPRET=1 interprets them" if _is_interpreted() else None


def why_not_library() -> str | None:
    """Say why Triton's launcher launches and not the library's; None if the library does.

    It is asked at every call: a profiler may begin to watch at any time.
    """
    why = _why_never_library()
    if why is None and (knobs := sys.modules.get("triton.knobs")) is not None:
        runtime = knobs.runtime
        if _has_calls(runtime.launch_enter_hook) or _has_calls(runtime.launch_exit_hook):
            return "somebody watches Triton's launches (triton.knobs.runtime)"
    return why


def _has_calls(hook: Any) -> bool:
    """Whether a hook of Triton's does anything: a chain, or what was put in the place of one."""
    return bool(getattr(hook, "calls", hook))


def allows_tf32(x: Tensor, y: Tensor | None) -> bool:
    """Whether torch allows products in the dtypes of x, and of a base or grad_y, to use TF32."""
    is_float32 = x.dtype is torch.float32 or (y is not None and y.dtype is torch.float32)
    # allow_tf32, which is the same setting, raises where the newer name has been used.
    return is_float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def forward(
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
    seed: Tensor | None,
    path: str,
) -> tuple[Tensor, Tensor]:
    """Launch `svd_linear`, or, given the output of a base layer, `svd_delta`; returns (y, h)."""
    if path == "auto" and why_not_library() is None:
        tf32 = allows_tf32(x, base)
        y, h, _ = launch_forward(
            x, weight, bias, base, A, E, B, mask, seed, scaling, dropout_p, tf32
        )
        if y is not None:
            return y, h
    from .kernels import svd_linear as kernels

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if weight is not None:
            return kernels.svd_linear_fwd(
                x, weight, bias, A, E, B, mask, scaling, dropout_p, seed, path
            )
        return kernels.svd_delta_fwd(base, x, A, E, B, mask, scaling, dropout_p, seed)


def backward(
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
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward of either; returns (dx, dA, dE, dB), dx being empty unless `need_dx`."""
    if path == "auto" and why_not_library() is None:
        tf32 = allows_tf32(x, grad_y)
        dx, dA, dE, dB = launch_backward(
            grad_y, x, weight, A, E, B, mask, seed, h, scaling, dropout_p, need_dx, tf32
        )
        if dA is not None:
            return x.new_empty(0) if dx is None else dx, dA, dE, dB
    from .kernels import svd_linear as kernels

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return kernels.svd_linear_bwd(
            grad_y, x, weight, A, E, B, mask, h, scaling, dropout_p, seed, need_dx, path
        )
