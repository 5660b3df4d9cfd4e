"""A node config that knows whether the app chose its data by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..protocol import PARTITION_ID

__all__ = ["RecordingConfig"]


class RecordingConfig(dict[str, Any]):
    """A node_config that records whether `partition-id` is read, by its key or with all other values."""

    was_read = False

    def __getitem__(self, key: str) -> Any:
        self.was_read |= key == PARTITION_ID
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the same as `dict.get`."""
        self.was_read |= key == PARTITION_ID
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # also makes dict(config) and {**config} call keys()
        return super().__iter__()

    def keys(self) -> Any:
        """Returns the same as `dict.keys`, which does not read values."""
        return super().keys()

    def values(self) -> Any:
        """Returns the same as `dict.values`."""
        self.was_read = True
        return super().values()

    def items(self) -> Any:
        """Returns the same as `dict.items`."""
        self.was_read = True
        return super().items()

    def copy(self) -> Any:
        """Returns a plain dict that records nothing."""
        self.was_read = True
        return super().copy()

    def pop(self, *args: Any) -> Any:
        """Returns the same as `dict.pop`."""
        self.was_read = True
        return super().pop(*args)

    def setdefault(self, *args: Any) -> Any:
        """Returns the same as `dict.setdefault`."""
        self.was_read = True
        return super().setdefault(*args)

    def popitem(self) -> Any:
        """Returns the same as `dict.popitem`."""
        self.was_read = True
        return super().popitem()

    def __repr__(self) -> str:
        self.was_read = True
        return super().__repr__()
