"""Simulated runs of one scheme, and the line of a plan that sums them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..latency import Latency, Parts
from .clairvoyant import clairvoyant_rounds
from .closed_forms import idle_mean
from .schemes import Scheme
from .simulation import coded_rounds, idle_rounds, steady_rounds

__all__ = ["Line", "SchemeRuns"]

_IDLE_RUNS = 10  # number of runs for which the idle start is simulated if it has no closed form
_IDLE_JOBS = 3_000  # jobs of measured rounds for which it is


@dataclass(frozen=True)
class Line:
    """The expected times and costs of one scheme.

    Attributes:
        scheme: The scheme.
        idle: Expected seconds of a round in which all workers start idle.
        closed_form: Whether `idle` is a closed form; otherwise it was simulated.
        steady: Mean seconds of a round over a run.
        error: Standard error of `steady` in seconds; NaN if it is not known.
        computed: Shards computed in a round, whether needed or not, divided by n; 1 without a code.
        upload: Size of a round's replies in megabytes, whether needed or not.
        storage: Largest number of shards that a worker has to store.
        bound: Mean seconds of a round of the clairvoyant bound in the same runs, which no scheme with the same
            assignment beats; None if it is not known. See `clairvoyant_rounds`.
        interval: Ends of a 90 % interval of `steady`, from resampled rounds; None if the times are not measured.
    """

    scheme: Scheme
    idle: float
    closed_form: bool
    steady: float
    error: float
    computed: float
    upload: float
    storage: int
    bound: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def over_bound(self) -> float | None:
        """How many times as long as the bound a round takes; None if the bound is not known or not finite."""
        return None if not self.bound or not np.isfinite(self.bound) else self.steady / self.bound


class SchemeRuns:
    """Simulates runs of one scheme, and collects their results.

    Args:
        scheme: The scheme.
        latency: Latency of a job, for closed forms.
        draws: Drawn times of each run.
        megabytes: Size of the model.
        first: Round of a run from which on rounds count; a run settles before.

    Attributes:
        means: Mean seconds of a round, for each run.
        seconds: Seconds of each round of the first run that counts.
    """

    def __init__(
        self, scheme: Scheme, latency: Latency, draws: Sequence[Parts], megabytes: float, *, first: int
    ) -> None:
        self.scheme, self.megabytes, self.first = scheme, megabytes, first
        self.means: list[float] = []
        self._computed: list[float] = []
        self._messages: list[float] = []
        self._bounds: list[float] = []
        self.seconds: NDArray[np.float64] = np.empty(0)
        self.add(draws)
        self._closed = idle_mean(scheme, latency, model_megabytes=megabytes)
        self._idle = self._closed
        if self._idle is None:
            few = [
                idle_rounds(scheme, _thinned(parts, scheme), model_megabytes=megabytes).seconds.mean()
                for parts in draws[:_IDLE_RUNS]
            ]
            self._idle = float(np.mean(few))

    @property
    def message(self) -> float:
        """Megabytes of a message and its reply."""
        return self.megabytes * (1 + 1 / self.scheme.m)

    def add(self, draws: Sequence[Parts]) -> None:
        """Simulates one more run for each draw, all with the same number of rounds."""
        if self.scheme.shardwise:
            runs = [steady_rounds(self.scheme, parts, model_megabytes=self.megabytes) for parts in draws]
        else:
            loads = self.scheme.loads.astype(np.float64)
            runs = coded_rounds(self.scheme, np.stack([parts.seconds(loads, self.message) for parts in draws]))
        if not self.means:
            self.seconds = runs[0].seconds[self.first :]
        self.means += [float(run.seconds[self.first :].mean()) for run in runs]
        bounds = (clairvoyant_rounds(self.scheme, parts, model_megabytes=self.megabytes) for parts in draws)
        self._bounds += [float(bound[self.first :].mean()) for bound in bounds if bound is not None]
        self._computed += [run.computed for run in runs]
        self._messages += [run.messages for run in runs]

    def line(self) -> Line:
        """Returns the line of the plan that sums up the runs."""
        known = len(self.means) > 1 and bool(np.isfinite(self.means).all())
        assert self._idle is not None
        return Line(
            self.scheme,
            self._idle,
            self._closed is not None,
            float(np.mean(self.means)),
            float(np.std(self.means, ddof=1) / np.sqrt(len(self.means))) if known else float("nan"),
            float(np.mean(self._computed)) / self.scheme.n,
            float(np.mean(self._messages)) * self.megabytes / self.scheme.m,
            int(self.scheme.loads.max()),
            float(np.mean(self._bounds)) if self._bounds else None,
        )


def _thinned(parts: Parts, scheme: Scheme) -> Parts:
    """Returns fewer rounds, spread over all of them, where an event loop has to simulate them."""
    rounds = len(parts.fixed)
    most = max(20, _IDLE_JOBS // scheme.n)
    if not scheme.shardwise or rounds <= most:
        return parts
    keep = np.linspace(0, rounds - 1, most).astype(int)
    return Parts(parts.fixed[keep], parts.compute[keep], parts.transfer[keep])
