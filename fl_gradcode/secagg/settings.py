"""The server's settings of a secure run: the public manifest, and what this version can decode of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .._files import MEGABYTE, read_file
from ..codes import GradientCode
from ..errors import InvalidSetting
from .classes import classes_for
from .manifest import Manifest

__all__ = ["SecureAggregation"]

_LARGEST = 64 * MEGABYTE


class SecureAggregation:
    """Settings of a run in which the server learns the sum of the shards' updates, and no single one.

        strategy = GradientCoding(FedAvg(), code, secure=SecureAggregation("/path/to/secagg-manifest.json"))

    Every node has a `secagg-dir` with this manifest's digest and the seeds of its classes; see `deal`. The server needs
    no secret.

    Args:
        manifest: The public manifest, as a path or a value.
        colluders: Number T of workers whose collusion the graph must withstand; by default the manifest's number. Each
            node checks its own number too.
        min_classes: Fewest classes in a sum; by default the manifest's number.

    Attributes:
        manifest: The manifest.

    Raises:
        InvalidSetting: The manifest cannot be read, or holds what a run cannot use yet.
        NotCertified: Its graph does not withstand so many colluders.
    """

    def __init__(
        self,
        manifest: Manifest | str | os.PathLike[str],
        *,
        colluders: int | None = None,
        min_classes: int | None = None,
    ) -> None:
        if isinstance(manifest, Manifest):
            self.manifest = manifest
        else:
            try:
                self.manifest = Manifest.from_bytes(read_file(Path(manifest), _LARGEST))
            except OSError as error:
                raise InvalidSetting(f"The manifest {manifest} cannot be read: {error.strerror or error}.") from None
        wrong = _not_built(self.manifest)
        if wrong:
            raise InvalidSetting(f"This version cannot run the manifest: {wrong}.")
        self.manifest.body.certificate(colluders=colluders, min_classes=min_classes)

    def __repr__(self) -> str:
        return f"SecureAggregation(manifest {self.manifest.digest.hex()[:12]}...)"

    @property
    def send(self) -> str:
        """What `GradientCoding(send=)` must be for this manifest, "coded" or "shards"."""
        return "coded" if self.manifest.body.classes.sending == "coded" else "shards"

    def check_code(self, code: GradientCode) -> None:
        """Refuse a code that is not the manifest's.

        Raises:
            InvalidCode: Masks do not work with this code.
            InvalidSetting: The manifest was made for another code.
        """
        pinned = self.manifest.body.classes
        found = classes_for(code, pinned.sending)
        same = (found.members, found.ring, found.s) == (pinned.members, pinned.ring, pinned.s)
        if not same or not np.array_equal(found.matrix, pinned.matrix):
            raise InvalidSetting(
                f"The manifest was made for another code than {code!r}: it has {pinned.n} workers, {pinned.k} shards, "
                f"s={pinned.s} and m={pinned.m}. Make a manifest for this code, or pass the manifest's."
            )


def _not_built(manifest: Manifest) -> str:
    """Returns what a run cannot use of a manifest, or an empty string."""
    body = manifest.body
    if len(body.graph.cohorts) != 1:
        return f"it has {len(body.graph.cohorts)} cohorts, and a round has one sum"
    if body.quantiser.noise:
        return "it has integer noise, which no run accounts for yet"
    if body.identities:
        return "it names identities, which only a set-up through the server would use"
    if body.app:
        return "it pins the digest of the app, which a node cannot look up"
    counters = [name for name, dtype, _ in body.arrays if dtype != "bfloat16" and np.dtype(dtype).kind != "f"]
    if counters:
        return f"array {counters[0]!r} holds no floats, and clipped counters are no counters"
    for metrics in (body.metrics, body.evaluation):
        if list(metrics) != sorted(metrics) or body.weight_key in dict(metrics):
            return "its metrics must be sorted by name, without the weight"
    return ""
