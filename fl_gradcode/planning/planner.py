"""Plans whether coding pays: expected round times and costs of every scheme, and one recommendation.

    plan = make_plan(named("virtual-machines"), n=30)
    print(plan.verdict)
    print(plan.recommended.scheme.python)

The recommendation is based on the steady state of a run. The time from an idle start is shown beside it, in closed form
if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..codes import check_count, fractional_repetition
from ..errors import InvalidSetting
from ..latency import Latency, Parts
from ..staleness import StalenessRule
from .compute_share import SHARES, ShareRange, at_shares, range_of
from .job_times import LEARNED
from .scheme_runs import Line, SchemeRuns
from .schemes import Scheme, any_code, drop_slowest, over_selection, partial_work, repetition, wait_for_all
from .stale_rounds import StaleRounds, stale_means
from .verdicts import GAIN, Evidence, recommend, weigh

__all__ = ["GAIN", "Line", "RoundPlan", "candidates", "make_plan", "spread"]

# Schemes within 15 % of the fastest get further runs, up to 8 times as many, until their differences are known to 1 %.
_NEAR, _SURE, _MORE = 1.15, 0.01, 8
# Of measured rounds, so many jobs are simulated, in a number of rounds between two bounds, in blocks over all of them.
_JOBS, _SIMULATED, _BLOCK, _BLOCKS = 20_000, (200, 4_000), 20, 100
_STALE_RUNS = 8  # runs with which bounded staleness is simulated
_STALENESS = StalenessRule(3, 0.6, 0.03)  # what `Shards(staleness=3)` sets
_SHARE_RUNS = 8  # runs with which other shares of compute are tried
_TOLERANCES = (1, 2, 3, 4, 5, 7)
#: A worker this many times slower than the median one, in every draw of the population, counts as permanently slow.
_SLOW = 1.5


@dataclass(frozen=True)
class RoundPlan:
    """The comparison of all schemes, and the recommendation.

    Attributes:
        lines: One line for each scheme; the first is waiting for all.
        recommended: The line of the exact scheme to use; the first line if coding does not pay.
        verdict: What to do, in words: it starts with "code", "do not code" or, if measured rounds are too few or too
            different, "cannot tell".
        n: Number of workers.
        slow: Workers that are permanently slow, slowest first.
        evidence: What measured rounds say of the recommendation; None for a law.
        shares: Shares of compute for which the recommendation holds; None if that was not asked, or is not so at the
            share itself.
        stale: What bounded staleness would do to the fastest scheme with one shard a message, which is never
            recommended by itself, since its rounds are not exact; None if no such scheme was compared.
    """

    lines: tuple[Line, ...]
    recommended: Line
    verdict: str
    n: int
    slow: tuple[int, ...]
    evidence: Evidence | None = None
    shares: ShareRange | None = None
    stale: StaleRounds | None = None

    @property
    def codes(self) -> bool:
        """Whether coding is recommended."""
        return self.recommended is not self.lines[0]

    @property
    def headline(self) -> str:
        """The first statement of the verdict, without costs and doubts."""
        first = self.verdict.split(";")[0].split(". ")[0].rstrip(".")
        return first[0].upper() + first[1:]

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
    besides: Sequence[Scheme] = (),
    share: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RoundPlan:
    """Returns the plan that compares schemes for n workers under a latency.

    Args:
        latency: Latency of one job; see `Latency`, `populations.named` and `History.latency`.
        n: Number of workers, at least 2; each has one shard of its own.
        model_megabytes: Size of the model, which each message carries to a worker; a reply carries 1/m of it back.
        tolerances: Values of s to try; by default a few up to n / 3.
        rounds: Number of rounds of each simulated run; the first fifth is ignored, because a run has to settle first.
        populations: Number of runs, each with its own random population of devices and slow periods. If the latency
            replays measured rounds, one run through all of them is simulated instead or, of very many, through a sample
            of blocks of rounds that is spread over all of them.
        seed: Seed of the first population.
        schemes: Schemes to compare; by default `candidates`.
        besides: Schemes to compare besides.
        share: Share of a one-shard job that grows with the shards. If given, the plan says for which other shares the
            recommendation would hold, see `RoundPlan.shares`.
        progress: Called after each scheme with the number of schemes that are done, and of all.

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
    for scheme in (*(schemes or ()), *besides):
        if scheme.n != n:
            raise InvalidSetting(f"The scheme {scheme.name!r} is for {scheme.n} workers; planned is for n={n}.")
    measured = latency.measured_rounds
    first = rounds // 5
    if measured is not None:
        every = latency.parts(seed=seed, n=n, rounds=measured)
        order, first, passes = _rounds_to_simulate(measured, n)
        slow = _permanently_slow([every], model_megabytes)
        draws = [Parts(every.fixed[order], every.compute[order], every.transfer[order])]
    else:
        draws = [latency.parts(seed=seed + number, n=n, rounds=rounds) for number in range(populations)]
        if populations > 1 and _equal(*draws[:2]):  # measured times are replayed, so that all draws are equal
            draws = [latency.parts(seed=seed, n=n, rounds=rounds * populations)]
            first = rounds * populations // 5
        slow = _permanently_slow(draws, model_megabytes)
    chosen = schemes if schemes is not None else candidates(n, tolerances, slow=slow, m=bool(model_megabytes))
    chosen = [wait_for_all(n), *(scheme for scheme in (*chosen, *besides) if scheme.enough != n or scheme.s)]
    samples: list[SchemeRuns] = []
    for scheme in chosen:
        samples.append(SchemeRuns(scheme, latency, draws, model_megabytes, first=first))
        if progress is not None:
            progress(len(samples), len(chosen))
    while len(draws) > 1 and len(samples[0].means) < _MORE * populations:
        unsure = _unsure(samples)
        if not unsure:
            break
        begin = seed + len(samples[0].means)
        more = [latency.parts(seed=begin + number, n=n, rounds=rounds) for number in range(populations)]
        for sample in [samples[0], *unsure]:
            sample.add(more)
    lines = [sample.line() for sample in samples]
    recommended, verdict = recommend(lines)
    place = next(i for i, line in enumerate(lines) if line is recommended)
    evidence = None
    if measured is not None:
        seconds = np.stack([sample.seconds.reshape(passes, -1).mean(axis=0) for sample in samples])
        lines, evidence = weigh(lines, recommended, verdict, seconds, measured)
        verdict = evidence.verdict
    shares = None if share is None else _shares(share, samples, lines, place, draws[:_SHARE_RUNS], first)
    stale = _stale(samples, lines, draws[:_STALE_RUNS], first, model_megabytes)
    return RoundPlan(tuple(lines), lines[place], verdict, n, slow, evidence, shares, stale)


def _stale(
    samples: Sequence[SchemeRuns], lines: Sequence[Line], draws: Sequence[Parts], first: int, megabytes: float
) -> StaleRounds | None:
    """Returns the rounds with bounded staleness of the fastest scheme with one shard a message and patience."""
    known = [(line.steady, i) for i, line in enumerate(lines) if line.scheme.shardwise and line.scheme.patience]
    if not known or not np.isfinite(min(known)[0]):
        return None
    sample = samples[min(known)[1]]
    exact = float(np.mean(sample.means[: len(draws)]))
    return stale_means(sample.scheme, draws, _STALENESS, exact, first=first, model_megabytes=megabytes)


def _rounds_to_simulate(measured: int, n: int) -> tuple[NDArray[np.int64], int, int]:
    """Returns the measured rounds to simulate, how many of them come first to let the run settle, and the passes.

    Few rounds are passed through several times: which late jobs a round finds depends on where the run began.
    """
    most, passes = int(np.clip(_JOBS // n, *_SIMULATED)), 1
    length = max(_BLOCK, most // _BLOCKS)
    if measured > most + length:
        blocks = most // length  # each from the middle of its part of the rounds
        starts = ((np.arange(blocks) + 0.5) * measured / blocks - length / 2).astype(np.int64)
        order = (starts[:, None] + np.arange(length)).ravel()
    else:
        passes = max(1, _SIMULATED[0] // measured)
        order = np.tile(np.arange(measured), passes)
    settle = min(measured, max(10, min(50, measured // 5)))
    return np.concatenate([np.arange(settle), order]), settle, passes


def _shares(
    share: float, samples: Sequence[SchemeRuns], lines: Sequence[Line], place: int, draws: Sequence[Parts], first: int
) -> ShareRange | None:
    """Returns the shares of compute for which the recommended line, at `place`, is the right one."""
    same = [np.full(len(SHARES), np.mean(sample.means[: len(draws)])) for sample in samples]
    times = [
        at_shares(sample.scheme, draws, first, sample.message)
        if not sample.scheme.shardwise and sample.scheme.exact and sample.scheme.s
        else known
        for sample, known in zip(samples, same, strict=True)
    ]
    holds, instead = [], []
    for at in range(len(SHARES)):
        there = [replace(line, steady=float(seconds[at])) for line, seconds in zip(lines, times, strict=True)]
        best, _ = recommend(there)
        exact = [line.steady for line in there[1:] if line.scheme.exact]
        gains = there[place].steady <= (1 - GAIN) * there[0].steady
        close = bool(exact) and there[place].steady <= (1 + GAIN) * min(exact)
        holds.append(best is there[place] or (place > 0 and gains and close))
        instead.append("do not code" if best is there[0] else f"code: {best.scheme.phrase}")
    return range_of(share, holds, instead)


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
        result += [partial_work(n, s, patience=0.0, order=order), partial_work(n, s, patience=LEARNED, order=order)]
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


def _unsure(samples: Sequence[SchemeRuns]) -> list[SchemeRuns]:
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
