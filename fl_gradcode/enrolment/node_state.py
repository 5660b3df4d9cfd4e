"""What a node keeps of set-ups on disk, so that a killed node goes on, and no step is answered in two ways."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .._files import MEGABYTE, locked, parse_json, read_file, replacing
from ..errors import InvalidSetting
from ..masking import hash_of
from ..privacy import check_own
from .statements import Setup

__all__ = ["NodeState", "Pending", "Sealed", "StateFile", "name_of_run"]

_FORMAT = "fl-gradcode set-up 1"
_STATE = "secagg-setup.json"
_LARGEST = 256 * MEGABYTE


def name_of_run(setup: Setup) -> str:
    """Returns the short name by which a node remembers the run of a body: the server may choose long names."""
    return "#" + hash_of("run", setup.run, setup.body).hex()[:32]


@dataclass(frozen=True)
class Pending:
    """A set-up that has begun: the node has said hello. All keys and digests are hexadecimal.

    Attributes:
        setup: The set-up.
        ephemeral: Private ephemeral key.
        hello: The answer to the first step, as JSON.
        hellos: Digest of the hellos that the node was shown in the second step; empty before.
        led: The answer to the second step, as JSON; empty before.
        seeds: Class -> seed, of the classes that this node leads.
    """

    setup: Setup
    ephemeral: str = field(repr=False)
    hello: str
    hellos: str = ""
    led: str = ""
    seeds: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Sealed:
    """A set-up that has ended on this node: it masks with these keys. All keys and digests are hexadecimal.

    Attributes:
        setup: The set-up.
        hello: The answer to the first step, as JSON.
        asked: Digest of the request of the third step.
        confirmed: The answer to it, as JSON.
        entries: Public key and commitment of each class.
        seeds: Class -> seed, of all classes that this node holds.
    """

    setup: Setup
    hello: str
    asked: str
    confirmed: str
    entries: Sequence[Sequence[str]]
    seeds: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class NodeState:
    """All that a node keeps.

    Attributes:
        last: Run of a body, as `name_of_run` has it -> the last epoch of it in which the node has said hello. Files of
            earlier versions have the runs' own names.
        known: Worker -> the identity under which it first took part, where no allow-list says it.
        pending: The set-up that has begun; None if there is none.
        sealed: The set-up whose keys the node has; None if there is none.
    """

    last: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    pending: Pending | None = None
    sealed: Sealed | None = None


class StateFile:
    """The file of a node's state; only its owner can read it.

    Args:
        folder: The node's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / _STATE

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time answer: two could give two answers to one step.

        Raises:
            InvalidSetting: The folder cannot be written.
        """
        with locked(self.folder / f".{_STATE}.lock"):
            yield

    def read(self) -> NodeState:
        """Returns the state; that of a new node if there is no file.

        Raises:
            InvalidSetting: The file is damaged, or open to others.
        """
        try:
            check_own(self.path)
            values = parse_json(read_file(self.path, _LARGEST))
            if values["format"] != _FORMAT:
                raise ValueError
            return NodeState(
                {run: _whole(epoch) for run, epoch in values["last"].items()},
                {worker: _text(key) for worker, key in values["known"].items()},
                None if values["pending"] is None else _made(Pending, values["pending"]),
                None if values["sealed"] is None else _made(Sealed, values["sealed"]),
            )
        except FileNotFoundError:
            return NodeState()
        except InvalidSetting:
            raise
        except Exception as error:  # the file may hold anything
            raise InvalidSetting(
                f"The state of set-ups {self.path} cannot be read ({type(error).__name__}). Restore the file, or "
                "remove it: the node then takes part again from the next epoch on."
            ) from None

    def write(self, state: NodeState) -> None:
        """Replace the state; it is on disk once this returns.

        Raises:
            InvalidSetting: It cannot be written. Nothing may be answered then.
        """
        values: dict[str, Any] = {
            "format": _FORMAT,
            "last": dict(state.last),
            "known": dict(state.known),
            "pending": None if state.pending is None else asdict(state.pending),
            "sealed": None if state.sealed is None else asdict(state.sealed),
        }
        try:
            # One name for the draft: what a killed process has left of it, with keys in it, goes with the next one.
            with replacing(self.path, self.path.with_name(f"{self.path.name}.new"), mode=0o600) as file:
                file.write((json.dumps(values) + "\n").encode())
        except OSError as error:
            raise InvalidSetting(f"The state of set-ups {self.path} cannot be written: {error.strerror}.") from None


def _made(kind: Any, values: dict[str, Any]) -> Any:
    if {*values} != {entry.name for entry in fields(kind)}:
        raise ValueError("fields")
    for name, value in values.items():
        if name == "seeds":
            for number, seed in value.items():
                if not number.isdigit() or len(bytes.fromhex(seed)) != 32:
                    raise ValueError("seeds")
        elif name == "entries":
            if not all(len(bytes.fromhex(one)) == 32 for pair in value for one in pair):
                raise ValueError("entries")
        elif name != "setup":
            _text(value)
    return kind(**{**values, "setup": Setup(**values["setup"])})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a whole number")
    return value
