"""What an operator types, for programs: the `flwr` commands of one SuperLink, each with its answer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["EngineError", "Flwr"]

#: run-config keys that hold a path: made absolute, since the app runs in the engine's working folder.
_PATHS = ("checkpoint", "data-dir", "ledger", "results")


class EngineError(RuntimeError):
    """A SuperLink, a node or a run could not be started."""


class Flwr:
    """The commands, on one of the SuperLinks of config.toml in FLWR_HOME.

    Args:
        environment: With FLWR_HOME.
        superlink: Its name there.
    """

    def __init__(self, environment: Mapping[str, str], superlink: str = "own") -> None:
        self.environment, self._superlink = environment, superlink

    def submit(self, app: Path, run_config: Mapping[str, Any], federation: str = "") -> str:
        """The number of the run.

        Raises:
            EngineError: The app could not be submitted; Flower's own words.
        """
        command = ["run", str(app), self._superlink]
        if run_config:
            command += ["--run-config", " ".join(f"{key}={_toml(key, value)}" for key, value in run_config.items())]
        if federation:
            command += ["--federation-config", federation]
        submitted = self._call(*command)
        run_id = submitted.get("run-id") or submitted.get("run_id")
        if not run_id:
            raise EngineError(f"flwr run failed: {submitted.get('error-message') or submitted}")
        return str(run_id)

    def status(self, run_id: str) -> str:
        """Of a run, such as "running" or "finished:completed"; "unknown" while the SuperLink does not answer."""
        runs = self._call("ls", self._superlink, "--run-id", run_id).get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def stop(self, run_id: str) -> None:
        """Stop a run."""
        self._call("stop", run_id, self._superlink)

    def log(self, run_id: str) -> str:
        """All that a run has logged."""
        done = self._run("log", run_id, self._superlink, "--show")
        return done.stdout + done.stderr

    def register(self, public_key: Path) -> int:
        """The id of the node that has the private key to this one.

        Raises:
            EngineError: The SuperLink refused; Flower's own words.
        """
        answer = self._call("supernode", "register", str(public_key), self._superlink)
        if "node-id" not in answer:
            raise EngineError(f"flwr supernode register failed: {answer.get('error-message')}")
        return int(answer["node-id"])

    def unregister(self, node_id: int) -> None:
        """Refuse this node from now on, for ever.

        Raises:
            EngineError: The SuperLink refused; Flower's own words.
        """
        answer = self._call("supernode", "unregister", str(node_id), self._superlink)
        if "node-id" not in answer:
            raise EngineError(f"flwr supernode unregister failed: {answer.get('error-message')}")

    def nodes(self) -> list[dict[str, Any]]:
        """Registered nodes, with `id`, `status` and their times.

        Raises:
            EngineError: The SuperLink does not answer; Flower's own words.
        """
        answer = self._call("supernode", "list", self._superlink)
        if "nodes" not in answer:
            raise EngineError(f"flwr supernode list failed: {answer.get('error-message')}")
        return [{**node, "id": int(node["node-id"])} for node in answer["nodes"]]

    def _call(self, *command: str) -> dict[str, Any]:
        done = self._run(*command, "--format", "json")
        start = done.stdout.find("{")
        try:
            answer = json.loads(done.stdout[start:]) if start >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        return answer or {"error-message": (done.stdout + done.stderr).strip()}

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["flwr", *command], env=dict(self.environment), capture_output=True, text=True, timeout=120, check=False
        )


def _toml(key: str, value: Any) -> str:
    if key in _PATHS and value:
        value = str(Path(value).expanduser().resolve())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value + "'"
    return str(value)
