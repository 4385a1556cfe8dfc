"""What crosses processes where several train the adapters of a model."""

from .shards import shard_placement

__all__ = ["shard_placement"]
