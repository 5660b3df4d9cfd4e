"""Whether server and nodes understand each other: each record of ours says of which version it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flwr.app import ConfigRecord

from .errors import VersionMismatch

__all__ = ["PROTOCOL", "explained", "library_version", "read_json", "record_of"]

#: What the records mean. It changes when a plan or a reply does: the other half would misread it.
PROTOCOL = 2
_JSON, _PROTOCOL, _VERSION = "json", "protocol", "version"
#: How a node says it whose version knew no protocols.
_OLD = "Plan.__init__() got an unexpected keyword argument"


def record_of(values: Mapping[str, Any]) -> ConfigRecord:
    """A record that holds them, and our version."""
    return ConfigRecord({_JSON: json.dumps(dict(values)), _PROTOCOL: PROTOCOL, _VERSION: library_version()})


def read_json(record: ConfigRecord, other: str) -> str:
    """What `record_of` was given, as JSON.

    Args:
        record: From the other half.
        other: "server" or "node": who made it.

    Raises:
        VersionMismatch: It is of another protocol; with what to install where.
    """
    protocol: Any = record.get(_PROTOCOL, 1)
    its = str(record.get(_VERSION, "of an older version"))
    if protocol != PROTOCOL:
        server, node = (its, library_version()) if other == "server" else (library_version(), its)
        ours, theirs = (protocol, PROTOCOL) if other == "server" else (PROTOCOL, protocol)
        raise VersionMismatch(
            f"The node has fl-gradcode {node} (protocol {theirs}), and the server {server} (protocol {ours}). "
            f"{_advice(str(server))}"
        )
    return str(record[_JSON])


def explained(reason: str) -> str:
    """A node's error, or what it means if its version is too old to say."""
    if _OLD in reason:
        return f"the node has an older fl-gradcode, and the server {library_version()}. {_advice(library_version())}"
    return reason


@lru_cache(maxsize=1)
def library_version() -> str:
    """Of what is installed here."""
    try:
        return version("fl-gradcode")
    except PackageNotFoundError:  # a checkout on the path
        return "of a checkout"


def _advice(server: str) -> str:
    what = f"'fl-gradcode=={server}'" if server[:1].isdigit() else "the server's version"
    return f"Install the same one on the node (pip install {what}) and start its SuperNode again."
