"""What of a layer can be part of one op, and what is computed in plain PyTorch instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_PLAIN = frozenset((Tensor, nn.Parameter))
# An op has a fake, so it serves what stands for a tensor while PyTorch records a graph.
_SERVED = _PLAIN | {FakeTensor, FunctionalTensor, type(None)}

# Names of this module, because they are in every forward, and attributes take time there. Only
# `torch.jit.is_tracing` has a public name, and it is what torch.compile knows. What stands behind
# it takes a quarter of the time. The transforms are what autograd.Function asks for itself.
_is_transformed = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
_is_recording_a_trace = torch._C._is_tracing

# Tools patch classes, too. Those of the modules that become part of an op, as they are here.
_FORWARDS: dict[type, Any] = {k: k.forward for k in (nn.Linear, nn.Dropout, nn.Identity)}

TRACED = "what torch.jit.trace records has to run without this package"


def why_plain(*tensors: Tensor | None) -> str | None:
    """Say why plain PyTorch has to compute this call, or None if an op can.

    To PyTorch an op is one step. It has a gradient, but no rule for the transforms of
    `torch.func` or for forward-mode AD; tensor subclasses have no rule for it; and a file that
    `torch.jit.trace` or `torch.export` writes has to run where this package is not installed.

    Args:
        tensors: all that the call is about. Nothing but their types is read.
    """
    for t in tensors:
        if type(t) not in _SERVED:
            return f"{type(t).__name__} is a tensor subclass, for which the op has no rule"
    if _is_transformed():
        return "the op has no rule for transforms of torch.func"
    if forward_ad._current_level >= 0:
        return "the op has no forward-mode derivative"
    if _is_tracing():
        return TRACED
    if is_exporting():
        return "what torch.export writes has to run without this package"
    return None


def is_eager() -> bool:
    """Whether what is called is just carried out.

    It is not where a graph is recorded, a transform of `torch.func` or forward-mode AD is active,
    or a mode looks on: that has to see the op, and not what it consists of.
    """
    return not (
        is_compiling()
        or _is_transformed()
        or _dispatch_modes()
        or forward_ad._current_level >= 0
        or _is_recording_a_trace()
        or (_function_modes() and not _only_a_default_device())
    )


def _only_a_default_device() -> bool:
    """Whether the only modes for functions are those of `torch.set_default_device`."""
    stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(type(mode) is DeviceContext for mode in stack)


def is_exporting() -> bool:
    """Whether `torch.export` records: `torch.compiler.is_exporting`.

    That is a constant to torch.compile of torch 2.11: true, although nothing is exported.
    """
    return torch.compiler._is_exporting_flag


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast wants on such devices; None where it is off or unknown."""
    # Of a device without autocast the second question may not be asked. The first is nothing that
    # torch.compile of torch 2.11 knows, so it is not asked where the answer is known.
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def is_plain_tensor(t: Tensor) -> bool:
    """Whether `t` is a tensor or a parameter of PyTorch's own classes, and not of a subclass."""
    return type(t) in _PLAIN


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return `module.<name>`, from the table of its parameters if it is there.

    That takes a tenth of the time. It is not there where something stands in for the parameter: a
    view of FSDP's, a tensor of a replica of DataParallel, what a parametrization computes. And an
    attribute of the instance comes first, as it does in Python.
    """
    attributes = module.__dict__
    if name not in attributes:
        try:
            return attributes["_parameters"][name]
        except KeyError:
            pass
    return getattr(module, name)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` is the forward of its class and nothing else.

    It is not where the module has a hook, forward or backward, or all modules have one; where
    somebody has given the instance a `forward` of its own; or the class of PyTorch another one.
    """
    kind = type(module)
    return not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or kind.forward is not _FORWARDS.get(kind, kind.forward)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def fused_dropout_p(dropout: nn.Module) -> float | None:
    """Say with which probability an op may drop entries in place of `dropout`.

    Returns:
        0 for an `nn.Identity`, and for an `nn.Dropout` in evaluation mode; the `p` of one in
        training mode. None if the module has to be called: it is of another class (a subclass
        included), has hooks or a patched forward, works in place, or drops everything (p = 1).
        The layer is then base(x) + `svd_delta` over dropout(x).
    """
    if type(dropout) is nn.Identity:
        return 0.0 if is_unhooked(dropout) else None
    if type(dropout) is not nn.Dropout or dropout.inplace or not is_unhooked(dropout):
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1.0 else None
