"""How the holders of a class compare what they compute: before a vector leaves in a run, and after each round.

Two holders that compute different integers show the server their difference. So a node answers nothing in a run until
more than half of the holders of each of its classes have shown, by keyed tags, that they compute what it does: the
rehearsal. Two majorities have a holder in common, which has one answer to a rehearsal: so all nodes that pass it have
computed the same there. The tags of a round travel with its replies, and are shown to the holders with the next plan:
a node that differs then sends no further vector until it has passed another rehearsal.

A server can show no tags, or fewer, and cannot make any. So this finds honest mistakes, and what it bounds of a server
that deviates is what a node's owner sets: how many vectors leave that a majority has not confirmed.

Under a manifest with agree="always", each answer is kept back until a majority has shown the same integers for the same
request. Of two majorities, one holder is in both, and it has one tag of a request. So whatever the server shows, no two
answers leave that differ.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import MEGABYTE, locked, parse_json, read_file, replace_file
from ..errors import InvalidSetting, SecureRefused
from ..privacy import check_own
from ..secagg import TAG_BYTES, ClassKeys, Parts, agreement_tag, shown_tag

__all__ = ["ComparedHolders"]

_STATE = "comparisons.json"
_LARGEST = 64 * MEGABYTE
_RUNS, _ANSWERS = 4, 4  # that are remembered: a run that is not has to be rehearsed again
_NOT_COMPARED = "The holders of this node's classes have not compared what they compute in this run."
_log = logging.getLogger(__name__)


class ComparedHolders:
    """What a node knows of the other holders of its classes, in one file of its folder.

    Args:
        folder: The node's folder.
        keys: Its keys.
        run: Name of the run.
        most: Most answers, in all runs, of which no majority of the holders has shown that they agree; None for no
            limit. A confirmed answer takes nothing from those that are not: the server chooses what it asks between.
    """

    def __init__(self, folder: Path, keys: ClassKeys, run: str, most: int | None = None) -> None:
        self._keys, self._most = keys, most
        self._path = folder / _STATE
        self._run = hashlib.sha256(keys.manifest.digest + run.encode()).hexdigest()[:32]

    @property
    def needed(self) -> bool:
        """Whether the manifest says that holders are compared."""
        return self._keys.manifest.body.rehearsal

    @property
    def always(self) -> bool:
        """Whether the manifest says that holders are compared before each answer."""
        return self._keys.manifest.body.always

    # The rehearsal

    def rehearsed(self, request: bytes, integers: Mapping[int, Parts]) -> bytes:
        """Returns this node's tags of a rehearsal, 32 bytes a class, after writing down what its fellows' must be.

        Args:
            request: Digest R of the rehearsal.
            integers: The integers of each class that the node sends, before masking.
        """
        expected = self._expected(request, integers)
        for path in (*self._path.parent.glob("rehearsal-*.json"), *self._path.parent.glob("rehearsed-*")):
            path.unlink(missing_ok=True)  # of an earlier version
        with self._changing() as state:
            runs = state["runs"]
            runs.pop(self._run, None)
            runs[self._run] = {"tags": expected, "passed": False}  # a new rehearsal has to be passed anew
            state["runs"] = dict([*runs.items()][-_RUNS:])
        return self._own(expected)

    def compare(self, tags: Mapping[int, str]) -> None:
        """Check the tags of the other holders in a rehearsal, and note that it is passed.

        Args:
            tags: Worker -> its tags in the order of its classes, as hexadecimal.

        Raises:
            SecureRefused: Not more than half of the holders have the same integers. The text names workers alone.
        """
        with self._changing() as state:
            run = state["runs"].get(self._run)
            if run is None:
                raise SecureRefused("This node has not rehearsed this run.")
            run["passed"] = False
        self._refuse_minority(run["tags"], tags)
        with self._changing() as state:
            if state["runs"].get(self._run, {}).get("tags") != run["tags"]:
                raise SecureRefused("This node has rehearsed again meanwhile.")
            state["runs"][self._run]["passed"] = True

    # Rounds

    def agreed(self, label: str, tags: Mapping[int, str], tagged: str) -> tuple[bytes, bytes]:
        """Returns the request whose answer may leave, and this node's tags of that answer.

        Args:
            label: Kind and round that are asked for, such as "train 3".
            tags: Worker -> its tags in the order of its classes, as hexadecimal.
            tagged: What they are the tags of: kind, round and request.

        Raises:
            SecureRefused: This node has computed nothing for the request, or not more than half of the holders have
                shown the same integers. The text names workers alone.
        """
        shown, _, request = tagged.rpartition(" ")
        with self._changing() as state:
            found = [one for one in state["answers"] if (one["run"], one["label"]) == (self._run, label)]
        if shown != label or not found or found[0]["request"] != request:
            raise SecureRefused(f"This node has computed nothing for the request of {label} that it is shown tags of.")
        self._refuse_minority(found[0]["tags"], tags)
        return bytes.fromhex(request), self._own(found[0]["tags"])

    def check(self, tags: Mapping[int, str], tagged: str) -> None:
        """Look at the tags of an earlier answer, and refuse to go on unless this run's holders are known to agree.

        Args:
            tags: Worker -> its tags in the order of its classes, as hexadecimal, with dots for a class it did not tag.
            tagged: What they are the tags of: kind, round and request, as `note` writes it.

        Raises:
            SecureRefused: There was no rehearsal in this run, holders have been seen to differ since, or too many
                answers were not confirmed. The text names workers alone.
        """
        if not self.needed:
            return
        refusal = ""
        with self._changing() as state:
            self._may_answer(state)
            label, _, request = tagged.rpartition(" ")
            mine = [one for one in state["answers"] if one["run"] == self._run and one["label"] == label]
            for answer in mine if tags else ():
                if answer["request"] != request:
                    refusal = f"The server has sent other holders another request of {label} than this node."
                    break
                found = {c: self._shown(int(c), expected, tags) for c, expected in answer["tags"].items()}
                apart = [differ for agree, differ in found.values() if differ and len(agree) <= len(differ)]
                if apart:
                    refusal = self._different(apart[0])
                    break
                for _, differ in found.values():
                    self._tell(differ)
                if all(2 * len(agree) > len(answer["tags"][c]) for c, (agree, _) in found.items()):
                    state["answers"].remove(answer)
                    state["unconfirmed"] -= 1
            if refusal:
                state["runs"][self._run]["passed"] = False
            elif self._most is not None and state["unconfirmed"] >= self._most:
                raise SecureRefused(self._too_many())
        if refusal:
            raise SecureRefused(refusal)

    def note(self, label: str, request: bytes, integers: Mapping[int, Parts]) -> bytes:
        """Returns this node's tags of an answer, 32 bytes a class, after writing down what its fellows' must be.

        Args:
            label: Kind and round, such as "train 3".
            request: Digest R of the request.
            integers: The integers of the classes that are answered for, before masking.

        Raises:
            SecureRefused: The holders differ, or too many answers were not confirmed; see `check`.
        """
        if not (self.needed or self.always):
            return b""
        expected = self._expected(request, integers)
        with self._changing() as state:
            if self.needed:
                self._may_answer(state)  # another process may have learnt more meanwhile
            answers = state["answers"]
            key = {"run": self._run, "label": label, "request": request.hex()}
            known = next((one for one in answers if {**one, **key} == one), None)
            if known is not None:  # a further shard, or a process that was killed
                known["tags"] |= expected
                return self._own(expected)
            if self.needed:
                if self._most is not None and state["unconfirmed"] >= self._most:
                    raise SecureRefused(self._too_many())
                state["unconfirmed"] += 1
            state["answers"] = [*answers, {**key, "tags": expected}][-_ANSWERS:]
        return self._own(expected)

    def _may_answer(self, state: Mapping[str, Any]) -> None:
        if not state["runs"].get(self._run, {}).get("passed"):
            raise SecureRefused(_NOT_COMPARED)

    # Tags

    def _expected(self, request: bytes, integers: Mapping[int, Parts]) -> dict[str, dict[str, list[str]]]:
        """Returns class -> worker -> the tag that this holder must have, and the one if its training has failed.

        A class that has failed is poisoned by a stream that nobody else knows, so it differs from all others and shows
        nothing. Holders of which one has failed, for want of memory perhaps, are not known to compute other integers.
        """
        failed = _words(hashlib.sha256(b"failed"))
        expected = {}
        for c, parts in integers.items():
            content = failed
            if not parts["status"].any():
                digest = hashlib.sha256()
                for part in sorted(parts):
                    digest.update(parts[part].astype("<u4", copy=False).data)
                content = _words(digest)
            expected[str(c)] = {
                str(w): [agreement_tag(self._keys.seeds[c], request, w, one).hex() for one in (content, failed)]
                for w in self._holders(c)
            }
        return expected

    def _own(self, expected: Mapping[str, Mapping[str, Sequence[str]]]) -> bytes:
        me = str(self._keys.worker)
        return b"".join(bytes.fromhex(tags[me][0]) for _, tags in sorted(expected.items(), key=lambda one: int(one[0])))

    def _refuse_minority(self, expected_of: Mapping[str, Mapping[str, Sequence[str]]], tags: Mapping[int, str]) -> None:
        """Refuse to go on unless more than half of the holders of each class have shown the same integers.

        Raises:
            SecureRefused: They have not. The text names workers alone.
        """
        for c, expected in sorted(expected_of.items(), key=lambda one: int(one[0])):
            agree, differ = self._shown(int(c), expected, tags)
            if 2 * len(agree) > len(expected):
                self._tell(differ)
                continue
            if differ:
                raise SecureRefused(self._different(differ))
            raise SecureRefused(
                f"{len(agree)} of the {len(expected)} holders of a class of worker {self._keys.worker} have shown that "
                "they compute the same; more than half are needed."
            )

    def _shown(
        self, number: int, expected: Mapping[str, Sequence[str]], tags: Mapping[int, str]
    ) -> tuple[set[int], set[int]]:
        """Returns the holders of a class that show the tag they must, this node included, and those that do not.

        Those that show none, or of which one has failed, are in neither set.
        """
        agree: set[int] = {self._keys.worker}
        differ: set[int] = set()
        for worker, (theirs, failed) in ((int(one), pair) for one, pair in expected.items()):
            if worker == self._keys.worker or worker not in tags:
                continue
            place = self._keys.manifest.body.classes.sent_by(worker).index(number)
            shown = shown_tag(tags[worker], place)
            if shown and hmac.compare_digest(shown.encode(), theirs.encode()):
                agree.add(worker)
            elif shown and theirs != failed and not hmac.compare_digest(shown.encode(), failed.encode()):
                differ.add(worker)
        return agree, differ

    def _holders(self, number: int) -> list[int]:
        classes = self._keys.manifest.body.classes
        return [worker for worker in range(classes.n) if number in classes.sent_by(worker)]

    def _different(self, others: Iterable[int]) -> str:
        return (
            f"Workers {self._keys.worker} and {min(others)} compute different integers from the same data: they need "
            "the same kind of processor, libraries and threads."
        )

    def _tell(self, others: Iterable[int]) -> None:
        for worker in sorted(others):
            _log.warning("Worker %d computes other integers than this node and most holders of its shards.", worker)

    def _too_many(self) -> str:
        return (
            f"No majority of the holders has shown that it agrees with {self._most} answers of this node, as many as "
            "its owner allows."
        )

    # The file

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The state, which is written if no error is raised; one process at a time has it."""
        with locked(self._path.with_name(f".{_STATE}.lock")):
            state = self._read()
            before = json.dumps(state)
            yield state
            after = json.dumps(state)
            if after != before:
                replace_file(self._path, after, mode=0o600)

    def _read(self) -> dict[str, Any]:
        try:
            check_own(self._path)
            values = parse_json(read_file(self._path, _LARGEST))
            runs, answers, unconfirmed = values["runs"], values["answers"], values["unconfirmed"]
            if type(unconfirmed) is not int or not isinstance(runs, dict) or not isinstance(answers, list):
                raise ValueError
        except FileNotFoundError:
            return {"runs": {}, "answers": [], "unconfirmed": 0}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidSetting(
                f"The file {self._path} cannot be read ({type(error).__name__}). Remove it: this node then takes part "
                "again after the next rehearsal."
            ) from None
        return {"runs": runs, "answers": answers, "unconfirmed": unconfirmed}


def _words(digest: Any) -> NDArray[np.uint32]:
    return np.frombuffer(digest.digest(), "<u4")


assert hashlib.sha256().digest_size == TAG_BYTES
