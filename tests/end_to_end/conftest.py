"""A small app with a sleeping node, run in a real engine; everything it leaves behind; and plain FedAvg beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from experiments.engine import Engine, Outcome
from fl_gradcode import Ledger
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat
from tests.end_to_end.apps.straggling.straggling import client
from tests.end_to_end.flower_commands import write_commands

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).resolve().parent / "apps" / "straggling"
#: Seconds of a sleep that the test ends: so many that whoever waits for the sleeper is stopped by a timeout instead.
UNTIL_WOKEN = 1000.0
QUIET = {"folder": "", "sleeper": -1, "raiser": -1, "sleeps-from": 1}


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        outcome: How it ended.
        rows: The ledger.
        events: What server and clients noted, with the time of day: an account apart from the ledger's.
        final: The final arrays, flat; None if the run did not get there.
    """

    outcome: Outcome
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    final: NDArray[np.float64] | None

    def times(self, what: str, worker: int | None = None) -> dict[int, float]:
        """Round -> time of this event."""
        return {e["round"]: e["time"] for e in self.events if e["what"] == what and e.get("worker") == worker}

    def late(self, worker: int) -> list[tuple[int, str, str]]:
        """(round, phase in which it came, phase that it answers) of this worker's late replies."""
        return [
            (row["round"], kind, one["from"])
            for row in self.rows
            for kind in ("train", "evaluate")
            for one in (row[kind] or {"late": []})["late"]
            if one["worker"] == worker
        ]


_KINDS: dict[str, Callable[[Path], Engine]] = {
    "simulation": lambda folder: Engine(6, folder=folder),
    "fleet": lambda folder: Engine(4, deployed=True, folder=folder),
    # TLS, SuperNodes that prove by a key who they are, and a SuperLink that keeps its state in a file.
    "secure fleet": lambda folder: Engine(4, deployed=True, secure=True, database=True, folder=folder),
}


def on_engine(*kinds: str, stress: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test on the engine of each of these kinds, which it shares with all other tests that name it.

    On those in `stress`, only `make test-all` runs it.
    """
    more = [pytest.param(kind, marks=pytest.mark.stress) for kind in stress]
    return pytest.mark.parametrize("engine", [*kinds, *more], indirect=True, scope="session")


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine that a test names by `on_engine`.

    pytest brings tests with the same parameter of a session's fixture together and ends the fixture after the last of
    them: only one engine runs at a time.
    """
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    with prepared(_KINDS[request.param](folder)) as engine:
        yield engine


def all_nodes(engine: Engine) -> None:
    """Have all nodes of a fleet running, whatever a test before this one did to them."""
    engine.keep_nodes(engine.nodes)
    engine.wait_for_nodes(engine.nodes)


def prepared(engine: Engine) -> Engine:
    """The apps import fl_gradcode, this checkout's, installed or not; and processes start in half the time."""
    engine.logs_of_all = False
    engine.environment["PYTHONPATH"] = str(ROOT)
    commands = write_commands(engine.folder / "commands")
    engine.environment["PATH"] = f"{commands}{os.pathsep}{engine.environment['PATH']}"
    return engine


def run_straggling(
    engine: Engine,
    folder: Path,
    config: dict[str, Any],
    *,
    while_waiting: Callable[[Callable[[], list[dict[str, Any]]]], None],
    timeout: float = 500.0,
) -> Run:
    """Copy the app to `folder`, run it there, and wake up whoever still sleeps at its end.

    `while_waiting` is called a few times a second, with a function that reads the events so far. A simulation gets as
    many actors as nodes: a sleeping client occupies one.
    """
    app = copy_of_the_app(folder)
    nodes = config.get("nodes", 4)

    def events() -> list[dict[str, Any]]:
        return client.read_notes(folder)

    def look() -> None:
        while_waiting(events)
        # The simulation ends with its last sleeper, and a node keeps its sleeper for the next run.
        if any(event["what"] == "went on" and event["round"] == config["num-server-rounds"] for event in events()):
            (folder / "wake-up").touch()

    try:
        outcome = engine.run(
            app,
            {**config, "folder": str(folder)},
            timeout=timeout,
            while_waiting=look,
            nodes=nodes,
            cpus=nodes,
        )
    finally:
        (folder / "wake-up").touch()
    ledger = folder / "ledger.jsonl"
    rows = Ledger.read(ledger) if ledger.exists() else []
    for row in rows:  # a row claims nothing that was not compared
        for phase in filter(None, (row["train"], row["evaluate"])):
            assert (phase["replica-disagreement"] is None) == (not phase["compared"])
    return Run(outcome, rows, events(), saved_arrays(folder / "final.npz"))


def copy_of_the_app(folder: Path) -> Path:
    """The app, in a folder of its own."""
    folder.mkdir(parents=True)
    shutil.copytree(TEMPLATE, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "app"


def saved_arrays(file: Path) -> NDArray[np.float64] | None:
    """A model that the app has left, flat; None: it has not."""
    if not file.exists():
        return None
    with np.load(file) as saved:
        return np.concatenate([saved[name].ravel().astype(np.float64) for name in saved.files])


def plain_fedavg(rounds: int, nodes: int = 4) -> NDArray[np.float64]:
    """The oracle: the same client on the same shards, under FedAvg as Flower ships it, with nobody missing."""
    with InProcessGrid(client.app, nodes, run_config=QUIET) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(grid, client.initial_arrays(), num_rounds=rounds)
    return flat(result.arrays)


def distance(actual: NDArray[np.float64] | None, expected: NDArray[np.float64]) -> float:
    """Relative L2 distance."""
    assert actual is not None
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
