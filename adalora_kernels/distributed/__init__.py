"""What crosses processes where several train the adapters of a model."""

from typing import TYPE_CHECKING, Any

from .shards import shard_placement

if TYPE_CHECKING:
    from .tensor_parallel import ColwiseAdaLora, ReplicatedAdaLora, RowwiseAdaLora, adalora_plan

__all__ = [
    "ColwiseAdaLora",
    "ReplicatedAdaLora",
    "RowwiseAdaLora",
    "adalora_plan",
    "shard_placement",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: it needs torch.distributed.tensor, which takes long to import.
    if name in __all__:
        from . import tensor_parallel

        return getattr(tensor_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
