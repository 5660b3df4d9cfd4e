"""Plans whether coding pays: expected round times and costs of every scheme, and one recommendation.

    plan = make_plan(named("virtual-machines"), n=30)
    print(plan.verdict)
    print(plan.recommended.scheme.python)

The recommendation is based on the steady state of a run. The time from an idle start is shown beside it, in closed form
if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .._text import seconds_text
from ..codes import check_count, fractional_repetition
from ..errors import InvalidSetting
from ..latency import Latency, Parts
from .closed_forms import idle_mean
from .schemes import Scheme, any_code, drop_slowest, over_selection, partial_work, repetition, wait_for_all
from .simulation import idle_rounds, steady_rounds

__all__ = ["GAIN", "Line", "RoundPlan", "candidates", "make_plan", "spread"]

#: Coding is recommended if it shortens rounds by at least this fraction. Below that, it is not worth its storage.
GAIN = 0.05
#: A scheme whose rounds are at most this fraction longer than the fastest is preferred if it stores or computes less.
_CLOSE = 0.04
# Schemes within 15 % of the fastest get further runs, up to 8 times as many, until their differences are known to 1 %.
_NEAR, _SURE, _MORE = 1.15, 0.01, 8
_IDLE_RUNS = 10  # number of runs for which the idle start is simulated if it has no closed form
_TOLERANCES = (1, 2, 3, 4, 5, 7)
#: A worker this many times slower than the median one, in every draw of the population, counts as permanently slow.
_SLOW = 1.5


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
    """

    scheme: Scheme
    idle: float
    closed_form: bool
    steady: float
    error: float
    computed: float
    upload: float
    storage: int


@dataclass(frozen=True)
class RoundPlan:
    """The comparison of all schemes, and the recommendation.

    Attributes:
        lines: One line for each scheme; the first is waiting for all.
        recommended: The line of the exact scheme to use; the first line if coding does not pay.
        verdict: One sentence, which starts with "do not code" if coding does not pay.
        n: Number of workers.
        slow: Workers that are permanently slow, slowest first.
    """

    lines: tuple[Line, ...]
    recommended: Line
    verdict: str
    n: int
    slow: tuple[int, ...]

    @property
    def codes(self) -> bool:
        """Whether coding is recommended."""
        return self.recommended is not self.lines[0]

    def speedup(self, line: Line) -> float:
        """Returns how many times shorter the line's rounds are than with waiting for all."""
        return self.lines[0].steady / line.steady if line.steady else float("nan")


def make_plan(
    latency: Latency,
    n: int,
    *,
    model_megabytes: float = 0.0,
    tolerances: Iterable[int] | None = None,
    rounds: int = 48,
    populations: int = 32,
    seed: int = 0,
    schemes: Sequence[Scheme] | None = None,
) -> RoundPlan:
    """Returns the plan that compares schemes for n workers under a latency.

    Args:
        latency: Latency of one job; see `Latency`, `populations.named` and `History.latency`.
        n: Number of workers, at least 2; each has one shard of its own.
        model_megabytes: Size of the model, which each message carries to a worker; a reply carries 1/m of it back.
        tolerances: Values of s to try; by default a few up to n / 3.
        rounds: Number of rounds of each simulated run; the first fifth is ignored, because a run has to settle first.
        populations: Number of runs, each with its own random population of devices and slow periods. If the latency
            replays measured times, all draws are equal, and one long run with the same total number of rounds is
            simulated instead.
        seed: Seed of the first population.
        schemes: Schemes to compare; by default `candidates`.

    Raises:
        InvalidSetting: There are fewer than 2 workers, or an argument is out of range.
    """
    n = check_count(n, "n")
    if n < 2:
        raise InvalidSetting(f"n={n}: one worker has nobody to share its work with; planning needs at least 2.")
    if not 0 <= model_megabytes < float("inf"):
        raise InvalidSetting(f"model_megabytes={model_megabytes} must be a number of at least 0.")
    for name, value, least in (("rounds", rounds, 20), ("populations", populations, 1), ("seed", seed, 0)):
        if not value >= least or value % 1:
            raise InvalidSetting(f"{name}={value} must be a whole number of at least {least}.")
    for scheme in schemes or ():
        if scheme.n != n:
            raise InvalidSetting(f"The scheme {scheme.name!r} is for {scheme.n} workers; planned is for n={n}.")
    draws = [latency.parts(seed=seed + number, n=n, rounds=rounds) for number in range(populations)]
    if populations > 1 and _equal(*draws[:2]):  # measured times are replayed, so that all draws are equal
        draws = [latency.parts(seed=seed, n=n, rounds=rounds * populations)]
    slow = _permanently_slow(draws, model_megabytes)
    chosen = schemes if schemes is not None else candidates(n, tolerances, slow=slow, m=bool(model_megabytes))
    chosen = [wait_for_all(n), *(scheme for scheme in chosen if scheme.enough != n or scheme.s)]
    samples = [_Sample(scheme, latency, draws, model_megabytes) for scheme in chosen]
    while len(draws) > 1 and len(samples[0].means) < _MORE * populations:
        unsure = _unsure(samples)
        if not unsure:
            break
        first = seed + len(samples[0].means)
        more = [latency.parts(seed=first + number, n=n, rounds=rounds) for number in range(populations)]
        for sample in [samples[0], *unsure]:
            sample.add(more)
    lines = tuple(sample.line() for sample in samples)
    recommended, verdict = _recommend(lines)
    return RoundPlan(lines, recommended, verdict, n, slow)


def candidates(
    n: int, tolerances: Iterable[int] | None = None, *, slow: Sequence[int] = (), m: bool = False
) -> list[Scheme]:
    """Returns the schemes to compare by default, for several values of s.

    Args:
        n: Number of workers.
        tolerances: Values of s; by default a few up to n / 3.
        slow: Workers that are permanently slow, which are spread over the groups.
        m: Whether to include schemes whose replies have half the length (m = 2).
    """
    wanted = [s for s in _TOLERANCES if s <= max(1, n // 3)] if tolerances is None else sorted(set(tolerances))
    for s in wanted:
        if not 1 <= s < n:
            raise InvalidSetting(f"s={s}: with n={n} workers a tolerance lies in 1..{n - 1}.")
    result = [over_selection(n)] if n >= 4 else []
    for s in wanted:
        order = spread(slow, n, s)
        result += [drop_slowest(n, s), any_code(n, s), repetition(n, s, order=order)]
        if m and s + 2 <= n:
            result.append(repetition(n, s, m=2, order=spread(slow, n, s, m=2)))
        result += [partial_work(n, s, patience=patience, order=order) for patience in (0.0, 2.0)]
    return result


def spread(slow: Sequence[int], n: int, s: int, *, m: int = 1) -> list[int] | None:
    """Returns the `order=` for `fractional_repetition` that spreads slow workers over groups.

    The result is None if the default order spreads them already.
    """
    groups = fractional_repetition(n, s, m=m).groups
    assert groups is not None
    if max(len(set(group) & set(slow)) for group in groups) <= -(-len(slow) // len(groups)):
        return None
    return [*slow, *(i for i in range(n) if i not in set(slow))]


def _equal(left: Parts, right: Parts) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("fixed", "compute", "transfer"))


def _permanently_slow(draws: Sequence[Parts], model_megabytes: float) -> tuple[int, ...]:
    """Returns the workers that are much slower than the median one in every draw, slowest first."""
    relative = []
    for parts in draws:
        usual = np.median(parts.seconds(1.0, 2 * model_megabytes), axis=0)
        middle = float(np.median(usual))
        relative.append(usual / middle if 0 < middle < np.inf else np.where(usual > min(middle, 1e300), np.inf, 1.0))
    least = np.min(relative, axis=0)
    return tuple(int(i) for i in np.argsort(-least, kind="stable") if least[i] > _SLOW)


class _Sample:
    """Simulates runs of one scheme, and collects their results."""

    def __init__(self, scheme: Scheme, latency: Latency, draws: Sequence[Parts], model: float) -> None:
        self.scheme, self.model = scheme, model
        self.means: list[float] = []  # mean seconds of a round, for each run
        self.computed: list[float] = []
        self.messages: list[float] = []
        self.add(draws)
        self.closed = idle_mean(scheme, latency, model_megabytes=model)
        self.idle = self.closed
        if self.idle is None:
            few = [idle_rounds(scheme, parts, model_megabytes=model).seconds.mean() for parts in draws[:_IDLE_RUNS]]
            self.idle = float(np.mean(few))

    def add(self, draws: Sequence[Parts]) -> None:
        """Simulate one more run for each draw."""
        for parts in draws:
            run = steady_rounds(self.scheme, parts, model_megabytes=self.model)
            self.means.append(float(run.seconds[len(run.seconds) // 5 :].mean()))
            self.computed.append(run.computed)
            self.messages.append(run.messages)

    def line(self) -> Line:
        """Returns the line of the plan that summarises the runs."""
        known = len(self.means) > 1 and bool(np.isfinite(self.means).all())
        assert self.idle is not None
        return Line(
            self.scheme,
            self.idle,
            self.closed is not None,
            float(np.mean(self.means)),
            float(np.std(self.means, ddof=1) / np.sqrt(len(self.means))) if known else float("nan"),
            float(np.mean(self.computed)) / self.scheme.n,
            float(np.mean(self.messages)) * self.model / self.scheme.m,
            int(self.scheme.loads.max()),
        )


def _unsure(samples: Sequence[_Sample]) -> list[_Sample]:
    """Returns the exact schemes that need further runs, because it is not clear yet which of them is the fastest.

    Schemes are compared on the same draws. Populations with permanent differences, such as phones, vary far more than
    rounds do.
    """
    most = len(samples[0].means)
    exact = [
        sample
        for sample in samples
        if sample.scheme.exact and len(sample.means) == most and np.isfinite(sample.means).all()
    ]
    if len(exact) < 2:
        return []
    best = min(exact, key=lambda sample: float(np.mean(sample.means)))
    fastest = float(np.mean(best.means))
    near = [sample for sample in exact if np.mean(sample.means) <= _NEAR * fastest]
    for candidate in near:
        apart = np.subtract(candidate.means, best.means)
        if apart.std(ddof=1) / np.sqrt(most) > _SURE * fastest:
            return [sample for sample in near if sample is not samples[0]]
    return []


def _recommend(lines: Sequence[Line]) -> tuple[Line, str]:
    plain = lines[0]
    exact = [line for line in lines[1:] if line.scheme.exact]
    if not exact:
        return plain, "do not code: no code was compared that any worker may miss."
    coded = [line for line in exact if np.isfinite(line.steady)]
    if not coded:
        return plain, "do not code: more workers never answer than any code that was compared tolerates."
    if not plain.steady:
        return plain, "do not code: a round takes no time as it is."
    fastest = min(coded, key=lambda line: line.steady)
    if np.isfinite(plain.steady) and fastest.steady > (1 - GAIN) * plain.steady:
        change = fastest.steady / plain.steady - 1
        how = (
            f"{change:.0%} longer"
            if change > 0.005
            else f"only {-change:.0%} shorter"
            if change < -0.005
            else "as long"
        )
        return plain, (
            f"do not code: waiting for all takes {seconds_text(plain.steady)} a round, and with the best code "
            f"({fastest.scheme.name}) a round is {how}."
        )
    longest = min((1 + _CLOSE) * fastest.steady, (1 - GAIN) * plain.steady)
    close = [line for line in coded if line.steady <= longest]
    best = min(close, key=lambda line: (line.storage, line.computed, line.steady))
    gain = f"{plain.steady / best.steady:.2f}x faster than" if np.isfinite(plain.steady) else "where nothing else ends:"
    against = f"waiting for all ({seconds_text(plain.steady)})" if np.isfinite(plain.steady) else "some never answer"
    return best, (
        f"code: {best.scheme.name} takes {seconds_text(best.steady)} a round, {gain} {against}; each worker stores "
        f"{best.storage} shards, and {best.computed:.2f} times as much is computed."
    )
