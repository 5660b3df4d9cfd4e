"""What the outcomes of an app's calls say about the contract of coding."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .._text import listed
from ..copies import DISAGREEMENT
from .processes import AppProcesses
from .trial import Call, Inputs, Outcome, Trial

__all__ = ["Finding", "examined"]

#: "ok"; "note", if the app works and something should be known; "fails", if a coded run would give another model.
Verdict = Literal["ok", "note", "fails"]
Clock = Literal["true", "other", "steps"]

_OTHER_NODE = 987_654_321
_LARGEST = 100_000_000  # bytes of a file that is put back


@dataclass(frozen=True)
class Finding:
    """One row of a check.

    Attributes:
        key: What was looked at, as a word for programs.
        title: The same for people.
        verdict: "ok", "note" or "fails".
        text: What was seen, and what to do about it.
    """

    key: str
    title: str
    verdict: Verdict
    text: str


class _Trials:
    """Runs trials on demand, each in a fresh process.

    Attributes:
        first: Partition 0 first, then partition 1, partition 0 again, and a second round of it: once with the
            `context.state` that the first left, once without.
        second: On another node, with another clock and hash seed: partition 1 first, then partition 0, then partition 1
            with the random numbers of partition 0, in two rounds.
        third: Partition 0 in round 2, as the first call, without the files that the others made.
        mods: Names of the mods that the app lists.
    """

    def __init__(self, processes: AppProcesses, inputs: Inputs) -> None:
        self._processes, self._inputs = processes, inputs
        self.mods: tuple[str, ...] = ()
        self.third: Outcome | None = None
        self.first = self.run(
            {
                "0": Call(0, node="a"),
                "1": Call(1),
                "0 again": Call(0),
                "0 with state": Call(0, round=2, node="a"),
                "0 without state": Call(0, round=2),
            },
        )
        self.second = self.run(
            {
                "1": Call(1),
                "0": Call(0),
                "1 as 0": Call(1, seed_of=0),
                "1 as 0 in round 2": Call(1, round=2, seed_of=0),
            },
            hash_seed=2,
            clock="other",
            node=_OTHER_NODE,
        )
        with _away(self.created):
            self.third = self.run({"0": Call(0, round=2)})["0"]

    def run(
        self, calls: Mapping[str, Call], *, hash_seed: int = 1, clock: Clock = "true", node: int = 1
    ) -> Mapping[str, Outcome]:
        ran = self._processes.run(Trial(calls, self._inputs, hash_seed, clock, node))
        self.mods = ran.mods
        return ran.outcomes

    def alone(self, *, hash_seed: int = 1, clock: Clock = "true", node: int = 1, round: int = 1) -> Outcome:
        """The outcome of partition 0 as the first call of a fresh process, which leaves files as they were."""
        with _restored(self.shared):
            calls = {"0": Call(0, round=round)}
            return self.run(calls, hash_seed=hash_seed, clock=clock, node=node)["0"]

    @property
    def all(self) -> list[Outcome]:
        return [*self.first.values(), *self.second.values(), *([self.third] if self.third else [])]

    @property
    def created(self) -> set[str]:
        """Files that calls made."""
        return {path for outcome in self.all for path in outcome.created}

    @property
    def shared(self) -> set[str]:
        """Files that a call wrote and a call read."""
        written = {path for outcome in self.all for path in outcome.written}
        return written & {path for outcome in self.all for path in outcome.read}


def examined(processes: AppProcesses, inputs: Inputs) -> tuple[list[Finding], tuple[str, ...]]:
    """Call an app in two orders and two processes, and more where they differ; returns what was found, and the mods.

    Args:
        processes: Where the app is called.
        inputs: What it is given.

    Raises:
        UnsuitableApp: The app cannot be loaded, or its process ended.
    """
    trials = _Trials(processes, inputs)
    errors = list(dict.fromkeys(outcome.error for outcome in trials.all if outcome.error))
    if errors:
        text = f"train() raised {errors[0]}."
        return [Finding("runs", "train() returns", "fails", text)], trials.mods
    if any(
        outcome.sketch and not all(map(math.isfinite, (outcome.sketch.norm or 0.0, *outcome.sketch.sums)))
        for outcome in trials.all
    ):
        return [Finding("runs", "train() returns", "fails", "An update is not finite (NaN or infinity).")], trials.mods
    causes = dict(_causes(trials))
    return [
        _data(trials),
        *(replace(finding, verdict="fails", text=causes[finding.key]) if finding.key in causes else finding
          for finding in _KINDS),
        *_state(trials, causes),
        _files(trials, causes),
        _records(trials),
    ], trials.mods  # fmt: skip


_KINDS = (
    Finding("generators", "random numbers", "ok", "Two processes computed the same update."),
    Finding("clock", "clock", "ok", "An update does not depend on the date and hour."),
    Finding("order", "order of sets", "ok", "An update does not depend on Python's hash seed."),
    Finding("node", "node", "ok", "An update does not depend on the node's id."),
    Finding("variables", "variables between calls", "ok", "An update does not depend on the calls before it."),
)


def _same(one: Outcome, other: Outcome) -> bool:
    return _apart(one, other) <= DISAGREEMENT


def _apart(one: Outcome, other: Outcome) -> float:
    assert one.sketch is not None and other.sketch is not None
    return one.sketch.apart(other.sketch)


def _data(trials: _Trials) -> Finding:
    key, title = "data", "data by partition-id"
    read = [outcome.reads_partition for outcome in trials.all]
    if any(read) and not all(read):
        text = (
            "train() reads context.node_config['partition-id'] in the first call only, and keeps what it has chosen. "
            "Choose the data by it at each call."
        )
        return Finding(key, title, "fails", text)
    if not any(read):
        text = (
            "train() never reads context.node_config['partition-id'], so each node trains on the same data whatever "
            "shard is asked for. Choose the data by it at each call."
        )
        return Finding(key, title, "fails", text)
    pairs = (
        (trials.first["0"], trials.second["1 as 0"]),
        (trials.first["0 without state"], trials.second["1 as 0 in round 2"]),
    )
    if any(not _same(*pair) for pair in pairs):
        return Finding(key, title, "ok", "Partitions 0 and 1 give different updates for the same random numbers.")
    if not any(outcome.sketch and any(outcome.sketch.sums) for pair in pairs for outcome in pair):
        text = "Partitions 0 and 1 leave the model as it is in rounds 1 and 2: the check cannot see if they differ."
        return Finding(key, title, "note", text)
    text = (
        "Partitions 0 and 1 give the same update for the same random numbers: partition-id is read, but does not "
        "choose the data. Is the data set or loader chosen by something else, or made once and kept?"
    )
    return Finding(key, title, "fails", text)


def _causes(trials: _Trials) -> Iterator[tuple[str, str]]:
    """Yields (key of a finding, what is wrong) for the cause of two calls that should agree and do not."""
    first, second, third = trials.first, trials.second, trials.third
    assert third is not None
    across = _same(first["0"], second["0"]) and _same(first["1"], second["1"])
    again, later = _same(first["0"], first["0 again"]), _same(first["0 without state"], third)
    if across and again and later:
        return
    alone = trials.alone()
    if not _same(alone, trials.alone()):
        if _same(*(trials.alone(clock="steps") for _ in range(2))):
            yield "clock", _BY_CLOCK
        else:
            apart = _number(_apart(first["0"], alone))
            yield "generators", _BY_GENERATOR.format(apart=apart)
        return
    if trials.shared and not _same_without_files(trials, alone):
        yield "files", _BY_FILE.format(files=listed(sorted(trials.shared), 3))
    elif not _same(alone, trials.alone(clock="other")):
        yield "clock", _BY_CLOCK
    elif not _same(alone, trials.alone(hash_seed=2)):
        yield "order", "Updates differ with Python's hash seed: something depends on hash() or the order of a set."
    elif not _same(alone, trials.alone(node=_OTHER_NODE)):
        yield "node", "Updates differ with the id of the node, which differs between the holders of a shard."
    elif not again:
        yield "variables", _BY_VARIABLE
    elif not across:
        yield "variables", _BY_FIRST_CALL
    else:
        yield "variables", _BY_FIRST_ROUND


def _same_without_files(trials: _Trials, alone: Outcome) -> bool:
    """Returns whether calls do the same without the files that calls wrote and read."""
    with _away(trials.shared):
        if not _same(alone, trials.run({"0": Call(0)})["0"]) or not _same(trials.first["0"], alone):
            return False
    with _away(trials.shared):
        later = trials.run({"0": Call(0, round=2)})["0"]
    return _same(later, trials.alone(round=2))


_BY_CLOCK = "An update depends on the clock, which differs between holders and runs. Leave the time out of training."
_BY_GENERATOR = (
    "The same call in two processes gives different updates (relative difference {apart}): is there a generator of the "
    "app's own without a seed, such as np.random.default_rng() or random.SystemRandom(), or does something depend on "
    "the process, such as its number or id()? The generators of random, NumPy and torch are seeded for each shard; "
    "draw from those, or seed with a number drawn from them."
)
_BY_FILE = (
    "train() writes {files} and reads it in a later call, and the update depends on it. Another holder of the shard "
    "has another file. Leave it out, or keep what is needed in the model."
)
_BY_VARIABLE = (
    "The same call gives another update when it is repeated in a process: a variable of the app changes from call to "
    "call, such as a counter, a model that is trained on, or a generator made at import. Create it again in each call."
)
_BY_FIRST_CALL = (
    "What partition is called first decides what the others train on: a data set, loader or model is made at the first "
    "call and kept in a variable. Create it again in each call, or keep one for each partition-id."
)
_BY_FIRST_ROUND = (
    "In which round a partition is first called decides what it trains on later: something that is drawn or computed "
    "then, such as a random split, is kept in a variable, and another holder is first called in another round. "
    "Create it again in each call, or draw it with a seed made of partition-id alone."
)


@contextmanager
def _away(paths: Iterable[str]) -> Iterator[None]:
    """Move files away, and put them back at the end in place of what has been made meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        moved = {}
        for number, path in enumerate(path for path in map(Path, paths) if path.is_file()):
            moved[path] = shutil.move(path, Path(folder) / str(number))
        try:
            yield
        finally:
            for path, kept in moved.items():
                shutil.move(kept, path)


@contextmanager
def _restored(paths: Iterable[str]) -> Iterator[None]:
    """Give files the contents back that they had."""
    files = [path for path in map(Path, paths) if path.is_file()]
    contents = {path: path.read_bytes() for path in files if path.stat().st_size <= _LARGEST}
    try:
        yield
    finally:
        for path, content in contents.items():
            path.write_bytes(content)


def _state(trials: _Trials, causes: Mapping[str, str]) -> Iterator[Finding]:
    key, title = "state", "context.state"
    kept = sorted({name for outcome in trials.all for name in outcome.kept})
    if not kept:
        yield Finding(key, title, "ok", "train() keeps nothing in context.state.")
        return
    names = listed(map(repr, kept), 4)
    with_state, without = trials.first["0 with state"], trials.first["0 without state"]
    if causes:
        yield Finding(key, title, "note", f"train() keeps {names}; check again once the other problems are fixed.")
    elif _same(with_state, without):
        yield Finding(key, title, "note", f"train() keeps {names}, and the update does not depend on it.")
    else:
        text = (
            f"train() keeps {names}, and the update depends on it: a holder that missed a round, or trained another "
            "shard then, sends another update. Keep it in the model, or let each shard have one holder (uncoded)."
        )
        yield Finding(key, title, "fails", text)


def _files(trials: _Trials, causes: Mapping[str, str]) -> Finding:
    key, title = "files", "files"
    written = sorted({path for outcome in trials.all for path in outcome.written})
    if key in causes:
        return Finding(key, title, "fails", causes[key])
    if trials.shared:
        text = f"train() writes {listed(sorted(trials.shared), 3)} and reads it; the update stays the same."
        return Finding(key, title, "note", text)
    if written:
        return Finding(key, title, "note", f"train() writes {listed(written, 3)}, and reads none of it.")
    return Finding(key, title, "ok", "train() writes no files.")


def _records(trials: _Trials) -> Finding:
    key, title = "records", "records of the reply"
    outcomes = trials.all
    shapes = {tuple(sorted(outcome.records)) for outcome in outcomes}
    if len(shapes) > 1:
        return Finding(key, title, "fails", "Two calls return records of different names or kinds. Return the same.")
    forms = {outcome.sketch.form for outcome in outcomes if outcome.sketch is not None}
    uncodable = next((outcome.uncodable for outcome in outcomes if outcome.uncodable), "")
    if uncodable:
        text = f"A coded vector cannot carry this reply: {uncodable}. Use send='shards'."
        return Finding(key, title, "note", text)
    if len(forms) > 1:
        return Finding(key, title, "fails", "Partitions return arrays of different names, dtypes or shapes.")
    return Finding(key, title, "ok", "One ArrayRecord and one MetricRecord with the number of examples.")


def _number(apart: float) -> str:
    return "without bound" if math.isinf(apart) else f"{apart:.1e}"
