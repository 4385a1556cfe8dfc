"""Tells whether processes that train together have different adapters: a pipeline's stages."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

_KEY = "adalora_kernels/adapters/"
# What this process has announced to each group, in the order of the calls.
_announced: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()


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
