"""What a person must see of a run: data that nobody answers for, no spare worker left, holders that disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .reader import RoundLine
from .workers import WorkerLine, gone_of, told_workers

__all__ = ["Notice", "notices_of"]

_DISAGREEMENT = 1e-5  # relative: what the run itself warns of
_DUPLICATE = "duplicate: node "
_LATELY = 10  # rounds that are looked back


@dataclass(frozen=True)
class Notice:
    """Something that a person must see.

    Attributes:
        key: What it is about: the same from round to round.
        text: One sentence.
    """

    key: str
    text: str


def notices_of(
    rounds: Sequence[RoundLine], recent: Sequence[Mapping[str, Any]], workers: Sequence[WorkerLine]
) -> Iterable[Notice]:
    """The worst first.

    Args:
        rounds: All rounds of a run.
        recent: The last rows, whole.
        workers: What those say of the workers.
    """
    last = rounds[-1]
    if last.raised:
        yield Notice("ended", f"The run ended in round {last.round}: {_sentence(last.raised)}")
    failed: list[tuple[Mapping[str, Any], RoundLine]] = []
    for row, line in zip(reversed(recent), reversed(rounds), strict=False):
        expected = line.outcome == "approximate" and not line.code.get("exact", True)  # the code promises no more
        if line.outcome not in ("skipped", "approximate", "raised") or expected:
            break
        failed.insert(0, (row, line))
    if failed:
        yield _undecoded(failed, next((line.holders for line in reversed(rounds) if line.holders), ()))
    s = last.code.get("s")
    gone = gone_of(workers)
    if isinstance(s, int) and s > 0 and len(gone) >= s:
        verb = "do" if len(gone) > 1 else "does"
        left = "no spare is left, the next failure may cost a round" if len(gone) == s else "each round is at risk"
        text = f"{told_workers(gone)} {verb} not answer, and the code covers any {s}: {left}."
        yield Notice("spare", text[0].upper() + text[1:])
    yield from _disagreements(recent[-_LATELY:])


def _undecoded(failed: Sequence[tuple[Mapping[str, Any], RoundLine]], holders_of: Sequence[tuple[int, ...]]) -> Notice:
    """Rounds at the end that are not exact: which shards nobody answered for, as far as can be told.

    An older ledger does not say who holds them: then the coverage of an estimate tells.
    """
    first, last = failed[0][1], failed[-1][1]
    which = f"Round {last.round} was" if len(failed) == 1 else f"Rounds {first.round} to {last.round} were"
    outcome = f"not exact ({', '.join(sorted({line.outcome for _, line in failed}))})"
    phases = [_main(row) for row, _ in failed]
    silent = set.intersection(*({*(phase.get("stragglers") or ())} for phase in phases))
    sampled = set.intersection(*({*(phase.get("shards") or ())} for phase in phases))
    lost: dict[tuple[int, ...], list[int]] = {}
    for shard in sorted(sampled):
        holders = holders_of[shard] if shard < len(holders_of) else ()
        covered = [phase.get("coverage") or () for phase in phases if phase.get("outcome") == "approximate"]
        left_out = bool(covered) and all(shard < len(one) and one[shard] == 0 for one in covered)
        if (holders and silent.issuperset(holders)) or (not holders and left_out):
            lost.setdefault(holders, []).append(shard)
    if lost:
        told = [
            _told_shards(shards) + (f" (held by {told_workers(holders)})" if holders else "")
            for holders, shards in lost.items()
        ]
        more = f" and {len(told) - 3} more such blocks" if len(told) > 3 else ""
        why = f"nobody answered in time for {', '.join(told[:3])}{more}"
    elif silent:
        why = f"{told_workers(sorted(silent))} not in time, and the code covers any {last.code.get('s')}"
    else:
        why = last.ended or "the ledger does not say why"
    return Notice("undecoded", f"{which} {outcome}: {why}.")


def _disagreements(recent: Sequence[Mapping[str, Any]]) -> Iterable[Notice]:
    """What holders of a shard, or nodes with one number, say against each other."""
    most, where = _DISAGREEMENT, 0
    twins: dict[tuple[str, str], int] = {}
    others: dict[str, list[int]] = {}
    for row in recent:
        for phase in (row.get("train") or {}, row.get("evaluate") or {}):
            apart = float(phase.get("replica-disagreement") or 0.0)
            if apart > most:
                most, where = apart, int(row["round"])
            for one in phase.get("rejected") or ():
                reason = str(one.get("reason"))
                if reason.startswith(_DUPLICATE):
                    other, _, worker = reason.removeprefix(_DUPLICATE).partition(" answered as worker ")
                    twins[" and ".join(sorted({other, str(one.get("node"))})), worker] = int(row["round"])
            others.update((phase.get("privacy") or {}).get("other-requests") or {})
    if where:
        yield Notice(
            "disagreement",
            f"Holders of a shard disagreed by up to {most:.1e} (relative), most in round {where}: their training "
            "depends on more than the message, the shard and the seeded generators.",
        )
    for (nodes, worker), server_round in twins.items():
        yield Notice(
            f"twins {nodes}",
            f"Nodes {nodes} both answered as worker {worker}, last in round {server_round}: give each its own "
            "partition-id, unless one was just restarted.",
        )
    for shard, pair in others.items():
        yield Notice(
            f"requests {shard}",
            f"Workers {' and '.join(map(str, pair))} bound the noise of shard {shard} to different requests: one "
            "of them runs another app or other settings.",
        )


def _main(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The phase that a round's outcome is of."""
    return row.get("train") or row.get("evaluate") or {}


def _told_shards(shards: Sequence[int]) -> str:
    more = f" and {len(shards) - 6} more" if len(shards) > 6 else ""
    return f"shard{'s' * (len(shards) > 1)} {', '.join(map(str, shards[:6]))}{more}"


def _sentence(text: str) -> str:
    line = text.strip().rstrip(":").splitlines()[0]
    return line if line.endswith(".") else f"{line}."
