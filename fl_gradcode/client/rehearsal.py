"""A node's part in a rehearsal: before a vector leaves in a run, the holders of a class compare tags of their integers.

Two holders that compute different integers would show the server their difference. So a node answers nothing in a run
until more than half of the holders of each of its classes have shown that they compute what it does. Two majorities
have a holder in common, which has one answer to a rehearsal: so all nodes that answer have computed the same there.
This finds honest mistakes. A server that rehearses another model than it trains learns nothing of them here, and may
see the difference of two holders later.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .._files import replace_file
from ..errors import SecureRefused
from ..privacy import check_own
from ..secagg import ClassKeys, Parts, agreement_tag

__all__ = ["Rehearsal"]

_BYTES = 32


class Rehearsal:
    """What a node keeps of the rehearsal of one run, in two files of its folder.

    Args:
        folder: The node's folder.
        keys: Its keys.
        run: Name of the run.
    """

    def __init__(self, folder: Path, keys: ClassKeys, run: str) -> None:
        self._keys = keys
        name = hashlib.sha256(keys.manifest.digest + run.encode()).hexdigest()[:32]
        self._expected = folder / f"rehearsal-{name}.json"
        self._passed = folder / f"rehearsed-{name}"

    def check(self) -> None:
        """Refuse to answer if the manifest has a rehearsal and this run's has not been passed.

        Raises:
            SecureRefused: Its holders have not been compared.
        """
        if not self._keys.manifest.body.rehearsal:
            return
        try:
            check_own(self._passed)
            found = self._passed.exists()
        except FileNotFoundError:
            found = False
        if not found:
            raise SecureRefused("The holders of this node's classes have not compared what they compute in this run.")

    def tags(self, request: bytes, integers: Mapping[int, Parts]) -> bytes:
        """Returns this node's tags of its classes, 32 bytes each, after writing down those that its fellows must have.

        Args:
            request: Digest R of the rehearsal.
            integers: The integers of each class that the node sends, before masking.
        """
        keys, classes = self._keys, self._keys.manifest.body.classes
        expected: dict[str, dict[str, str]] = {}
        mine = b""
        for c, parts in integers.items():
            content = np.concatenate([parts[part] for part in sorted(parts)])
            tag = {w: agreement_tag(keys.seeds[c], request, w, content) for w in self._holders(c)}
            expected[str(c)] = {str(worker): one.hex() for worker, one in tag.items()}
            mine += tag[keys.worker]
        assert tuple(integers) == classes.sent_by(keys.worker)
        self._passed.unlink(missing_ok=True)  # a new rehearsal has to be passed anew
        replace_file(self._expected, json.dumps(expected), mode=0o600)
        return mine

    def compare(self, tags: Mapping[int, str]) -> None:
        """Check the tags of the other holders, and note that the rehearsal is passed.

        Args:
            tags: Worker -> its tags in the order of its classes, as hexadecimal.

        Raises:
            SecureRefused: A holder has other integers, or too few holders are there. The text names workers alone.
        """
        try:
            check_own(self._expected)
            expected = json.loads(self._expected.read_text())
            self._passed.unlink(missing_ok=True)
        except FileNotFoundError:
            raise SecureRefused("This node has not rehearsed this run.") from None
        for c in self._keys.manifest.body.classes.sent_by(self._keys.worker):
            holders = self._holders(c)
            agree = {self._keys.worker}
            for worker in holders:
                if worker == self._keys.worker or worker not in tags:
                    continue
                if not hmac.compare_digest(self._tag_of(tags[worker], worker, c), expected[str(c)][str(worker)]):
                    raise SecureRefused(
                        f"Workers {self._keys.worker} and {worker} compute different integers from the same data: they "
                        "need the same kind of processor, libraries and threads."
                    )
                agree.add(worker)
            if 2 * len(agree) <= len(holders):
                raise SecureRefused(
                    f"{len(agree)} of the {len(holders)} holders of a class of worker {self._keys.worker} have "
                    "rehearsed; more than half are needed."
                )
        replace_file(self._passed, "", mode=0o600)

    def _holders(self, number: int) -> list[int]:
        classes = self._keys.manifest.body.classes
        return [worker for worker in range(classes.n) if number in classes.sent_by(worker)]

    def _tag_of(self, tags: str, worker: int, number: int) -> str:
        place = self._keys.manifest.body.classes.sent_by(worker).index(number)
        return tags[2 * _BYTES * place : 2 * _BYTES * (place + 1)]
