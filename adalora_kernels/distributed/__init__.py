"""What crosses processes. Nothing here is imported before somebody asks for it."""

from .tensor_parallel import ColwiseAdaLora, ReplicatedAdaLora, RowwiseAdaLora, adalora_plan

__all__ = ["ColwiseAdaLora", "ReplicatedAdaLora", "RowwiseAdaLora", "adalora_plan"]
