"""The rank allocator: it spends a budget that a schedule sets on the most important triplets."""

from .allocator import LOG_PREFIX, RankAllocator
from .schedule import BudgetSchedule

__all__ = ["LOG_PREFIX", "BudgetSchedule", "RankAllocator"]
