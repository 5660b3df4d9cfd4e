"""A node_config that notices whether the app chooses its data by `partition-id`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .wire import PARTITION_ID

__all__ = ["WatchedConfig"]


class WatchedConfig(dict[str, Any]):
    """A node_config that notices whether `partition-id` is read, one by one or all at once."""

    was_read = False

    def __getitem__(self, key: str) -> Any:
        self.was_read |= key == PARTITION_ID
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As dict.get."""
        self.was_read |= key == PARTITION_ID
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # also makes dict(config) and {**config} call keys()
        return super().__iter__()

    def keys(self) -> Any:
        """As dict.keys; the values are read one by one."""
        return super().keys()

    def values(self) -> Any:
        """As dict.values."""
        self.was_read = True
        return super().values()

    def items(self) -> Any:
        """As dict.items."""
        self.was_read = True
        return super().items()

    def copy(self) -> Any:
        """A plain copy."""
        self.was_read = True
        return super().copy()

    def pop(self, *args: Any) -> Any:
        """As dict.pop."""
        self.was_read = True
        return super().pop(*args)

    def setdefault(self, *args: Any) -> Any:
        """As dict.setdefault."""
        self.was_read = True
        return super().setdefault(*args)

    def popitem(self) -> Any:
        """As dict.popitem."""
        self.was_read = True
        return super().popitem()

    def __repr__(self) -> str:
        self.was_read = True
        return super().__repr__()
