"""How the status of a run looks on a terminal, or in a file: heading, warnings, rounds, workers, advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from rich import box
from rich.console import Group, OverflowMethod, RenderableType
from rich.table import Table
from rich.text import Text

from ..runlog import MARKS, Advice, Notice, RoundLine, RunStatus, WorkerLine, number

__all__ = ["TO_PASTE", "draw_all", "draw_status", "heading", "plain", "rounds_table", "told_notice", "told_seconds"]

#: How a line to paste runs over: whoever can prints it whole.
TO_PASTE: OverflowMethod = "fold"
_WORKERS, _LEAST = 16, 4  # lines of the table of workers: at most, and at least if there are so many
_REASONS, _FAILING = 3, 5  # reasons of a worker, and workers whose reasons are listed
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*%#"
_SIGNS = 60  # of the line of waiting times
_HIGH = 5.0  # times the median waiting time: what is above is drawn as high as this
_LONG = 10.0  # times a usual round without another
_NOISY = 10.0  # kappa from which on it is worth telling of an exact round
_ROOM = 13  # signs for the workers that were not in time
_OUTCOMES = ("exact", "approximate", "skipped", "raised", "ended")
_STYLES = {"approximate": "yellow", "skipped": "red", "raised": "bold red", "ended": "yellow"}
_MARK_STYLES = dict(zip(MARKS, ("bold red", "red", "yellow", "yellow", "", "dim"), strict=True))


def draw_status(
    status: RunStatus,
    advice: Advice | None,
    *,
    rounds: int,
    now: float,
    written: float | None,
    others: int,
    ascii_only: bool,
) -> Group:
    """The whole page.

    Args:
        status: Of the run.
        advice: None leaves it out.
        rounds: How many of the last rounds are listed.
        now: Seconds since the epoch.
        written: When the file was last written, if this run was the last to write; for rows that do not say.
        others: How many other runs the file holds.
        ascii_only: Whether the terminal shows no other signs.
    """
    parts: list[RenderableType] = [*heading(status, now=now, written=written, others=others)]
    parts += [told_notice(one) for one in status.notices]
    parts += [Text(), rounds_table(status.rounds[-rounds:]), _waiting(status.rounds, ascii_only=ascii_only), Text()]
    parts += _workers(status)
    if advice is not None:
        parts += [Text(), *_advice(advice)]
    return Group(*parts)


def heading(status: RunStatus, *, now: float, written: float | None, others: int = 0) -> Iterable[Text]:
    """Which run, how far it is, where the time went."""
    code, last = status.code, status.last
    size = f"n={code.get('n')} workers, k={code.get('k')} shards, s={code.get('s')}"
    m = f", m={code['m']}" if (number(code.get("m")) or 1) > 1 else ""
    more = f"  ({others} other run{'s' * (others > 1)} in this file: --run all)" if others else ""
    yield Text(f"Run {plain(status.run)}{more}", style="bold")
    yield Text(f"{plain(str(code.get('name') or 'a code without a name'))}, {size}{m}; sends {status.sending}")
    counts = ", ".join(f"{count} {plain(name)}" for name, count in _counted(status.outcomes))
    done = f"{len(status.rounds)} round{'s' * (len(status.rounds) > 1)}"
    yield Text(f"{done}: {counts}; the last, round {last.round}, {_ago(status, now, written)}")
    yield from _stands(status, now, written)
    known = {part: spent for part, spent in status.seconds.items() if spent is not None}
    whole = sum(known.values())
    split = ", ".join(f"{part} {spent / whole:.1%}" for part, spent in known.items()) if whole else "no times"
    clock = " on a virtual clock" if status.virtual else ""
    yield Text(f"{told_seconds(whole)}{clock} in all: {split}")
    told = f"{_bytes(status.bytes_down)} down, {_bytes(status.bytes_up)} up"
    if status.privacy is not None:
        spent, delta = number(status.privacy.get("epsilon")), number(status.privacy.get("delta"))
        told += (
            f"; privacy of a {status.privacy.get('unit')} so far: epsilon {'?' if spent is None else f'{spent:.3g}'}"
        )
        told += "" if delta is None else f", delta {delta:g}"
    yield Text(plain(told))


def told_notice(notice: Notice) -> Text:
    """One warning."""
    return Text(f"! {plain(notice.text)}", style="bold red")


def rounds_table(rounds: Sequence[RoundLine], *, header: bool = True) -> Table:
    """A line a round; with the same widths whichever rounds they are, so that lines can follow one by one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=header, show_edge=False)
    widths = {"round": 6, "outcome": 11, "waited": 7, "decodable after": 15, "used": 8}
    for name, width in widths.items():
        table.add_column(name, justify="left" if name == "outcome" else "right", width=width, no_wrap=True)
    table.add_column("not in time", width=_ROOM, no_wrap=True)
    table.add_column("", min_width=9, max_width=30)
    for one in rounds:
        after = "-" if one.replies is None else f"{one.replies} in {_short(one.after)}"
        table.add_row(
            str(one.round),
            Text(plain(one.outcome), style=_STYLES.get(one.outcome, "")),
            _short(one.waiting),
            after,
            f"{one.used}/{'?' if one.workers is None else one.workers}",
            _few(one.stragglers),
            Text(plain("; ".join(_remarks(one)))),
        )
    return table


def _remarks(one: RoundLine) -> Iterable[str]:
    if one.resumed:
        yield "resumed"
    if one.outcome == "approximate" and one.error is not None:
        yield f"error {one.error:.2g}"
    if one.kappa is not None and one.kappa > (_NOISY if one.outcome == "exact" else 1.0 + 1e-9):
        yield f"kappa {one.kappa:.3g}"
    if one.outcome in ("skipped", "raised") and one.ended:
        yield one.ended
    if one.evaluation not in (None, "exact", one.outcome):
        yield f"evaluation {one.evaluation}"
    yield from one.events


def _waiting(rounds: Sequence[RoundLine], *, ascii_only: bool) -> Text:
    """Waiting seconds of the whole run in one line."""
    known = [(one.waiting, one.round) for one in rounds if one.waiting is not None]
    if not known:
        return Text("waited: not known")
    times = [seconds for seconds, _ in known]
    middle, (longest, where) = median(times), max(known)
    top = min(longest, _HIGH * middle) or longest or 1.0
    each = -(-len(times) // _SIGNS)
    bars = _PLAIN_BARS if ascii_only else _BARS
    heights = [max(times[i : i + each]) for i in range(0, len(times), each)]
    drawn = "".join(bars[min(7, int(8 * height / top))] for height in heights)
    most = f", the longest of each {each} rounds" if each > 1 else ""
    return Text(f"waited {drawn}\n       median {_short(middle)}, longest {_short(longest)} in round {where}{most}")


def _workers(status: RunStatus) -> Iterable[RenderableType]:
    lines = list(status.workers)
    if not lines:
        yield Text("The rows say nothing of the workers: an older version wrote them.")
        return
    shown = lines[:_WORKERS]
    if len(lines) > _WORKERS:
        marked = [one for one in shown if one.mark]
        shown = marked if len(marked) >= _LEAST else shown[:_LEAST]
    rows = status.looked_at
    table = Table(
        title=f"Workers, in the last {rows} rounds" if rows > 1 else "Workers, in one round", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, title_style="",
    )  # fmt: skip
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
            _short(one.seconds),
            "-" if one.computing is None else f"{one.computing:.0%}",
            "-" if one.slower is None else f"{one.slower:.2f}x",
            "never" if one.heard is None else str(one.heard),
            Text(plain(": ".join(filter(None, (one.mark, one.note)))), style=_MARK_STYLES[one.mark]),
        )
    yield table
    left = Counter(one.mark for one in lines[len(shown) :])
    told = [f"{left[mark]} more {mark or 'as expected'}" for mark in MARKS if left[mark]]
    if told:
        yield Text(f"and {', '.join(told)}")
    failing = [one for one in lines if one.reasons]
    for one in failing[:_FAILING]:
        reasons = [f"{count} x {plain(reason)}" for reason, count in one.reasons[:_REASONS]]
        more = f"; and {len(one.reasons) - _REASONS} other reasons" if len(one.reasons) > _REASONS else ""
        who = _name(one) if one.worker is None else f"worker {one.worker}"
        yield Text(f"{who} failed: {'; '.join(reasons)}{more}")
    if len(failing) > _FAILING:
        yield Text(f"and {len(failing) - _FAILING} more failed: --json has their reasons")


def _advice(advice: Advice) -> Iterable[Text]:
    if advice.python:
        yield Text(f"Recommended, by the times of the last {advice.rounds} rounds:")
    yield Text(plain(advice.verdict[0].upper() + advice.verdict[1:]))
    if not advice.python:
        return
    if advice.own and "order=" not in advice.python:
        yield Text("This run does that already.")
        return
    if advice.own:
        yield Text("This run does that already, if its slow workers are spread over the groups like this:")
    elif advice.own_seconds is not None:
        yield Text(f"By the same times, this run's own scheme takes {_short(advice.own_seconds)} a round.")
    yield Text()
    yield Text(f"    {advice.python}", overflow=TO_PASTE)


def draw_all(statuses: Sequence[RunStatus], *, now: float) -> Table:
    """A line for each run of a file."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("run", "code", "rounds", "exact", "median wait", "in all", "last round"):
        table.add_column(name, justify="left" if name in ("run", "code") else "right", no_wrap=True)
    for one in statuses:
        code = one.code
        times = [line.waiting for line in one.rounds if line.waiting is not None]
        table.add_row(
            Text(plain(one.run)),
            Text(f"{plain(str(code.get('name')))} {code.get('n')}, s={code.get('s')}"),
            str(len(one.rounds)),
            str(one.outcomes.get("exact", 0)),
            _short(median(times) if times else None),
            told_seconds(sum(spent for spent in one.seconds.values() if spent is not None)),
            _ago(one, now, None),
        )
    return table


def _ended(status: RunStatus, written: float | None) -> float | None:
    """When the last round ended, as its row says, or else the file."""
    return status.last.ended_at if status.last.ended_at is not None else written


def _ago(status: RunStatus, now: float, written: float | None) -> str:
    ended = _ended(status, written)
    return "not known when" if ended is None else f"{told_seconds(round(max(0.0, now - ended)))} ago"


def _stands(status: RunStatus, now: float, written: float | None) -> Iterable[Text]:
    """That no round has ended for long."""
    ended, usual = _ended(status, written), median([sum(one.seconds) for one in status.rounds])
    if ended is not None and not status.last.raised and not status.virtual and now - ended > max(60.0, _LONG * usual):
        yield Text(f"Rounds take {told_seconds(usual)}: the run is over, or it hangs.", style="yellow")


def _counted(outcomes: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    names = [*_OUTCOMES, *sorted(set(outcomes) - set(_OUTCOMES))]
    return [(name, outcomes[name]) for name in names if outcomes.get(name)]


def _name(one: WorkerLine) -> str:
    return str(one.worker) if one.worker is not None else f"node {plain(one.node or '?')}"


def _few(workers: Sequence[int], room: int = _ROOM) -> str:
    told = " ".join(map(str, workers))
    if len(told) <= room:
        return told
    kept = told[: room - 5].rsplit(" ", 1)[0]
    return f"{kept} +{len(workers) - len(kept.split())}"


def _short(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms" if seconds >= 0.001 else "< 1 ms"
    if seconds < 999.5:
        return f"{seconds:.3g} s"
    return f"{seconds:.0f} s" if seconds < 36_000 else f"{seconds / 3600:.3g} h"


def told_seconds(seconds: float) -> str:
    """For people."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    for unit, size, smaller, step in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // step)} {smaller}"
    raise AssertionError(seconds)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def plain(text: str) -> str:
    """Text that others wrote, without anything that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
