"""A recipe says what one call of a layer launches, for every number of rows M of one bucket.

It is made from what is neither M, nor a pointer, nor a number of the call. Two launchers carry it
out: `run`, through Triton's own launch, and the compiled one in `csrc/launcher.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import ceil_div, launch, launch_cublas

# Where the parts of a workspace may begin. Triton's kernels and tensor maps need 16 bytes.
_ALIGNMENT = 256
# Most arguments are of these types, and the same in every call.
_PLAIN = frozenset((int, bool, float, str, tuple, type(None)))


class Count(NamedTuple):
    """A `Count` is min(⌈M / per⌉ · times + plus, most): all that depends on M depends so."""

    per: int = 1
    times: int = 1
    plus: int = 0
    most: int = 2**62

    def of(self, M: int) -> int:
        """Return the number for M rows."""
        return min(ceil_div(M, self.per) * self.times + self.plus, self.most)


Size: TypeAlias = int | Count


class Array(NamedTuple):
    """An `Array` is a tensor that a call gets or returns, or, by any other name, a workspace's.

    A call gets "x", "weight", "bias", "base", "A", "E", "B", "mask", "seed", "h" and "grad_y"; it
    returns "y", "h", "dx", "dA", "dE" and "dB". Without strides it is contiguous; with them it may
    also be another view of the tensor from its first entry on, for instance its transpose.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    strides: tuple[int, ...] | None = None

    def of(self, M: int) -> tuple[int, ...]:
        """Return the shape for M rows."""
        return tuple([n if isinstance(n, int) else n.of(M) for n in self.shape])

    @property
    def T(self) -> Array:
        """Return the transpose of a matrix that has strides."""
        return self._replace(shape=self.shape[::-1], strides=self.strides and self.strides[::-1])


class Scalar(NamedTuple):
    """A `Scalar` is a number of the call: "scaling", "drop_below" or "keep_scale"."""

    name: str


class Tile(NamedTuple):
    """A `Tile` is an array that a kernel reads or writes in blocks, by a tensor descriptor."""

    array: Array
    block: tuple[int, int]


class Part(NamedTuple):
    """A `Part` of the workspace begins where the part number `after` ends, at 0 if that is -1.

    The beginning is rounded up to 256 bytes. Two parts may lie at the same place if one is dead
    when the other is written.
    """

    array: Array
    after: int


class Step(NamedTuple):
    """A `Step` is a launch of a jitted kernel, or of cuBLAS if there is none: out += x·w.

    Arguments go by the names of parameters, with num_warps and num_stages. They are Array, Tile,
    Count, Scalar, plain constants, tuples of integers, and named tuples of all these.
    """

    kernel: Any
    grid: tuple[Size, ...]
    arguments: Mapping[str, Any]


class Recipe(NamedTuple):
    """A `Recipe` has the parts of the one workspace of a call, and its launches in order."""

    workspace: tuple[Part, ...]
    steps: tuple[Step, ...]


def run(
    recipe: Recipe, M: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]
) -> None:
    """Carry out a recipe for M rows by Triton's launch; only the workspace is allocated.

    Args:
        tensors: what the call gets and returns, by the names of their arrays. Those whose array has
            no strides are contiguous.
        scalars: the numbers of the call.
    """
    device = next(iter(tensors.values())).device
    known = {**tensors, **_workspace(recipe.workspace, M, device)}

    def view(array: Array) -> Tensor:
        tensor, strides = known[array.name], array.strides
        # Strides alone would not tell a matrix of one row from one of one column.
        if strides is None or (strides == tensor.stride() and array.shape[-1] == tensor.shape[-1]):
            return tensor
        return tensor.as_strided(array.of(M), strides)

    def value(argument: Any) -> Any:
        kind = type(argument)
        if kind is Array:
            return view(argument)
        if kind is Count:
            return argument.of(M)
        if kind is Scalar:
            return scalars[argument.name]
        if kind is Tile:
            return TensorDescriptor.from_tensor(view(argument.array), list(argument.block))
        if hasattr(kind, "_fields"):
            return kind(*[a if type(a) in _PLAIN else value(a) for a in argument])
        return argument

    for step in recipe.steps:
        arguments = {
            name: argument if type(argument) in _PLAIN else value(argument)
            for name, argument in step.arguments.items()
        }
        if step.kernel is None:
            launch_cublas(**arguments)
        else:
            launch(step.kernel, tuple(map(value, step.grid)), arguments)


def _workspace(parts: tuple[Part, ...], M: int, device: torch.device) -> dict[str, Tensor]:
    """Allocate the one workspace, and return its parts by name."""
    if not parts:
        return {}
    ends: list[int] = []
    places = []
    for array, after in parts:
        shape = array.of(M)
        begin = 0 if after < 0 else ceil_div(ends[after], _ALIGNMENT) * _ALIGNMENT
        ends.append(begin + math.prod(shape) * array.dtype.itemsize)
        places.append((array, shape, slice(begin, ends[-1])))
    memory = torch.empty(max(ends), dtype=torch.uint8, device=device)
    return {a.name: memory[place].view(a.dtype).view(shape) for a, shape, place in places}
