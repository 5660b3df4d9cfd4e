"""The status of a run as one self-contained HTML page: no script from elsewhere, no font, no image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from statistics import median
from typing import TYPE_CHECKING

from .._text import duration_text, printable, seconds_text
from ..runlog import RoundLine, RunStatus, WorkerLine
from .status_page import heading, remarks

if TYPE_CHECKING:
    from ..runlog import Advice

__all__ = ["status_html"]

_BARS = 240  # most bars of the picture; each stands for several rounds if there are more
_HIGH = 5.0  # times the median waiting time: longer waits are drawn as high as this
_WORKERS = 500  # most lines of the table of workers
_TEXT = 400  # most characters of a text that comes from clients
_COLOURS = {"exact": "ok", "approximate": "warn", "skipped": "bad", "raised": "bad", "ended": "warn"}

_STYLE = """
:root{--bg:#fff;--fg:#1c1f23;--dim:#5d6570;--line:#e2e5e9;--card:#f6f7f9;--ok:#1f7a4d;--warn:#8a6100;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e6e8eb;--dim:#9aa3ad;--line:#2c3239;--card:#1d2126;
--ok:#5ec894;--warn:#e0b34c;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.25rem;margin:0;overflow-wrap:anywhere}h2{font-size:1rem;margin:1.6rem 0 .4rem}
p{margin:.2rem 0}.dim{color:var(--dim)}.ok{color:var(--ok)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.notice{border-left:4px solid var(--bad);background:var(--card);padding:.5rem .7rem;margin:.5rem 0;
overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;margin:1rem 0}
.card{background:var(--card);border-radius:6px;padding:.6rem .7rem}
.card b{display:block;font-size:1.2rem}.card span{color:var(--dim);font-size:.85rem}
svg{width:100%;height:7rem;display:block;background:var(--card);border-radius:6px}
svg .ok{fill:var(--ok)}svg .warn{fill:var(--warn)}svg .bad{fill:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:500}td.text,th.text{text-align:left}td.free{white-space:normal;min-width:10rem}
pre{background:var(--card);border-radius:6px;padding:.6rem .7rem;overflow-x:auto}
""".strip()

#: Says how long ago the last round was, from second to second.
_SCRIPT = """
const e=document.querySelector('time');if(e){const t=+e.dataset.at*1000,f=()=>{const s=Math.max(0,(Date.now()-t)/1000);
e.textContent=s<120?Math.round(s)+' s ago':s<7200?Math.round(s/60)+' min ago':Math.round(s/3600)+' h ago'};
f();setInterval(f,1000)}
""".strip()


def status_html(
    status: RunStatus, advice: Advice | None, *, rounds: int, now: float, refresh: float | None = None
) -> str:
    """Returns the page.

    Args:
        status: Status of the run.
        advice: The planner's advice; None leaves it out.
        rounds: Number of last rounds to list.
        now: Seconds since the epoch.
        refresh: Seconds after which a browser loads the page again; None: never.
    """
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{max(1, round(refresh))}">'
    name = _text(status.run)
    parts = [*_heading(status, now), *_notices(status), *_cards(status), *_picture(status.rounds)]
    parts += [*_workers(status), *_advice(advice), *_rounds(status.rounds[-rounds:])]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{again}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Round {status.last.round} of {name}</title>\n<style>{_STYLE}</style></head><body>\n{body}\n"
        f"<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _text(text: str) -> str:
    """Returns a text for HTML. What comes from clients is cut and has no control characters."""
    return escape(printable(text, _TEXT))


def _heading(status: RunStatus, now: float) -> Iterator[str]:
    first, *rest = (line.plain for line in heading(status, now=now, since=False))
    yield f"<h1>{_text(first)}</h1>"
    ended = status.last.ended_at
    if ended is not None:
        when = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        yield f'<p class="dim">Last round: <time data-at="{ended:.0f}">{when}</time></p>'
    for line in rest:
        yield f'<p class="dim">{_text(line)}</p>'


def _notices(status: RunStatus) -> Iterator[str]:
    for notice in status.notices:
        yield f'<p class="notice">{_text(notice.text)}</p>'


def _cards(status: RunStatus) -> Iterator[str]:
    times = [one.waiting for one in status.rounds if one.waiting is not None]
    exact, done = status.outcomes.get("exact", 0), len(status.rounds)
    marked = sum(1 for one in status.workers if one.mark not in ("", "failed"))
    whole = sum(spent for spent in status.seconds.values() if spent is not None)
    cards = [
        (str(status.last.round), "last round", ""),
        (f"{exact} of {done}", "rounds exact", "ok" if exact == done else "bad"),
        (seconds_text(median(times) if times else None), "median wait", ""),
        (duration_text(whole), "in all" + (", on a virtual clock" if status.virtual else ""), ""),
        (f"{marked} of {len(status.workers)}", "workers slow, silent or failing", "warn" if marked else "ok"),
    ]
    if status.privacy is not None and status.privacy.epsilon is not None:
        cards.append((f"{status.privacy.epsilon:.3g}", f"epsilon of a {_text(status.privacy.unit)}", ""))
    told = "".join(
        f'<div class="card"><b class="{kind}">{one}</b><span>{what}</span></div>' for one, what, kind in cards
    )
    yield f'<div class="cards">{told}</div>'


def _picture(rounds: Sequence[RoundLine]) -> Iterator[str]:
    """Yields the waiting seconds of the whole run as bars, in the colour of the worst outcome."""
    known = [one for one in rounds if one.waiting is not None]
    if not known:
        return
    middle, longest = median(one.waiting or 0.0 for one in known), max(known, key=lambda one: one.waiting or 0.0)
    top = min(longest.waiting or 0.0, _HIGH * middle) or longest.waiting or 1.0
    each = -(-len(known) // _BARS)
    bars, severity = [], ("", "ok", "warn", "bad")
    groups = [known[i : i + each] for i in range(0, len(known), each)]
    width = 1000 / max(len(groups), 30)
    for place, group in enumerate(groups):
        wait = max(one.waiting or 0.0 for one in group)
        high = max(2.0, 100 * min(1.0, wait / top))
        kind = max((_COLOURS.get(one.outcome, "ok") for one in group), key=severity.index)
        numbers = f"Round {group[0].round}" if each == 1 else f"Rounds {group[0].round} to {group[-1].round}"
        bars.append(
            f'<rect class="{kind}" x="{place * width:.1f}" y="{100 - high:.1f}" width="{width * 0.8:.1f}" '
            f'height="{high:.1f}"><title>{numbers}: {seconds_text(wait)}, {_text(group[-1].outcome)}</title></rect>'
        )
    most = f"; a bar is the longest of {each} rounds" if each > 1 else ""
    cut = f"; bars end at {_HIGH:g} times the median" if (longest.waiting or 0.0) > top else ""
    label = (
        f"median {seconds_text(middle)}, longest {seconds_text(longest.waiting)} in round {longest.round}{most}{cut}"
    )
    yield f'<h2>Waited <span class="dim">({label})</span></h2>'
    yield (
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="Waiting time of each round: '
        f'{label}">{"".join(bars)}</svg>'
    )


def _rounds(rounds: Sequence[RoundLine]) -> Iterator[str]:
    lines = []
    for one in reversed(rounds):
        after = "-" if one.replies is None else f"{one.replies} in {seconds_text(one.after)}"
        kind = _COLOURS.get(one.outcome, "")
        missing = ", ".join(map(str, one.stragglers[:12])) + (
            f" and {len(one.stragglers) - 12} more" if len(one.stragglers) > 12 else ""
        )
        lines.append(
            f'<tr><td>{one.round}</td><td class="text {kind}">{_text(one.outcome)}</td>'
            f"<td>{seconds_text(one.waiting)}</td><td>{after}</td>"
            f"<td>{one.used} of {'?' if one.workers is None else one.workers}</td>"
            f'<td class="text free">{missing}</td><td class="text free">{_text("; ".join(remarks(one)))}</td></tr>'
        )
    yield (f"<h2>Last {len(rounds)} rounds</h2>" if len(rounds) > 1 else "<h2>One round</h2>") + (
        '<div class="wide"><table><tr><th>round</th><th class="text">outcome</th><th>waited</th>'
        '<th>decodable after</th><th>used</th><th class="text">not in time</th>'
        f'<th class="text"></th></tr>{"".join(lines)}</table></div>'
    )


def _workers(status: RunStatus) -> Iterator[str]:
    lines = list(status.workers)
    if not lines:
        return
    yield f"<h2>Workers, in the last {status.looked_at} rounds</h2>" if status.looked_at > 1 else "<h2>Workers</h2>"
    yield (
        '<div class="wide"><table><tr><th>worker</th><th class="text"></th><th>in time</th><th>late</th><th>failed</th>'
        "<th>job</th><th>computing</th><th>x median</th><th>heard in</th></tr>"
        f"{''.join(map(_worker, lines[:_WORKERS]))}</table></div>"
    )
    if len(lines) > _WORKERS:
        yield f'<p class="dim">and {len(lines) - _WORKERS} more workers</p>'
    for one in lines[:_WORKERS]:
        for failure in one.reasons:
            who = f"node {one.node or '?'}" if one.worker is None else f"Worker {one.worker}"
            yield f"<p>{_text(who)} failed in {failure.rounds} rounds: {_text(failure.reason)}</p>"


def _worker(one: WorkerLine) -> str:
    who = f"node {one.node or '?'}" if one.worker is None else str(one.worker)
    marked = ": ".join(filter(None, (one.mark, one.note)))
    kind = "bad" if one.mark in ("failing", "silent") else "warn" if one.mark.endswith("slow") else "dim"
    return (
        f'<tr><td>{_text(who)}</td><td class="text {kind}">{_text(marked)}</td><td>{one.in_time} of {one.rounds}</td>'
        f"<td>{one.late}</td><td>{one.failed}</td><td>{seconds_text(one.seconds)}</td>"
        f"<td>{'-' if one.computing is None else f'{one.computing:.0%}'}</td>"
        f"<td>{'-' if one.slower is None else f'{one.slower:.2f}'}</td>"
        f"<td>{'never' if one.heard is None else one.heard}</td></tr>"
    )


def _advice(advice: Advice | None) -> Iterator[str]:
    if advice is None:
        return
    yield "<h2>Recommended</h2>"
    yield f"<p>{_text(advice.verdict[0].upper() + advice.verdict[1:])}</p>"
    for note in advice.notes:
        yield f"<p>{_text(note)}</p>"
    if advice.own:
        yield "<p>This run already does that.</p>"
    elif advice.python:
        if advice.own_seconds is not None:
            yield f"<p>By the same times, this run's own scheme takes {seconds_text(advice.own_seconds)} a round.</p>"
        yield f"<pre>{escape(advice.python)}</pre>"
