"""Reads measured times, replays them as a law, and fits laws to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .._npy import read_npz
from .._text import printable
from ..errors import InvalidSetting
from .exports import read_measured
from .laws import Law, Marginal, bimodal, bursty, lognormal, pareto, shifted_exponential
from .sheets import LARGEST, read_sheet

__all__ = ["Fit", "checked_times", "fit", "read_table", "read_trace", "replay", "trace"]

#: A time above this multiple of the median counts as slow.
_SLOW = 3.0
_LONGEST = 1e15  # seconds; what is larger is no measured time, and overflows in sums of squares


def trace(times: ArrayLike, *, name: str = "trace") -> Law:
    """Returns a law that takes measured times in order, or draws among them.

    With several columns, worker i takes the times of column i (modulo the number of columns) in order, and starts over
    at the end. With one column, each worker draws a time at random.

    Args:
        times: Seconds, shape (ticks, workers) or (ticks,).
        name: Name for people.
    """
    table = checked_times(times)
    ticks, workers = table.shape
    if workers == 1:
        marginal = Marginal.of_values(table)

        def draw(seed: int, worker: int, tick: int) -> float:
            return float(table[np.random.default_rng((seed, worker, tick)).integers(ticks), 0])

        return Law(name, draw, lambda worker: marginal)
    return Law(name, lambda seed, worker, tick: float(table[tick % ticks, worker % workers]))


def replay(times: ArrayLike, *, name: str = "replay") -> Law:
    """Returns a law that replays the measured times of rounds: round t takes row t - 1, and starts over at the end.

    A tick of a law is half a round, so evaluation in a round takes the same row.

    Args:
        times: Seconds, shape (rounds, workers) or (rounds,).
        name: Name for people.
    """
    table = checked_times(times)
    rounds, workers = table.shape
    return Law(name, lambda seed, worker, tick: float(table[(tick // 2 - 1) % rounds, worker % workers]), table=table)


def checked_times(times: ArrayLike) -> NDArray[np.float64]:
    """Returns the times as a float64 table, shape (ticks, workers).

    Raises:
        InvalidSetting: The table is empty or has another shape, or an entry is not a finite number of at least 0.
    """
    try:
        table = np.array(times, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidSetting(f"A trace is numbers, of shape (ticks, workers) or (ticks,): {error}.") from error
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or not table.size:
        raise InvalidSetting(f"A trace has shape (ticks, workers) or (ticks,), not {np.shape(times)}.")
    if not (np.isfinite(table) & (table >= 0)).all():
        bad = tuple(int(x) for x in np.argwhere(~(np.isfinite(table) & (table >= 0)))[0])
        raise InvalidSetting(f"The trace has {table[bad]} at row {bad[0]}, column {bad[1]}; times are at least 0.")
    if table.max() > _LONGEST:
        raise InvalidSetting(f"The trace has a time of {table.max():g} s; no time is above {_LONGEST:g} s.")
    return table


def read_trace(path: str | Path, *, key: str | None = None) -> NDArray[np.float64]:
    """Returns the times in a file as a table of rounds, shape (rounds, workers), or an array as stored.

    Columns that count rounds or tell the time are left out, as `read_measured` describes.

    Args:
        path: A .csv file with one column a worker and an optional header line, or a .npz file.
        key: Name of the array in a .npz file; may be None if there is only one.

    Raises:
        InvalidSetting: The file does not exist or cannot be read, or a time is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidSetting(f"There is no trace file {str(path)!r}.")
    if file.suffix.lower() == ".npz":
        return _array_of(file, key)
    return read_measured(file).rounds_table()


def read_table(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """Returns the header of a .csv file, which is empty if the first line has numbers, and its rows.

    Raises:
        InvalidSetting: The file does not exist, is of another kind, or has no rows.
    """
    sheet = read_sheet(path)
    return sheet.header, sheet.rows


def _array_of(file: Path, key: str | None) -> NDArray[np.float64]:
    try:
        table = read_npz(file, LARGEST)
    except OSError as error:
        raise InvalidSetting(f"The trace {file.name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidSetting(f"The trace {file.name} cannot be read as an .npz file ({error}).") from error
    chosen = next(iter(table)) if key is None and len(table) == 1 else key
    if chosen not in table:
        names = printable(", ".join(table), 200)
        raise InvalidSetting(f"The trace {file.name} has arrays {names}: name one of them as key.")
    if table[chosen].dtype.kind not in "fiu":
        kind = table[chosen].dtype
        raise InvalidSetting(f"The array {printable(chosen)} of {file.name} is not of numbers, but of {kind}.")
    return np.asarray(table[chosen], dtype=np.float64)


@dataclass(frozen=True)
class Fit:
    """A law that was fitted to times.

    Attributes:
        law: The fitted law.
        code: Python expression that makes the law.
        distance: Kolmogorov-Smirnov distance to the times, from 0 (equal) to 1.
        aic: Akaike's information criterion. Smaller is better, and values are comparable for the same times only.
    """

    law: Law
    code: str
    distance: float
    aic: float


def fit(times: ArrayLike) -> list[Fit]:
    """Returns laws that are fitted to times by maximum likelihood, best (smallest AIC) first.

    The laws are shifted exponential, lognormal, Pareto, and two speeds with jitter. The law of two speeds is `bursty`
    if the table shows that slow periods last, which means that a slow tick is followed by a slow one more than twice as
    often as by chance. Otherwise it is `bimodal`.

    Args:
        times: Seconds, shape (ticks, workers) or (ticks,).

    Raises:
        InvalidSetting: There are fewer than 8 times, a time is not greater than 0, or all times are equal.
    """
    with np.errstate(all="ignore"):  # of times at the ends of a float's range no law is probable
        return _fits(checked_times(times))


def _fits(table: NDArray[np.float64]) -> list[Fit]:
    x = table.ravel()
    if len(x) < 8:
        raise InvalidSetting(f"{len(x)} times are too few to fit a law to; at least 8 are needed.")
    if not (x > 0).all():
        raise InvalidSetting(f"A time of {x.min():g} cannot be fitted: times must be greater than 0.")
    if x.max() - x.min() <= 1e-12 * x.max():
        raise InvalidSetting(f"All times are {x[0]:g}: that is constant({x[0]:g}), there is nothing to fit.")
    shift, spread = float(x.min()), float(x.mean() - x.min())
    logs = np.log(x)
    median, sigma = math.exp(float(logs.mean())), float(logs.std())
    alpha = len(x) / float((logs - logs.min()).sum())
    fits = [
        Fit(
            shifted_exponential(shift, spread),
            f"shifted_exponential({shift:.4g}, {spread:.4g})",
            *_quality(x, stats.expon(shift, spread).logpdf(x), stats.expon(shift, spread).cdf(np.sort(x)), 2),
        ),
        Fit(
            lognormal(median, sigma),
            f"lognormal({median:.4g}, {sigma:.4g})",
            *_quality(
                x, stats.lognorm(sigma, scale=median).logpdf(x), stats.lognorm(sigma, scale=median).cdf(np.sort(x)), 2
            ),
        ),
        Fit(
            pareto(alpha, shift),
            f"pareto({alpha:.4g}, {shift:.4g})",
            *_quality(
                x, stats.pareto(alpha, scale=shift).logpdf(x), stats.pareto(alpha, scale=shift).cdf(np.sort(x)), 2
            ),
        ),
    ]
    two = _two_speeds(table)
    return sorted(fits if two is None else [*fits, two], key=lambda candidate: candidate.aic)


def _two_speeds(table: NDArray[np.float64]) -> Fit | None:
    x = table.ravel()
    slow = table > _SLOW * np.median(x)
    share = float(slow.mean())
    if not 0 < share < 0.5:
        return None
    fast = np.log(table[~slow])
    base, jitter = math.exp(float(fast.mean())), max(float(fast.std()), 1e-6)
    slowdown = math.exp(float(np.log(table[slow]).mean())) / base
    parts = [(1 - share, stats.lognorm(jitter, scale=base)), (share, stats.lognorm(jitter, scale=base * slowdown))]
    density = np.log(np.maximum(sum(weight * part.pdf(x) for weight, part in parts), 1e-300))
    cdf = sum(weight * part.cdf(np.sort(x)) for weight, part in parts)
    distance, aic = _quality(x, density, np.asarray(cdf), 4)
    after = slow[1:][slow[:-1]]
    if table.shape[1] > 1 and len(after) >= 5 and after.mean() > 2 * share:
        # A tick of the law is half a round. The second eigenvalue of the chain over one tick, squared, must give that
        # over a round, which is (stay - share) / (1 - share).
        stay = float(min(after.mean(), 1 - 0.5 / len(after)))
        lasts = math.sqrt((stay - share) / (1 - share))
        leave, enter = (1 - share) * (1 - lasts), share * (1 - lasts)
        rest = f"{slowdown:.4g}, base={base:.4g}, jitter={jitter:.4g}"
        law = bursty(enter, leave, slowdown, base=base, jitter=jitter)
        return Fit(law, f"bursty({enter:.4g}, {leave:.4g}, {rest})", distance, aic)
    law = bimodal(share, slowdown, base=base, jitter=jitter)
    code = f"bimodal({share:.4g}, {slowdown:.4g}, base={base:.4g}, jitter={jitter:.4g})"
    return Fit(law, code, distance, aic)


def _quality(
    x: NDArray[np.float64], log_density: NDArray[np.float64], cdf: NDArray[np.float64], parameters: int
) -> tuple[float, float]:
    steps = np.arange(len(x) + 1) / len(x)
    distance = float(max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max()))
    return distance, 2 * parameters - 2 * float(log_density.sum())
