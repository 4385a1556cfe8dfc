"""Write a recipe down as the numbers that the compiled launcher reads (`csrc/recipe.h`).

The kernels are compiled by Triton here, once for each plan, so that the launcher needs nothing of
Python afterwards: function handles, shared memory, and the order and types of the parameters that
a kernel really has. Those are its arguments but for constants, with tuples flattened; an operand
that is read by a descriptor becomes a tensor map, its sizes and its strides; and two pointers to
scratch memory come last, which our kernels don't use.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .recipe import Array, Count, Recipe, Scalar, Size, Step, Tile
from .svd_linear import plans
from .svd_linear.calls import call_of, operands, recipe_of

# The order in which the launcher numbers them; the parts of the workspace follow.
_GIVEN = ("x", "weight", "bias", "base", "A", "E", "B", "mask", "seed", "h", "grad_y")
_ARRAYS = (*_GIVEN, "y", "dx", "dA", "dE", "dB")
# The types in which the launcher hands on the scalars.
_SCALARS = {"scaling": "fp32", "drop_below": "i32", "keep_scale": "fp32"}
_INTEGERS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
# CUtensorMapDataType.
_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
_CONSTANT, _ADDRESS, _SCALAR, _MAP = range(4)
_LAUNCH, _PRODUCT = range(2)
_SCRATCH = 2
# What the launcher takes for a call that it must leave alone, for good.
_NOTHING = [0, 0]

# The code of a function is unloaded with its kernel. They stay when plans are forgotten, because
# another thread may be launching one.
_kernels: dict[int, Any] = {}


class _CannotEncode(Exception):
    """The launcher has no way to do this."""


def plan_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    grad_y: Tensor | None,
    need_dx: bool,
) -> Tensor:
    """Return the recipe of a call as int64 numbers on the CPU.

    The arguments are those of `svd_linear_fwd`, `svd_delta_fwd` (base) and `svd_linear_bwd`
    (grad_y). Without steps it says that the launcher is not to serve such calls. It is empty where
    planning or compiling raises: the call then goes the long way, which raises it again.
    """
    try:
        tensors = (x, weight, bias, base, A, E, B, mask, seed, h, grad_y)
        given = operands(**dict(zip(_GIVEN, tensors, strict=True)))
        numbers = encode(recipe_of(call_of(given, need_dx)), len(given["x"]), given)
    except _CannotEncode:
        numbers = _NOTHING
    except Exception:
        numbers = []
    return torch.tensor(numbers, dtype=torch.int64)


def encode(recipe: Recipe, M: int, tensors: Mapping[str, Tensor]) -> list[int]:
    """Compile a recipe's kernels for the current device, and write the recipe down.

    Args:
        M: one number of rows of the bucket that the recipe is for.
        tensors: what the call gets; whether they are aligned is part of what is compiled.
    """
    writer = _Writer(recipe, M, tensors)
    numbers = [len(recipe.workspace)]
    for array, after in recipe.workspace:
        numbers += [after, array.dtype.itemsize, len(array.shape), *_sizes(array.shape)]
    numbers.append(len(recipe.steps))
    for step in recipe.steps:
        numbers += writer.launch(step) if step.kernel is not None else writer.product(step)
    return numbers


def _sizes(sizes: tuple[Size, ...]) -> Iterator[int]:
    for size in sizes:
        yield from size if isinstance(size, Count) else Count(times=0, plus=size)


def _matrix(array: Array) -> tuple[tuple[Size, ...], tuple[int, ...]]:
    """Return the sizes and strides of a matrix."""
    if len(array.shape) != 2:
        raise _CannotEncode("it is no matrix")
    if array.strides is not None:
        return array.shape, array.strides
    columns = array.shape[1]
    if not isinstance(columns, int):
        raise _CannotEncode("its rows are not always equally far apart")
    return array.shape, (columns, 1)


class _Writer:
    """A `_Writer` writes the steps of one recipe."""

    def __init__(self, recipe: Recipe, M: int, tensors: Mapping[str, Tensor]) -> None:
        parts = [part.array.name for part in recipe.workspace]
        self.numbers = {name: i for i, name in enumerate([*_ARRAYS, *parts])}
        # Every number of rows up to this one gets the same kernels.
        self.most = min(plans.rows_bucket(M), 2**31 - 1)
        self.M = M
        self.tensors = tensors

    def product(self, step: Step) -> list[int]:
        """Write a product of torch's."""
        numbers = [_PRODUCT]
        for array in (step.arguments[name] for name in ("out", "x", "w")):
            shape, strides = _matrix(array)
            numbers += [self.numbers[array.name], *_sizes(shape), *strides]
        return numbers

    def launch(self, step: Step) -> list[int]:
        """Compile a kernel, and write down its launch."""
        values = {name: self._value(leaf) for name, leaf in step.arguments.items()}
        kernel = step.kernel.warmup(grid=(1,), **values)
        metadata = kernel.metadata
        plain = {"num_ctas": 1, "launch_cooperative_grid": False}
        plain |= {"global_scratch_size": 0, "profile_scratch_size": 0}
        for name, value in plain.items():
            if getattr(metadata, name) != value:
                raise _CannotEncode(f"{name} is {getattr(metadata, name)}")
        kernel.run  # noqa: B018  loads it, if it isn't
        _kernels[kernel.function] = kernel
        maps = iter(metadata.tensordesc_meta or ())
        parameters: list[list[int]] = []
        for i, (name, kind) in enumerate(kernel.src.signature.items()):
            leaf = step.arguments[name]
            parameters += self._parameters(kind, leaf, (i,), kernel.src.attrs, maps)
        parameters += [[_CONSTANT, 8, *Count(times=0)]] * _SCRATCH
        grid = (*step.grid, 1, 1)[:3]
        return [
            *(_LAUNCH, kernel.function, metadata.shared, 32 * metadata.num_warps),
            int(metadata.launch_pdl),
            *_sizes(grid),
            *(len(parameters), *(number for one in parameters for number in one)),
        ]

    def _value(self, leaf: Any) -> Any:
        """Return what to compile with."""
        match leaf:
            case Array():
                # All that is allocated is aligned, as no memory at all is.
                return self.tensors.get(leaf.name, torch.empty(0, dtype=leaf.dtype))
            case Count():
                return leaf.of(self.M)
            case Scalar():
                # Triton compiles a whole number in if it is 1, or a multiple of 16. Without dropout
                # it is 0 at every call.
                whole = 3 if "seed" in self.tensors else 0
                return whole if _SCALARS[leaf.name] == "i32" else 1.5
            case Tile():
                _, strides = _matrix(leaf.array)
                base = self._value(leaf.array)
                return TensorDescriptor(
                    base, list(leaf.array.of(self.M)), list(strides), list(leaf.block)
                )
        if hasattr(leaf, "_fields"):
            return type(leaf)(*map(self._value, leaf))
        return leaf

    def _parameters(
        self, kind: Any, leaf: Any, path: tuple[int, ...], attributes: Any, maps: Iterator[Any]
    ) -> Iterator[list[int]]:
        """Write down the parameters that an argument became.

        Args:
            kind: their types, as the signature of the compiled kernel has them.
            path: where it is among the arguments.
            attributes: what was compiled in about them, by path.
        """
        if isinstance(kind, tuple):
            for i, (one, inner) in enumerate(zip(kind, leaf, strict=True)):
                yield from self._parameters(one, inner, (*path, i), attributes, maps)
        elif isinstance(leaf, Count) and (attributes.get(path) or leaf.of(self.most) >= 2**31):
            raise _CannotEncode(f"argument {path} depends on M, and was compiled for one M")
        elif kind == "constexpr" and not isinstance(leaf, Array | Count | Scalar):
            return
        elif isinstance(leaf, Tile):
            yield from self._map(leaf, next(maps, None))
        elif isinstance(leaf, Array) and kind.startswith("*"):
            yield [_ADDRESS, self.numbers[leaf.name]]
        elif isinstance(leaf, Scalar) and kind == _SCALARS[leaf.name]:
            yield [_SCALAR, list(_SCALARS).index(leaf.name)]
        elif isinstance(leaf, float) and kind == "fp32":
            (bits,) = struct.unpack("<i", struct.pack("<f", leaf))
            yield [_CONSTANT, 4, *Count(times=0, plus=bits)]
        elif isinstance(leaf, int | Count) and kind in _INTEGERS:
            yield [_CONSTANT, _INTEGERS[kind], *_sizes((leaf,))]
        else:
            raise _CannotEncode(f"{leaf} is of type {kind}")

    def _map(self, tile: Tile, meta: Mapping[str, Any] | None) -> Iterator[list[int]]:
        """Write down a tensor map, and the sizes and strides that come with it."""
        dtype = tile.array.dtype
        shape, (row, column) = _matrix(tile.array)
        if meta is None or meta["fp4_padded"] or column != 1 or dtype not in _MAP_TYPES:
            raise _CannotEncode("it is not read by a plain tensor map")
        rows, columns = meta["block_size"]
        yield [
            *(_MAP, self.numbers[tile.array.name], *_sizes(shape), row * dtype.itemsize),
            *(rows, columns, _MAP_TYPES[dtype], dtype.itemsize, meta["swizzle"], 0),
        ]
        for size in shape:
            yield [_CONSTANT, 4, *_sizes((size,))]
        for stride in (row, column):
            yield [_CONSTANT, 8, *_sizes((stride,))]
