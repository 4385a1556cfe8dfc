"""What crosses processes where the adapters of a model are spread over several of them."""

from .shards import shard_placement

__all__ = ["shard_placement"]
