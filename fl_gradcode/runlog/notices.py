"""Notices: the things in a run that need a person's attention.

Examples are shards that no worker answers for, a run without a spare worker, and holders of a shard that disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .._text import listed, numbered
from .reader import RoundLine
from .rows import RoundRow
from .workers import WorkerLine, gone_of

__all__ = ["Notice", "notices_of"]

_DISAGREEMENT = 1e-5  # relative: what the run itself warns of
_LATELY = 10  # rounds that are looked at for disagreements
_BLOCKS = 3  # blocks of lost shards that a notice names


@dataclass(frozen=True)
class Notice:
    """Something in a run that needs a person's attention.

    Attributes:
        key: What the notice is about. It is the same from round to round.
        text: The notice, in one sentence.
    """

    key: str
    text: str


def notices_of(
    rounds: Sequence[RoundLine],
    recent: Sequence[RoundRow],
    workers: Sequence[WorkerLine],
    holders: Sequence[Sequence[int]],
) -> Iterator[Notice]:
    """Yields the notices of a run, the most serious first.

    Args:
        rounds: All rounds of the run, at least one.
        recent: Its last rows.
        workers: Its workers, as `workers_of` describes them by these rows.
        holders: Workers that hold each shard, as far as known.
    """
    last = rounds[-1]
    if last.raised:
        yield Notice("ended", f"The run ended in round {last.round}: {_sentence(last.raised)}")
    failed = _failed_at_the_end(rounds, recent)
    if failed:
        yield _undecoded(failed, last, holders)
    s, gone = last.code.s, gone_of(workers)
    if len(gone) >= s > 0:
        verb = "do" if len(gone) > 1 else "does"
        left = "no spare is left, the next failure may cost a round" if len(gone) == s else "each round is at risk"
        text = f"{numbered('worker', gone)} {verb} not answer, and the code covers any {s}: {left}."
        yield Notice("spare", text[0].upper() + text[1:])
    yield from _disagreements(recent[-_LATELY:])


def _failed_at_the_end(rounds: Sequence[RoundLine], recent: Sequence[RoundRow]) -> list[RoundRow]:
    """Returns the rows of the rounds at the end that did not decode as the code promises, oldest first."""
    failed: list[RoundRow] = []
    for row, line in zip(reversed(recent), reversed(rounds), strict=False):
        expected = line.outcome == "approximate" and not line.code.exact  # the code promises no more
        if line.outcome not in ("skipped", "approximate", "raised") or expected:
            break
        failed.insert(0, row)
    return failed


def _undecoded(failed: Sequence[RoundRow], last: RoundLine, holders_of: Sequence[Sequence[int]]) -> Notice:
    """Returns the notice about rounds that are not exact, with the shards that no worker answered for."""
    phases = [row.phases[0] for row in failed]
    rounds = (
        f"Round {failed[0].round} was"
        if len(failed) == 1
        else f"Rounds {failed[0].round} to {failed[-1].round} were"
    )  # fmt: skip
    outcomes = ", ".join(sorted({phase.outcome for phase in phases}))
    silent = set.intersection(*({*phase.stragglers} for phase in phases))
    sampled = set.intersection(*({*phase.shards} for phase in phases))
    lost: dict[tuple[int, ...], list[int]] = {}
    for shard in sorted(sampled):
        holders = tuple(holders_of[shard]) if shard < len(holders_of) else ()
        if holders and silent.issuperset(holders):
            lost.setdefault(holders, []).append(shard)
    if lost:
        blocks = [
            f"{numbered('shard', shards)} (held by {numbered('worker', holders)})" for holders, shards in lost.items()
        ]
        why = f"nobody answered in time for {listed(blocks, _BLOCKS + 1)}"
    elif silent:
        why = f"{numbered('worker', sorted(silent))} not in time, and the code covers any {last.code.s}"
    else:
        why = last.ended
    return Notice("undecoded", f"{rounds} not exact ({outcomes}): {why}.")


def _disagreements(recent: Sequence[RoundRow]) -> Iterator[Notice]:
    """Yields notices about holders of one shard, or nodes with one number, that contradict each other."""
    most, where = _DISAGREEMENT, 0
    twins: dict[int, tuple[int, str]] = {}
    requests: dict[int, tuple[int, int]] = {}
    for row in recent:
        for phase in row.phases:
            if (phase.replica_disagreement or 0.0) > most:
                most, where = phase.replica_disagreement or 0.0, row.round
            for one in phase.rejected:
                if one.kind == "duplicate-worker" and one.worker is not None:
                    twins[one.worker] = row.round, f"node {one.node} was rejected as a {one.reason}"
            if phase.privacy is not None:
                requests.update(phase.privacy.other_requests)
    if where:
        yield Notice(
            "disagreement",
            f"Holders of a shard disagreed by up to {most:.1e} (relative), most in round {where}: their training "
            "depends on more than the message, the shard and the seeded generators.",
        )
    for worker, (server_round, how) in twins.items():
        yield Notice(
            f"twins {worker}",
            f"Two nodes answered as worker {worker}, last in round {server_round} ({how}): give each its own "
            "partition-id, unless one was just restarted.",
        )
    for shard, pair in requests.items():
        yield Notice(
            f"requests {shard}",
            f"Workers {pair[0]} and {pair[1]} bound the noise of shard {shard} to different requests: one of them "
            "runs another app or other settings.",
        )


def _sentence(text: str) -> str:
    line = text.strip().rstrip(":").splitlines()[0]
    return line if line.endswith(".") else f"{line}."
