"""Flower's engines for experiments and tests: a SuperLink of our own, on free ports, in a FLWR_HOME of its own.

Every process that is started here is stopped here, by its pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

__all__ = ["Engine", "EngineError", "Outcome"]

#: run-config keys that hold a path: made absolute, since the app runs in the engine's working folder.
_PATHS = ("data-dir", "ledger", "results")
_START_SECONDS = 60.0


class EngineError(RuntimeError):
    """A SuperLink or a run could not be started."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: Flower's status, such as "finished:completed", and everything it logged."""

    run_id: str
    status: str
    log: str

    @property
    def completed(self) -> bool:
        """Whether the ServerApp ended without an exception."""
        return self.status == "finished:completed"


class Engine:
    """A SuperLink, in simulation or deployment mode, as a context manager.

    Args:
        nodes: Number of nodes: simulated ones, or SuperNode processes.
        deployed: Real SuperNode processes instead of the simulation engine.
        folder: Where logs and FLWR_HOME go; a temporary folder by default.
        cpus: Actors of the simulation.
        node_config: Of a SuperNode: what its node config holds besides partition-id and num-partitions.
    """

    def __init__(
        self,
        nodes: int,
        *,
        deployed: bool = False,
        folder: Path | None = None,
        cpus: int = 2,
        node_config: Callable[[int], str] = lambda number: "",
    ) -> None:
        self.nodes, self.deployed, self.cpus = nodes, deployed, cpus
        self._node_config = node_config
        self._temporary = tempfile.TemporaryDirectory(prefix="fl-gradcode-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or ".").resolve()
        self._link_port, self._control_port = _free_port(), _free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        home = self.folder / "flwr-home"
        bin_folder = str(Path(sys.executable).parent)  # flower-superexec and others are started by name
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PATH": bin_folder + os.pathsep + os.environ.get("PATH", ""),
        }

    def __enter__(self) -> Engine:
        """Start the SuperLink and, if deployed, the SuperNodes."""
        home = self.folder / "flwr-home"
        home.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{self._link_port}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "{address}"\ninsecure = true\n'
        )
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self._link_port)]
        command += ["--disable-runtime-dependency-installation"]
        if not self.deployed:
            control = f"127.0.0.1:{self._control_port}"
            command += ["--simulation", "--isolation", "subprocess", "--control-api-address", control]
        try:
            self._start(command, "superlink")
            self._wait_until_healthy(address)
            if self.deployed:
                for number in range(self.nodes):
                    self.start_node(number)
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self._stop_all()
        if self._temporary is not None:
            self._temporary.cleanup()

    def start_node(self, number: int) -> subprocess.Popen[bytes]:
        """Start the SuperNode with this partition-id."""
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self._link_port}"]
        command += ["--host", "127.0.0.1", "--port", str(_free_port())]
        command += ["--node-config", f"partition-id={number} num-partitions={self.nodes} {self._node_config(number)}"]
        self._nodes[number] = self._start(command, f"supernode-{number}")
        return self._nodes[number]

    def kill_node(self, number: int) -> None:
        """End the SuperNode with this partition-id by SIGKILL, and what it runs, as when its machine dies."""
        process = self._nodes.pop(number)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=8)

    def run(
        self,
        app: Path,
        run_config: Mapping[str, Any],
        *,
        timeout: float,
        while_waiting: Callable[[], None] | None = None,
    ) -> Outcome:
        """Run a Flower app and wait for its end.

        Args:
            app: Folder of the app.
            run_config: Values that differ from the app's pyproject.toml; paths are made absolute.
            timeout: Seconds after which the run is stopped.
            while_waiting: Called a few times a second.

        Raises:
            EngineError: The app could not be submitted; Flower's own words.
        """
        command = ["flwr", "run", str(app), "own", "--format", "json"]
        if run_config:
            command += [
                "--run-config",
                " ".join(f"{key}={_toml(key, value)}" for key, value in run_config.items()),
            ]
        if not self.deployed:
            command += [
                "--federation-config",
                f"num-supernodes={self.nodes} client-resources-num-cpus=1 init-args-num-cpus={self.cpus}",
            ]
        submitted = self._call(command)
        run_id = submitted.get("run-id") or submitted.get("run_id")
        if not run_id:
            raise EngineError(f"flwr run failed: {submitted.get('error-message') or submitted}")
        deadline = time.monotonic() + timeout
        status = "unknown"
        last_look = 0.0
        while not status.startswith("finished"):
            if time.monotonic() > deadline:
                self._call(["flwr", "stop", str(run_id), "own", "--format", "json"])
                status = "finished:timed-out"
                break
            if while_waiting is not None:
                while_waiting()
            if time.monotonic() - last_look > 1.5:
                status = self._status(str(run_id))
                last_look = time.monotonic()
            time.sleep(0.3)
        return Outcome(str(run_id), status, self._log_of(str(run_id)))

    def _status(self, run_id: str) -> str:
        listed = self._call(["flwr", "ls", "own", "--run-id", run_id, "--format", "json"])
        runs = listed.get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def _log_of(self, run_id: str) -> str:
        done = subprocess.run(
            ["flwr", "log", run_id, "own", "--show"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def _call(self, command: list[str]) -> dict[str, Any]:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        start = done.stdout.find("{")
        try:
            answer = json.loads(done.stdout[start:]) if start >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        return answer or {"error-message": (done.stdout + done.stderr).strip()}

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        self._logs.append(log)
        # A session of its own: its children can be stopped with it, whatever they are.
        process = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def _wait_until_healthy(self, address: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._processes[0].poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=2):
                return
            time.sleep(0.1)
        tail = (self.folder / "superlink.log").read_text(errors="replace")[-2000:]
        raise EngineError(f"The SuperLink did not start:\n{tail}")

    def _stop_all(self) -> None:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            # SuperNodes first: a SuperLink that goes first leaves them retrying.
            for process in reversed(self._processes):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, stop)
            deadline = time.monotonic() + 8
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.1, deadline - time.monotonic()))
        for log in self._logs:
            log.close()
        self._processes.clear()
        self._logs.clear()


def _toml(key: str, value: Any) -> str:
    if key in _PATHS and value:
        value = str(Path(value).expanduser().resolve())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value + "'"
    return str(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
