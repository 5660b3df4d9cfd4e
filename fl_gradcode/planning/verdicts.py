"""What a plan says: the scheme to use, how sure measured rounds make that, and whether they all say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .._text import seconds_text
from .scheme_runs import Line
from .uncertainty import block_length, interval_of, resampled_means

__all__ = ["GAIN", "Evidence", "recommend", "weigh"]

#: Coding is recommended if it shortens rounds by at least this fraction. Below that, it is not worth its storage.
GAIN = 0.05
#: A scheme whose rounds are at most this fraction longer than the fastest is preferred if it stores or computes less.
_CLOSE = 0.04
_LIKELY = 1.25  # times faster that a code may yet be, from which on measured rounds do not exclude that it pays
_HALVES, _ENDS = 20, 100  # rounds from which on the halves, and the first and last tenth, are compared
_WORSE, _SURELY = 1.1, 1.03  # times slower than a part's own best scheme that differ, and its interval's lower end
_FEWEST = 5  # measured rounds without which there is no verdict
_LEVEL = 1.25  # times longer that rounds of one half take, from which on that is said


@dataclass(frozen=True)
class Evidence:
    """What measured rounds say of a recommendation.

    Attributes:
        rounds: Number of measured rounds.
        simulated: Number of them that were simulated; the sample is spread over all of them.
        faster: Ends of a 90 % interval of how many times faster the recommended scheme is than waiting for all or, if
            coding is not recommended, the fastest code; None where one of them never ends.
        sure: Whether the interval leaves no doubt about the verdict.
        parts: Sentences about parts of the trace that would get other advice, or that take other times.
        verdict: The verdict, with what the rounds say.
    """

    rounds: int
    simulated: int
    faster: tuple[float, float] | None
    sure: bool
    parts: tuple[str, ...]
    verdict: str


def recommend(lines: Sequence[Line]) -> tuple[Line, str]:
    """Returns the line of the exact scheme to use, the first if none pays, and the verdict in words."""
    plain = lines[0]
    exact = [line for line in lines[1:] if line.scheme.exact]
    if not exact:
        return plain, "do not code: none of the compared codes tolerates a missing worker."
    coded = [line for line in exact if np.isfinite(line.steady)]
    if not coded:
        return plain, "do not code: more workers never answer than any of the compared codes tolerates."
    if not plain.steady:
        return plain, "do not code: a round takes no time as it is."
    fastest = min(coded, key=lambda line: line.steady)
    if np.isfinite(plain.steady) and fastest.steady > (1 - GAIN) * plain.steady:
        change = fastest.steady / plain.steady - 1
        how = (
            f"takes {change:.0%} longer"
            if change > 0.005
            else f"takes only {-change:.0%} less"
            if change < -0.005
            else "is no faster"
        )
        return plain, (
            f"do not code: waiting for all takes {seconds_text(plain.steady)} a round, and the best code "
            f"({fastest.scheme.name}) {how}."
        )
    longest = min((1 + _CLOSE) * fastest.steady, (1 - GAIN) * plain.steady)
    close = [line for line in coded if line.steady <= longest]
    best = min(close, key=lambda line: (line.storage, line.scheme.amplifies, line.computed, line.steady))
    gain = (
        f"{plain.steady / best.steady:.2f}x faster than waiting for all ({seconds_text(plain.steady)})"
        if np.isfinite(plain.steady)
        else "and waiting for all never ends, because some workers never answer"
    )
    return best, (
        f"code: {best.scheme.phrase} takes {seconds_text(best.steady)} a round, {gain}; each worker stores "
        f"{best.storage} shards, and {best.computed:.2f} times as much is computed. {_others_data(best)}"
    )


def _others_data(line: Line) -> str:
    others = line.storage - 1
    whose = (
        "One of them is the raw data of another worker."
        if others == 1
        else f"{others} of them are the raw data of other workers."
    )
    return whose + (" This code amplifies rounding errors." if line.scheme.amplifies else "")


def weigh(
    lines: Sequence[Line], best: Line, verdict: str, seconds: NDArray[np.float64], rounds: int
) -> tuple[list[Line], Evidence]:
    """Returns the lines with their intervals, and what the rounds say of the recommendation.

    Args:
        lines: Lines of the plan; the first is waiting for all.
        best: The recommended line.
        verdict: The verdict without intervals.
        seconds: Seconds of each simulated round, shape (lines, rounds).
        rounds: Number of measured rounds that these stand for.
    """
    rng = np.random.default_rng(0)
    finite = np.isfinite(seconds).all(axis=1) & (seconds.mean(axis=1) > 0)
    simulated = seconds.shape[1]
    place = next(i for i, line in enumerate(lines) if line is best)
    exact = [i for i, line in enumerate(lines) if i and line.scheme.exact and finite[i]]
    other = place or (min(exact, key=lambda i: lines[i].steady) if exact else 0)
    used = [i for i in {0, other} if finite[i]]
    series = [seconds[i] for i in used]
    if len(used) > 1:  # a late job delays other rounds of one scheme than of the other: their ratio needs longer blocks
        series.append(seconds[used[0]] / lines[used[0]].steady - seconds[used[1]] / lines[used[1]].steady)
    length = max(map(block_length, series), default=1)
    blocks = simulated / length
    drawn = resampled_means(np.where(finite[:, None], seconds, 1.0), length, rng)
    result = [
        replace(line, interval=interval_of(line.steady, drawn[i], blocks), error=float(drawn[i].std()))
        if finite[i]
        else line
        for i, line in enumerate(lines)
    ]
    faster, sure, said = None, True, verdict
    if finite[0] and other and finite[other]:
        faster = interval_of(lines[0].steady / lines[other].steady, drawn[0] / drawn[other], blocks)
        low, high = faster
        between = f"between {_times(low)} and {_times(high)} times"
        if place:
            sure = low > 1.0
        else:
            sure = high < _LIKELY
        sure = sure and rounds >= _FEWEST
        if rounds < _FEWEST:
            said = (
                f"cannot tell yet: {_rounds(rounds)} are too few for a verdict, {_FEWEST} are needed. So far, {verdict}"
            )
        elif not sure:
            said = (
                f"cannot tell: by {_rounds(rounds)}, {lines[other].scheme.phrase} is {between} as fast as waiting for "
                f"all. Measure more rounds. So far, {verdict}"
            )
        elif place:
            said = f"{verdict} Over {_rounds(rounds)}, it is {between} faster."
    parts = _parts(lines, best, np.asarray(seconds), finite, rounds)
    return result, Evidence(rounds, simulated, faster, sure, parts, said)


def _rounds(rounds: int) -> str:
    return "one measured round" if rounds == 1 else f"{rounds} measured rounds"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def _parts(
    lines: Sequence[Line], best: Line, seconds: NDArray[np.float64], finite: NDArray[np.bool_], rounds: int
) -> tuple[str, ...]:
    """Returns sentences about parts of the rounds that would get other advice."""
    if not finite[0] or seconds.shape[1] < _HALVES:
        return ()
    simulated = seconds.shape[1]
    halves = {"first half": (0.0, 0.5), "second half": (0.5, 1.0)}
    ends = {"beginning": (0.0, 0.1), "end": (0.9, 1.0)} if simulated >= _ENDS else {}
    said, means = [], {}
    for name, (begin, end) in {**halves, **ends}.items():
        part = seconds[:, round(begin * simulated) : round(end * simulated)]
        means[name] = _mean_and_interval(part[0])
        other = _other_advice(lines, best, part, finite)
        if other is not None:
            where = f"the {name} (rounds {round(begin * rounds) + 1} to {round(end * rounds)})"
            said.append(f'{where} would get "{other}"')
    sentences = []
    one, two = means["first half"], means["second half"]
    if max(one[0], two[0]) >= _LEVEL * min(one[0], two[0]) and (one[2] < two[1] or two[2] < one[1]):
        sentences.append(
            f"The halves differ: waiting for all takes {seconds_text(one[0])} a round in the first half and "
            f"{seconds_text(two[0])} in the second."
        )
    if said:
        sentences.append(f"Parts of the trace differ: {'; '.join(said)}.")
    elif ends:
        sentences.append("The beginning, the end and both halves of the trace get the same advice.")
    return tuple(sentences)


def _mean_and_interval(seconds: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the mean of rounds and the ends of its interval."""
    mean, length = float(seconds.mean()), block_length(seconds)
    drawn = resampled_means(seconds[None], length, np.random.default_rng(0))[0]
    return mean, *interval_of(mean, drawn, len(seconds) / length)


def _other_advice(
    lines: Sequence[Line], best: Line, part: NDArray[np.float64], finite: NDArray[np.bool_]
) -> str | None:
    """Returns the advice for a part of the rounds, in a few words; None if it is the same or hardly better."""
    own_lines = [
        replace(line, steady=float(row.mean()) if known else line.steady)
        for line, row, known in zip(lines, part, finite, strict=True)
    ]
    own, _ = recommend(own_lines)
    at = next(i for i, line in enumerate(own_lines) if line is own)
    usual = next(i for i, line in enumerate(lines) if line is best)
    if at == usual:
        return None
    if not (finite[at] and finite[usual]):
        return None
    # A code that does not pay in this part costs little time, but storage: not coding is other advice there.
    words = "do not code" if at == 0 else f"code: {own.scheme.phrase}"
    length = max(block_length(part[at]), block_length(part[usual]))
    drawn = resampled_means(part[[usual, at, 0]], length, np.random.default_rng(0))
    blocks = part.shape[1] / length
    if at == 0:
        gain = own_lines[0].steady / own_lines[usual].steady
        return words if interval_of(gain, drawn[2] / drawn[0], blocks)[1] < 1 / (1 - GAIN) else None
    ratio = own_lines[usual].steady / own.steady
    surely = interval_of(ratio, drawn[0] / drawn[1], blocks)[0] > _SURELY
    return words if ratio >= _WORSE and surely else None
