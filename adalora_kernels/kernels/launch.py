"""Launching a kernel, or only writing down what would be launched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Read by triton when a kernel is decorated, so it can't change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv costs more than all that it is needed for here."""
    return -(-a // b)


@dataclass(frozen=True)
class Launch:
    """One launch: of a Triton kernel of ours, or of a cuBLAS product (`function` is None).

    `read` and `written` are bytes: each tensor that the kernel needs counted once, each that it
    writes once. What a cache does with repeated reads of a tile is not in them.
    """

    kernel: str
    grid: tuple[int, ...]
    read: int
    written: int
    function: Any = None
    arguments: Mapping[str, Any] | None = None

    @property
    def moved(self) -> int:
        """Bytes read plus bytes written."""
        return self.read + self.written


_recording: list[Launch] | None = None


@contextlib.contextmanager
def dry_run() -> Iterator[list[Launch]]:
    """Within it launchers launch nothing, and append what they would have launched to the list.

    Give them tensors on the meta device and nothing is allocated either. For one thread at a time.
    """
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


def size_in_bytes(tensors: Sequence[Tensor | None]) -> int:
    """Of all of them; what is expanded (stride 0) counts as what is stored."""
    total = 0
    for t in tensors:
        if t is not None:
            stored = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
            total += t.element_size() * torch.Size(stored).numel()
    return total


def launch(
    function: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    reads: Sequence[Tensor | None],
    writes: Sequence[Tensor | None],
) -> None:
    """Launch the jitted `function`; `arguments` also holds num_warps and num_stages."""
    if _recording is None:
        function[grid](**arguments)
        return
    name = function.fn.__name__.removesuffix("_kernel")
    read, written = size_in_bytes(reads), size_in_bytes(writes)
    _recording.append(Launch(name, grid, read, written, function, dict(arguments)))


def launch_cublas(
    product: Callable[[], object], reads: Sequence[Tensor | None], writes: Sequence[Tensor]
) -> None:
    """Call `product`, which is one matrix product of torch's (cuBLAS) into `writes`."""
    if _recording is None:
        product()
    else:
        _recording.append(Launch("cublas", (), size_in_bytes(reads), size_in_bytes(writes)))
