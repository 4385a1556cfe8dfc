"""What of a layer can be part of one op, and what has to be called as the user left it."""

from __future__ import annotations

from torch import nn


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling `module` is the forward of its class and nothing else.

    It is not where the module has a hook, forward or backward, or where somebody has given the
    instance a `forward` of its own.
    """
    return "forward" not in module.__dict__ and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def fused_dropout_p(dropout: nn.Module) -> float | None:
    """Say with which probability an op may drop entries in place of `dropout`.

    Returns:
        0 for an `nn.Identity`, and for an `nn.Dropout` in evaluation mode; the `p` of one in
        training mode. None if the module has to be called: it is of another class (a subclass
        included), has hooks or a patched forward, works in place, or drops everything (p = 1).
        The layer is then base(x) + `svd_delta` over dropout(x).
    """
    if not is_unhooked(dropout):
        return None
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.inplace:
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if dropout.p < 1.0 else None
