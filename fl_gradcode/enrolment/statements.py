"""The signed statements of a set-up: hellos, public keys of classes, and confirmations, as values.

All are bound to one set-up: the run, its epoch and the body that the owners agreed on. Keys of classes and
confirmations are also bound to the digest of all hellos, so that whoever was shown other hellos makes statements that
others refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._text import listed, printable
from ..errors import SecureRefused
from ..masking import Field, fields, hash_of
from ..protocol import MOST_WORKERS
from ..secagg import ManifestBody
from .identities import Identity, is_key, is_signed
from .wraps import gives_secret

__all__ = ["ClassKey", "Confirmation", "Hello", "Setup", "check_class_keys", "check_hellos", "leader_of"]

_PROTOCOL = "fl-gradcode/secagg/setup/v1"
_MOST_OF_A_RUN = 1000  # letters
_LATEST = 2**31
_SIGNATURE = 128  # hexadecimal digits


@dataclass(frozen=True)
class Setup:
    """Which set-up a message belongs to.

    Attributes:
        run: Name of the run.
        epoch: Number of the set-up in the run, from 1. A later one replaces all keys of the ones before.
        body: Digest M0 of the manifest's body, as hexadecimal.
    """

    run: str
    epoch: int
    body: str

    def __post_init__(self) -> None:
        if len(self.run) > _MOST_OF_A_RUN or not is_key(self.body):
            raise SecureRefused(f"A set-up names a run by {_MOST_OF_A_RUN} letters or fewer, and a body by its digest.")
        if type(self.epoch) is not int or not 1 <= self.epoch < _LATEST:
            raise SecureRefused(f"The epoch of a set-up is a whole number from 1 to {_LATEST - 1}.")

    def bound(self, what: str, *values: Field) -> bytes:
        """Returns the bytes to sign for a statement of this set-up."""
        return fields(_PROTOCOL, what, *self.label, *values)

    @property
    def label(self) -> tuple[Field, ...]:
        """The fields that all keys and statements of this set-up are bound to."""
        return self.run, bytes.fromhex(self.body), self.epoch

    @property
    def label_of_phase(self) -> str:
        """Name of the set-up among the phases of a run, such as "set-up 1"."""
        return f"set-up {self.epoch}"

    def __str__(self) -> str:
        return f"epoch {self.epoch} of run {printable(self.run, 40)}"


@dataclass(frozen=True)
class Hello:
    """A worker's announcement of its ephemeral key.

    Attributes:
        worker: Number of the worker.
        identity: Its Ed25519 public key, as hexadecimal.
        ephemeral: Its X25519 public key of this epoch, as hexadecimal.
        signature: Under its identity, as hexadecimal.
    """

    worker: int
    identity: str
    ephemeral: str
    signature: str

    @classmethod
    def signed(cls, setup: Setup, identity: Identity, ephemeral: bytes) -> Hello:
        """Returns the hello of an identity."""
        unsigned = cls(identity.worker, identity.public, ephemeral.hex(), "")
        return cls(identity.worker, identity.public, ephemeral.hex(), identity.sign(unsigned._content(setup)))

    def _content(self, setup: Setup) -> bytes:
        return setup.bound("hello", self.worker, bytes.fromhex(self.identity), bytes.fromhex(self.ephemeral))

    def is_genuine(self, setup: Setup) -> bool:
        """Returns whether its identity signed it for this set-up."""
        return is_signed(self.identity, self.signature, self._content(setup))

    @property
    def gives_secret(self) -> bool:
        """Whether its ephemeral key shares a secret with others'."""
        return gives_secret(bytes.fromhex(self.ephemeral))

    def to_list(self) -> list[Any]:
        """Returns the hello as it is sent."""
        return [self.worker, self.identity, self.ephemeral, self.signature]

    @classmethod
    def from_list(cls, values: Any) -> Hello:
        """Returns the hello that was received.

        Raises:
            ValueError: It is none.
        """
        worker, identity, ephemeral, signature = values
        return cls(_worker(worker), _key(identity), _key(ephemeral), _signature(signature))


@dataclass(frozen=True)
class ClassKey:
    """The public key of a class, as its lead holder publishes it.

    Attributes:
        number: Number of the class.
        leader: The lead holder, who drew the seed.
        public: X25519 public key of the class, as hexadecimal.
        commitment: Commitment to the class's data, as hexadecimal; see `data_commitment`.
        signature: Under the lead holder's identity, as hexadecimal.
    """

    number: int
    leader: int
    public: str
    commitment: str
    signature: str

    @classmethod
    def signed(
        cls, setup: Setup, hellos: bytes, identity: Identity, number: int, public: bytes, commitment: bytes
    ) -> ClassKey:
        """Returns the class key that an identity publishes, for the digest of all hellos that it was shown."""
        unsigned = cls(number, identity.worker, public.hex(), commitment.hex(), "")
        signature = identity.sign(unsigned._content(setup, hellos))
        return cls(number, identity.worker, public.hex(), commitment.hex(), signature)

    def _content(self, setup: Setup, hellos: bytes) -> bytes:
        public, commitment = bytes.fromhex(self.public), bytes.fromhex(self.commitment)
        return setup.bound("class", hellos, self.number, self.leader, public, commitment)

    def is_genuine(self, setup: Setup, hellos: bytes, identity: str) -> bool:
        """Returns whether an identity signed it for this set-up and these hellos."""
        return is_signed(identity, self.signature, self._content(setup, hellos))

    @property
    def gives_secret(self) -> bool:
        """Whether the public key shares a secret with other classes'."""
        return gives_secret(bytes.fromhex(self.public))

    def to_list(self) -> list[Any]:
        """Returns the class key as it is sent."""
        return [self.number, self.leader, self.public, self.commitment, self.signature]

    @classmethod
    def from_list(cls, values: Any) -> ClassKey:
        """Returns the class key that was received.

        Raises:
            ValueError: It is none.
        """
        number, leader, public, commitment, signature = values
        if type(number) is not int:
            raise ValueError("the number of a class")
        return cls(number, _worker(leader), _key(public), _key(commitment), _signature(signature))


@dataclass(frozen=True)
class Confirmation:
    """A worker's statement of the manifest that it has computed and will mask under.

    Attributes:
        worker: Number of the worker.
        manifest: Digest M of the manifest, as hexadecimal.
        signature: Under its identity, as hexadecimal.
    """

    worker: int
    manifest: str
    signature: str

    @classmethod
    def signed(cls, setup: Setup, hellos: bytes, identity: Identity, manifest: bytes) -> Confirmation:
        """Returns the confirmation of an identity."""
        content = setup.bound("confirm", hellos, identity.worker, manifest)
        return cls(identity.worker, manifest.hex(), identity.sign(content))

    def is_genuine(self, setup: Setup, hellos: bytes, identity: str) -> bool:
        """Returns whether an identity signed it for this set-up and these hellos."""
        content = setup.bound("confirm", hellos, self.worker, bytes.fromhex(self.manifest))
        return is_signed(identity, self.signature, content)

    def to_list(self) -> list[Any]:
        """Returns the confirmation as it is sent."""
        return [self.worker, self.manifest, self.signature]

    @classmethod
    def from_list(cls, values: Any) -> Confirmation:
        """Returns the confirmation that was received.

        Raises:
            ValueError: It is none.
        """
        worker, manifest, signature = values
        return cls(_worker(worker), _key(manifest), _signature(signature))


def digest_of(hellos: Sequence[Hello]) -> bytes:
    """Returns the digest of all hellos of a set-up, 32 bytes."""
    return hash_of("hellos", *(str(value) for hello in hellos for value in hello.to_list()))


def leader_of(body: ManifestBody, number: int, present: Sequence[int]) -> int | None:
    """Returns the lead holder of a class: the lowest-numbered holder that is present, or None."""
    return min({*body.classes.holders[number]} & {*present}, default=None)


def check_hellos(setup: Setup, body: ManifestBody, hellos: Sequence[Hello]) -> bytes:
    """Check all hellos of a set-up; returns their digest, 32 bytes.

    Raises:
        SecureRefused: A hello is not its worker's for this set-up, too few workers are there, or a class has no holder.
    """
    present = [hello.worker for hello in hellos]
    n, least = body.classes.n, body.classes.n - body.classes.s
    if sorted({*present}) != present or not {*present} <= {*range(n)}:
        raise SecureRefused("The hellos are not of different workers of the code in ascending order.")
    if len({hello.identity for hello in hellos}) != len(hellos):
        raise SecureRefused("Two workers say hello with one identity.")
    for hello in hellos:
        if body.identities and hello.identity != body.identities[hello.worker]:
            raise SecureRefused(f"The hello of worker {hello.worker} has another identity than the allow-list.")
        if not hello.is_genuine(setup):
            raise SecureRefused(f"The hello of worker {hello.worker} is not its own for {setup}.")
        if not hello.gives_secret:
            raise SecureRefused(f"The hello of worker {hello.worker} has an ephemeral key that gives no secret.")
    if len(present) < least:
        raise SecureRefused(f"Hellos of {len(present)} workers are too few: the code needs at least n - s = {least}.")
    lost = [c for c in range(len(body.classes)) if leader_of(body, c, present) is None]
    if lost:
        raise SecureRefused(f"No holder of class {listed(lost)} has said hello.")
    return digest_of(hellos)


def check_class_keys(
    setup: Setup, body: ManifestBody, hellos: Sequence[Hello], digest: bytes, keys: Sequence[ClassKey]
) -> None:
    """Check the public keys of all classes.

    Raises:
        SecureRefused: A class is missing, or its key is not its lead holder's for this set-up and these hellos.
    """
    if [key.number for key in keys] != list(range(len(body.classes))):
        raise SecureRefused(f"The server's set-up does not have one key of each of {len(body.classes)} classes.")
    identities = {hello.worker: hello.identity for hello in hellos}
    for key in keys:
        leader = leader_of(body, key.number, [*identities])
        if key.leader != leader:
            raise SecureRefused(f"The key of class {key.number} is of worker {key.leader}; worker {leader} leads it.")
        if not key.is_genuine(setup, digest, identities[key.leader]):
            raise SecureRefused(
                f"The key of class {key.number} is not one that worker {leader} made for {setup} and these hellos."
            )


def _worker(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST_WORKERS:
        raise ValueError("the number of a worker")
    return value


def _key(value: Any) -> str:
    if not is_key(value):
        raise ValueError("32 bytes")
    return str(value)


def _signature(value: Any) -> str:
    if not isinstance(value, str) or len(value) != _SIGNATURE or {*value} - {*"0123456789abcdef"}:
        raise ValueError("a signature")
    return value
