"""The server's settings of a secure run: the public manifest or its body, and what this version can decode of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from .._files import MEGABYTE, read_file
from ..codes import GradientCode
from ..errors import InvalidSetting
from .classes import classes_for
from .manifest import Manifest, ManifestBody, parsed

__all__ = ["SecureAggregation"]

_LARGEST = 64 * MEGABYTE


class SecureAggregation:
    """Settings of a run in which the server learns the sum of the shards' updates, and no single one.

        strategy = GradientCoding(FedAvg(), code, secure=SecureAggregation("/path/to/secagg-manifest.json"))

    Every node has a `secagg-dir`. After a dealer (`deal`), it has the manifest's digest and the seeds of its classes.
    With a body alone (`secagg-body.json`), nodes have identities, and draw and exchange the seeds through the server
    before the first round, and again when a worker comes later. Either way the server needs no secret.

    Args:
        manifest: The public manifest or its body, as a path or a value.
        colluders: Number T of workers whose collusion the graph must withstand; by default the manifest's number. Each
            node checks its own number too.
        min_classes: Fewest classes in a sum; by default the manifest's number.

    Attributes:
        body: The manifest's body.
        manifest: The manifest that a dealer has made; None if keys are set up through the server.

    Raises:
        InvalidSetting: The manifest cannot be read, or holds what a run cannot use yet.
        NotCertified: Its graph does not withstand so many colluders.
    """

    def __init__(
        self,
        manifest: Manifest | ManifestBody | str | os.PathLike[str],
        *,
        colluders: int | None = None,
        min_classes: int | None = None,
    ) -> None:
        found = manifest if isinstance(manifest, Manifest | ManifestBody) else _read(Path(manifest))
        self.manifest = found if isinstance(found, Manifest) else None
        self.body = found.body if isinstance(found, Manifest) else found
        wrong = _not_built(self.body)
        if self.manifest is not None and self.body.identities:
            wrong = "it names identities, which only a set-up through the server uses: pass its body"
        elif self.manifest is None:
            wrong = wrong or self.body.first_use
        if wrong:
            raise InvalidSetting(f"This version cannot run the manifest: {wrong}.")
        self.body.certificate(colluders=colluders, min_classes=min_classes)

    def __repr__(self) -> str:
        if self.manifest is not None:
            return f"SecureAggregation(manifest {self.manifest.digest.hex()[:12]}...)"
        return f"SecureAggregation(body {self.body.digest.hex()[:12]}...)"

    @property
    def send(self) -> Literal["coded", "shards"]:
        """What `GradientCoding(send=)` must be for this manifest, "coded" or "shards"."""
        return "coded" if self.body.classes.sending == "coded" else "shards"

    @property
    def rounding(self) -> float:
        """By how much rounding to integers can change an entry of the sum of weighted updates for one shard more."""
        return 2.0**-self.body.quantiser.fraction_bits * self.body.quantiser.largest_weight

    def check_code(self, code: GradientCode) -> None:
        """Refuse a code that is not the manifest's.

        Raises:
            InvalidCode: Masks do not work with this code.
            InvalidSetting: The manifest was made for another code.
        """
        pinned = self.body.classes
        found = classes_for(code, pinned.sending)
        same = (found.members, found.ring, found.s) == (pinned.members, pinned.ring, pinned.s)
        if not same or not np.array_equal(found.matrix, pinned.matrix):
            size = (found.n, found.k, found.s, found.m)
            alike = size == (pinned.n, pinned.k, pinned.s, pinned.m)
            raise InvalidSetting(
                f"The manifest was made for another code than {code!r}: it has {pinned.n} workers, {pinned.k} shards, "
                f"s={pinned.s} and m={pinned.m}{', as this one, but other holders or coefficients' if alike else ''}. "
                "Make a manifest for this code, or pass the manifest's."
            )


def _read(path: Path) -> Manifest | ManifestBody:
    try:
        text = read_file(path, _LARGEST)
    except OSError as error:
        raise InvalidSetting(f"The manifest {path} cannot be read: {error.strerror or error}.") from None
    return Manifest.from_bytes(text) if "body" in parsed(text) else ManifestBody.from_bytes(text)


def _not_built(body: ManifestBody) -> str:
    """Returns what a run cannot use of a manifest, or an empty string."""
    if len(body.graph.cohorts) != 1:
        return f"it has {len(body.graph.cohorts)} cohorts, and a round has one sum"
    if body.app:
        return "it pins the digest of the app, which a node cannot look up"
    counters = [name for name, dtype, _ in body.arrays if dtype != "bfloat16" and np.dtype(dtype).kind != "f"]
    if counters:
        return f"array {counters[0]!r} holds no floats, and clipped counters are no counters"
    for metrics in (body.metrics, body.evaluation):
        if list(metrics) != sorted(metrics) or body.weight_key in dict(metrics):
            return "its metrics must be sorted by name, without the weight"
    return ""
