"""TLS and authenticated SuperNodes for the engine, made by the scripts that an operator uses, those in deploy/."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

__all__ = ["Security"]

_DEPLOY = Path(__file__).resolve().parents[1] / "deploy"


class Security:
    """An authority and a certificate for 127.0.0.1, and one key for each node, in a folder.

    Args:
        folder: Where they are made, if they are not there yet.
        nodes: How many keys.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.authority = folder / "ca.crt"
        self._certificate, self._key = folder / "server.crt", folder / "server.key"
        self._keys = [folder / "keys" / f"node-{number}" for number in range(nodes)]
        if not self._certificate.exists():
            _script("make-certificates.sh", str(folder), "127.0.0.1")
        for key in self._keys:
            if not key.exists():
                _script("make-node-key.sh", str(key))

    def private_key(self, number: int) -> Path:
        """What node `number` proves with who it is."""
        return self._keys[number]

    def public_key(self, number: int) -> Path:
        """What is registered for node `number`."""
        return self._keys[number].with_name(f"{self._keys[number].name}.pub")

    def superlink_options(self) -> list[str]:
        """Options of flower-superlink."""
        return [
            *("--ssl-ca-certfile", str(self.authority)),
            *("--ssl-certfile", str(self._certificate)),
            *("--ssl-keyfile", str(self._key)),
            "--enable-supernode-auth",
        ]

    def supernode_options(self, number: int) -> list[str]:
        """Options of flower-supernode, for node `number`."""
        return [
            *("--root-certificates", str(self.authority)),
            *("--auth-supernode-private-key", str(self.private_key(number))),
        ]

    def context(self) -> ssl.SSLContext:
        """For our own requests to the SuperLink."""
        return ssl.create_default_context(cafile=str(self.authority))


def _script(name: str, *arguments: str) -> None:
    done = subprocess.run([str(_DEPLOY / name), *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
