"""The privacy budget ledger: one file for each shard, which outlives rounds, runs and restarts.

A charge is on disk before training begins, so a crash afterwards can only count too much. The same request again costs
nothing, since it gets the same answer. A different request for a round that was answered is refused, since the two
answers could be subtracted from each other.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import MEGABYTE, lock, make_folder, open_file, parse_json, read_file, sync_folder
from ..errors import InvalidSetting, PrivacyRefused
from .accounting import Spend, epsilon_of
from .keys import check_own

__all__ = ["SHARDS_SPENT", "SPENT", "BudgetLedger", "Charge", "Entry", "Request", "refuse_other_unit"]

#: Folders of a node's ledgers in its own: of what records have spent, and of what whole shards have.
SPENT, SHARDS_SPENT = "spent", "spent-shards"

# A server that claims more than so many rounds without this node is wrong, and would fill its disk.
_MOST_MISSED = 10_000
_LARGEST = 256 * MEGABYTE  # of a shard's file; a million rounds
_MOST = 10**9  # of rounds, and of steps in one of them


@dataclass(frozen=True)
class Entry:
    """One line of a shard's file: what one round spent.

    Attributes:
        run: Name of the run.
        round: Server round.
        context: Digest of all that the answer depended on; empty where only other holders were asked.
        spend: The noisy steps.
        data: Digest of what the shard's data are; empty: not known.
    """

    run: str
    round: int
    context: str
    spend: Spend
    data: str = ""


@dataclass(frozen=True)
class Request:
    """What a server asks of a shard.

    Attributes:
        shard: Number of the shard.
        run: Name of the run.
        round: Server round.
        context: Digest of all that the answer depends on.
        spend: The noisy steps that an answer takes.
        earlier: Earlier rounds of this run in which any holder of the shard was asked.
        repeatable: Whether the same request gets the same answer. If not, each answer is a release of its own.
        data: Digest of what the shard's data are; empty: not known.
    """

    shard: int
    run: str
    round: int
    context: str
    spend: Spend
    earlier: Iterable[int] = ()
    repeatable: bool = True
    data: str = ""


@dataclass(frozen=True)
class Charge:
    """What a shard has spent, this request included.

    Attributes:
        run_epsilon: In this run; NaN if it was not wanted.
        total_epsilon: In all runs; NaN if it was not wanted.
        new: False if the request was charged before.
    """

    run_epsilon: float
    total_epsilon: float
    new: bool


class BudgetLedger:
    """Charges requests to the budgets of shards, and refuses those that exceed them.

    Args:
        folder: Folder of the files; made if it is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path_of(self, shard: int) -> Path:
        """Returns the path of the shard's file, which has one JSON line for each round."""
        return self.folder / f"shard-{shard}.jsonl"

    def entries(self, shard: int) -> list[Entry]:
        """Returns all that was spent on a shard, in the order in which it was charged.

        Raises:
            InvalidSetting: The file is damaged.
        """
        return self._read(shard)[0]

    def charge(
        self,
        request: Request,
        *,
        delta: float,
        accountant: str = "prv",
        run_budget: float = float("inf"),
        budget: float = float("inf"),
        budget_delta: float | None = None,
        wanted: bool = True,
    ) -> Charge:
        """Charge a request before its training begins, and rounds of its run that only other holders were asked in.

        Args:
            request: What is asked.
            delta: At which epsilons are computed.
            accountant: By which epsilons are computed: "prv" or "rdp".
            run_budget: Largest epsilon allowed for this run.
            budget: Largest epsilon allowed for all runs together.
            budget_delta: Delta at which `budget` is meant; by default `delta`.
            wanted: Whether epsilons are wanted where nothing limits them. Computing them imports Opacus, which takes
                seconds.

        Raises:
            PrivacyRefused: It would exceed a budget. Or the round was answered to another request, comes before one
                that was answered, or costs something else than earlier rounds of its run. Nothing is written then.
            InvalidSetting: The file is damaged, or cannot be written.
        """
        with self._locked():
            entries, end = self._read(request.shard)
            new = _new_entries(request, [one for one in entries if one.run == request.run])
            after = [*entries, *new]
            if not wanted and run_budget == budget == float("inf"):
                if new:
                    self._append(request.shard, end, new)
                return Charge(math.nan, math.nan, bool(new))
            total = epsilon_of((one.spend for one in after), delta, accountant=accountant)
            ours = [one.spend for one in after if one.run == request.run]
            this_run = total if len(ours) == len(after) else epsilon_of(ours, delta, accountant=accountant)
            if new:
                own = delta if budget_delta is None else budget_delta
                counted = total
                if budget < float("inf"):
                    _refuse_other_data(request, entries)
                    if own != delta:
                        counted = epsilon_of((one.spend for one in after), own, accountant=accountant)
                for what, epsilon, most, at in (
                    ("this run", this_run, run_budget, delta),
                    ("all runs", counted, budget, own),
                ):
                    if epsilon > most:
                        raise PrivacyRefused(
                            f"Shard {request.shard}, round {request.round}: it would bring {what} to epsilon "
                            f"{epsilon:.3g} (delta {at:g}), above the budget of {most:g}."
                        )
                self._append(request.shard, end, new)
            return Charge(this_run, total, bool(new))

    def epsilon(self, shard: int, delta: float, *, accountant: str = "prv") -> float:
        """Returns epsilon of all that was spent on a shard, over all runs."""
        return epsilon_of((one.spend for one in self.entries(shard)), delta, accountant=accountant)

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards that something was spent on, ascending."""
        found = (path.stem.removeprefix("shard-") for path in self.folder.glob("shard-*.jsonl"))
        return sorted(int(name) for name in found if name.isdigit())

    def _read(self, shard: int) -> tuple[list[Entry], int]:
        """Returns the entries, and the size in bytes up to the end of the last whole line."""
        path = self.path_of(shard)
        try:
            check_own(path)
            content = read_file(path, _LARGEST)
        except FileNotFoundError:
            return [], 0
        except OSError as error:
            raise InvalidSetting(f"The ledger of spent privacy {path} cannot be read: {error.strerror}.") from None
        *lines, rest = content.split(b"\n")
        end = len(content) - len(rest)
        if _is_whole(rest):  # only its newline was lost
            lines, end = [*lines, rest], len(content)
        # Any other rest was being written when the power went: its answer had not left.
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(_entry_of(parse_json(line)))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                raise InvalidSetting(
                    f"Line {number} of the ledger of spent privacy {path} cannot be read. Restore the file; without it "
                    "nobody knows what was spent."
                ) from None
        return entries, end

    def _append(self, shard: int, end: int, new: list[Entry]) -> None:
        lines = "".join(
            json.dumps(
                {
                    "run": one.run,
                    "round": one.round,
                    "context": one.context,
                    "noise-multiplier": one.spend.noise_multiplier,
                    "sample-rate": one.spend.sample_rate,
                    "steps": one.spend.steps,
                    "data": one.data,
                }
            )
            + "\n"
            for one in new
        )
        path = self.path_of(shard)
        try:
            first = not path.exists()
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600), "r+b") as file:
                file.truncate(end)
                file.seek(max(0, end - 1))
                whole = end == 0 or file.read(1) == b"\n"
                file.seek(end)
                file.write(lines.encode() if whole else b"\n" + lines.encode())
                file.flush()
                os.fsync(file.fileno())
            if first:
                sync_folder(self.folder)
        except OSError as error:
            raise InvalidSetting(f"The ledger of spent privacy {path} cannot be written: {error.strerror}.") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time charge: two that read before either writes would both find room in the budget."""
        try:
            make_folder(self.folder, mode=0o700)
            opened = open_file(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise InvalidSetting(
                f"The folder for spent privacy {self.folder} cannot be written: {error.strerror}."
            ) from None
        with os.fdopen(opened, "r+b") as file:
            if (problem := lock(file, wait=True)) is not None:  # two that spend at once would count too little
                raise InvalidSetting(
                    f"The folder for spent privacy {self.folder} cannot be locked ({problem.strerror}): it must be on "
                    "a file system with locks, such as a local disk."
                )
            yield


def refuse_other_unit(folder: Path, ledger: str, shard: int) -> None:
    """Refuse to count one budget in two units: a record's epsilon and a whole shard's do not add up.

    Args:
        folder: The node's folder, with both ledgers.
        ledger: The ledger that is going to be charged, `SPENT` or `SHARDS_SPENT`.
        shard: Number of the shard.

    Raises:
        PrivacyRefused: The shard has spent something in the other unit.
    """
    other = SHARDS_SPENT if ledger == SPENT else SPENT
    if BudgetLedger(folder / other).entries(shard):
        units = ("single records", "whole shards") if ledger == SPENT else ("whole shards", "single records")
        raise PrivacyRefused(
            f"Shard {shard}: this request spends privacy of {units[0]}, and this node's folder has a ledger of "
            f"{units[1]}, which one max-epsilon cannot bound together. Give this kind of run a folder of its own."
        )


def _new_entries(request: Request, run: list[Entry]) -> list[Entry]:
    """Returns what the request adds to the entries of its run.

    Raises:
        PrivacyRefused: The request contradicts what the run has spent so far.
    """
    here = f"Shard {request.shard}, round {request.round}"
    other = next((one.spend for one in run if one.spend != request.spend), None)
    if other is not None:
        raise PrivacyRefused(
            f"{here}: run {request.run} was charged {_told(other)} a round so far, and now asks for "
            f"{_told(request.spend)}. Give a run with other settings another name."
        )
    charged = {one.round for one in run}
    answered = {one.round: one.context for one in run if one.context}
    if request.repeatable:
        known = answered.get(request.round)
        if known == request.context:
            return []
        if known is not None:
            raise PrivacyRefused(
                f"{here}: this round was answered before, to a request with other weights or settings. A second answer "
                "could be subtracted from the first."
            )
        if answered and request.round < max(answered):
            raise PrivacyRefused(f"{here}: round {max(answered)} was answered before, and rounds do not go backwards.")
    missed = sorted({r for r in itertools.islice(request.earlier, 10 * _MOST_MISSED) if r < request.round} - charged)
    if len(missed) > _MOST_MISSED:
        raise PrivacyRefused(f"{here}: the server says that more than {_MOST_MISSED} rounds went by without this node.")
    mine = Entry(request.run, request.round, request.context, request.spend, request.data)
    return [*(Entry(request.run, r, "", request.spend, request.data) for r in missed), mine]


def _refuse_other_data(request: Request, entries: list[Entry]) -> None:
    """Refuse a request on other records: a budget belongs to records, and the shard's number comes from the server."""
    if any(one.data and request.data and one.data != request.data for one in entries):
        raise PrivacyRefused(
            f"Shard {request.shard} has other data than the ledger's: its records may have been charged as another "
            "shard's. Where that is not so, give this data a folder of its own (privacy-dir)."
        )


def _is_whole(line: bytes) -> bool:
    """Returns whether a line without a newline is an entry all the same."""
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _entry_of(v: dict[str, Any]) -> Entry:
    """Returns the entry in a line.

    Raises:
        ValueError: A number is none that a charge could have.
    """
    noise, rate, steps, number = v["noise-multiplier"], v["sample-rate"], v["steps"], v["round"]
    if type(steps) is not int or type(number) is not int or not (1 <= steps <= _MOST and 0 <= number <= _MOST):
        raise ValueError("steps and rounds are whole numbers")
    if isinstance(noise, bool) or isinstance(rate, bool) or not (0 < noise < math.inf and 0 < rate <= 1):
        raise ValueError("noise and rate are positive numbers")
    return Entry(
        str(v["run"]), number, str(v["context"]), Spend(float(noise), float(rate), steps), str(v.get("data", ""))
    )


def _told(spend: Spend) -> str:
    return f"{spend.steps} steps at noise multiplier {spend.noise_multiplier:g}, sample rate {spend.sample_rate:g}"
