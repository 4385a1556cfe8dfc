"""The rank allocator: it spends a budget that a schedule sets on the most important triplets."""

from .allocator import RankAllocator
from .schedule import BudgetSchedule

# Logs of a training have the values of `RankAllocator.summary` under these names.
LOG_PREFIX = "adalora/"

__all__ = ["LOG_PREFIX", "BudgetSchedule", "RankAllocator"]
