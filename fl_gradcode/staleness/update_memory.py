"""The last known update of each shard, with the round that it is from."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import open_file
from ..errors import InvalidSetting

__all__ = ["FLOAT16", "UNKNOWN", "Remembered", "UpdateMemory"]

FLOAT16 = "float16"
#: Shard of a message to a node that chooses among its own.
UNKNOWN = -1
_BLOCK = 1024  # entries that share a scale, with "float16"
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
        store: Where updates are kept: "" for memory as they came, "float16" for half of it, with 11 bits of each entry
            relative to the largest one of 1,024 neighbours, or the absolute path of a new file, which is mapped into
            memory. The file has no name once it is open, so that nobody else writes to it and nothing is left of it.

    Raises:
        InvalidSetting: The file is there already, or cannot be written.

    Attributes:
        versions: Shard -> the round of its last known update; shards without one are missing.
    """

    def __init__(self, k: int, store: str | os.PathLike[str] = "") -> None:
        self.k, self.store = k, os.fspath(store)
        self.versions: dict[int, int] = {}
        self._in_flight: dict[int, tuple[int, int]] = {}  # node -> shard and round of the message it has not answered
        self._under_way: dict[int, int] | None = None  # shard -> newest round in flight
        self._key: _Key = ()  # layout of all updates
        self._updates: dict[int, NDArray[Any]] = {}
        self._scales: dict[int, NDArray[np.floating]] = {}
        self._metrics: dict[int, NDArray[np.float64]] = {}
        self._senders: dict[int, int] = {}
        self._file: int | None = None  # descriptor
        if self.store not in ("", FLOAT16):
            self._file = self._opened()
            weakref.finalize(self, os.close, self._file)
        self._rows: NDArray[Any] | None = None

    def _opened(self) -> int:
        """Returns the descriptor of the file, which has no name any more."""
        path = Path(self.store)
        try:
            opened = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
            path.unlink()
        except OSError as error:
            raise InvalidSetting(
                f"The file of last updates {self.store!r} cannot be made: {error.strerror}. Name a new file in a "
                "folder that can be written."
            ) from error
        return opened

    def bytes_for(self, size: int, itemsize: int) -> int:
        """Returns the bytes that updates of `size` entries take, of `itemsize` bytes each."""
        return self.k * size * (2 if self.store == FLOAT16 else itemsize)

    def keep(
        self,
        shard: int,
        server_round: int,
        update: NDArray[Any],
        metrics: NDArray[Any],
        key: object,
        *,
        sender: int,
        late: bool = False,
    ) -> bool:
        """Remember an update; returns False if a later one is known, or if it does not fit the others.

        Args:
            shard: The shard.
            server_round: The round whose model its training started from.
            update: Its weighted update, shape (d,).
            metrics: Its weight and weighted metrics, shape (numbers,).
            key: Layout of both, as nested tuples. Updates of another layout are forgotten.
            sender: Worker that sent it.
            late: Whether it came after its round, or in a round without a model: then it is not kept if its layout is
                another one.
        """
        if self._key and key != self._key:
            if late:
                return False
            self.forget()
        if server_round <= self.versions.get(shard, 0):
            return False
        self._key = _tuples(key)
        self._metrics[shard] = np.array(metrics, np.float64)
        self._store(shard, np.asarray(update))
        self.versions[shard], self._senders[shard] = server_round, sender
        return True

    def forget(self) -> None:
        """Forget all updates."""
        self._key, self._rows = (), None
        for kept in (self.versions, self._updates, self._scales, self._metrics, self._senders):
            kept.clear()

    def forget_those_of(self, workers: Collection[int]) -> None:
        """Forget the updates that some workers have sent."""
        for shard in [shard for shard, sender in self._senders.items() if sender in workers]:
            del self.versions[shard], self._senders[shard], self._updates[shard], self._metrics[shard]
            self._scales.pop(shard, None)

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

    def weight(self, shard: int) -> float:
        """Returns the weight of the last known update of a shard, 0 if there is none."""
        return float(self._metrics[shard][0]) if shard in self._metrics else 0.0

    def ages(self, server_round: int) -> tuple[int, ...]:
        """Returns how many shards have an update of each age: entry a counts those of a rounds ago."""
        ages = [server_round - version for version in self.versions.values()]
        return tuple(np.bincount(ages, minlength=1).tolist()) if ages else ()

    def _store(self, shard: int, update: NDArray[Any]) -> None:
        if self.store == FLOAT16:
            # A scale for each block, so that nothing overflows, and large entries spoil their neighbours alone.
            starts = np.arange(0, update.size, _BLOCK)
            largest = np.maximum.reduceat(np.abs(update), starts) if update.size else np.zeros(0)
            fitting = np.where((largest > 0) & np.isfinite(largest), largest, 1)
            scales: NDArray[np.floating] = fitting.astype(np.float64)
            if update.dtype.itemsize <= 4:  # float32 holds neither 1e50 nor 1e-50
                scales = fitting.astype(np.float32)
            self._scales[shard] = scales
            self._updates[shard] = (update / _spread(scales, update.size)).astype(np.float16)
        elif self._file is None:
            self._updates[shard] = update.copy()
        else:
            if self._rows is None:
                self._rows = self._mapped(update)
            self._rows[shard] = update
            self._updates[shard] = self._rows[shard]

    def _mapped(self, update: NDArray[Any]) -> NDArray[Any]:
        assert self._file is not None
        size = max(1, self.k * update.nbytes)
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a signal later
                os.posix_fallocate(self._file, 0, size)
            else:
                os.ftruncate(self._file, size)
        except OSError as error:
            raise InvalidSetting(
                f"The file of last updates {self.store!r} cannot hold {size / 1e6:.1f} MB: {error.strerror}."
            ) from error
        mapped = np.frombuffer(mmap.mmap(self._file, size), update.dtype, self.k * update.size)
        return mapped.reshape(self.k, update.size)

    def _restored(self, shard: int) -> NDArray[Any]:
        kept, scales = self._updates[shard], self._scales.get(shard)
        return kept if scales is None else kept.astype(scales.dtype) * _spread(scales, kept.size)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold, as plain values and arrays."""
        shards = sorted(self.versions)
        return {
            "key": self._key,
            "versions": [[j, self.versions[j], self._senders[j]] for j in shards],
            "updates": [np.asarray(self._updates[j]) for j in shards],
            "scales": [self._scales.get(j) for j in shards],
            "metrics": [self._metrics[j] for j in shards],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, from a memory with any store.

        Raises:
            ValueError: It is of another number of shards, or no such state.
        """
        self.forget()
        lists = [state["versions"], state["updates"], state["scales"], state["metrics"]]
        if len({len(one) for one in lists}) != 1:
            raise ValueError("last updates of different numbers")
        self._key = _tuples(state["key"])
        for (shard, version, sender), update, scales, metrics in zip(*lists, strict=True):
            if type(shard) is not int or not 0 <= shard < self.k or type(version) is not int or version < 1:
                raise ValueError(f"a last update of shard {shard!r}, round {version!r}")
            if not isinstance(update, np.ndarray) or update.ndim != 1 or update.dtype.kind != "f":
                raise ValueError("a last update that is no vector of floats")
            self.versions[shard], self._senders[shard] = version, int(sender)
            self._metrics[shard] = np.asarray(metrics, np.float64)
            if scales is None:
                self._store(shard, update)
                continue
            if not isinstance(scales, np.ndarray) or scales.dtype not in (np.float32, np.float64):
                raise ValueError("a last update with scales that are no floats")
            if len(scales) != -(-update.size // _BLOCK):
                raise ValueError("a last update with scales of another length")
            elif self.store == FLOAT16:
                self._updates[shard], self._scales[shard] = update, scales
            else:
                self._store(shard, update.astype(scales.dtype) * _spread(scales, update.size))


def _spread(scales: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    """Returns the scale of each entry."""
    return np.repeat(scales, _BLOCK)[:size]


def _tuples(value: Any) -> Any:
    """Returns nested lists as nested tuples, which is how layouts are compared."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value
