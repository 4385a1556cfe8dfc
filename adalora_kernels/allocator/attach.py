"""What an allocator needs to know of the optimizer whose steps it follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter


def checked_optimizer(optimizer: Any, adapters: list[Adapter]) -> torch.optim.Optimizer:
    """The torch optimizer inside of wrappers such as Accelerate's.

    Raises:
        TypeError: there is none.
        ValueError: it lacks a trainable parameter of an adapter, or the adapters are sharded.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    check_is_optimizer(optimizer)
    if any("DTensor" in type(p).__name__ for a in adapters for p in a.parameters):
        raise ValueError("the adapters are sharded (FSDP2, DTensor), which is not supported")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in adapters:
        if any(p.requires_grad and id(p) not in held for p in adapter.parameters):
            raise ValueError(
                f"optimizer must have all trainable adapter parameters, lacks one of those "
                f"beside {adapter.name}"
            )
    found: torch.optim.Optimizer = optimizer
    return found


def check_is_optimizer(optimizer: object) -> None:
    """Raise TypeError if it is not a torch optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )


def refuse_capture(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured, which would keep one step's budget."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "an attached allocator can't be captured in a CUDA graph, for its budget changes: "
            "detach() it, and capture update() (see RankAllocator)"
        )


def refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if the arguments of `optimizer.step`, self first, have a closure."""
    if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
        raise RuntimeError(
            "an attached allocator can't add its regulariser to gradients that are made by a "
            "closure: use orth_reg in the loss, and orth_reg_weight=0 here"
        )


def grad_scale_of(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """What ∂L/∂w is of the gradients where a fused optimizer undoes a GradScaler's scale itself."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return None if scale is None else 1.0 / scale


def overflow_as_scale(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor | None:
    """A scale of inf where a fused optimizer under a GradScaler is to skip its step, else 1.

    Other optimizers are not called at all then. The verdict is on the device and is not to be read
    here; a scale of inf makes the importance update skip itself there.
    """
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    if overflow is None:
        return None
    skips = torch.full((1,), torch.inf, device=device)
    return skips.where(overflow.to(device) > 0, 1.0)
