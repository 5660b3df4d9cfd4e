"""The requests that a node has answered, and the bytes of its last replies, on disk before a reply leaves.

A mask may cover one message only. So a node answers one request for each run, kind and round. The same request again
gets the same bytes, which are never computed a second time: a result that differs in one bit would be a second message
under the same mask.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .._files import locked, parse_json, read_file, replace_file, sync_folder
from ..errors import InvalidSetting, SecureRefused
from ..privacy import check_own

__all__ = ["Answered", "AnsweredRequests"]

_LEDGER = "answered.jsonl"
# Runs whose last replies are kept.
_RUNS = 4
_HASHED = 4096  # bytes of the ledger: some rows
_HEAD_BYTES = 100


def _digest_of(content: bytes) -> str:
    """Returns the digest of the last rows, which tells ledgers of the same length apart."""
    return hashlib.sha256(content[-_HASHED:]).hexdigest()


@dataclass(frozen=True)
class Answered:
    """One line of the ledger.

    Attributes:
        run: Name of the run.
        kind: "train", "evaluate" or "rehearse".
        round: Server round, or the number of a rehearsal.
        request: Digest R of the request, as hexadecimal.
        number: The class that was answered for, with one shard a message; None for a coded vector.
    """

    run: str
    kind: str
    round: int
    request: str
    number: int | None = None

    @property
    def name(self) -> str:
        """Name of the file with the bytes of the reply."""
        return f"reply-{self.request}{'' if self.number is None else f'-{self.number}'}.bin"


class AnsweredRequests:
    """A node's ledger of answered requests with the replies of the last rounds.

    Beside the folder there is a small file that tells how far the ledger went, so that a ledger which was lost, or
    came back from an old backup, is noticed. Who deletes both allows a server to ask each round a second time.

    Args:
        folder: Folder of the files; made if it is missing. Only the owner can read it. The name of the file beside it
            ends in "-head.json".
        most: Most requests that this node ever answers, in all runs; None: no limit. The server chooses the names of
            runs, so only this bounds how many sums it can ask for. All single shards of a round are one request.
    """

    def __init__(self, folder: str | os.PathLike[str], *, most: int | None = None) -> None:
        self.folder, self.most = Path(folder), most

    def reply_to(self, run: str, kind: str, round: int, request: bytes, number: int | None = None) -> bytes | None:
        """Returns the bytes of the reply that was given to this request, or None if it is new and may be answered.

        Raises:
            SecureRefused: Another request of this round was answered, or a later round, or the bytes are gone, or the
                node has answered as many requests as its owner allows. The text does not depend on data.
            InvalidSetting: The ledger is damaged.
        """
        with self._locked():
            return self._known(Answered(run, kind, round, request.hex(), number), self._read()[0])

    def keep(self, run: str, kind: str, round: int, request: bytes, reply: bytes, number: int | None = None) -> bytes:
        """Write a reply to disk and returns the bytes to send, which are the earlier ones if it was answered meanwhile.

        The bytes are on disk before the ledger says that the request was answered, and both before they are sent.

        Raises:
            SecureRefused: See `reply_to`.
            InvalidSetting: The ledger is damaged, or cannot be written.
        """
        new = Answered(run, kind, round, request.hex(), number)
        with self._locked():
            rows, end = self._read()
            earlier = self._known(new, rows)
            if earlier is not None:
                return earlier
            try:
                replace_file(self.folder / new.name, reply, mode=0o600)
                self._append(new, end)
            except OSError as error:
                raise InvalidSetting(f"The folder {self.folder} cannot be written: {error.strerror}.") from None
            self._drop([*rows, new])
        return reply

    @property
    def _head(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-head.json")

    def _write_head(self, size: int, digest: str) -> None:
        """Note how far the ledger goes, after its row: a ledger may be ahead of its head, as a kill leaves it.

        It is written in one piece and not synced, which would take as long as all the rest: a power cut may take it
        back.
        """
        text = json.dumps([size, digest]).ljust(_HEAD_BYTES).encode()
        file = os.open(self._head, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            os.write(file, text)
        finally:
            os.close(file)

    def _check_head(self, content: bytes, end: int) -> None:
        """Refuse a ledger that lacks what it had before.

        Raises:
            InvalidSetting: It is shorter than it was, or another one.
        """
        try:
            check_own(self._head)
            content_of_head = read_file(self._head, 10 * _HEAD_BYTES)
            if not content_of_head.strip(b"\0"):  # a power cut took it
                return
            size, digest = parse_json(content_of_head)
            known = type(size) is int and size <= end and _digest_of(content[:size]) == digest
        except FileNotFoundError:  # the first request, or the first one since this file is written
            return
        except (OSError, ValueError, TypeError) as error:
            raise InvalidSetting(
                f"The file {self._head} cannot be read ({type(error).__name__}). Restore it."
            ) from None
        if not known:
            raise InvalidSetting(
                f"The ledger {self.folder / _LEDGER} lacks requests that this node has answered. Restore the file: "
                "without it a round could be answered twice. If it is lost, the keys beside it must not be used again: "
                "make new ones in another folder."
            )

    def rows(self) -> list[Answered]:
        """Returns all answers, oldest first."""
        return self._read()[0]

    def _known(self, new: Answered, rows: list[Answered]) -> bytes | None:
        here = f"round {new.round} ({new.kind})"
        same_kind = [row for row in rows if (row.run, row.kind) == (new.run, new.kind)]
        same_round = [row for row in same_kind if row.round == new.round]
        if any(row.request != new.request for row in same_round):
            raise SecureRefused(f"Another request for {here} of this run was answered before.")
        if new in same_round:
            try:
                return (self.folder / new.name).read_bytes()
            except OSError:
                raise SecureRefused(f"The reply to {here} is no longer kept, and is not computed again.") from None
        if any(row.round > new.round for row in same_kind):
            raise SecureRefused(f"A request for a later round than {here} was answered before.")
        if same_round:  # a further shard of a request that counts already
            return None
        if self.most is not None and len({(row.run, row.kind, row.round) for row in rows}) >= self.most:
            raise SecureRefused(f"This node has answered {self.most} requests, as many as its owner allows.")
        return None

    def _drop(self, rows: list[Answered]) -> None:
        """Remove all replies but the last one of each kind in the last runs."""
        last = {(row.run, row.kind): row.request for row in rows}
        runs = list(dict.fromkeys(row.run for row in reversed(rows)))[:_RUNS]
        kept = {row.name for row in rows if row.run in runs and row.request == last[row.run, row.kind]}
        # A killed process may have left the draft of a reply; the ledger is locked, so nobody is writing one now.
        for path in (*self.folder.glob("reply-*.bin"), *self.folder.glob(".reply-*.new")):
            if path.name not in kept:
                with suppress(OSError):  # it takes space, and no more
                    path.unlink()

    def _read(self) -> tuple[list[Answered], int]:
        """Returns the rows, and the size in bytes up to the end of the last whole line."""
        path = self.folder / _LEDGER
        try:
            check_own(path)
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise InvalidSetting(f"The ledger {path} cannot be read: {error.strerror}.") from None
        *lines, rest = content.split(b"\n")  # a rest without newline was being written: its reply had not left
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                row = Answered(**values)
                if type(row.round) is not int or len(bytes.fromhex(row.request)) != 32:
                    raise ValueError
                if row.number is not None and type(row.number) is not int:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise InvalidSetting(
                    f"Line {number} of the ledger {path} cannot be read. Restore the file: without it a round could be "
                    "answered twice."
                ) from None
            rows.append(row)
        end = len(content) - len(rest)
        self._check_head(content, end)
        return rows, end

    def _append(self, row: Answered, end: int) -> None:
        path = self.folder / _LEDGER
        first = not path.exists()
        values = {name: value for name, value in vars(row).items() if value is not None}
        line = json.dumps(values) + "\n"
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600), "r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            file.seek(max(0, end + len(line) - _HASHED))
            tail = file.read()
        if first:
            sync_folder(self.folder)
        self._write_head(end + len(line), _digest_of(tail))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time answer: two could give two answers to one round."""
        with locked(self.folder / ".lock", mode=0o700):
            yield
