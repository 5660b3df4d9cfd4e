"""The last known update of each shard, with the round that it is from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting

__all__ = ["FLOAT16", "Remembered", "UpdateMemory"]

FLOAT16 = "float16"
_Key = tuple[Any, ...]


@dataclass(frozen=True)
class Remembered:
    """The last known update of a shard.

    Attributes:
        shard: The shard.
        round: The round whose model its training started from.
        update: Its weighted update, shape (d,).
        metrics: Its weight and weighted metrics, shape (numbers,).
    """

    shard: int
    round: int
    update: NDArray[Any]
    metrics: NDArray[np.float64]


class UpdateMemory:
    """The last known update of each shard.

    Args:
        k: Number of shards.
        store: Where updates are kept: "" for memory as they came, "float16" for half of it, with 11 bits of each entry,
            or the absolute path of a file, which is mapped into memory, made anew and no longer needed after the run.

    Raises:
        InvalidSetting: The file cannot be written.

    Attributes:
        versions: Shard -> the round of its last known update; shards without one are missing.
    """

    def __init__(self, k: int, store: str | os.PathLike[str] = "") -> None:
        self.k, self.store = k, os.fspath(store)
        folder = os.path.dirname(self.store) or "."
        if self.store and self.store != FLOAT16 and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise InvalidSetting(
                f"The file of last updates {self.store!r} cannot be written: name one in a folder of yours."
            )
        self.versions: dict[int, int] = {}
        self._in_flight: dict[int, tuple[int, int]] = {}  # node -> shard and round of the message it has not answered
        self._under_way: dict[int, int] | None = None  # shard -> newest round in flight
        self._key: _Key = ()  # layout of all updates
        self._updates: dict[int, NDArray[Any]] = {}
        self._scales: dict[int, float] = {}
        self._metrics: dict[int, NDArray[np.float64]] = {}
        self._rows: NDArray[Any] | None = None

    def bytes_for(self, size: int, itemsize: int) -> int:
        """Returns the bytes that updates of `size` entries take, of `itemsize` bytes each."""
        return self.k * size * (2 if self.store == FLOAT16 else itemsize)

    def keep(self, shard: int, server_round: int, update: NDArray[Any], metrics: NDArray[Any], key: object) -> bool:
        """Remember an update; returns False if a later one is known.

        Args:
            shard: The shard.
            server_round: The round whose model its training started from.
            update: Its weighted update, shape (d,).
            metrics: Its weight and weighted metrics, shape (numbers,).
            key: Layout of both, as nested tuples. Updates of another layout are forgotten.
        """
        if self._key and key != self._key:
            if server_round <= max(self.versions.values(), default=0):
                return False
            self.forget()
        if server_round <= self.versions.get(shard, 0):
            return False
        self._key = _tuples(key)
        self._metrics[shard] = np.array(metrics, np.float64)
        self._updates[shard] = self._stored(shard, np.asarray(update))
        self.versions[shard] = server_round
        return True

    def forget(self) -> None:
        """Forget all updates."""
        self._key, self._rows = (), None
        for kept in (self.versions, self._updates, self._scales, self._metrics):
            kept.clear()

    def knows(self, key: object) -> bool:
        """Returns whether the updates have this layout."""
        return bool(self._key) and key == self._key

    def asked(self, node: int, shard: int, server_round: int) -> None:
        """Note that a round has ended in which a node was asked for a shard and did not answer yet."""
        self._in_flight[node], self._under_way = (shard, server_round), None

    def owed_by(self, node: int) -> tuple[int, int] | None:
        """Returns the shard and the round of the message that a node has not answered yet, or None."""
        return self._in_flight.get(node)

    def answered(self, node: int) -> None:
        """Note that a node owes no reply to an earlier round any more, since it answered or was restarted."""
        if self._in_flight.pop(node, None) is not None:
            self._under_way = None

    def newest(self, shard: int) -> int:
        """Returns the round of the newest update of a shard that is known or under way; 0 if there is none."""
        if self._under_way is None:
            self._under_way = {}
            for mine, asked in self._in_flight.values():
                self._under_way[mine] = max(asked, self._under_way.get(mine, 0))
        return max(self.versions.get(shard, 0), self._under_way.get(shard, 0))

    def of(self, shards: Iterable[int]) -> list[Remembered]:
        """Returns the last known updates of shards, which must have one."""
        return [Remembered(j, self.versions[j], self._restored(j), self._metrics[j]) for j in shards]

    def ages(self, server_round: int) -> tuple[int, ...]:
        """Returns how many shards have an update of each age: entry a counts those of a rounds ago."""
        ages = [server_round - version for version in self.versions.values()]
        return tuple(np.bincount(ages, minlength=1).tolist()) if ages else ()

    def _stored(self, shard: int, update: NDArray[Any]) -> NDArray[Any]:
        if self.store == FLOAT16:
            scale = float(np.abs(update).max(initial=0.0))  # so that nothing overflows or is lost in subnormal numbers
            self._scales[shard] = scale = scale if 0 < scale < math.inf else 1.0
            return (update / scale).astype(np.float16)
        if not self.store:
            return update.copy()
        if self._rows is None:
            try:
                self._rows = np.lib.format.open_memmap(self.store, "w+", update.dtype, (self.k, update.size))
            except (OSError, ValueError) as error:
                raise InvalidSetting(f"The file of last updates {self.store!r} cannot be written: {error}.") from error
        self._rows[shard] = update
        row: NDArray[Any] = self._rows[shard]
        return row

    def _restored(self, shard: int) -> NDArray[Any]:
        kept = self._updates[shard]
        return kept.astype(np.float32) * np.float32(self._scales[shard]) if self.store == FLOAT16 else kept

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold, as plain values and arrays."""
        shards = sorted(self.versions)
        return {
            "key": self._key,
            "versions": [[j, self.versions[j], self._scales.get(j, 1.0)] for j in shards],
            "updates": [np.asarray(self._updates[j]) for j in shards],
            "metrics": [self._metrics[j] for j in shards],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It is of another number of shards, or no such state.
        """
        self.forget()
        lists = [state["versions"], state["updates"], state["metrics"]]
        if len({len(one) for one in lists}) != 1:
            raise ValueError("last updates of different numbers")
        self._key = _tuples(state["key"])
        for (shard, version, scale), update, metrics in zip(*lists, strict=True):
            if type(shard) is not int or not 0 <= shard < self.k or type(version) is not int or version < 1:
                raise ValueError(f"a last update of shard {shard!r}, round {version!r}")
            if not isinstance(update, np.ndarray) or update.ndim != 1 or update.dtype.kind != "f":
                raise ValueError("a last update that is no vector of floats")
            self.versions[shard], self._scales[shard] = version, float(scale)
            self._metrics[shard] = np.asarray(metrics, np.float64)
            whole = update if self.store == FLOAT16 and update.dtype == np.float16 else None
            self._updates[shard] = self._stored(shard, update) if whole is None else whole


def _tuples(value: Any) -> Any:
    """Returns nested lists as nested tuples, which is how layouts are compared."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value
