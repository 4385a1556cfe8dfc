"""The rank allocator: it spends a budget that a schedule sets on the most important triplets."""

from .allocator import RankAllocator
from .schedule import BudgetSchedule

LOG_PREFIX = "adalora/"
"""Logs of a training have what `RankAllocator.summary` has, under names that begin with this."""

__all__ = ["LOG_PREFIX", "BudgetSchedule", "RankAllocator"]
