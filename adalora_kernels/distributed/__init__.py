"""What crosses processes. Nothing here is imported before somebody asks for it."""

from .tensor_parallel import ColwiseAdaLora, RowwiseAdaLora, adalora_plan

__all__ = ["ColwiseAdaLora", "RowwiseAdaLora", "adalora_plan"]
