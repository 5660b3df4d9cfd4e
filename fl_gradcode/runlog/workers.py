"""What the last rounds of a run say of each worker: in time or late, slow, failing and why, or silent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .reader import number

__all__ = ["MARKS", "WorkerLine", "gone_of", "in_time_of", "told_workers", "workers_of"]

#: What may be wrong with a worker, what to look at first in front; "" is as expected.
MARKS = ("failing", "silent", "slow for good", "sometimes slow", "failed", "")
_SLOW = 1.5  # times the median worker, at the median of its jobs: the planner's measure
_MOMENT, _OFTEN = 4.0, 0.1  # a slow moment is so many times the median job, and sometimes is so large a share of jobs
_FEW = 3  # jobs before a worker is called slow; rounds before it is called silent
_LATELY = 3  # rounds
_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


@dataclass(frozen=True)
class WorkerLine:
    """One worker, or a node that never said which worker it is.

    Attributes:
        worker: Its number; None if it is not known.
        node: Its node's id, where it failed.
        rounds: In how many of the rounds looked at it held a sampled shard.
        in_time: In how many of them its reply was in before the round ended.
        late: How many of its replies came after the round that asked had ended.
        failed: In how many rounds a reply of it was an error, or was rejected, in training or evaluation.
        jobs: How many of its jobs left a time.
        seconds: Median time of a job, from send to reply.
        computing: Share of these seconds that it says it computed.
        slower: Its median time over that of the median worker, for one shard.
        heard: Last round in which a good reply of it came in.
        missed: For how many of the last rounds that it held a sampled shard of no good reply to training has come.
        mark: One of `MARKS`.
        note: What is known about that, in words.
        reasons: Each distinct reason of a failure, as last told, and in how many rounds; the last one first.
    """

    worker: int | None
    node: str | None
    rounds: int
    in_time: int
    late: int
    failed: int
    jobs: int
    seconds: float | None
    computing: float | None
    slower: float | None
    heard: int | None
    missed: int
    mark: str
    note: str
    reasons: tuple[tuple[str, int], ...]


@dataclass
class _Seen:
    node: str | None = None
    rounds: int = 0
    in_time: int = 0
    late: int = 0
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)  # of one shard
    shares: list[float] = field(default_factory=list)
    heard: int | None = None
    took_part: int = 0  # last round
    asked: int | None = None
    pause: int = 0  # longest time between two replies, in rounds that it took part in
    unheard: int = 0  # rounds that it took part in since then
    missed: int = 0
    failures: list[int] = field(default_factory=list)  # rounds
    reasons: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # as last told, rounds, last round
    owing: tuple[int, float, float] | None = None  # round, seconds so far, of one shard
    restarted: int = 0

    def hear(self, server_round: int) -> None:
        self.pause = max(self.pause, 0 if self.heard is None else self.unheard)
        self.heard, self.unheard = server_round, 0

    def slow_jobs(self, usual: float) -> int:
        return sum(unit > _MOMENT * usual for unit in self.units)

    def fail(self, server_round: int, node: Any, reason: str) -> None:
        self.node = str(node) if node is not None else self.node
        if server_round not in self.failures[-1:]:
            self.failures.append(server_round)
        self.unheard = 0
        key = _NUMBER.sub("#", reason)  # the same, whichever round or node or time it tells of
        text, count, last = self.reasons.pop(key, (reason, 0, 0))
        self.reasons[key] = (text, count, last) if last == server_round else (reason, count + 1, server_round)


def in_time_of(phase: Mapping[str, Any]) -> set[int]:
    """Workers whose reply to the phase was in, and good, before it ended."""
    told = {i for name in ("answered", "unread", "used") for i in phase.get(name) or () if i is not None}
    return told - set(phase.get("stragglers") or ())


def gone_of(workers: Iterable[WorkerLine]) -> list[int]:
    """Workers that must be reckoned without: silent, or failing to train."""
    return sorted(
        one.worker
        for one in workers
        if one.worker is not None and (one.mark == "silent" or (one.mark == "failing" and one.missed > 1))
    )


def workers_of(rows: Sequence[Mapping[str, Any]], holders: Sequence[Sequence[int]] = ()) -> tuple[WorkerLine, ...]:
    """A line for each worker of the present code, those worth a look first, the slowest first among them.

    Args:
        rows: The last rows of a run, oldest first.
        holders: Of each shard under the present code, as far as the ledger says: others have left.
    """
    seen: dict[int | str, _Seen] = {}
    of_node: dict[str, int] = {}
    since = 0  # first round of the present code
    code: Any = None
    for row in rows:
        if row.get("code") != code:
            code, since = row.get("code"), int(row["round"])
        _learn(seen, of_node, row)
    if not rows:
        return ()
    last = int(rows[-1]["round"])
    middles = {who: median(one.units) for who, one in seen.items() if one.units}
    middle = median(middles.values()) if middles else 0.0
    usual = median([unit for one in seen.values() for unit in one.units]) if middles else 0.0
    members = {worker for one in holders for worker in one}
    present = {
        who: one
        for who, one in seen.items()
        if isinstance(who, str)
        or (who in members if members else one.took_part >= since or one.failures)
        or (one.failures and one.failures[-1] > last - _LATELY)
    }
    asked = ((rows[-1].get("train") or {}).get("asked") or []) + ((rows[-1].get("train") or {}).get("held-back") or [])
    lines = []
    for who, one in present.items():
        slower = middles[who] / middle if who in middles and middle else None
        mark = _mark(one, last, slower, usual)
        gone = one.asked is not None and None not in asked and who not in asked
        lines.append(
            WorkerLine(
                worker=who if isinstance(who, int) else None,
                node=one.node,
                rounds=one.rounds,
                in_time=one.in_time,
                late=one.late,
                failed=len(one.failures),
                jobs=len(one.seconds),
                seconds=median(one.seconds) if one.seconds else None,
                computing=median(one.shares) if one.shares else None,
                slower=slower,
                heard=one.heard,
                missed=one.missed,
                mark=mark,
                note=_note(one, mark, usual, gone=gone),
                reasons=tuple((text, count) for text, count, _ in reversed(one.reasons.values())),
            )
        )
    return tuple(sorted(lines, key=lambda one: (MARKS.index(one.mark), -(one.slower or 0.0), *_order(one))))


def _order(one: WorkerLine) -> tuple[bool, int, str]:
    return one.worker is None, one.worker or 0, one.node or ""


def _learn(seen: dict[int | str, _Seen], of_node: dict[str, int], row: Mapping[str, Any]) -> None:
    """What one row says."""
    server_round = int(row["round"])

    def of(who: int | str) -> _Seen:
        return seen.setdefault(who, _Seen())

    heard: set[int] = set()
    for one in seen.values():
        one.owing = None
    for kind in ("train", "evaluate"):
        phase = row.get(kind) or {}
        good = in_time_of(phase)
        heard |= good
        if kind == "train":
            for worker in good | set(phase.get("stragglers") or ()):
                of(worker).rounds += 1
                of(worker).unheard += 1
                of(worker).missed = 0 if worker in good else of(worker).missed + 1
                of(worker).took_part = server_round
                of(worker).in_time += worker in good
            for worker in [*(phase.get("asked") or ()), *(phase.get("held-back") or ())]:
                if worker is not None:
                    of(worker).asked = server_round
        for one in phase.get("late") or ():
            label, _, asked = str(one.get("from", "")).partition(" ")
            if asked.isdigit() and int(asked) > server_round:
                continue  # of another run, whose nodes still owed it
            if one.get("reason"):
                of(_who(one, of_node)).fail(server_round, one.get("node"), str(one["reason"]))
            elif one.get("worker") is not None:
                heard.add(one["worker"])
                of(one["worker"]).late += label == "train"
                of(one["worker"]).missed *= label != "train"
        for one in phase.get("rejected") or ():
            reason = str(one.get("reason"))
            if not reason.startswith("duplicate"):
                of(_who(one, of_node)).fail(server_round, one.get("node"), reason)
        for worker in phase.get("restarted") or ():
            if worker is not None:
                of(worker).restarted += 1
        heard |= _learn_times(of, phase, server_round)
    for worker in heard:
        of(worker).hear(server_round)


def _learn_times(of: Any, phase: Mapping[str, Any], server_round: int) -> set[int]:
    """Job times of a phase's entry; who they are of."""
    heard = set()
    for name in ("timings", "owing"):
        for one in phase.get(name) or ():
            worker, seconds, asked = one.get("worker"), number(one.get("seconds")), number(one.get("round"))
            if worker is None or seconds is None or asked is None or asked > server_round:
                continue
            if name == "owing":
                of(worker).owing = (int(asked), seconds, seconds / max(1.0, number(one.get("shards")) or 1.0))
                continue
            heard.add(int(worker))
            shards, computing = number(one.get("shards")) or 0.0, number(one.get("computing"))
            if one.get("kind") != "train" or shards <= 0:
                continue
            seen: _Seen = of(worker)
            seen.seconds.append(seconds)
            if computing is None or not 0 <= computing <= seconds:
                seen.units.append(seconds / shards)
            else:
                seen.units.append(seconds - computing + computing / shards)
                seen.shares.append(computing / seconds if seconds else 0.0)
    return heard


def _who(one: Mapping[str, Any], of_node: dict[str, int]) -> int | str:
    """The worker; where the server had forgotten it after a failure, whoever the node was last."""
    worker, node = one.get("worker"), str(one.get("node"))
    if worker is not None:
        of_node[node] = int(worker)
        return int(worker)
    return of_node.get(node, node)


def _mark(one: _Seen, last: int, slower: float | None, usual: float) -> str:
    lately = one.failures[-1] if one.failures else 0
    if (
        len(one.failures) > 1
        and last - lately < _LATELY
        and (one.failures[-2] > last - _LATELY or (one.heard or 0) < lately)
    ):
        return "failing"
    if one.rounds >= _FEW and one.unheard >= max(_FEW, 2 * one.pause):
        return "silent"
    # Who is slow in all that it does has done little yet, and mostly still owes something.
    units = [*one.units, *([one.owing[2]] if one.owing else [])]
    enough = len(units) >= _FEW or (len(units) > 1 and min(units) > _MOMENT * usual)
    if slower is not None and slower > _SLOW and enough:
        return "slow for good"
    slow = one.slow_jobs(usual)
    if slow > 1 and slow >= _OFTEN * len(one.units):
        return "sometimes slow"
    return "failed" if one.failures else ""


def _note(one: _Seen, mark: str, usual: float, *, gone: bool) -> str:
    notes: list[str] = []
    if mark == "silent" and gone:
        notes.append(f"its node is not there: last asked in round {one.asked}")
    elif mark == "silent" and one.asked is None:
        notes.append("no node has said that it is this worker")
    elif one.owing is not None and mark == "silent":
        notes.append(f"owes the reply of round {one.owing[0]}, for {one.owing[1]:.3g} s so far")
    if mark == "sometimes slow":
        notes.append(f"{one.slow_jobs(usual)} of {len(one.units)} jobs took {_MOMENT:g} times the usual")
    if one.restarted:
        notes.append(f"restarted {one.restarted} times" if one.restarted > 1 else "restarted once")
    return "; ".join(notes)


def told_workers(workers: Iterable[int], most: int = 8) -> str:
    """Worker 3; workers 3 and 4; workers 1, 2, 3 and 97 more."""
    listed = [*workers]
    if len(listed) > most:
        return f"workers {', '.join(map(str, listed[: most - 1]))} and {len(listed) - most + 1} more"
    start = ", ".join(map(str, listed[:-1]))
    return f"workers {start} and {listed[-1]}" if start else f"worker {listed[-1]}"
