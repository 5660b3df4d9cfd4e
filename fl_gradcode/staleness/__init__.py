"""Bounded staleness: rounds that end with some shards' last updates, the rule for it, and the memory of updates."""

from .rule import StalenessRule
from .update_memory import FLOAT16, UNKNOWN, Remembered, UpdateMemory

__all__ = ["FLOAT16", "UNKNOWN", "Remembered", "StalenessRule", "UpdateMemory"]
