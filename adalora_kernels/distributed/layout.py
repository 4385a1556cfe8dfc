"""Where the parts of sharded tensors lie, and what the processes that hold them tell each other.

A DTensor is divided along some dimensions of its device mesh and replicated along the others. What
is said here holds for any such placement: FSDP2's, HSDP's, tensor parallel's, and both on one mesh.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import is_dtensor, local_tensors

# Its name since torch 2.13, and the one of before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


class Axis(NamedTuple):
    """The processes of one line of a device mesh, this one among them.

    Attributes:
        ranks: their ranks in the default group, in the order of the mesh.
        own: which of them this process is.
        group: their process group.
        device: what it sends from.
    """

    ranks: tuple[int, ...]
    own: int
    group: dist.ProcessGroup
    device: torch.device

    def gather(self, flat: Tensor) -> Tensor:
        """The tensors (n,) of all of them, (len(ranks), n), on the device of this one."""
        sent = flat.to(self.device)
        rows = sent.new_empty((len(self.ranks), sent.numel()))
        _all_gather(rows.view(-1), sent, group=self.group)
        members = dist.get_process_group_ranks(self.group)
        if members != list(self.ranks):  # A mesh may have them in another order.
            rows = rows[[members.index(rank) for rank in self.ranks]]
        return rows.to(flat.device)

    def reduce(self, flat: Tensor, op: str = "SUM") -> Tensor:
        """The sum of the tensors (n,) of all of them, or their maximum ("MAX")."""
        sent = flat.to(self.device, copy=True)
        dist.all_reduce(sent, op=getattr(dist.ReduceOp, op), group=self.group)
        return sent.to(flat.device)


class Piece(NamedTuple):
    """What this process holds of a matrix.

    Attributes:
        shape: that of the whole matrix.
        offset, size: where in it the piece begins, and its shape.
        splits: by which axes (their numbers) each of the two dimensions is divided, outermost
            first.
        counted: whether this process speaks for the piece where several hold the same.
    """

    shape: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    splits: tuple[tuple[int, ...], tuple[int, ...]]
    counted: bool

    @property
    def numel(self) -> int:
        """The number of entries."""
        return self.size[0] * self.size[1]


def _span(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, length) of what DTensor gives to one of so many: equal parts, the last ones less."""
    size = -(-length // parts)
    start = min(size * index, length)
    return start, min(size, length - start)


class Layout:
    """Where the parts of some matrices lie, of which some are DTensors.

    A tensor that is none counts as replicated. Dimensions of the mesh along which nothing is
    divided do not exist here, so that nothing is sent along them.

    Attributes:
        tensors: the matrices.
        axes: those along which something is divided, in the same order on all processes.
        pieces: what this process holds of each.

    Raises:
        ValueError: a placement that is neither Shard nor Replicate, or meshes that divide the same
            processes in different ways.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.axes: list[Axis] = []
        self._lines: dict[tuple[int, int], Axis] = {}
        # Few differ: in a model of hundreds of layers it takes time to look at each.
        kinds, divided = [], {}
        for tensor in self.tensors:
            placed: Any = tensor if is_dtensor(tensor) else None
            mesh = None if placed is None else placed.device_mesh
            kind = tensor.shape, id(mesh), None if placed is None else placed.placements
            if kind not in divided:
                divided[kind] = self._splits(placed)
            kinds.append(kind)
        pieces = {kind: self._piece(kind[0], *splits) for kind, splits in divided.items()}
        self.pieces = [pieces[kind] for kind in kinds]
        for tensor, piece, local in zip(
            self.tensors, self.pieces, local_tensors(self.tensors), strict=True
        ):
            if local.shape != piece.size:
                _refuse(tensor, piece, local)

    def _splits(self, dtensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By which axes the rows and the columns of a tensor are divided; None is no DTensor."""
        splits: tuple[list[int], list[int]] = ([], [])
        for mesh_dim, dim in () if dtensor is None else _in_order(dtensor):
            mesh = dtensor.device_mesh  # The tensors keep it alive, so that its id is its own.
            key = id(mesh), mesh_dim
            if key not in self._lines:
                self._lines[key] = _axis(mesh, mesh_dim)
            if len(self._lines[key].ranks) > 1:
                splits[dim].append(self._number_of(self._lines[key]))
        return tuple(splits[0]), tuple(splits[1])

    def _number_of(self, axis: Axis) -> int:
        for number, other in enumerate(self.axes):
            if other.ranks == axis.ranks:
                return number
            if len(set(other.ranks) & set(axis.ranks)) > 1:
                raise ValueError(
                    "the adapters are sharded over device meshes that divide the same processes in "
                    f"different ways: {list(other.ranks)} and {list(axis.ranks)}"
                )
        self.axes.append(axis)
        return len(self.axes) - 1

    def _piece(self, shape: torch.Size, rows: tuple[int, ...], columns: tuple[int, ...]) -> Piece:
        splits = rows, columns
        offset, size = [0, 0], list(shape)
        for dim, numbers in enumerate(splits):
            for number in numbers:
                axis = self.axes[number]
                start, size[dim] = _span(size[dim], len(axis.ranks), axis.own)
                offset[dim] += start
        others = set(range(len(self.axes))).difference(*splits)
        counted = all(self.axes[number].own == 0 for number in others)
        return Piece(
            (shape[0], shape[1]), (offset[0], offset[1]), (size[0], size[1]), splits, counted
        )

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these very tensors are the ones that this is of."""
        return len(tensors) == len(self.tensors) and all(map(operator.is_, tensors, self.tensors))

    def part(self, whole: Tensor, number: int) -> Tensor:
        """Of something as large as matrix `number`, the part that this process holds; a view."""
        piece = self.pieces[number]
        for dim in (0, 1):
            whole = whole.narrow(dim, piece.offset[dim], piece.size[dim])
        return whole

    def like(self, local: Tensor, number: int) -> Tensor:
        """A tensor as matrix `number` is placed, made of what this process has of it."""
        tensor: Any = self.tensors[number]
        if not is_dtensor(tensor):
            return local
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def maximum(self, flat: Tensor) -> Tensor:
        """The maximum over all processes."""
        for axis in self.axes:
            flat = axis.reduce(flat, "MAX")
        return flat

    def sum_in_order(self, flat: Tensor) -> Tensor:
        """The sum over all processes: the same bits for each, whatever its backend does."""
        for axis in self.axes:
            total, *others = axis.gather(flat)
            for other in others:
                total = total + other
            flat = total
        return flat

    def gather_vectors(self, parts: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        """The parts with all of their vectors, where these are divided.

        One flat gather along each axis that divides vectors.

        Args:
            parts: what this process holds of each matrix.
            dims: in which dimension each counts its vectors.
        """
        result = list(parts)
        left = [list(p.splits[dim]) for p, dim in zip(self.pieces, dims, strict=True)]
        while any(left):
            number = next(splits[-1] for splits in left if splits)
            chosen = [i for i, splits in enumerate(left) if splits and splits[-1] == number]
            for i in chosen:
                left[i].pop()
            axis = self.axes[number]
            counts = [
                [
                    _span(self._length(i, dims[i], left[i]), len(axis.ranks), w)[1]
                    for w in range(len(axis.ranks))
                ]
                for i in chosen
            ]
            self._gather_along(axis, result, chosen, counts, dims)
        return result

    def _length(self, i: int, dim: int, splits: Sequence[int]) -> int:
        """How many vectors of matrix `i` there are in this process's part by these axes."""
        length = self.pieces[i].shape[dim]
        for number in splits:
            length = _span(length, len(self.axes[number].ranks), self.axes[number].own)[1]
        return length

    def _gather_along(
        self,
        axis: Axis,
        result: list[Tensor],
        chosen: Sequence[int],
        counts: Sequence[Sequence[int]],
        dims: Sequence[int],
    ) -> None:
        """Replace the chosen ones by what all processes along the axis hold of them."""
        others = [result[i].shape[1 - dims[i]] for i in chosen]
        sizes = [
            [counted[w] * other for counted, other in zip(counts, others, strict=True)]
            for w in range(len(axis.ranks))
        ]
        # Vectors first, so that the parts of one matrix follow one another.
        own = [result[i].movedim(dims[i], 0).reshape(-1) for i in chosen]
        cut = [
            part.split_with_sizes(size)
            for part, size in zip(_gather_uneven(axis, torch.cat(own), sizes), sizes, strict=True)
        ]
        for k, i in enumerate(chosen):
            whole = torch.cat([parts[k] for parts in cut])
            result[i] = whole.view(-1, others[k]).movedim(0, dims[i])

    def sum_products(self, products: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        """The sums of products (r, r) whose matrices are divided along their vectors.

        One flat all-reduce along each axis that divides vectors.

        Args:
            products: of what `gather_vectors` has made of each matrix.
            dims: in which dimension each counts its vectors.
        """
        result = list(products)
        for number, axis in enumerate(self.axes):
            chosen = [
                i
                for i, (piece, dim) in enumerate(zip(self.pieces, dims, strict=True))
                if number in piece.splits[1 - dim] and result[i].numel() > 0
            ]
            if not chosen:
                continue
            flat = axis.reduce(torch.cat([result[i].reshape(-1) for i in chosen]))
            parts = flat.split_with_sizes([result[i].numel() for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                result[i] = part.view_as(result[i])
        return result


def _divided_dim(placement: Any) -> int | None:
    """The dimension of a tensor that a placement divides; None if it is of another kind."""
    # FSDP2's placement beside tensor parallel's in one dimension has a private class, which is no
    # subclass of Shard in all versions of torch. It has the attributes.
    is_shard = placement.is_shard() or hasattr(placement, "split_factor")
    return placement.dim if is_shard else None


def _in_order(dtensor: Any) -> list[tuple[int, int]]:
    """(dimension of the mesh, that of the tensor) for each division, in which they were made.

    That is the order of the mesh, but FSDP2 divides what tensor parallel has divided before: its
    dimension stands first, and its placement says so by a split_factor.
    """
    first, later = [], []
    for mesh_dim, placement in enumerate(dtensor.placements):
        if placement.is_replicate():
            continue
        dim = _divided_dim(placement)
        if dim is None:
            raise ValueError(
                f"an adapter's parameter {tuple(dtensor.shape)} has the placement {placement!r}: "
                "only Shard and Replicate can be trained"
            )
        dim = dim % dtensor.dim()
        if getattr(placement, "split_factor", 1) == 1:
            first.append((mesh_dim, dim))
        else:
            later.append((mesh_dim, dim))
    return first + later[::-1]


def _gather_uneven(axis: Axis, own: Tensor, sizes: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """What each process has, flat, where they have sum(sizes[w]) entries each."""
    lengths = [sum(size) for size in sizes]
    longest, total = max(lengths), sum(lengths)
    if longest * len(lengths) <= 2 * total:
        rows = axis.gather(torch.cat([own, own.new_zeros(longest - len(own))]))
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]
    # Most would send what is missing to the longest: few triplets among many processes. The sum
    # with zeros takes twice what there is.
    start = sum(lengths[: axis.own])
    whole = own.new_zeros(total)
    whole[start : start + len(own)] = own
    return axis.reduce(whole).split_with_sizes(lengths)


def _refuse(tensor: Any, piece: Piece, local: Tensor) -> None:
    raise ValueError(
        f"an adapter's parameter {tuple(tensor.shape)} with placements {tensor.placements} has "
        f"{tuple(local.shape)} here, where torch's rule gives {piece.size}"
    )


def _axis(mesh: Any, mesh_dim: int) -> Axis:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this process is not in the device mesh {mesh} of the adapters")
    line = list(coordinate)
    line[mesh_dim] = slice(None)
    ranks = tuple(mesh.mesh[tuple(line)].tolist())
    return Axis(
        ranks, coordinate[mesh_dim], mesh.get_group(mesh_dim), torch.device(mesh.device_type)
    )
