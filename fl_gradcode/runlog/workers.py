"""What the last rounds of a run say about each worker: in time or late, slow, failing and why, or silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from .reader import HARMLESS
from .rows import CodeLine, JobLine, Late, PhaseRow, Rejected, RoundRow

__all__ = ["MARKS", "FailureLine", "WorkerLine", "gone_of", "workers_of"]

#: What may be wrong with a worker, the most serious first. "" means that nothing is.
MARKS = ("failing", "silent", "always slow", "sometimes slow", "failed", "")
_SLOW = 1.5  # times the median worker, at the median of its jobs: the planner's measure
_MOMENT, _OFTEN = 4.0, 0.1  # a slow moment is so many times the median job, and sometimes is so large a share of jobs
_FEW = 3  # jobs before a worker is called slow; rounds before it is called silent
_LATELY = 3  # rounds


@dataclass(frozen=True)
class FailureLine:
    """The failures of one kind of one worker.

    Attributes:
        kind: Kind of the rejections.
        reason: Reason of the last one, in one sentence.
        rounds: Number of rounds with such a failure.
    """

    kind: str
    reason: str
    rounds: int


@dataclass(frozen=True)
class WorkerLine:
    """One worker, or a node that never said which worker it is.

    All counts are over the rows looked at.

    Attributes:
        worker: Number of the worker; None if it is not known.
        node: Id of its node, if it failed.
        rounds: Number of rounds in which it held a sampled shard.
        in_time: Number of them in which its reply was in before the round ended.
        late: Number of its replies that came after the round that asked had ended.
        failed: Number of rounds in which it sent an error or its reply was rejected, in training or evaluation.
        jobs: Number of its jobs with a known time.
        seconds: Median seconds of a job, from send to reply.
        computing: Share of these seconds that the client says it computed.
        slower: Median time of the worker over that of the median worker, for one shard.
        heard: Last round in which a good reply came in from it.
        missed: Number of latest rounds in a row in which it held a sampled shard and sent no good reply to training.
        mark: One of `MARKS`.
        note: Details about the mark, in words.
        reasons: Its failures by kind, the latest kind first.
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
    reasons: tuple[FailureLine, ...]


@dataclass
class _Seen:
    """What the rows read so far say about one worker or node."""

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
    #: Kind of a failure -> its last reason, the number of rounds, the last round; the latest kind is the last one.
    reasons: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    owing: tuple[int, float, float] | None = None  # round, seconds so far, of one shard
    restarted: int = 0

    def hear(self, server_round: int) -> None:
        self.pause = max(self.pause, 0 if self.heard is None else self.unheard)
        self.heard, self.unheard = server_round, 0

    def slow_jobs(self, usual: float) -> int:
        return sum(unit > _MOMENT * usual for unit in self.units)

    def fail(self, server_round: int, node: str, kind: str, reason: str) -> None:
        self.node = node
        if server_round not in self.failures[-1:]:
            self.failures.append(server_round)
        self.unheard = 0
        _, count, last = self.reasons.pop(kind, ("", 0, 0))
        self.reasons[kind] = (reason, count + (last != server_round), server_round)


def gone_of(workers: Iterable[WorkerLine]) -> list[int]:
    """Returns the workers that no longer take part, ascending: those that are silent or fail to train."""
    return sorted(
        one.worker
        for one in workers
        if one.worker is not None and (one.mark == "silent" or (one.mark == "failing" and one.missed > 1))
    )


def workers_of(rows: Sequence[RoundRow], holders: Sequence[Sequence[int]] = ()) -> tuple[WorkerLine, ...]:
    """Returns a line for each worker of the present code, those with a mark first, and the slowest first among them.

    Args:
        rows: The last rows of a run, oldest first.
        holders: Workers that hold each shard under the present code, as far as known. Workers that hold none have left.
    """
    seen: dict[int | str, _Seen] = {}
    of_node: dict[str, int] = {}
    since = 0  # first round of the present code
    code: CodeLine | None = None
    for row in rows:
        if row.code != code:
            code, since = row.code, row.round
        _learn(seen, of_node, row)
    if not rows:
        return ()
    last = rows[-1]
    middles = {who: median(one.units) for who, one in seen.items() if one.units}
    middle = median(middles.values()) if middles else 0.0
    usual = median([unit for one in seen.values() for unit in one.units]) if middles else 0.0
    members = {worker for one in holders for worker in one}
    present = {
        who: one
        for who, one in seen.items()
        if isinstance(who, str)
        or (who in members if members else one.took_part >= since or one.failures)
        or (one.failures and one.failures[-1] > last.round - _LATELY)
    }
    asked = () if last.train is None else last.train.asked + last.train.held_back
    lines = []
    for who, one in present.items():
        slower = middles[who] / middle if who in middles and middle else None
        mark = _mark(one, last.round, slower, usual)
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
                reasons=tuple(
                    FailureLine(kind, reason, count) for kind, (reason, count, _) in reversed(one.reasons.items())
                ),
            )
        )
    return tuple(sorted(lines, key=lambda one: (MARKS.index(one.mark), -(one.slower or 0.0), *_order(one))))


def _order(one: WorkerLine) -> tuple[bool, int, str]:
    return one.worker is None, one.worker or 0, one.node or ""


def _learn(seen: dict[int | str, _Seen], of_node: dict[str, int], row: RoundRow) -> None:
    """Adds what one row says to `seen`, by worker or by node, and to `of_node`, the last known worker of a node."""

    def of(who: int | str) -> _Seen:
        return seen.setdefault(who, _Seen())

    for one in seen.values():
        one.owing = None
    heard: set[int] = set()
    if row.train is not None:
        _learn_presence(of, row.train, row.round)
    for phase in row.phases:
        heard |= phase.in_time
        for late in phase.late:
            asking, number = late.asked
            if number is not None and number > row.round:
                continue  # of another run, whose nodes still owed it
            if late.kind is not None:
                of(_who(late, of_node)).fail(row.round, late.node, late.kind, late.reason or late.kind)
            elif late.worker is not None:
                heard.add(late.worker)
                of(late.worker).late += asking == "train"
                of(late.worker).missed *= asking != "train"
        for rejected in phase.rejected:
            if rejected.kind not in HARMLESS:
                of(_who(rejected, of_node)).fail(row.round, rejected.node, rejected.kind, rejected.reason)
        for worker in phase.restarted:
            if worker is not None:
                of(worker).restarted += 1
        heard |= _learn_times(of, phase, row.round)
    for worker in heard:
        of(worker).hear(row.round)


def _learn_presence(of: Callable[[int | str], _Seen], phase: PhaseRow, server_round: int) -> None:
    """Adds who held a sampled shard in training, who was in time, and who was asked."""
    good = phase.in_time
    for worker in good | {*phase.stragglers}:
        of(worker).rounds += 1
        of(worker).unheard += 1
        of(worker).missed = 0 if worker in good else of(worker).missed + 1
        of(worker).took_part = server_round
        of(worker).in_time += worker in good
    for asked in (*phase.asked, *phase.held_back):
        if asked is not None:
            of(asked).asked = server_round


def _learn_times(of: Callable[[int | str], _Seen], phase: PhaseRow, server_round: int) -> set[int]:
    """Adds the job times of a phase. Returns the workers whose replies came in."""
    heard = set()
    for job in phase.timings:
        if job.worker is None or job.seconds is None or not _is_of_this_run(job, server_round):
            continue
        heard.add(job.worker)
        if job.kind != "train" or job.shards <= 0:
            continue
        one, computing = of(job.worker), job.computing
        one.seconds.append(job.seconds)
        if computing is None or not 0 <= computing <= job.seconds:
            one.units.append(job.seconds / job.shards)
        else:
            one.units.append(job.seconds - computing + computing / job.shards)
            one.shares.append(computing / job.seconds if job.seconds else 0.0)
    for job in phase.owing:
        if job.worker is not None and job.seconds is not None and _is_of_this_run(job, server_round):
            of(job.worker).owing = (job.round or 0, job.seconds, job.seconds / max(1, job.shards))
    return heard


def _is_of_this_run(job: JobLine, server_round: int) -> bool:
    """Returns False for a job of an earlier run, whose node still owed the reply when this run began."""
    return job.round is not None and job.round <= server_round


def _who(one: Late | Rejected, of_node: dict[str, int]) -> int | str:
    """Returns the worker that sent a reply, or the worker that its node last was, or else the node."""
    if one.worker is not None:
        of_node[one.node] = one.worker
        return one.worker
    return of_node.get(one.node, one.node)


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
    # A worker that is always slow has finished few jobs so far, and mostly still owes one.
    units = [*one.units, *([one.owing[2]] if one.owing else [])]
    enough = len(units) >= _FEW or (len(units) > 1 and min(units) > _MOMENT * usual)
    if slower is not None and slower > _SLOW and enough:
        return "always slow"
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
