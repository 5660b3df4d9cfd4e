"""Nodes with identities in one process, the server that relays between them by hand, and runs that need no dealer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, VirtualGrid
from fl_gradcode.enrolment import (
    Answer,
    ClassKey,
    EnrolledNode,
    Hello,
    Request,
    Setup,
    agree,
    allow_list,
    make_identity,
)
from fl_gradcode.latency import Latency
from fl_gradcode.secagg import Manifest, ManifestBody, SecureAggregation, make_body
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays
from tests.secagg.rounds import ARRAYS, METRICS, grid_of, known_app

__all__ = ["Server", "enrolled", "manifest_of", "start"]


def enrolled(folder: Path, code: GradientCode, *, first_use: bool = False, **settings: Any) -> ManifestBody:
    """Identities, an allow-list, and a body that all owners have agreed to; returns the body."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [make_identity(folder / f"node-{worker}", worker).line for worker in range(code.n)]
    (folder / "allow-list").write_text("\n".join(lines) + "\n")
    keys = () if first_use else allow_list(folder / "allow-list")
    named: dict[str, Any] = {
        "colluders": 0,
        "bound": 4.0,
        "largest_weight": 16.0,
        "metrics": METRICS,
        "arrays": ARRAYS,
        **settings,
    }
    body = make_body(code, identities=keys, **named)
    (folder / "secagg-body.json").write_bytes(body.text)
    for worker in range(code.n):
        agree(folder / f"node-{worker}", body.text, keys or None)
    return body


class Server:
    """A server that shows nodes what it likes; by default what an honest one would.

    Args:
        folder: Folder with all nodes' folders.
        body: The body that it claims to run.
        run: Name of the run.
        epoch: The epoch.
    """

    def __init__(self, folder: Path, body: ManifestBody, run: str = "run-1", epoch: int = 1) -> None:
        self.folder, self.body = folder, body
        self.setup = Setup(run, epoch, body.digest.hex())
        self.hellos: dict[int, Hello] = {}
        self.classes: dict[int, ClassKey] = {}
        self.boxes: dict[int, dict[int, bytes]] = {}

    def node(self, worker: int) -> EnrolledNode:
        return EnrolledNode(self.folder / f"node-{worker}", worker, None)

    def ask(self, worker: int, request: Request) -> Answer:
        return self.node(worker).answer(request, {})

    @property
    def shown(self) -> tuple[Hello, ...]:
        return tuple(self.hellos[worker] for worker in sorted(self.hellos))

    @property
    def keys(self) -> tuple[ClassKey, ...]:
        return tuple(self.classes[c] for c in sorted(self.classes))

    def say_hello(self, workers: Sequence[int]) -> None:
        for worker in workers:
            hello = self.ask(worker, Request(self.setup, "hello")).hello
            assert hello is not None
            self.hellos[worker] = hello

    def lead_request(self) -> Request:
        return Request(self.setup, "lead", self.shown)

    def leaders(self) -> list[int]:
        return sorted({min({*holders} & {*self.hellos}) for holders in self.body.classes.holders})

    def lead(self, workers: Sequence[int] | None = None) -> None:
        for worker in self.leaders() if workers is None else workers:
            answer = self.ask(worker, self.lead_request())
            self.classes.update({key.number: key for key in answer.classes})
            for (c, other), box in answer.wraps.items():
                self.boxes.setdefault(other, {})[c] = box

    def confirm_request(self, worker: int) -> Request:
        return Request(self.setup, "confirm", self.shown, self.keys, self.boxes.get(worker, {}))

    def confirm(self, worker: int, **changed: Any) -> str:
        """The manifest that a worker confirms."""
        answer = self.ask(worker, replace(self.confirm_request(worker), **changed))
        assert answer.confirmation is not None
        return answer.confirmation.manifest

    def run(self, workers: Sequence[int] | None = None) -> Server:
        """An honest set-up; all workers confirm the same manifest."""
        present = list(range(self.body.classes.n)) if workers is None else list(workers)
        self.say_hello(present)
        self.lead()
        assert len({self.confirm(worker) for worker in present}) == 1
        return self


def manifest_of(folder: Path, worker: int, run: str = "run-1") -> Manifest:
    return EnrolledNode(folder / f"node-{worker}", worker, None).keys_of(run)[0]


def start(
    code: GradientCode,
    folder: Path,
    app: Any = None,
    *,
    rounds: int = 1,
    latency: Latency | None = None,
    tamper: Any = None,
    owner: dict[str, Any] | None = None,
    wrapped: Callable[[InProcessGrid], Any] = lambda grid: grid,
    **options: Any,
) -> tuple[GradientCoding, dict[int, ArrayRecord], Any]:
    """Run rounds; returns the strategy, the model after each round, and Flower's result."""
    models = {0: initial_arrays()}
    kill = options.pop("kill", lambda server_round: None)

    def keep(server_round: int, arrays: ArrayRecord, row: Any) -> None:
        models[server_round] = arrays
        kill(server_round)

    secure = SecureAggregation(folder / "secagg-body.json")
    options = {"run": "run-1", "give_up_rounds": None, **options}
    strategy = GradientCoding(FedAvg(), code, secure=secure, on_round_end=keep, **options)
    with grid_of(app or known_app(), folder, code.n, tamper, **(owner or {})) as inner:
        grid = wrapped(inner)
        result = strategy.start(
            grid if latency is None else VirtualGrid(grid, latency, seed=3), initial_arrays(), num_rounds=rounds
        )
    return strategy, models, result
