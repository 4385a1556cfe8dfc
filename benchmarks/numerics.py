"""Before anything is timed: is it right?"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor


def check(name: str, actual: Tensor, exact: Tensor, eager: Tensor | None = None) -> None:
    """Refuse a wrong result, of which no time must be reported.

    Ours, given the result of plain eager: design, section 7, at most twice its error plus one
    rounding step. A rival, without: the same but for rounding, so that the comparison is fair.

    Raises:
        ArithmeticError: the result is wrong.
    """
    actual_, exact_ = actual.detach().double(), exact.detach().double()
    error = float((actual_ - exact_).norm())
    if eager is None:
        allowed = max(1e-5, 4 * torch.finfo(actual.dtype).eps) * float(exact_.norm())
    else:
        rounding = torch.finfo(eager.dtype).eps * float(exact_.norm())
        allowed = 2 * float((eager.detach().double() - exact_).norm()) + rounding
    # Not `error > allowed`: NaN is wrong too.
    if not error <= allowed:
        raise ArithmeticError(f"{name}: error {error:.2e}, allowed {allowed:.2e}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what nobody wrote shows."""
    with warnings.catch_warnings():
        # Of ops without a deterministic implementation, which is not what this is for.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
