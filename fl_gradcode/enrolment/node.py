"""A node's half of a set-up: what it checks before it answers each step, and the keys that it masks with afterwards.

A node draws one ephemeral key an epoch, and answers each step of an epoch once: the same request gets the same bytes
again, and another one is refused. So whatever the server replays, reorders or replaces, there is at most one set of
keys for an epoch on a node.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import InvalidSetting, SecureRefused
from ..masking import KEY_BYTES, hash_of
from ..secagg import Manifest, check_data, class_keys, manifest_entry
from .agreement import agreed_body, check_identities, is_agreed
from .exchange import Answer, Request
from .identities import read_identity
from .node_state import NodeState, Pending, Sealed, StateFile, name_of_run
from .statements import ClassKey, Confirmation, Hello, Setup, check_class_keys, check_hellos, digest_of, leader_of
from .wraps import ephemeral_key, unwrap, wrap

__all__ = ["EnrolledNode"]

_log = logging.getLogger(__name__)
# Runs whose last epochs are remembered. None is ever forgotten: its first epoch would begin again with other keys.
_RUNS = 100_000


class EnrolledNode:
    """A node whose keys are set up through the server.

    Args:
        folder: The node's folder, with its identity and the body that its owner agreed to.
        worker: Number of the worker.
        allowed: Public keys of the owner's allow-list; None if the node config names none.

    Attributes:
        body: The body.

    Raises:
        SecureRefused: The node is another worker, or the body has other identities than the allow-list.
        InvalidSetting: A file of the node cannot be used.
    """

    def __init__(self, folder: Path, worker: int, allowed: Sequence[str] | None) -> None:
        self._file, self._identity = StateFile(folder), read_identity(folder)
        self.body = agreed_body(folder)
        if self._identity.worker != worker:
            raise SecureRefused(f"This node is worker {worker}, and its identity is of worker {self._identity.worker}.")
        try:
            check_identities(self.body, allowed)
        except InvalidSetting as error:
            raise SecureRefused(str(error)) from None
        if self.body.identities and self.body.identities[worker] != self._identity.public:
            raise SecureRefused(f"The allow-list has another key of worker {worker} than this node's identity.")

    @property
    def worker(self) -> int:
        """Number of the worker."""
        return self._identity.worker

    @property
    def told(self) -> str:
        """Which keys the node has, in words for its owner."""
        state = self._file.read()
        if state.sealed is not None and state.sealed.setup.body == self.body.digest.hex():
            manifest = self._manifest(state.sealed.entries)
            return f"of {state.sealed.setup}, manifest {manifest.digest.hex()}"
        return "none yet" if state.pending is None else f"none yet; {state.pending.setup} has begun"

    def answer(self, request: Request, data: Mapping[int, str]) -> Answer:
        """Returns the answer to a step, after writing it to disk.

        Args:
            request: What the server asks.
            data: For each shard of this node, the digest of its data; empty if they are not known.

        Raises:
            SecureRefused: A rule of the set-up forbids the answer. The text depends on no data.
            InvalidSetting: A file of the node cannot be used.
        """
        if request.setup.body != self.body.digest.hex():
            raise SecureRefused("The server sets up keys for another body than this node's owner agreed to.")
        with self._file.locked():
            if not is_agreed(self._file.folder, self.body):
                raise SecureRefused("The owner of this node has just agreed to another body.")
            state = self._file.read()
            if request.step == "hello":
                return self._hello(request.setup, state)
            if request.step == "lead":
                return self._lead(request, state, data)
            return self._confirm(request, state, data)

    def keys_of(self, run: str) -> tuple[Manifest, dict[int, bytes]]:
        """Returns the manifest and the seeds of the run's last set-up.

        Raises:
            SecureRefused: No set-up of this run has ended on this node, or its owner has agreed to another body since.
        """
        sealed = self._file.read().sealed
        if sealed is None or sealed.setup.run != run:
            raise SecureRefused("No set-up of this run has ended on this node, so it has no keys to mask with.")
        if sealed.setup.body != self.body.digest.hex():
            raise SecureRefused("The owner of this node has agreed to another body since its keys were set up.")
        return self._manifest(sealed.entries), {
            int(number): bytes.fromhex(seed) for number, seed in sealed.seeds.items()
        }

    def _hello(self, setup: Setup, state: NodeState) -> Answer:
        pending, sealed = state.pending, state.sealed
        if sealed is not None and sealed.setup == setup:
            return replace(Answer.from_json(sealed.hello), confirmation=Answer.from_json(sealed.confirmed).confirmation)
        if pending is not None and pending.setup == setup:
            return Answer.from_json(pending.hello)
        run = name_of_run(setup)
        latest = max(state.last.get(run, 0), state.last.get(setup.run, 0))
        if setup.epoch <= latest:
            raise SecureRefused(f"Epoch {setup.epoch} of this run is over: this node has said hello in epoch {latest}.")
        if run not in state.last and len(state.last) >= _RUNS:
            raise SecureRefused(
                f"This node has taken part in {_RUNS} runs, and remembers no more. Its owner may begin again in "
                "another folder, with a new identity."
            )
        if not self.body.identities:
            _log.warning(
                "There is no allow-list: this node trusts the identities that the server shows it first. A server that "
                "replaces them reads the sums of single classes."
            )
        private, public = ephemeral_key()
        hello = Answer(self.worker, "hello", Hello.signed(setup, self._identity, public))
        pending = Pending(setup, private.hex(), hello.to_json())
        last = {**state.last, run: setup.epoch}
        self._file.write(replace(state, last=last, pending=pending))
        return hello

    def _lead(self, request: Request, state: NodeState, data: Mapping[int, str]) -> Answer:
        pending = self._begun(request.setup, state)
        digest = digest_of(request.hellos)
        if pending.hellos:
            if pending.hellos != digest.hex():
                raise SecureRefused(f"This node was shown other hellos in {request.setup} before.")
            if pending.led:
                return Answer.from_json(pending.led)
        known = self._check_hellos(request, pending, state)
        hellos = {hello.worker: hello for hello in request.hellos}
        seeds, keys, wraps = {}, [], {}
        for c in self.body.classes.supports[self.worker]:
            if leader_of(self.body, c, [*hellos]) != self.worker:
                continue
            seed = seeds[c] = secrets.token_bytes(KEY_BYTES)
            public, commitment = manifest_entry(self.body, c, seed, data)
            keys.append(ClassKey.signed(request.setup, digest, self._identity, c, public, commitment))
            for other in self.body.classes.holders[c]:
                if other in hellos and other != self.worker:
                    label = _label(request.setup, digest, keys[-1], other)
                    theirs = bytes.fromhex(hellos[other].ephemeral)
                    wraps[c, other] = wrap(seed, bytes.fromhex(pending.ephemeral), theirs, *label)
        if not keys:
            raise SecureRefused("The server asks for keys of classes, and this node leads none.")
        answer = Answer(self.worker, "lead", None, tuple(keys), wraps)
        kept = {str(c): seed.hex() for c, seed in seeds.items()}
        pending = replace(pending, hellos=digest.hex(), led=answer.to_json(), seeds=kept)
        # On disk before a wrap leaves: a second seed under the same ephemeral keys would be a second message.
        self._file.write(replace(state, known=known, pending=pending))
        return answer

    def _confirm(self, request: Request, state: NodeState, data: Mapping[int, str]) -> Answer:
        asked = _digest_of(request).hex()
        if state.sealed is not None and state.sealed.setup == request.setup:
            if state.sealed.asked != asked:
                raise SecureRefused(f"This node has confirmed other keys in {request.setup} before.")
            return Answer.from_json(state.sealed.confirmed)
        pending = self._begun(request.setup, state)
        digest = digest_of(request.hellos)
        if pending.hellos and pending.hellos != digest.hex():
            raise SecureRefused(f"This node was shown other hellos in {request.setup} before.")
        known = self._check_hellos(request, pending, state)
        check_class_keys(request.setup, self.body, request.hellos, digest, request.classes)
        seeds = self._seeds_in(request, pending, digest)
        entries = [[key.public, key.commitment] for key in request.classes]
        manifest = self._manifest(entries)
        class_keys(manifest, self.worker, seeds).edge_keys([*seeds])  # a key of small order is refused here
        check_data(manifest, seeds, data)
        confirmation = Confirmation.signed(request.setup, digest, self._identity, manifest.digest)
        answer = Answer(self.worker, "confirm", confirmation=confirmation)
        kept = {str(c): seed.hex() for c, seed in seeds.items()}
        sealed = Sealed(request.setup, pending.hello, asked, answer.to_json(), entries, kept)
        # The ephemeral key, and the keys of the epoch before, are erased here.
        self._file.write(replace(state, known=known, pending=None, sealed=sealed))
        return answer

    def _manifest(self, entries: Sequence[Sequence[str]]) -> Manifest:
        public, commitments = (tuple(bytes.fromhex(pair[side]) for pair in entries) for side in (0, 1))
        return Manifest(self.body, public, commitments)

    def _begun(self, setup: Setup, state: NodeState) -> Pending:
        if state.pending is None or state.pending.setup != setup:
            raise SecureRefused(f"This node is not in {setup}: it has said no hello for it, or a later one.")
        return state.pending

    def _check_hellos(self, request: Request, pending: Pending, state: NodeState) -> dict[str, str]:
        """Check the hellos that a step shows; returns the identities that are known from now on.

        Raises:
            SecureRefused: One is not genuine, this node's own is not among them, or an identity has changed.
        """
        check_hellos(request.setup, self.body, request.hellos)
        own = Answer.from_json(pending.hello).hello
        if own not in request.hellos:
            raise SecureRefused("The hellos that the server shows lack this node's own.")
        if self.body.identities:
            return dict(state.known)
        for hello in request.hellos:
            if state.known.get(str(hello.worker), hello.identity) != hello.identity:
                raise SecureRefused(
                    f"Worker {hello.worker} has another identity than in the first set-up. If its owner has made a new "
                    "one, agree on a body with an allow-list."
                )
        return {**state.known, **{str(hello.worker): hello.identity for hello in request.hellos}}

    def _seeds_in(self, request: Request, pending: Pending, digest: bytes) -> dict[int, bytes]:
        """Returns the seed of each class of this node: those that it has drawn, and those in the wraps for it.

        Raises:
            SecureRefused: A wrap is missing or not the lead holder's.
        """
        hellos = {hello.worker: hello for hello in request.hellos}
        seeds = {int(number): bytes.fromhex(seed) for number, seed in pending.seeds.items()}
        for c in self.body.classes.supports[self.worker]:
            key = request.classes[c]
            if key.leader == self.worker:
                continue  # drawn here; `class_keys` checks that it is there
            if c not in request.wraps:
                raise SecureRefused(f"The server's set-up has no seed of class {c} for worker {self.worker}.")
            theirs = bytes.fromhex(hellos[key.leader].ephemeral)
            label = _label(request.setup, digest, key, self.worker)
            seeds[c] = unwrap(request.wraps[c], bytes.fromhex(pending.ephemeral), theirs, *label)
        return seeds


def _label(setup: Setup, hellos: bytes, key: ClassKey, worker: int) -> tuple[bytes | str | int, ...]:
    """Returns what a wrap is bound to; the hellos' digest stands for both ephemeral keys."""
    return *setup.label, hellos, key.number, key.leader, worker, bytes.fromhex(key.public)


def _digest_of(request: Request) -> bytes:
    classes = (str(value) for key in request.classes for value in key.to_list())
    wraps = (field for number, box in sorted(request.wraps.items()) for field in (number, box))
    return hash_of("confirm", digest_of(request.hellos), len(request.classes), *classes, *wraps)
