"""Recognises engines under which adapters would silently train as something else.

Engines are told by what they leave on parameters and modules: they may come before an allocator is
attached, or after it. The names of DeepSpeed's marks are those of its versions 0.14 to 0.19.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from ..adapters import Adapter
from .shards import is_dtensor

# Adapters with their lora_A, lora_E and lora_B.
Triples: TypeAlias = Sequence[tuple[Adapter, Sequence[Tensor]]]

# ZeRO-3 has the first two on its parameters, ZeRO-1 and 2 and the bfloat16 optimizer the others.
_DEEPSPEED = ("ds_id", "_z3_optimizer", "_hp_mapping", "_zero_optimizer", "param_idx_in_group")
_USE_THE_ENGINE = (
    "DeepSpeed keeps the gradients and steps parts of its own in place of the parameters. Call "
    "allocator.attach(engine) after deepspeed.initialize, with the engine that it returns, in "
    "place of allocator.attach(optimizer)"
)
# Where the message begins in which an engine is named.
_NOBODY = (
    "nobody would average the adapters' gradients, and every process would train another adapter. "
)


def mesh_size(tensor: Any) -> int:
    """The number of processes that have parts of a DTensor, or copies of them."""
    return int(tensor.device_mesh.size())


def is_of_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed steps this parameter in place of the user's optimizer."""
    # Looked up in its own dict: an attribute that is not there costs an exception.
    marks = parameter.__dict__
    return any(name in marks for name in _DEEPSPEED)


def refuse_deepspeed(adapters: Triples) -> None:
    """Raise ValueError if DeepSpeed steps an adapter, whose own optimizer then has nothing to do.

    That is so under every stage of ZeRO, and with its optimizers for half precision.
    """
    for adapter, parameters in adapters:
        if any(is_of_deepspeed(p) for p in parameters):
            raise ValueError(f"{adapter.name} is trained by DeepSpeed. {_USE_THE_ENGINE}")


def why_lacking(parameters: Sequence[Tensor]) -> str:
    """Say why an optimizer that has had an adapter's parameters, or should, may lack one."""
    if any(is_of_deepspeed(p) for p in parameters):
        return _USE_THE_ENGINE
    if any(is_dtensor(p) for p in parameters):
        return (
            "FSDP2 (fully_shard) and tensor parallelism (parallelize_module) put new parameters "
            "into the model. Make the optimizer after them, or let Accelerate prepare model and "
            "optimizer together"
        )
    if "deepspeed" in sys.modules:
        return f"If the model is trained by DeepSpeed: {_USE_THE_ENGINE}"
    return "Make and attach the optimizer when the model has the parameters that are to be trained"


def refuse_unreduced(model: nn.Module | None, adapters: Triples) -> None:
    """Raise ValueError if adapters are whole in each process beside parameters that are sharded.

    The engine reduces the gradients of what it has sharded, and of nothing else. Adapters that are
    DTensors are among what it has sharded.

    Args:
        model: the model in which the adapters are; None if it is not known, and only the layers of
            the adapters can be looked at.
        adapters: each with its lora_A, lora_E and lora_B.
    """
    plain = [
        adapter
        for adapter, parameters in adapters
        if any(p.requires_grad and not is_dtensor(p) for p in parameters)
    ]
    if not plain or not dist.is_available() or not dist.is_initialized():
        return
    for adapter in plain:
        if not adapter.is_deleted and _is_beside_parts(adapter.module):
            raise ValueError(
                f"{adapter.name} is no DTensor, and tensor parallelism has sharded the weight of "
                "its layer: each process would have a part of the adapter's gradient, and train "
                "another one. Let the model be whole when the adapters come (without "
                "transformers' tp_plan), and give parallelize_module the styles of "
                "adalora_kernels.distributed (adalora_plan makes a plan of them) afterwards"
            )
    modules = model.modules() if model is not None else _layers_of(plain)
    engine = _engine_beside(modules)
    if engine is None:
        return
    name = plain[0].name
    if engine == "FSDP2":
        raise ValueError(
            f"{name} is no part of what FSDP2 (fully_shard) has sharded, but ignored by it or put "
            f"into the model afterwards: {_NOBODY}Put adapters in before fully_shard, and leave "
            "them out of ignored_params; or, to have a whole copy in each process, call "
            "allocator.attach(optimizer, sync_gradients=True)"
        )
    if engine == "FSDP1":
        raise ValueError(
            f"{name} is beside what FSDP1 (FullyShardedDataParallel) has flattened: {_NOBODY}Use "
            "FSDP2 (fully_shard), which can shard the adapters as well; or, to have a whole copy "
            "in each process, call allocator.attach(optimizer, sync_gradients=True)"
        )
    raise ValueError(f"{name} is in a model that DeepSpeed has partitioned. {_USE_THE_ENGINE}")


def _layers_of(adapters: Sequence[Adapter]) -> Iterable[nn.Module]:
    for adapter in adapters:
        if not adapter.is_deleted:
            yield from adapter.module.modules()


def _is_beside_parts(layer: nn.Module) -> bool:
    """Whether a layer has a weight that tensor parallelism has sharded, and not FSDP2."""
    for module in layer.modules():
        weight: Any = module._parameters.get("weight")
        if (
            weight is not None
            and is_dtensor(weight)
            and mesh_size(weight) > 1
            and not all(placement.is_replicate() for placement in weight.placements)
            and not module.__dict__.get("_is_fsdp_managed_module")
        ):
            return True
    return False


def _engine_beside(modules: Iterable[nn.Module]) -> str | None:
    """Return "FSDP2", "FSDP1" or "DeepSpeed" if one has sharded parameters of these modules."""
    has_fsdp = False
    sizes = set()
    for module in modules:
        parameters = [p for p in module._parameters.values() if p is not None]
        if any("ds_id" in p.__dict__ for p in parameters):
            return "DeepSpeed"
        # The mark that torch's FSDP, 1 and 2, leaves for torch.compile on all modules that it
        # takes care of; there is no public one. Tensor parallelism has DTensors, too, but the
        # gradients of layers that are whole beside it are the same in each process.
        if module.__dict__.get("_is_fsdp_managed_module"):
            has_fsdp = True
            sizes |= {mesh_size(p) for p in parameters if is_dtensor(p)}
    if sizes:
        return "FSDP2" if max(sizes) > 1 else None
    return "FSDP1" if has_fsdp and dist.get_world_size() > 1 else None
