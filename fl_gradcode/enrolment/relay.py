"""The server's half of a set-up: it relays what nodes say to each other, and holds no key.

What it checks of their statements is for the run to go well, and so that a node that says what is not its own is left
out by name. The nodes trust none of it, and check everything themselves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.serverapp import Grid

from .._text import numbered
from ..errors import RoundFailed
from ..grid import EarlyStopGrid
from ..protocol import Rejection
from ..runlog import PhaseRow
from ..secagg import Manifest, ManifestBody
from .asking import Asked
from .attempt import Attempt, Enrolment
from .exchange import Answer, Request
from .statements import Setup, digest_of

__all__ = ["Relay"]

_log = logging.getLogger(__name__)

#: Claims that a node is a worker, as of a round; returns why it may not be, or None.
Claim = Callable[[int, int, int], Rejection | None]

_ATTEMPTS = 5  # epochs that one set-up may take, since a lead holder may be gone in the middle
_TRIES = 2  # times that a node which does not say who it is is waited for
_FIRST_USE = (
    "There is no allow-list: nodes trust the identities that this server shows them first, and a server that replaces "
    "them could read the sums of single classes."
)


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
        self._met: set[int] = set()  # nodes that have confirmed their keys in this epoch, or cannot
        self._unheard: dict[int, Request] = {}  # worker -> the third message of this epoch, which it has not answered
        self._silent: Counter[int] = Counter()  # node -> how often it did not say in time who it is
        if self.trusts_first_use:
            _log.warning("%s", _FIRST_USE)

    @property
    def trusts_first_use(self) -> bool:
        """Whether no allow-list says who the workers are."""
        return not self.body.identities

    def follow(self, grid: Grid, server_round: int, timeout: float, patience: float | None) -> Manifest:
        """Returns the manifest of a round, after a new set-up if there is none yet or a new worker is there.

        Args:
            grid: The grid, an `EarlyStopGrid`.
            server_round: The round.
            timeout: Seconds to wait for the answers to one message of nodes that are up.
            patience: Seconds to wait for the first answers, as a round waits for replies; None for no limit.

        Raises:
            RoundFailed: Too few workers take part, and there is no earlier set-up. The message says why.
        """
        assert isinstance(grid, EarlyStopGrid)
        if self.enrolment is None:
            return self._set_up(grid, server_round, timeout, patience)
        owing = grid.owing()
        unmet = [node for node in grid.get_node_ids() if node not in self._met and node not in owing]
        strangers = [node for node in unmet if self._silent[node] < _TRIES]
        if not strangers:
            return self.enrolment.manifest
        # The hello of this epoch: who has its keys says the same again, and only a new worker says a new one.
        setup, there = self.enrolment.setup, {*self.enrolment.hellos}
        new: list[int] = []
        lacking: dict[int, int] = {}  # node that said hello in this epoch, and has no keys yet -> its worker

        def take(node: int, answer: Answer) -> str:
            wrong = self._hello_of(setup, server_round, (), node, answer)
            if not wrong and answer.hello in there and answer.confirmation is None and answer.worker in self._unheard:
                lacking[node] = answer.worker
            elif not wrong and (answer.hello not in there or answer.confirmation is None):
                new.append(answer.worker)
            return wrong

        ask = Asked(take, setup.label_of_phase, {node: Request(setup, "hello") for node in strangers})
        ask.run(grid, timeout)
        self._met |= {*ask.answered} - lacking.keys()
        self._silent.update({*strangers} - {*ask.answered})
        self._show_again(grid, lacking, timeout)
        if not new:
            return self.enrolment.manifest
        _log.info("%s without keys: they are set up again.", numbered("worker", sorted(new), 11).capitalize())
        try:
            return self._set_up(grid, server_round, timeout, patience)
        except RoundFailed as error:
            if self.enrolment is None:
                raise
            _log.warning("The set-up for new workers failed, and the run goes on without them: %s", error)
            return self.enrolment.manifest

    def _show_again(self, grid: EarlyStopGrid, lacking: Mapping[int, int], timeout: float) -> None:
        """Ask workers once more to confirm the keys of this epoch, which keeps the keys of all others."""
        enrolment = self.enrolment
        assert enrolment is not None
        if not lacking:
            return
        digest, identities = digest_of(enrolment.hellos), {one.worker: one.identity for one in enrolment.hellos}

        def take(node: int, answer: Answer) -> str:
            worker, one = answer.worker, answer.confirmation
            if one is None or not worker == one.worker == lacking[node]:
                return f"node {node} answers as another worker"
            self._met.add(node)
            genuine = one.is_genuine(enrolment.setup, digest, identities[worker])
            if not genuine or one.manifest != enrolment.manifest.digest.hex():
                return f"worker {worker} confirmed other keys in {enrolment.setup} than the server has"
            del self._unheard[worker]
            return ""

        requests = {node: self._unheard[worker] for node, worker in lacking.items()}
        ask = Asked(take, enrolment.setup.label_of_phase, requests)
        ask.run(grid, timeout)
        self._silent.update(lacking.keys() - self._met)  # asked a second time, and then no more in this epoch
        for text in ask.wrong[:3]:
            _log.warning("A node does not take part in %s: %s.", enrolment.setup, text.rstrip("."))

    def marked(self, entry: PhaseRow) -> PhaseRow:
        """Returns a ledger row with the origin of the keys that its replies are masked by."""
        if entry.secure is None or self.enrolment is None:
            return entry
        origin = "first-use" if self.trusts_first_use else "allow-list"
        return replace(entry, secure=replace(entry.secure, setup=origin, epoch=self.enrolment.setup.epoch))

    def _set_up(self, grid: EarlyStopGrid, server_round: int, timeout: float, patience: float | None) -> Manifest:
        unfit: set[int] = set()  # lead holders that failed: the next in line takes their place
        attempt: Attempt | None = None
        for _ in range(_ATTEMPTS):
            self._epoch += 1
            setup = Setup(self.run, self._epoch, self.body.digest.hex())
            take = partial(self._hello_of, setup, server_round, unfit)
            attempt = Attempt(self.body, setup, grid, timeout, patience, take, self._save)
            try:
                found = attempt.run()
            finally:
                if attempt.shown:
                    self.enrolment = None  # nodes may have erased the keys of the epoch before
            if found is not None:
                self.enrolment = found
                self._met = attempt.heard | ({*attempt.answered} - attempt.nodes)
                self._unheard = attempt.unheard
                for node in attempt.answered:
                    self._silent.pop(node, None)
                _log.info("Keys are set up for %d of %d workers (%s).", len(found.hellos), self.body.classes.n, setup)
                return found.manifest
            if len(unfit | attempt.unfit) <= self.body.classes.s:  # of more, the epoch may be the reason
                unfit |= attempt.unfit
        why = "" if attempt is None else " ".join(dict.fromkeys(attempt.why))
        raise RoundFailed(f"No keys could be set up in {_ATTEMPTS} attempts. {why}")

    def _hello_of(self, setup: Setup, server_round: int, unfit: Collection[int], node: int, answer: Answer) -> str:
        """Returns what is wrong with an answer to the first message, or an empty string."""
        hello, worker = answer.hello, answer.worker
        if worker in unfit:
            return f"worker {worker} is left out, since it gave no key that others take of a class that it led"
        if answer.step != "hello" or hello is None or hello.worker != worker or not 0 <= worker < self.body.classes.n:
            return f"node {node} said no hello as a worker of the code"
        known = {one.worker: one.identity for one in self.enrolment.hellos} if self.enrolment is not None else {}
        expected = self.body.identities[worker] if self.body.identities else known.get(worker, hello.identity)
        if hello.identity != expected or not hello.is_genuine(setup):
            return f"node {node} is not worker {worker}: its hello is not signed by that worker's identity"
        if not hello.gives_secret:  # the nodes would refuse all hellos because of this one
            return f"worker {worker} (node {node}) said hello with an ephemeral key that gives no secret"
        refused = self._claim(node, worker, server_round)
        return "" if refused is None else f"node {node}: {refused.reason}"
