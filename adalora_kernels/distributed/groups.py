"""Process groups: which one an argument means, and what one can send."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

# A string, because there are builds of torch without it.
Group: TypeAlias = "dist.ProcessGroup"


def check_group(name: str, value: object) -> None:
    """Raise TypeError if it is neither a bool nor a group; ValueError if this process is outside.

    None, which stands for no group, passes.
    """
    if isinstance(value, bool | None):
        return
    is_there = dist.is_available()
    if is_there and value is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} is a process group that this process is not in")
    if not is_there or not isinstance(value, dist.ProcessGroup):
        raise TypeError(f"{name} must be a bool or a process group, got {type(value).__name__}")


def group_of(value: bool | Group | None) -> Group | None:
    """The processes that an argument means: all for True, none for False or without any."""
    if isinstance(value, bool | None):
        if not value or not dist.is_available() or not dist.is_initialized():
            return None
        everyone: Any = dist.group.WORLD
        group: Group = everyone
        return group
    return value


def hosts_of(group: Group) -> Group:
    """A group of the same processes that speaks of tensors on the host: it, or one over gloo.

    What the host has to know is sent over this: over a GPU's group it would have to wait for what
    that has to do before. All processes of the group have to call this.
    """
    if speaks_of(group, torch.device("cpu")):
        return group
    ranks = dist.get_process_group_ranks(group)
    hosts: Group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return hosts


def speaks_of(group: Group, device: torch.device) -> bool:
    """Whether a group has a backend for tensors on a device."""
    backends = dist.get_backend_config(group).split(",")
    return device.type in (backend.partition(":")[0] for backend in backends)


def gathered(tensor: Tensor, group: Group) -> Tensor:
    """A tensor of each process, stacked in the order of the ranks."""
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor, group=group)
    return torch.stack(everyone)
