"""The status of a run as text for a terminal or a file: heading, notices, rounds, workers, advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Group, OverflowMethod, RenderableType
from rich.table import Table
from rich.text import Text

from .._text import duration_text, seconds_text
from ..runlog import MARKS, Notice, RoundLine, RunStatus, WorkerLine
from ._output import plain_table

if TYPE_CHECKING:
    from ..runlog import Advice

__all__ = ["TO_PASTE", "draw_all", "draw_status", "heading", "remarks", "rounds_table", "told_notice"]

#: Overflow of a line to paste. Such a line is printed without breaks where that is possible.
TO_PASTE: OverflowMethod = "fold"
_WORKERS, _LEAST = 16, 4  # most lines of the table of workers; least, if there are so many workers
_REASONS, _FAILING = 3, 5  # kinds of failures that are listed for a worker, and workers for which they are
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*%#"
_SIGNS = 60  # width of the line of waiting times
_HIGH = 5.0  # times the median waiting time: longer waits are drawn as high as this
_LONG = 10.0  # times a usual round: if no round ends for longer, the page says so
_NOISY = 10.0  # kappa above which it is shown for an exact round
_ROOM = 13  # width of the column of workers that were not in time
_OUTCOMES = ("exact", "stale", "approximate", "skipped", "raised", "ended")
_STYLES = {"approximate": "yellow", "skipped": "red", "raised": "bold red", "ended": "yellow"}
_MARK_STYLES = dict(zip(MARKS, ("bold red", "red", "yellow", "yellow", "", "dim"), strict=True))


def draw_status(
    status: RunStatus,
    advice: Advice | None,
    *,
    rounds: int,
    now: float,
    others: int,
    ascii_only: bool,
) -> Group:
    """Returns the whole page.

    Args:
        status: Status of the run.
        advice: The planner's advice; None leaves it out.
        rounds: Number of last rounds to list.
        now: Seconds since the epoch.
        others: Number of other runs in the file.
        ascii_only: Whether the terminal can show ASCII only.
    """
    parts: list[RenderableType] = [*heading(status, now=now, others=others)]
    parts += [told_notice(one) for one in status.notices]
    parts += [Text(), rounds_table(status.rounds[-rounds:]), _waiting(status.rounds, ascii_only=ascii_only), Text()]
    parts += _workers(status)
    if advice is not None:
        parts += [Text(), *_advice(advice)]
    return Group(*parts)


def heading(status: RunStatus, *, now: float, others: int = 0, since: bool = True) -> Iterator[Text]:
    """Yields lines that say which run it is, how far it is, and where its time went.

    Args:
        status: Status of the run.
        now: Seconds since the epoch.
        others: Number of other runs in the file.
        since: Whether to say how long ago the last round was.
    """
    code, last = status.code, status.last
    size = f"n={code.n} workers, k={code.k} shards, s={code.s}"
    m = f", m={code.m}" if code.m > 1 else ""
    more = f"  ({others} other run{'s' * (others > 1)} in this file: --run all)" if others else ""
    yield Text(f"Run {_plain(status.run)}{more}", style="bold")
    yield Text(f"{_plain(code.name)}, {size}{m}; sends {status.sending}")
    counts = ", ".join(f"{count} {name}" for name, count in _counted(status.outcomes))
    done = f"{len(status.rounds)} round{'s' * (len(status.rounds) > 1)}"
    yield Text(f"{done}: {counts}" + (f"; the last, round {last.round}, {_ago(status, now)}" if since else ""))
    yield from _stands(status, now)
    if len(status.ages) > 1:
        oldest = f"{len(status.ages) - 1} round{'s' * (len(status.ages) > 2)}"
        yield Text(f"Updates that were used are up to {oldest} old, {mean_age(status.ages):.2g} on average")
    known = {part: spent for part, spent in status.seconds.items() if spent is not None}
    whole = sum(known.values())
    split = ", ".join(f"{part} {spent / whole:.1%}" for part, spent in known.items()) if whole else "no times"
    clock = " on a virtual clock" if status.virtual else ""
    yield Text(f"{duration_text(whole)}{clock} in all: {split}")
    told = f"{_bytes(status.bytes_down)} down, {_bytes(status.bytes_up)} up"
    if status.privacy is not None:
        spent = "?" if status.privacy.epsilon is None else f"{status.privacy.epsilon:.3g}"
        told += f"; privacy of a {_plain(status.privacy.unit)} so far: epsilon {spent}, delta {status.privacy.delta:g}"
    yield Text(told)


def told_notice(notice: Notice) -> Text:
    """Returns the line of a notice."""
    return Text(f"! {_plain(notice.text)}", style="bold red")


def rounds_table(rounds: Sequence[RoundLine], *, header: bool = True) -> Table:
    """Returns a table with a line for each round. Its widths are fixed, so that further lines can be appended."""
    table = plain_table(header=header)
    widths = {"round": 6, "outcome": 11, "waited": 7, "decodable after": 15, "used": 8}
    for name, width in widths.items():
        table.add_column(name, justify="left" if name == "outcome" else "right", width=width, no_wrap=True)
    table.add_column("not in time", width=_ROOM, no_wrap=True)
    table.add_column("", min_width=9, max_width=30)
    for one in rounds:
        after = "-" if one.replies is None else f"{one.replies} in {seconds_text(one.after)}"
        table.add_row(
            str(one.round),
            Text(_plain(one.outcome), style=_STYLES.get(one.outcome, "")),
            seconds_text(one.waiting),
            after,
            f"{one.used}/{'?' if one.workers is None else one.workers}",
            _few(one.stragglers),
            Text(_plain("; ".join(remarks(one)))),
        )
    return table


def mean_age(ages: Sequence[int]) -> float:
    """Returns the mean of ages, of the number of updates of each age from 0."""
    return sum(age * count for age, count in enumerate(ages)) / sum(ages)


def remarks(one: RoundLine) -> Iterator[str]:
    """Yields what else there is to say about a round, in words."""
    if one.resumed:
        yield "resumed"
    if one.outcome == "approximate" and one.error is not None:
        yield f"error {one.error:.2g}"
    if one.outcome == "stale":
        yield f"mean age {mean_age(one.ages):.2g}, oldest {len(one.ages) - 1}"
    if one.kappa is not None and one.kappa > (_NOISY if one.outcome == "exact" else 1.0 + 1e-9):
        yield f"kappa {one.kappa:.3g}"
    if one.outcome in ("skipped", "raised") and one.ended:
        yield one.ended
    if one.evaluation not in (None, "exact", one.outcome):
        yield f"evaluation {one.evaluation}"
    yield from one.events


def _waiting(rounds: Sequence[RoundLine], *, ascii_only: bool) -> Text:
    """Returns the waiting seconds of the whole run as a line of bars, with the median and the longest."""
    known = [(one.waiting, one.round) for one in rounds if one.waiting is not None]
    if not known:
        return Text("waited: no round has waited yet")
    times = [seconds for seconds, _ in known]
    middle, (longest, where) = median(times), max(known)
    top = min(longest, _HIGH * middle) or longest or 1.0
    each = -(-len(times) // _SIGNS)
    bars = _PLAIN_BARS if ascii_only else _BARS
    heights = [max(times[i : i + each]) for i in range(0, len(times), each)]
    drawn = "".join(bars[min(7, int(8 * height / top))] for height in heights)
    most = f", the longest of each {each} rounds" if each > 1 else ""
    return Text(
        f"waited {drawn}\n       median {seconds_text(middle)}, longest {seconds_text(longest)} in round {where}{most}"
    )


def _workers(status: RunStatus) -> Iterator[RenderableType]:
    lines = list(status.workers)
    if not lines:
        yield Text("No worker was asked in these rounds.")
        return
    shown = lines[:_WORKERS]
    if len(lines) > _WORKERS:
        marked = [one for one in shown if one.mark]
        shown = marked if len(marked) >= _LEAST else shown[:_LEAST]
    rows = status.looked_at
    table = plain_table(title=f"Workers, in the last {rows} rounds" if rows > 1 else "Workers, in one round")
    table.add_column("worker", justify="right", no_wrap=True, max_width=22)
    for name in ("in time", "late", "failed", "job", "computing", "x median", "heard in"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", max_width=44)
    for one in shown:
        table.add_row(
            Text(_name(one)),
            f"{one.in_time}/{one.rounds}",
            str(one.late),
            str(one.failed),
            seconds_text(one.seconds),
            "-" if one.computing is None else f"{one.computing:.0%}",
            "-" if one.slower is None else f"{one.slower:.2f}x",
            "never" if one.heard is None else str(one.heard),
            Text(_plain(": ".join(filter(None, (one.mark, one.note)))), style=_MARK_STYLES[one.mark]),
        )
    yield table
    left = Counter(one.mark for one in lines[len(shown) :])
    told = [f"{left[mark]} more {mark or 'as expected'}" for mark in MARKS if left[mark]]
    if told:
        yield Text(f"and {', '.join(told)}")
    failing = [one for one in lines if one.reasons]
    for one in failing[:_FAILING]:
        reasons = [f"{failure.rounds} x {_plain(failure.reason)}" for failure in one.reasons[:_REASONS]]
        more = f"; and {len(one.reasons) - _REASONS} other kinds" if len(one.reasons) > _REASONS else ""
        who = _name(one) if one.worker is None else f"worker {one.worker}"
        yield Text(f"{who} failed: {'; '.join(reasons)}{more}")
    if len(failing) > _FAILING:
        yield Text(f"and {len(failing) - _FAILING} more failed: --json has their reasons")


def _advice(advice: Advice) -> Iterator[Text]:
    if advice.python:
        yield Text(f"Recommended by the times of the last {advice.rounds} rounds:")
    yield Text(_plain(advice.verdict[0].upper() + advice.verdict[1:]))
    for note in advice.notes:
        yield Text(note)
    if not advice.python:
        return
    if advice.own and "order=" not in advice.python:
        yield Text("This run already does that.")
        return
    if advice.own:
        yield Text("This run already does that, if its slow workers are spread over the groups like this:")
    elif advice.own_seconds is not None:
        yield Text(f"By the same times, this run's own scheme takes {seconds_text(advice.own_seconds)} a round.")
    yield Text()
    yield Text(f"    {advice.python}", overflow=TO_PASTE)


def draw_all(statuses: Sequence[RunStatus], *, now: float) -> Table:
    """Returns a table with a line for each run of a file."""
    table = plain_table()
    for name in ("run", "code", "rounds", "exact", "median wait", "in all", "last round"):
        table.add_column(name, justify="left" if name in ("run", "code") else "right", no_wrap=True)
    for one in statuses:
        code = one.code
        times = [line.waiting for line in one.rounds if line.waiting is not None]
        table.add_row(
            Text(_plain(one.run)),
            Text(f"{_plain(code.name)} {code.n}, s={code.s}"),
            str(len(one.rounds)),
            str(one.outcomes.get("exact", 0)),
            seconds_text(median(times) if times else None),
            duration_text(sum(spent for spent in one.seconds.values() if spent is not None)),
            _ago(one, now),
        )
    return table


def _ago(status: RunStatus, now: float) -> str:
    ended = status.last.ended_at
    return "end not known" if ended is None else f"{duration_text(round(max(0.0, now - ended)))} ago"


def _stands(status: RunStatus, now: float) -> Iterator[Text]:
    """Yields a line if no round has ended for much longer than a round takes."""
    ended, usual = status.last.ended_at, median([sum(one.seconds) for one in status.rounds])
    if ended is not None and not status.last.raised and not status.virtual and now - ended > max(60.0, _LONG * usual):
        yield Text(f"Rounds take {duration_text(usual)}: the run is over, or it hangs.", style="yellow")


def _counted(outcomes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    return ((name, outcomes[name]) for name in _OUTCOMES if name in outcomes)


def _name(one: WorkerLine) -> str:
    return str(one.worker) if one.worker is not None else f"node {_plain(one.node or '?')}"


def _few(workers: Sequence[int], room: int = _ROOM) -> str:
    told = " ".join(map(str, workers))
    if len(told) <= room:
        return told
    kept = told[: room - 5].rsplit(" ", 1)[0]
    return f"{kept} +{len(workers) - len(kept.split())}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _plain(text: str) -> str:
    """Returns a text from the ledger without control characters, which a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
