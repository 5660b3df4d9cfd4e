"""Latency laws: how long a reply takes, as values that can be drawn from reproducibly.

A law gives one number for each (seed, worker, tick). The same triple gives the same number, so that schemes that
are compared meet the same slow moments. `Latency` adds up three laws: a fixed part, a part that grows with the
number of shards, and one that grows with the bytes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InvalidSetting

__all__ = [
    "Latency",
    "Law",
    "bimodal",
    "bursty",
    "constant",
    "exponential",
    "lognormal",
    "pareto",
    "read_trace",
    "scaled",
    "shifted_exponential",
    "trace",
]


@dataclass(frozen=True)
class Law:
    """One random number for each (seed, worker, tick), in seconds or as a factor.

    Attributes:
        name: For people.
        draw: (seed, worker, tick) -> value of at least 0; `inf` means never.
    """

    name: str
    draw: Callable[[int, int, int], float]


@dataclass(frozen=True)
class Latency:
    """Seconds from send to reply: `fixed + compute * shards + transfer * megabytes`, each part a law of its own.

    A plain number stands for a constant. Evaluating a shard takes `evaluation` times as long as training it.
    """

    fixed: Law | float = 0.0
    compute: Law | float = 0.0
    transfer: Law | float = 0.0
    evaluation: float = 0.3

    def __post_init__(self) -> None:
        for name in ("fixed", "compute", "transfer", "evaluation"):
            value = getattr(self, name)
            if not isinstance(value, Law):
                _at_least_zero(**{name: value})

    def seconds(
        self, *, seed: int, worker: int, tick: int, shards: float, megabytes: float, evaluating: bool = False
    ) -> float:
        """Seconds until `worker` has answered its `tick`-th job of `shards` shards, `megabytes` both ways."""
        load = shards * (self.evaluation if evaluating else 1.0)
        total = 0.0
        for stream, (part, amount) in enumerate(((self.fixed, 1.0), (self.compute, load), (self.transfer, megabytes))):
            if amount:
                one = part.draw(seed * 3 + stream, worker, tick) if isinstance(part, Law) else float(part)
                total += one * amount
        return total


def constant(value: float) -> Law:
    """Always `value`."""
    _at_least_zero(value=value)
    return Law(f"constant {value:g}", lambda seed, worker, tick: value)


def exponential(mean: float = 1.0) -> Law:
    """Exponential with this mean: memoryless."""
    return shifted_exponential(0.0, mean)


def shifted_exponential(shift: float, mean: float) -> Law:
    """`shift` plus an exponential with mean `mean`: a job that takes at least so long."""
    _at_least_zero(shift=shift, mean=mean)
    return _independent(f"{shift:g} + exponential {mean:g}", lambda rng: shift + mean * rng.standard_exponential())


def lognormal(median: float = 1.0, sigma: float = 0.3) -> Law:
    """Lognormal: `median * exp(sigma Z)`; sigma 0.3 is the jitter of a healthy machine."""
    _at_least_zero(median=median, sigma=sigma)
    return _independent(
        f"lognormal {median:g}, {sigma:g}", lambda rng: median * math.exp(sigma * rng.standard_normal())
    )


def pareto(alpha: float, minimum: float = 1.0) -> Law:
    """Pareto: P(X > x) = (minimum / x)^alpha; infinite variance for alpha <= 2."""
    _at_least_zero(minimum=minimum)
    if not alpha > 0:
        raise InvalidSetting(f"alpha={alpha} of a Pareto law must be greater than 0.")
    return _independent(f"Pareto {alpha:g}", lambda rng: minimum * (1.0 - rng.random()) ** (-1.0 / alpha))


def bimodal(probability: float, slowdown: float, *, base: float = 1.0, jitter: float = 0.0) -> Law:
    """`base`, and `slowdown` times that with this probability, anew each time; optional lognormal jitter."""
    _probability(probability=probability)
    _at_least_zero(slowdown=slowdown, base=base, jitter=jitter)

    def draw(rng: np.random.Generator) -> float:
        slow = slowdown if rng.random() < probability else 1.0
        return base * slow * math.exp(jitter * rng.standard_normal())

    return _independent(f"bimodal {probability:g} x{slowdown:g}", draw)


def bursty(enter: float, leave: float, slowdown: float, *, base: float = 1.0, jitter: float = 0.0) -> Law:
    """A worker turns slow with probability `enter` per tick and recovers with `leave`: slow spells that last.

    The share of slow ticks is enter / (enter + leave), which is also the chance to be slow at tick 0.
    """
    _probability(enter=enter, leave=leave)
    _at_least_zero(slowdown=slowdown, base=base, jitter=jitter)
    stationary = enter / (enter + leave) if enter + leave else 0.0

    @cache
    def spells(seed: int, worker: int, block: int) -> tuple[bool, ...]:
        """Whether slow, for the 256 ticks of one block; each block starts where the one before ended."""
        uniform = np.random.default_rng((seed, worker, block, 1)).random(256)
        slow = spells(seed, worker, block - 1)[-1] if block else None
        states = []
        for u in uniform:
            slow = bool(u < stationary) if slow is None else bool(u >= leave if slow else u < enter)
            states.append(slow)
        return tuple(states)

    def draw(seed: int, worker: int, tick: int) -> float:
        for block in range(tick // 256):  # fills the cache in order: no deep recursion
            spells(seed, worker, block)
        slow = spells(seed, worker, tick // 256)[tick % 256]
        noise = math.exp(jitter * _rng(seed, worker, tick).standard_normal()) if jitter else 1.0
        return base * (slowdown if slow else 1.0) * noise

    return Law(f"bursty {enter:g}/{leave:g} x{slowdown:g}", draw)


def trace(times: ArrayLike, *, name: str = "trace") -> Law:
    """Measured times, shape (ticks, workers) or (ticks,).

    Worker i walks down column i modulo the number of columns, from the top again at the end; with one column,
    each worker draws a time at random.
    """
    table = np.array(times, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or not table.size:
        raise InvalidSetting(f"A trace has shape (ticks, workers) or (ticks,), not {np.shape(times)}.")
    if not (np.isfinite(table) & (table >= 0)).all():
        bad = tuple(int(x) for x in np.argwhere(~(np.isfinite(table) & (table >= 0)))[0])
        raise InvalidSetting(f"The trace has {table[bad]} at row {bad[0]}, column {bad[1]}; times are at least 0.")
    ticks, workers = table.shape
    if workers == 1:
        return _independent(name, lambda rng: float(table[rng.integers(ticks), 0]))
    return Law(name, lambda seed, worker, tick: float(table[tick % ticks, worker % workers]))


def read_trace(path: str | Path, *, key: str | None = None) -> NDArray[np.float64]:
    """Times in seconds from a .csv (one column a worker, optional header line) or .npz file (array `key`)."""
    file = Path(path)
    if not file.is_file():
        raise InvalidSetting(f"There is no trace file {str(path)!r}.")
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            names = list(arrays)
            chosen = key if key is not None else (names[0] if len(names) == 1 else None)
            if chosen not in names:
                raise InvalidSetting(f"The trace {file.name} has arrays {', '.join(names)}: name one of them as key.")
            return np.asarray(arrays[chosen], dtype=np.float64)
    if file.suffix != ".csv":
        raise InvalidSetting(f"A trace is a .csv or .npz file, not {file.name!r}.")
    with file.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if row]
    if rows and not all(_is_number(cell) for cell in rows[0]):
        rows = rows[1:]
    try:
        return np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise InvalidSetting(f"The trace {file.name} is not a table of numbers: {error}.") from error


def scaled(law: Law, factors: Mapping[int, float] | Sequence[float]) -> Law:
    """`law`, multiplied for some workers: `scaled(lognormal(), {0: 10, 1: 10})` makes two of them slow for good.

    A factor of infinity makes a worker silent.
    """
    table = dict(factors) if isinstance(factors, Mapping) else dict(enumerate(factors))
    _at_least_zero(**{f"factor of worker {worker}": factor for worker, factor in table.items()})

    def draw(seed: int, worker: int, tick: int) -> float:
        factor = table.get(worker, 1.0)
        return factor if factor == math.inf else law.draw(seed, worker, tick) * factor

    return Law(f"{law.name}, scaled", draw)


def _independent(name: str, draw: Callable[[np.random.Generator], float]) -> Law:
    return Law(name, lambda seed, worker, tick: float(draw(_rng(seed, worker, tick))))


def _rng(seed: int, worker: int, tick: int) -> np.random.Generator:
    return np.random.default_rng((seed, worker, tick))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise InvalidSetting(f"{name}={value} of a latency law must be at least 0.")


def _probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InvalidSetting(f"{name}={value} of a latency law is a probability: it must lie in 0..1.")
