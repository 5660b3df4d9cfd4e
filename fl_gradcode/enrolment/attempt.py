"""One epoch of a set-up on the server: three messages, and what each worker said in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._text import numbered
from ..errors import FlGradcodeError, InvalidSetting, RoundFailed, SecureRefused
from ..grid import EarlyStopGrid
from ..secagg import Manifest, ManifestBody
from .asking import Asked, Take
from .exchange import Answer, Request
from .statements import ClassKey, Hello, Setup, check_hellos, leader_of

__all__ = ["Attempt", "Enrolment"]

_log = logging.getLogger(__name__)
_SLOWER = 3  # times as long as for the slowest hello are later answers waited for


@dataclass(frozen=True, eq=False)
class Enrolment:
    """A set-up that has ended.

    Attributes:
        setup: The set-up.
        manifest: The manifest under which nodes mask.
        hellos: The hellos of all workers that took part.
    """

    setup: Setup
    manifest: Manifest
    hellos: tuple[Hello, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON values; nothing of it is secret."""
        return {
            "epoch": self.setup.epoch,
            "manifest": self.manifest.to_bytes().decode(),
            "hellos": [hello.to_list() for hello in self.hellos],
        }

    @classmethod
    def from_json(cls, run: str, values: Mapping[str, Any]) -> Enrolment:
        """Returns the enrolment that was saved for a run.

        Raises:
            InvalidSetting: The values are none.
        """
        try:
            manifest = Manifest.from_bytes(str(values["manifest"]).encode())
            setup = Setup(run, values["epoch"], manifest.body.digest.hex())
            return cls(setup, manifest, tuple(map(Hello.from_list, values["hellos"])))
        except (FlGradcodeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidSetting(
                f"The set-up of masks beside the checkpoint cannot be read ({type(error).__name__}). Remove it: nodes "
                "then set up new keys."
            ) from None


class Attempt:
    """Asks all nodes the three messages of one epoch.

    A worker that answers wrongly harms itself: what is not its own to say is not heard.

    Args:
        body: The body.
        setup: The set-up.
        grid: The grid.
        timeout: Seconds to wait at least for the answers to the second and the third message.
        patience: Seconds to wait for hellos; None for no limit. Nodes may only just be starting up.
        take_hello: Takes a node's hello.
        save: Called with the enrolment, as JSON values, before a node masks under it.

    Attributes:
        answered: Nodes that have answered the first message, well or not.
        unfit: Workers that lead a class and gave no key of it.
        why: Why the attempt failed, as sentences; empty if it did not.
        shown: Whether nodes were shown the keys, and may have left the epoch before.
        heard: Nodes that have confirmed some keys, these or others.
        unheard: Worker -> the third message, which it has not answered.
    """

    def __init__(
        self,
        body: ManifestBody,
        setup: Setup,
        grid: EarlyStopGrid,
        timeout: float,
        patience: float | None,
        take_hello: Take,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.body, self.setup = body, setup
        self._grid, self._timeout, self._patience = grid, timeout, patience
        self._take_hello, self._save = take_hello, save
        self._least = body.classes.n - body.classes.s
        self._node_of: dict[int, int] = {}
        self._hellos: tuple[Hello, ...] = ()
        self._digest = b""
        self.answered: list[int] = []
        self.unfit: set[int] = set()
        self.why: list[str] = []
        self.shown = False
        self.heard: set[int] = set()
        self.unheard: dict[int, Request] = {}

    @property
    def nodes(self) -> set[int]:
        """The nodes whose workers take part."""
        return {self._node_of[hello.worker] for hello in self._hellos}

    def run(self) -> Enrolment | None:
        """Returns the enrolment, or None if another attempt may go better.

        Raises:
            RoundFailed: Another one would not: too few nodes answer, or too few confirm the same keys.
        """
        if not self._greet():
            return None
        keys, boxes = self._lead()
        if self.unfit:
            return None
        ordered = [keys[number] for number in range(len(self.body.classes))]
        manifest = Manifest(
            self.body,
            tuple(bytes.fromhex(key.public) for key in ordered),
            tuple(bytes.fromhex(key.commitment) for key in ordered),
        )
        done = Enrolment(self.setup, manifest, self._hellos)
        self._save(done.to_json())
        self.shown = True
        return done if self._confirm(done, tuple(ordered), boxes) else None

    def _greet(self) -> bool:
        """Ask for hellos; returns whether they suffice."""
        found: dict[int, Hello] = {}
        over: list[int] = []

        def take(node: int, answer: Answer) -> str:
            wrong = self._take_hello(node, answer)
            if answer.confirmation is not None:
                over.append(node)
            if not wrong and answer.hello is not None:
                found[answer.worker], self._node_of[answer.worker] = answer.hello, node
            return wrong

        request = Request(self.setup, "hello")
        asked = Asked(
            take,
            self.setup.label_of_phase,
            dict.fromkeys(self._grid.get_node_ids(), request),
            self._least,
            self.body.classes.n,
            joining=request,
        )
        asked.run(self._grid, self._patience)
        self.answered = asked.answered
        self._timeout = max(self._timeout, _SLOWER * asked.slowest)
        self._hellos = tuple(found[worker] for worker in sorted(found))
        if over:  # a server that lost its files counts from 1 again
            self.why = [f"Nodes have keys of {self.setup} already."]
            return False
        try:
            self._digest = check_hellos(self.setup, self.body, self._hellos)
        except SecureRefused as error:
            if not asked.wrong:
                raise RoundFailed(f"{error} Start more nodes, or give them longer by timeout=.") from None
            self.why = [str(error), *asked.wrong[:3]]
        return not self.why

    def _lead(self) -> tuple[dict[int, ClassKey], dict[int, dict[int, bytes]]]:
        """Ask the lead holders; returns the public key of each class, and for each worker the wraps for it."""
        identities = {hello.worker: hello.identity for hello in self._hellos}
        leaders = {c: leader_of(self.body, c, [*identities]) for c in range(len(self.body.classes))}
        keys: dict[int, ClassKey] = {}
        boxes: dict[int, dict[int, bytes]] = {worker: {} for worker in identities}

        def take(node: int, answer: Answer) -> str:
            worker = answer.worker
            if self._node_of.get(worker) != node:
                return f"node {node} answers as another worker"
            for key in answer.classes:
                own = key.leader == worker == leaders.get(key.number)
                if own and key.gives_secret and key.is_genuine(self.setup, self._digest, identities[worker]):
                    keys[key.number] = key
            for (number, to), box in answer.wraps.items():
                if leaders.get(number) == worker and to in boxes:
                    boxes[to][number] = box
            return ""

        request = Request(self.setup, "lead", self._hellos)
        asked = Asked(
            take,
            self.setup.label_of_phase,
            {self._node_of[one]: request for one in leaders.values() if one is not None},
        )
        asked.run(self._grid, self._timeout)
        self.unfit = {worker for c, worker in leaders.items() if c not in keys and worker is not None}
        if self.unfit:
            who = numbered("worker", sorted(self.unfit), 11).capitalize()
            self.why = [f"{who} gave no key of the classes to lead in {self.setup}.", *asked.wrong[:3]]
        return keys, boxes

    def _confirm(self, done: Enrolment, keys: tuple[ClassKey, ...], boxes: Mapping[int, Mapping[int, bytes]]) -> bool:
        """Show the keys to all workers; returns whether so many have confirmed them that rounds decode.

        Raises:
            RoundFailed: So many have confirmed other keys that the rest cannot decode.
        """
        identities, manifest = {hello.worker: hello.identity for hello in self._hellos}, done.manifest.digest.hex()
        other: list[int] = []
        good: list[int] = []

        def take(node: int, answer: Answer) -> str:
            worker, one = answer.worker, answer.confirmation
            if self._node_of.get(worker) != node or one is None:
                return f"node {node} answers as another worker"
            genuine = one.worker == worker and one.is_genuine(self.setup, self._digest, identities[worker])
            (good if genuine and one.manifest == manifest else other).append(worker)
            self.heard.add(node)
            return ""

        confirm = {
            self._node_of[worker]: Request(self.setup, "confirm", self._hellos, keys, boxes[worker])
            for worker in identities
        }
        asked = Asked(take, self.setup.label_of_phase, confirm, self._least)
        asked.run(self._grid, self._timeout)
        silent = [worker for worker in identities if self._node_of[worker] not in self.heard]
        self.unheard = {worker: confirm[self._node_of[worker]] for worker in silent}
        for text in asked.wrong[:3]:
            _log.warning("A node does not take part in %s: %s.", self.setup, text.rstrip("."))
        self.unfit = self._blamed({*asked.answered} - self.heard, keys)
        if self.unfit:
            who = numbered("worker", sorted(self.unfit), 11)
            self.why = [f"Most holders refuse the keys of {who} in {self.setup}.", *asked.wrong[:3]]
            return False
        if other:
            who = numbered("worker", sorted(other), 11).capitalize()
            if len(identities) - len(other) < self._least:
                raise RoundFailed(f"{who} confirmed other keys in {self.setup} than the server has.")
            _log.warning("%s confirmed other keys in %s than the server has, and cannot help.", who, self.setup)
        if len(good) < self._least:
            self.why = [
                f"{len(good)} of {len(identities)} workers confirmed their keys in {self.setup}.",
                *asked.wrong[:3],
            ]
        return len(good) >= self._least

    def _blamed(self, refusing: set[int], keys: tuple[ClassKey, ...]) -> set[int]:
        """Returns the lead holders of which several other holders of a class, and most of them, refuse the key.

        One that refuses may be the liar itself.
        """
        blamed = set()
        for key in keys:
            others = [one.worker for one in self._hellos if one.worker in self.body.classes.holders[key.number]]
            others.remove(key.leader)
            refuse = [worker for worker in others if self._node_of[worker] in refusing]
            if len(refuse) > 1 and 2 * len(refuse) > len(others):
                blamed.add(key.leader)
        return blamed
