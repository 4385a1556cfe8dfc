"""A pipeline's stages: processes with different adapters, that share one budget, or should."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..adapters import taking_part
from .groups import Group, gathered, hosts_of

_KEY = "adalora_kernels/adapters/"
# What this process has announced to each group, in the order of the calls.
_announced: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


class Stages:
    """Lets the processes of a group share one budget over the adapters that they have.

    The order of all adapters is that of the processes in the group: between equal scores the
    earlier one stays. All processes have to make this, and call its methods, together.

    What crosses: three numbers per adapter in steps that prune, on the hosts, and two per triplet,
    as float64; one number in every step that learns.

    Args:
        group: the processes.
        names, ranks: those of this process's adapters.

    Attributes:
        group: the processes.
        matrices: the number of all adapters.
        total: the sum of their ranks.

    Raises:
        ValueError: two processes have an adapter of the same name.
    """

    def __init__(self, group: Group, names: Sequence[str], ranks: Sequence[int]) -> None:
        self.group, self._hosts = group, hosts_of(group)
        self._own = dist.get_rank(group)
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (list(names), list(ranks)), group=self._hosts)
        owners: dict[str, int] = {}
        for process, (theirs, _) in enumerate(everyone):
            for name in theirs:
                if name in owners:
                    raise ValueError(
                        f"process_group is for processes with different adapters, such as the "
                        f"stages of a pipeline, but {name} is on those of rank {owners[name]} and "
                        f"{process} of the group. Give the adapters of each stage names of their "
                        "own; for copies of the same adapters leave process_group out"
                    )
                owners[name] = process
        self._ranks: list[list[int]] = [theirs for _, theirs in everyone]
        self._sizes = [sum(theirs) for theirs in self._ranks]
        self.matrices, self.total = len(owners), sum(self._sizes)

    def gather_members(
        self, trained: Sequence[bool], had_gradient: Sequence[bool], counts: Sequence[int]
    ) -> Totals:
        """Bring together who takes part. The hosts of all processes wait for each other.

        Args:
            trained: which adapters of this process need a gradient.
            had_gradient: which have had one since the run began.
            counts: how many triplets of each are there.
        """
        most = max(map(len, self._ranks))
        own = torch.zeros(most, 3, dtype=torch.int64)
        own[: len(counts)] = torch.tensor([trained, had_gradient, counts]).T
        everyone = gathered(own, self._hosts).tolist()
        rows = [
            (bool(needs), bool(had), rank, count)
            for theirs, ranks in zip(everyone, self._ranks, strict=True)
            for (needs, had, count), rank in zip(theirs, ranks, strict=False)
        ]
        needed, with_gradient, ranks, numbers = zip(*rows, strict=True)
        any_had = any(with_gradient)
        taking = taking_part(needed, with_gradient, ranks, any_had)
        counted = sum(count for count, takes in zip(numbers, taking, strict=True) if takes)
        return Totals(any_had, sum(taking), counted, sum(numbers))

    def maximum(self, flag: Tensor) -> Tensor:
        """The maximum of a tensor over all processes."""
        flag = flag.clone()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return flag

    def gather_triplets(self, scores: Tensor, in_play: Tensor) -> tuple[Tensor, Tensor]:
        """The scores (N,) float64 and in_play (N,) bool of all processes, in their order."""
        own = scores.new_zeros(2, max(self._sizes), dtype=torch.float64)
        own[0, : len(scores)], own[1, : len(scores)] = scores, in_play
        everyone = gathered(own, self.group)
        parts = [part[:, :size] for part, size in zip(everyone, self._sizes, strict=True)]
        whole = torch.cat(parts, dim=1)
        return whole[0].contiguous(), whole[1] > 0

    def own_part(self, flat: Tensor) -> Tensor:
        """Of something (N,) over all triplets, the part of this process."""
        return flat.split_with_sizes(self._sizes)[self._own]


class Totals(NamedTuple):
    """Who takes part in all stages.

    Attributes:
        any_had_gradient: whether any adapter has had one since the run began.
        taking: how many adapters take part.
        in_play: how many triplets of these are there.
        there: how many triplets of all adapters are there.
    """

    any_had_gradient: bool
    taking: int
    in_play: int
    there: int


def announce(names: Sequence[str]) -> None:
    """Put down which adapters are allocated here, for the other processes to see.

    It goes into the key-value store through which the processes have found each other: nobody
    waits. Without such a store, or other processes, nothing happens.
    """
    store, group = _store()
    if store is None:
        return
    announced = _announced.setdefault(group, [])
    announced.append(_digest(names))
    store.set(f"{_KEY}{dist.get_rank()}", ",".join(announced))


def refuse_stages(names: Sequence[str]) -> None:
    """Raise ValueError if another process allocates other adapters, and not these.

    It looks at what has been announced by now, and does not wait. When an optimizer steps in one
    stage of a pipeline, the others have been part of its forward and backward, and so have
    announced theirs. A process that trains alone is no stage; nor is one that also trains what the
    others do, or one whose own adapters the others train as well.
    """
    store, group = _store()
    mine = _announced.get(group, []) if store is not None else []
    if not mine:
        return
    for rank in _ranks_to_look_at():
        key = f"{_KEY}{rank}"
        if not store.check([key]):
            continue
        theirs = [digest for digest in store.get(key).decode().split(",") if digest]
        if _digest(names) not in theirs and not set(theirs) <= set(mine):
            raise ValueError(
                f"the process of rank {rank} allocates other adapters than this one (here the "
                f"first of {len(names)} is {names[0]}): as stages of a pipeline each would get "
                "a budget of its own. For one budget over all give "
                "RankAllocator(process_group=...), or peft.apply(model, process_group=...), the "
                "group of all the stages. For trainings that have nothing to do with each other "
                "give each a group of its own: torch.distributed.new_group([rank], "
                "use_local_synchronization=True)"
            )


def _ranks_to_look_at() -> Iterator[int]:
    """Few of many processes: those at a distance of 1, 2, 4, … before and behind.

    Stages lie at equal distances, so one of them is of another stage.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    distance, seen = 1, {rank}
    while distance < world:
        for other in ((rank + distance) % world, (rank - distance) % world):
            if other not in seen:
                seen.add(other)
                yield other
        distance *= 2


def _store() -> tuple[Any, Any]:
    """The store of all processes and their group; None if there is none, or one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None, None
    group: Any = dist.group.WORLD
    try:
        return group.get_group_store(), group
    except (AttributeError, RuntimeError):  # MPI needs none.
        return None, None


def _digest(names: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
