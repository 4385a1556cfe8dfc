"""The allocator's state in a file of its own, beside a checkpoint's adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ..allocator import RankAllocator
from ..distributed.shards import is_dtensor, whole_tensor
from .files import read_tensors, replacing

STATE_NAME = "adalora_state.safetensors"
"""The file with an allocator's state, in the folder of an adapter or of a checkpoint."""

_STATE_TYPES = {
    "format": int,
    "names": list,
    "ranks": list,
    "global_step": int,
    "frozen": bool,
    "shrunk": bool,
}


def save_state(
    allocator: RankAllocator,
    file: str | os.PathLike[str],
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `allocator.state_dict()` as one safetensors file: the tensors, and JSON for the rest.

    Args:
        allocator: the allocator. Where its adapters are sharded (DTensors), all processes have to
            call this, and the first one writes; any process may load the file then.
        file: the file; it is written beside and then renamed.
        extra: more values that JSON knows, which `load_state` returns beside the state.
    """
    state = whole_state(allocator)
    if writes_here(allocator.adapters[0].lora_E):
        write_state(state | (extra or {}), file)


def writes_here(parameter: Tensor) -> bool:
    """Whether this process writes files: one of those does among which a DTensor is spread."""
    return not is_dtensor(parameter) or dist.get_rank() == 0


def whole_state(allocator: RankAllocator) -> dict[str, Any]:
    """`allocator.state_dict()` with whole tensors. All processes have to ask if it is sharded."""
    state = allocator.state_dict()
    if allocator.is_sharded:
        for key in ("exp_avg_ipt", "exp_avg_unc"):
            state[key] = [whole_tensor(tensor).cpu() for tensor in state[key]]
    return state


def write_state(state: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Write what `whole_state` returns, and values that JSON knows, as `save_state` does."""
    tensors: dict[str, Tensor] = {}
    lists: dict[str, int] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value.contiguous()
        elif isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
            lists[key] = len(value)
            tensors |= {f"{key}.{i}": item.contiguous() for i, item in enumerate(value)}
        else:
            values[key] = value
    metadata = {"format": "pt", "adalora_state": json.dumps({"values": values, "lists": lists})}
    file = Path(file)
    with replacing(file.parent) as folder:
        save_file(tensors, folder / file.name, metadata=metadata)


def load_state(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote, for `allocator.load_state_dict`. Tensors are on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed.
    """
    file = Path(file)
    tensors, metadata = read_tensors(file)
    state: dict[str, Any] = dict(tensors)
    try:
        rest = json.loads(metadata["adalora_state"])
        values, lists = dict(rest["values"]), dict(rest["lists"])
        for key, count in lists.items():
            state[key] = [state.pop(f"{key}.{i}") for i in range(count)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the state of a RankAllocator: {error!r}") from error
    state |= values
    for key, kind in _STATE_TYPES.items():
        if type(state.get(key)) is not kind:
            raise ValueError(f"{file} has {key} = {state.get(key)!r}, expected {kind.__name__}")
    if not all(type(rank) is int and rank >= 0 for rank in state["ranks"]):
        raise ValueError(f"{file} has ranks {state['ranks']!r}, expected numbers")
    if state["shrunk"] and not state["frozen"]:
        raise ValueError(f"{file} is of a shrunk model whose pattern is not frozen")
    for key, dtype in (("mask", torch.bool), ("skipped", torch.int64)):
        if getattr(state.get(key), "dtype", None) is not dtype:
            raise ValueError(f"{file} has no {key}, or not as {dtype}")
    return state
