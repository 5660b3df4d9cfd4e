"""The server's half of a set-up: it relays what nodes say to each other, and holds no key.

What it checks of their statements is for the run to go well, and so that a node that says what is not its own is left
out by name. The nodes trust none of it, and check everything themselves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from .._text import numbered
from ..errors import FlGradcodeError, InvalidSetting, RoundFailed, SecureRefused, VersionMismatch
from ..grid import Arrival, EarlyStopGrid, StopRule, Wait
from ..protocol import Rejection, rejection_of
from ..runlog import PhaseRow
from ..secagg import Manifest, ManifestBody
from .exchange import Answer, Request
from .statements import ClassKey, Confirmation, Hello, Setup, check_class_keys, check_hellos

__all__ = ["Enrolment", "Relay"]

_log = logging.getLogger(__name__)

#: Claims that a node is a worker, as of a round; returns why it may not be, or None.
Claim = Callable[[int, int, int], Rejection | None]
#: Takes a node's answer; returns what is wrong with it, or an empty string.
Take = Callable[[int, Answer], str]

_ATTEMPTS = 5  # epochs that one set-up may take, since a lead holder may be gone in the middle
_GRACE = 10.0  # seconds to wait for further answers once there are enough
_TRIES = 2  # times that a node which does not say who it is is waited for
_LEAST_TTL = 600.0
_FIRST_USE = (
    "There is no allow-list: nodes trust the identities that this server shows them first, and a server that replaces "
    "them could read the sums of single classes."
)


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


class Relay:
    """Sets up the keys of one run: once before its first round, and again for workers that come later.

    Args:
        body: The body that all owners have agreed on.
        run: Name of the run.
        claim: Claims that a node is a worker.
        save: Called with each new set-up, as JSON values, before anything is masked under it.
        saved: The set-up that a resumed run had, as it was saved; None if it had none.

    Attributes:
        enrolment: The last set-up; None before the first.

    Raises:
        InvalidSetting: What was saved cannot be read.
    """

    def __init__(
        self,
        body: ManifestBody,
        run: str,
        claim: Claim,
        save: Callable[[dict[str, Any]], None] = lambda values: None,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        self.body, self.run = body, run
        self._claim, self._save = claim, save
        self.enrolment = None if saved is None else Enrolment.from_json(run, saved)
        self._epoch = 0 if self.enrolment is None else self.enrolment.setup.epoch
        self._met: set[int] = set()  # nodes that take part in this epoch, or cannot
        self._silent: Counter[int] = Counter()  # node -> how often it did not say in time who it is
        if self.trusts_first_use:
            _log.warning("%s", _FIRST_USE)

    @property
    def trusts_first_use(self) -> bool:
        """Whether no allow-list says who the workers are."""
        return not self.body.identities

    def follow(self, grid: Grid, server_round: int, timeout: float) -> Manifest:
        """Returns the manifest of a round, after a new set-up if there is none yet or a new worker is there.

        Args:
            grid: The grid, an `EarlyStopGrid`.
            server_round: The round.
            timeout: Seconds to wait for the answers to one message.

        Raises:
            RoundFailed: Too few workers take part, and there is no earlier set-up. The message says why.
        """
        assert isinstance(grid, EarlyStopGrid)
        if self.enrolment is None:
            return self._set_up(grid, server_round, timeout)
        owing = grid.owing()
        unmet = [node for node in grid.get_node_ids() if node not in self._met and node not in owing]
        strangers = [node for node in unmet if self._silent[node] < _TRIES]
        if not strangers:
            return self.enrolment.manifest
        # The hello of this epoch: who has its keys says the same again, and only a new worker says a new one.
        setup, there = self.enrolment.setup, {*self.enrolment.hellos}
        new: list[int] = []

        def take(node: int, answer: Answer) -> str:
            wrong = self._hello_of(setup, server_round, node, answer)
            if not wrong and (answer.hello not in there or answer.confirmation is None):
                new.append(answer.worker)
            return wrong

        ask = _Asked(take, setup.label_of_phase, {node: Request(setup, "hello") for node in strangers})
        ask.run(grid, timeout)
        self._met |= {*ask.answered}
        self._silent.update({*strangers} - {*ask.answered})
        if not new:
            return self.enrolment.manifest
        _log.info("%s without keys: they are set up again.", numbered("worker", sorted(new), 11).capitalize())
        try:
            return self._set_up(grid, server_round, timeout)
        except RoundFailed as error:
            _log.warning("The set-up for new workers failed, and the run goes on without them: %s", error)
            return self.enrolment.manifest

    def marked(self, entry: PhaseRow) -> PhaseRow:
        """Returns a ledger row with the origin of the keys that its replies are masked by."""
        if entry.secure is None or self.enrolment is None:
            return entry
        origin = "first-use" if self.trusts_first_use else "allow-list"
        return replace(entry, secure=replace(entry.secure, setup=origin, epoch=self.enrolment.setup.epoch))

    def _set_up(self, grid: EarlyStopGrid, server_round: int, timeout: float) -> Manifest:
        why: list[str] = []
        for _ in range(_ATTEMPTS):
            self._epoch += 1
            setup = Setup(self.run, self._epoch, self.body.digest.hex())
            found = self._attempt(grid, setup, server_round, timeout)
            if isinstance(found, Enrolment):
                self.enrolment = found
                _log.info("Keys are set up for %d of %d workers (%s).", len(found.hellos), self.body.classes.n, setup)
                return found.manifest
            why = found
        raise RoundFailed(f"No keys could be set up in {_ATTEMPTS} attempts. {' '.join(dict.fromkeys(why))}")

    def _attempt(self, grid: EarlyStopGrid, setup: Setup, server_round: int, timeout: float) -> Enrolment | list[str]:
        """Try one epoch; returns the enrolment, or why another one may go better.

        Raises:
            RoundFailed: Another one would not: too few nodes answer, or nodes have confirmed different manifests.
        """
        classes, label = self.body.classes, setup.label_of_phase
        least = classes.n - classes.s
        hello_of: dict[int, tuple[int, Hello]] = {}  # worker -> its node and hello

        def take_hello(node: int, answer: Answer) -> str:
            wrong = self._hello_of(setup, server_round, node, answer)
            if not wrong and answer.hello is not None:
                hello_of[answer.worker] = node, answer.hello
            return wrong

        hello = Request(setup, "hello")
        first = _Asked(take_hello, label, dict.fromkeys(grid.get_node_ids(), hello), least, classes.n, joining=hello)
        first.run(grid, timeout)
        present = sorted(hello_of)
        hellos = tuple(hello_of[worker][1] for worker in present)
        try:
            digest = check_hellos(setup, self.body, hellos)
        except SecureRefused as error:
            if not first.wrong:
                raise RoundFailed(f"{error} Start more nodes, or give them longer by node_timeout=.") from None
            return [str(error), *first.wrong[:3]]

        leaders = sorted({min({*one} & {*present}) for one in classes.holders})
        keys: dict[int, ClassKey] = {}
        boxes: dict[int, dict[int, bytes]] = {worker: {} for worker in present}

        def take_keys(node: int, answer: Answer) -> str:
            wrong = self._other_worker(hello_of, node, answer)
            if not wrong:
                keys.update({key.number: key for key in answer.classes if key.leader == answer.worker})
                for (number, worker), box in answer.wraps.items():
                    boxes.get(worker, {})[number] = box
            return wrong

        lead = Request(setup, "lead", hellos)
        second = _Asked(take_keys, label, {hello_of[worker][0]: lead for worker in leaders})
        second.run(grid, timeout)
        published = tuple(keys[number] for number in sorted(keys))
        try:
            check_class_keys(setup, self.body, hellos, digest, published)
        except SecureRefused as error:
            return [str(error), *second.wrong[:3]]

        public, commitments = (
            tuple(bytes.fromhex(one) for one in column)
            for column in zip(*((key.public, key.commitment) for key in published), strict=True)
        )
        done = Enrolment(setup, Manifest(self.body, public, commitments), hellos)
        self._save(done.to_json())  # before a node masks under it
        confirmed: dict[int, Confirmation] = {}

        def take_confirmation(node: int, answer: Answer) -> str:
            wrong = self._other_worker(hello_of, node, answer)
            if not wrong and answer.confirmation is not None:
                confirmed[answer.worker] = answer.confirmation
            return wrong

        confirm = {
            hello_of[worker][0]: Request(setup, "confirm", hellos, published, boxes[worker]) for worker in present
        }
        third = _Asked(take_confirmation, label, confirm, least)
        third.run(grid, timeout)
        self._check_confirmations(done, digest, confirmed)
        for text in third.wrong[:3]:
            _log.warning("A node does not take part in %s: %s.", setup, text.rstrip("."))
        if not confirmed:
            return third.wrong[:3] or ["No node confirmed its keys."]
        self._met = {*confirm, *(node for node in first.answered if node not in confirm)}
        return done

    def _hello_of(self, setup: Setup, server_round: int, node: int, answer: Answer) -> str:
        """Returns what is wrong with an answer to the first message, or an empty string."""
        hello, worker = answer.hello, answer.worker
        if answer.step != "hello" or hello is None or hello.worker != worker or not 0 <= worker < self.body.classes.n:
            return f"node {node} said no hello as a worker of the code"
        known = {one.worker: one.identity for one in self.enrolment.hellos} if self.enrolment is not None else {}
        expected = self.body.identities[worker] if self.body.identities else known.get(worker, hello.identity)
        if hello.identity != expected or not hello.is_genuine(setup):
            return f"node {node} is not worker {worker}: its hello is not signed by that worker's identity"
        refused = self._claim(node, worker, server_round)
        return "" if refused is None else f"node {node}: {refused.reason}"

    @staticmethod
    def _other_worker(hello_of: Mapping[int, tuple[int, Hello]], node: int, answer: Answer) -> str:
        return "" if hello_of.get(answer.worker, (None,))[0] == node else f"node {node} answers as another worker"

    def _check_confirmations(self, done: Enrolment, digest: bytes, confirmed: Mapping[int, Confirmation]) -> None:
        """Check that all nodes have computed the manifest that the server has.

        Raises:
            RoundFailed: Somebody has not; names them.
        """
        identities, manifest = {one.worker: one.identity for one in done.hellos}, done.manifest.digest.hex()
        wrong = [
            worker
            for worker, one in sorted(confirmed.items())
            if one.worker != worker
            or one.manifest != manifest
            or not one.is_genuine(done.setup, digest, identities[worker])
        ]
        if wrong:
            raise RoundFailed(
                f"{numbered('worker', wrong, 11).capitalize()} confirmed other keys in {done.setup} than the server "
                "has: nothing is asked under them."
            )


class _Asked(StopRule):
    """One message of a set-up: asks nodes, and hands on their answers.

    Args:
        take: Takes an answer.
        label: Name of the phase.
        requests: Node -> what it is asked.
        enough: Number of good answers after which the others have a time of grace; None to wait for all.
        most: Number of good answers after which nobody is waited for; None to wait for all.
        joining: What a node is asked that connects during the wait; None for nothing.
    """

    def __init__(
        self,
        take: Take,
        label: str,
        requests: Mapping[int, Request],
        enough: int | None = None,
        most: int | None = None,
        *,
        joining: Request | None = None,
    ) -> None:
        self.label = label
        self._take, self._requests, self._enough, self._most, self._joining = take, requests, enough, most, joining
        self._good = 0
        self._now: Callable[[], float] = lambda: 0.0
        #: Nodes that have answered, well or not.
        self.answered: list[int] = []
        #: What was wrong with answers, each once.
        self.wrong: list[str] = []

    def run(self, grid: EarlyStopGrid, timeout: float) -> None:
        """Ask the nodes, and wait for their answers."""
        if self._requests:
            self._now = grid.source.now
            grid.expect(self)
            messages = [self._message(node, request) for node, request in self._requests.items()]
            grid.send_and_receive(messages, timeout=timeout)

    @property
    def decided(self) -> bool:
        """Whether all are in, or enough are and the time of grace is over."""
        if self._most is not None and self._good >= self._most:
            return True
        return self.wake_at is not None and self._now() >= self.wake_at

    def offer(self, arrival: Arrival, reply: Message | None, at: float) -> None:
        """Hand on an answer, or note why there is none."""
        wrong = self._read(arrival, reply)
        self.answered.append(arrival.node)
        if wrong:
            self.wrong = [*dict.fromkeys([*self.wrong, wrong])]
            return
        self._good += 1
        if self.wake_at is None and self._enough is not None and self._good >= self._enough:
            self.wake_at = self._now() + max(_GRACE, 2 * at)

    def finish(self, wait: Wait) -> list[Message]:
        """Returns no messages, because `offer` has handed on everything."""
        return []

    def join(self, node: int) -> Message | None:
        """Returns the message for a node that connected during the wait."""
        return None if self._joining is None else self._message(node, self._joining)

    def _message(self, node: int, request: Request) -> Message:
        return Message(request.content(), dst_node_id=node, message_type="train", ttl=_LEAST_TTL, group_id="0")

    def _read(self, arrival: Arrival, reply: Message | None) -> str:
        if reply is None or reply.has_error():
            return arrival.failure if reply is None else rejection_of(reply).reason
        try:
            return self._take(arrival.node, Answer.find_in(reply.content))
        except (ValueError, VersionMismatch) as error:
            return f"node {arrival.node}: {error}"
