"""What can be done to a tensor whether it is a DTensor, of which a process holds a part, or whole.

`layout.py` knows where the parts lie, and what the processes that hold them tell each other.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters import find_adapters
from ..checks import as_int

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Imports nothing: where there is one, its module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_dtensor(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a DTensor, in little time where none is."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(issubclass(each, module.DTensor) for each in set(map(type, tensors)))


def shard_placement(
    model: nn.Module, world_size: int | None = None
) -> Callable[[nn.Parameter], Shard | None]:
    """How FSDP2 may divide the adapters of `model` so that their regulariser gathers nothing.

        fully_shard(block, mesh=mesh, shard_placement_fn=shard_placement(model))

    By itself FSDP2 divides rows. Those of a lora_A are whole triplets, and each process needs all
    of them for A·Aᵀ. Divided along `in`, each adds up its own part of A·Aᵀ instead.

    Args:
        model: in which `find_adapters` finds the adapters.
        world_size: among how many processes a parameter is divided; by default all there are. With
            HSDP it is the size of that dimension of the mesh which shards.

    Returns:
        A function of a parameter, for `shard_placement_fn`. It returns Shard(1) for a lora_A whose
        `in` can be divided by world_size, because FSDP2 can't divide that dimension unevenly; and
        None, with which FSDP2 divides rows, for everything else.

    Raises:
        TypeError: model is not a module, or world_size no number.
        ValueError: world_size is less than 1.
    """
    from torch.distributed.tensor import Shard

    parts = dist.get_world_size() if world_size is None else as_int("world_size", world_size, 1)
    # Weak: what FSDP2 puts shards in the place of is not to stay in memory.
    refs = [weakref.ref(adapter.lora_A) for adapter in find_adapters(model)]

    def placement(parameter: nn.Parameter) -> Shard | None:
        if not any(ref() is parameter for ref in refs):
            return None
        # Beside tensor parallel it is what that has left to this process which FSDP2 divides.
        return Shard(1) if local_tensors([parameter])[0].shape[1] % parts == 0 else None

    return placement


@torch.no_grad()  # Otherwise they are views that autograd knows.
def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of some tensors, to read and to write."""
    placed: Sequence[Any] = tensors
    return [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in placed]


@torch.no_grad()
def local_grads(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """What this process holds of the gradients of the tensors, to read and to write.

    A gradient that is placed otherwise than its tensor is brought to where that is first. What
    needs no gradient has none, though it may still hold one of before.
    """
    result: list[Tensor | None] = []
    for tensor in tensors:
        grad: Any = tensor.grad if tensor.requires_grad else None
        if is_dtensor(grad):
            placed: Any = tensor
            if grad.placements != placed.placements:
                grad = tensor.grad = grad.redistribute(placements=placed.placements)
            grad = grad.to_local()
        result.append(grad)
    return result


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a DTensor every process of its mesh has to ask, unless it is whole."""
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    return dtensor.full_tensor()  # type: ignore[no-any-return]


@torch.no_grad()
def copy_whole_(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one of its shape; into a DTensor, what this process holds of it."""
    if not is_dtensor(tensor):
        tensor.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    dtensor: Any = tensor
    # Every process has the whole, so that none needs to send anything.
    placed = distribute_tensor(whole, dtensor.device_mesh, dtensor.placements, src_data_rank=None)
    dtensor.to_local().copy_(placed.to_local())
