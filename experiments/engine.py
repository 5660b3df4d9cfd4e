"""Flower's engines for experiments and tests: a SuperLink of our own, on free ports, in a FLWR_HOME of its own.

Every process that is started here is stopped here, by its pid.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.flwr_commands import EngineError, Flwr
from experiments.processes import Member, Processes
from experiments.secure import Security

__all__ = ["Engine", "EngineError", "Outcome", "free_port"]

_START_SECONDS = 60.0
_NODE_ID = re.compile(r"SuperNode ID: (\d+)")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: Flower's status, such as "finished:completed", and everything it logged.

    The log of a completed run is empty if the engine does not keep them (`Engine.logs_of_all`).
    """

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
        secure: TLS, and SuperNodes that prove by a key who they are (deployed only).
        database: The SuperLink keeps its state in a file: runs and registered nodes outlive it.
    """

    #: Seconds that processes have to end by themselves when all is stopped.
    patience = 8.0
    #: Whether to fetch the log of a run that completed, too: a command of a second.
    logs_of_all = True

    def __init__(
        self,
        nodes: int,
        *,
        deployed: bool = False,
        folder: Path | None = None,
        cpus: int = 2,
        node_config: Callable[[int], str] = lambda number: "",
        secure: bool = False,
        database: bool = False,
    ) -> None:
        if secure and not deployed:
            raise ValueError("secure=True needs deployed=True: simulated nodes have no connection to secure.")
        self.nodes, self.deployed, self.cpus = nodes, deployed, cpus
        self._node_config, self._database = node_config, database
        self._temporary = tempfile.TemporaryDirectory(prefix="fl-gradcode-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or ".").resolve()
        self._security = Security(self.folder / "certificates", nodes) if secure else None
        self._control_port = free_port()
        self.address = f"127.0.0.1:{free_port()}"
        self._link: subprocess.Popen[bytes] | None = None
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._logged: dict[int, int] = {}  # how much a node's log held when it was started last
        #: Node number -> node id, of registered nodes.
        self.node_ids: dict[int, int] = {}
        bin_folder = str(Path(sys.executable).parent)  # flower-superexec and others are started by name
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(self.folder / "flwr-home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # Ten polls a second of every node, as before, took a sixth of all that the tests of engines compute.
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PATH": bin_folder + os.pathsep + os.environ.get("PATH", ""),
        }
        self._processes = Processes(self.folder, self.environment)
        self.flwr = Flwr(self.environment)

    def __enter__(self) -> Engine:
        """Start the SuperLink and, if deployed, the SuperNodes."""
        home = self.folder / "flwr-home"
        home.mkdir(parents=True, exist_ok=True)
        trust = f'root-certificates = "{self._security.authority}"' if self._security else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "{self.address}"\n{trust}\n'
        )
        try:
            self.start_superlink()
            if self.deployed:
                for number in range(self.nodes):
                    if self._security is not None:
                        self.node_ids[number] = self.flwr.register(self._security.public_key(number))
                    self.start_node(number)
        except BaseException:
            self._processes.stop_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self._processes.stop_all(patience=self.patience)
        if self._temporary is not None:
            self._temporary.cleanup()

    def start_superlink(self) -> None:
        """Start the SuperLink; after `kill_superlink` with the same port, certificates and database."""
        host, _, port = self.address.partition(":")
        command = ["flower-superlink", "--host", host, "--port", port, "--disable-runtime-dependency-installation"]
        command += self._security.superlink_options() if self._security else ["--insecure"]
        if self._database:
            command += ["--database", str(self.folder / "state.db")]
        if not self.deployed:
            control = f"127.0.0.1:{self._control_port}"
            command += ["--simulation", "--isolation", "subprocess", "--control-api-address", control]
        self._link = self._processes.start(command, "superlink")
        self._wait_until_healthy(self._link)

    def kill_superlink(self) -> None:
        """End the SuperLink, its SuperExec and the ServerApp by SIGKILL, as when its machine dies."""
        assert self._link is not None
        self._processes.kill(self._link)

    def kill_serverapp(self) -> None:
        """End the ServerApp of the run, and nothing else, by SIGKILL.

        Raises:
            EngineError: None is running.
        """
        found = self._running_apps("flwr-serverapp")
        if not found:
            raise EngineError("No ServerApp is running under this SuperLink.")
        for member in found:
            member.signal(signal.SIGKILL)

    def start_node(self, number: int, *, superlink: str = "") -> subprocess.Popen[bytes]:
        """Start the SuperNode with this partition-id; it reaches the SuperLink at its own address or at another one."""
        address = superlink or self.address
        command = ["flower-supernode", "--superlink", address, "--host", "127.0.0.1", "--port", str(free_port())]
        command += self._security.supernode_options(number) if self._security else ["--insecure"]
        command += ["--node-config", f"partition-id={number} num-partitions={self.nodes} {self._node_config(number)}"]
        name = f"supernode-{number}"
        self._logged[number] = len(self._processes.log(name))
        self._nodes[number] = self._processes.start(command, name)
        return self._nodes[number]

    def node_id(self, number: int) -> int | None:
        """The id under which the node with this partition-id has connected since it was started last; None: not yet."""
        found = _NODE_ID.search(self._processes.log(f"supernode-{number}"), self._logged.get(number, 0))
        return int(found[1]) if found else None

    def kill_node(self, number: int) -> None:
        """End the SuperNode with this partition-id by SIGKILL, and what it runs, as when its machine dies."""
        self._processes.kill(self._nodes.pop(number))

    def stop_node(self, number: int) -> None:
        """End the SuperNode with this partition-id by SIGTERM, as an operator does: it says goodbye."""
        self._processes.stop(self._nodes.pop(number))

    def keep_nodes(self, count: int) -> None:
        """Have exactly the SuperNodes 0 to count - 1 running: stop the others, and start those that have ended."""
        for number, process in list(self._nodes.items()):
            if number >= count or process.poll() is not None:
                self.stop_node(number)
        for number in range(count):
            if number not in self._nodes:
                self.start_node(number)

    def wait_for_nodes(self, count: int, *, timeout: float = 150.0) -> None:
        """Wait until the nodes that were started have connected and the SuperLink counts so many as online.

        One that starts needs seconds; one that was killed is counted for up to a minute.

        Raises:
            EngineError: It still counts others after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while any(self.node_id(number) is None for number in self._nodes) and time.monotonic() < deadline:
            self._processes.stopping.wait(0.2)  # logs are cheaper to read than a command is to start
        while (online := sum(node["status"] == "online" for node in self.listed_nodes())) != count:
            if time.monotonic() > deadline:
                raise EngineError(f"{online} nodes are online after {timeout:g} s, not {count}.")
            self._processes.stopping.wait(2.0)

    def restart_node(self, number: int, *, timeout: float = 150.0, pause: float = 5.0) -> None:
        """Start a killed or stopped SuperNode again, as a supervisor does: until the SuperLink takes it.

        With authentication it is refused while the old one still counts as online, up to 60 s after a kill.

        Args:
            number: Which.
            timeout: Seconds until we give up.
            pause: Seconds between two attempts.

        Raises:
            EngineError: It was refused all the time; its last words.
        """
        deadline = time.monotonic() + timeout
        if number in self._nodes:
            self.stop_node(number)
        while not self._comes_up(number, deadline):
            self.stop_node(number)
            if time.monotonic() > deadline:
                words = self._processes.log(f"supernode-{number}")[-2000:]
                raise EngineError(f"Node {number} was refused for {timeout:g} s:\n{words}")
            self._processes.stopping.wait(pause)

    def _comes_up(self, number: int, deadline: float) -> bool:
        process = self.start_node(number)
        while process.poll() is None and time.monotonic() < deadline:
            if self.node_id(number) is not None:
                return True
            self._processes.stopping.wait(0.2)
        return False

    def listed_nodes(self) -> list[dict[str, Any]]:
        """What `flwr supernode list` tells: `id`, `status` ("registered", "online", "offline", "unregistered"), its
        times, and the `number` of each node that was registered here."""
        numbers = {node_id: number for number, node_id in self.node_ids.items()}
        return [{**node, "number": numbers.get(node["id"])} for node in self.flwr.nodes()]

    def run(
        self,
        app: Path,
        run_config: Mapping[str, Any],
        *,
        timeout: float,
        while_waiting: Callable[[], None] | None = None,
        nodes: int | None = None,
        cpus: int | None = None,
    ) -> Outcome:
        """Run a Flower app and wait for its end: `submit` and `wait`."""
        return self.wait(self.submit(app, run_config, nodes=nodes, cpus=cpus), timeout, while_waiting)

    def submit(
        self, app: Path, run_config: Mapping[str, Any], *, nodes: int | None = None, cpus: int | None = None
    ) -> str:
        """Submit a Flower app to the SuperLink.

        Args:
            app: Folder of the app.
            run_config: Values that differ from the app's pyproject.toml; paths are made absolute.
            nodes: Simulated nodes of this run; the engine's by default.
            cpus: Actors of this run; the engine's by default.

        Returns:
            Flower's number of the run.

        Raises:
            EngineError: The app could not be submitted; Flower's own words.
        """
        federation = (
            f"num-supernodes={nodes or self.nodes} client-resources-num-cpus=1 init-args-num-cpus={cpus or self.cpus}"
        )
        return self.flwr.submit(app, run_config, "" if self.deployed else federation)

    def wait(self, run_id: str, timeout: float, while_waiting: Callable[[], None] | None = None) -> Outcome:
        """Wait for the end of a run; meanwhile the SuperLink may be away.

        Args:
            run_id: Flower's number of the run.
            timeout: Seconds after which the run is stopped.
            while_waiting: Called a few times a second.
        """
        deadline = time.monotonic() + timeout
        status = "unknown"
        last_look = 0.0
        while not status.startswith("finished"):
            if time.monotonic() > deadline:
                self.flwr.stop(run_id)
                status = "finished:timed-out"
                break
            if while_waiting is not None:
                while_waiting()
            # Each look is a process of its own, and would take a third of a core from what is measured.
            if time.monotonic() - last_look > 1.5 and not self._running_apps("flwr-serverapp", "flwr-simulation"):
                status = self.flwr.status(run_id)
                last_look = time.monotonic()
            time.sleep(0.3)
        wanted = self.logs_of_all or status != "finished:completed"
        return Outcome(run_id, status, self.flwr.log(run_id) if wanted else "")

    def _running_apps(self, *names: str) -> list[Member]:
        """Processes of this SuperLink that run apps."""
        members = [] if self._link is None else self._processes.members(self._link)
        return [member for member in members if any(name in member.command for name in names)]

    def _wait_until_healthy(self, link: subprocess.Popen[bytes]) -> None:
        scheme = "https" if self._security else "http"
        context: ssl.SSLContext | None = self._security.context() if self._security else None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and link.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{scheme}://{self.address}/health", timeout=2, context=context),
            ):
                return
            time.sleep(0.1)
        raise EngineError(f"The SuperLink did not start:\n{self._processes.log('superlink')[-2000:]}")


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
