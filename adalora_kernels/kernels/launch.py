"""Launch a kernel, or only write down what would be launched.

What a launch reads and writes is told by the names of its arguments: a kernel writes the tensors
whose name begins with "out", and reads all others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton reads this when a kernel is decorated, so it can't change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up. triton.cdiv costs more than all that it is needed for here."""
    return -(-a // b)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Launch the jitted `kernel`; `arguments` also holds num_warps and num_stages."""
    if _recording is None:
        kernel[grid](**arguments)
    else:
        name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
        _recording.append(_record(name, grid, kernel, arguments))


def launch_cublas(x: Tensor, w: Tensor, out: Tensor) -> None:
    """Add x (M, K)·w (K, N) to out (M, N) by torch, which has cuBLAS do it in place."""
    if _recording is not None:
        arguments = {"x": x, "w": w, "inout": out}
        _recording.append(_record("cublas", (), None, arguments))
    else:
        torch.addmm(out, x, w, out=out)


@dataclass(frozen=True)
class Launch:
    """A `Launch` is that of a Triton kernel of ours, or of a cuBLAS product (`function` is None).

    `read` and `written` are bytes: each tensor that the kernel needs counted once, each that it
    writes once. What a cache does with repeated reads of a tile is not in them.
    """

    kernel: str
    grid: tuple[int, ...]
    read: int
    written: int
    function: Any
    arguments: Mapping[str, Any]

    @property
    def moved(self) -> int:
        """Return bytes read plus bytes written."""
        return self.read + self.written


_recording: list[Launch] | None = None


@contextlib.contextmanager
def dry_run() -> Iterator[list[Launch]]:
    """Yield a list of launches, to which launchers append theirs instead of launching them.

    Give them tensors on the meta device and nothing is allocated either. For one thread at a time.
    """
    global _recording
    outer, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = outer


def _record(
    name: str, grid: tuple[int, ...], function: Any, arguments: Mapping[str, Any]
) -> Launch:
    read = written = 0
    for argument, tensor in _tensors(arguments):
        size = _stored_bytes(tensor)
        if argument.startswith(("out", "inout")):
            written += size
        if not argument.startswith("out"):
            read += size
    return Launch(name, grid, read, written, function, dict(arguments))


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the arguments, also those in named tuples and descriptors."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, TensorDescriptor):
            yield name, value.base
        elif hasattr(value, "_asdict"):
            yield from _tensors(value._asdict())


def _stored_bytes(t: Tensor) -> int:
    """Count the bytes of a tensor as they are stored: what is expanded (stride 0) counts once."""
    stored = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return t.element_size() * torch.Size(stored).numel()
