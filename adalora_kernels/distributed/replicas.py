"""Adapters of which each process has a whole copy: kept equal, and compared."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters import Adapter
from .groups import Group, check_group, gathered, group_of, hosts_of, speaks_of
from .shards import is_dtensor

# The most that is copied into one tensor to be sent at once.
_BUCKET_BYTES = 2**26


def group_to_sync(value: bool | Group) -> Group | None:
    """The processes that sync_gradients means; None for False.

    Raises:
        TypeError, ValueError: as `check_group`.
        RuntimeError: all processes are meant, and there are none.
    """
    check_group("sync_gradients", value)
    group = group_of(value)
    if value and group is None:
        raise RuntimeError(
            "sync_gradients=True needs the processes of torch.distributed: call "
            "torch.distributed.init_process_group() before attach()"
        )
    return group


class GradientSync:
    """Keeps what one optimizer trains equal in all processes, where no engine does it.

    It is about the optimizer's plain parameters: what is a DTensor belongs to whoever has sharded
    it. They are broadcast from the first process of the group when this is made, and from then on
    their gradients are averaged once per optimizer step.

    What crosses, per optimizer step: a byte for each parameter, and the gradients that any process
    has, in their own dtype. A gradient that a process does not have counts as zero there; if none
    has one it stays None.

    Args:
        optimizer: it is not kept.
        adapters: those whose gradients are watched.
        group: the processes.

    Attributes:
        group: the processes.
        handles: of the hooks on the adapters' parameters.

    Raises:
        ValueError: the processes' parameters differ in number, shape or dtype. Raised in each of
            them, and nothing is changed.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, adapters: Sequence[Adapter], group: Group
    ) -> None:
        self.group = group
        parameters = _plain(optimizer)
        for device in {p.device for p in parameters}:
            if not speaks_of(group, device):
                raise ValueError(
                    f"sync_gradients: a parameter is on {device}, about which the process group "
                    f"({dist.get_backend_config(group)}) can't talk"
                )
        # Which gradients there are is for the host to know.
        self._flags_group = hosts_of(group)
        self._check_same(parameters)
        for bucket in _buckets([p.data for p in parameters]):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.broadcast(flat, group=group, group_src=0)
            _copy_back(bucket, flat)
        self._is_done = False
        # What the version of a gradient was after the last backward, by the adapter's number.
        versions = self._versions = dict[int, int]()
        self._watched = [a.lora_E for a in adapters if a.lora_E.requires_grad]
        self.handles: list[RemovableHandle] = [
            E.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                _note_version(versions, i)
            )
            for i, E in enumerate(self._watched)
        ]

    def _check_same(self, parameters: Sequence[Tensor]) -> None:
        described = [(tuple(p.shape), str(p.dtype)) for p in parameters]
        mine = _digest(repr(described).encode()).unsqueeze(0)
        everyone = gathered(mine, self._flags_group)
        others = [rank for rank, digest in enumerate(everyone) if not digest.equal(everyone[0])]
        if others:
            raise ValueError(
                f"sync_gradients: the optimizer's parameters on rank {others[0]} of the group are "
                f"not those of rank 0 in number, shape or dtype; here there are {len(described)}"
            )

    def average(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients now, after the last backward; the optimizer's step will not."""
        self._average(optimizer)
        self._is_done = True

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients where nobody has, when their optimizer is about to use them.

        Raises:
            RuntimeError: something has been done to them before, which would have to come after.
        """
        if self._is_done:
            # The same in each process, unlike what has had a gradient.
            self._is_done = False
            if self._versions:
                self._versions.clear()
                raise RuntimeError(
                    "there has been a backward() after allocator.sync_gradients(): call it after "
                    "the last backward() before the optimizer's step, and before clipping"
                )
            return
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "a GradScaler has looked at the gradients of this process alone: call "
                "allocator.sync_gradients() after the last backward(), before scaler.unscale_() "
                "and scaler.step()"
            )
        self._check_unchanged()
        self._average(optimizer)

    def _check_unchanged(self) -> None:
        for i, version in self._versions.items():
            grad = self._watched[i].grad
            if grad is not None and grad._version != version:
                self._versions.clear()
                raise RuntimeError(
                    "the gradients have been changed since the last backward() (clipped, or "
                    "divided by a pipeline's schedule), before they were averaged over the "
                    "processes: call allocator.sync_gradients() after the last backward(), before "
                    "clipping and after schedule.step()"
                )

    @torch.no_grad()
    def _average(self, optimizer: torch.optim.Optimizer) -> None:
        self._versions.clear()
        parameters = _plain(optimizer)
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(there, op=dist.ReduceOp.MAX, group=self._flags_group)
        used = [p for p, any_has in zip(parameters, there.tolist(), strict=True) if any_has]
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        world = dist.get_world_size(self.group)
        for bucket in _buckets([p.grad for p in used if p.grad is not None]):
            # Divided before, so that half precision does not overflow.
            flat = torch.cat([t.flatten() for t in bucket]).div_(world)
            dist.all_reduce(flat, group=self.group)
            _copy_back(bucket, flat)


def average(tensor: Tensor, group: Group) -> Tensor:
    """The mean of a tensor over the processes, which is the same in each."""
    mean = tensor.detach() / dist.get_world_size(group)
    dist.all_reduce(mean, group=group)
    return mean


def _note_version(versions: dict[int, int], i: int) -> Any:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            versions[i] = parameter.grad._version

    return hook


def _plain(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What is trained and nobody else reduces, in the order of the optimizer."""
    return [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad and not is_dtensor(p)
    ]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device that are sent at once."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for t in tensors:
        groups[t.dtype, t.device].append(t)
    for group in groups.values():
        bucket: list[Tensor] = []
        size = 0
        for t in group:
            if bucket and size + t.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(t)
            size += t.nbytes
        yield bucket


def _copy_back(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split_with_sizes([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])


def _digest(data: bytes) -> Tensor:
    """64 bits by which to tell data from others, a scalar int64."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


@torch.no_grad()
def compare(
    names: Sequence[str],
    masks: Sequence[Tensor],
    lora_E: Sequence[Tensor],
    step: int,
    group: Group,
) -> None:
    """Raise RuntimeError in every process if masks or lora_E differ between processes.

    It names the first matrix that does. 16 bytes per matrix and process cross. Reads the device. A
    lora_E that is sharded is not compared: its mask is.

    Args:
        names: those of the matrices.
        masks: the mask (r,) bool of each.
        lora_E: that of each.
        step: the number of the step, for the message.
        group: the processes, each of which calls this.
    """
    alive = torch.cat([*masks]).cpu().split_with_sizes([len(mask) for mask in masks])
    device = masks[0].device
    values = _on_host([torch.zeros(0, device=device) if is_dtensor(E) else E for E in lora_E])
    digests = torch.stack(
        [
            torch.stack([_digest(mask.numpy().tobytes()), _digest(E.numpy().tobytes())])
            for mask, E in zip(alive, values, strict=True)
        ]
    )
    if not speaks_of(group, digests.device):
        digests = digests.to(device)
    everyone = gathered(digests, group).cpu()
    differs = everyone != everyone[0]
    if not differs.any():
        return
    matrices = differs.any(2).any(0)
    first = int(matrices.nonzero()[0])
    what = "mask" if differs[:, first, 0].any() else "lora_E"
    ranks = dist.get_process_group_ranks(group)
    others = [ranks[i] for i in differs[:, first].any(1).nonzero().flatten().tolist()]
    raise RuntimeError(
        f"replicas differ at step {step}: the {what} of {names[first]} on rank "
        f"{', '.join(map(str, others))} is not that of rank {ranks[0]} ({int(matrices.sum())} of "
        f"{len(names)} matrices differ). Every process must begin with the same values (the "
        "same seed, or DDP, which broadcasts them, around the model before the first step) and "
        "have the same gradients when the optimizer steps"
    )


def _on_host(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies on the host, flat, in few transfers."""
    sizes = [t.numel() for t in tensors]
    if len({t.device for t in tensors}) > 1:
        return tuple(t.cpu().double().flatten() for t in tensors)
    # Concatenated, values of narrower dtypes are those of the widest, exactly.
    return torch.cat([t.flatten() for t in tensors]).cpu().double().split_with_sizes(sizes)
