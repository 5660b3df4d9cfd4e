"""torch is seeded whenever the app imports it, and never imported by the library for that."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import heartbeat

from fl_gradcode import GradientCoding, uncoded
from fl_gradcode._seeding import generators_restored, seed_generators
from fl_gradcode.errors import RoundFailed
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

ROOT = Path(__file__).resolve().parents[2]

NODE = """
import importlib.util, random, sys
import numpy as np
from fl_gradcode import gradient_coding_mod
from fl_gradcode._seeding import generators_restored, seed_generators

def draw():
    import torch
    return random.random(), float(np.random.random()), float(torch.rand(1)), torch.randperm(1000).tolist()[:5]

def shard(number):
    seed_generators(7, 3, number)
    assert importlib.util.find_spec("torch") is not None  # as libraries look, without importing it
"""


def said_by(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", NODE + program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported_before() -> str:
    return said_by("import torch\nwith generators_restored():\n    shard(5)\n    print(draw())")


def test_a_node_that_does_not_need_torch_does_not_import_it() -> None:
    program = "with generators_restored():\n    shard(5)\nassert 'torch' not in sys.modules\nprint(len(sys.meta_path))"
    assert said_by(program) == said_by("print(len(sys.meta_path))")
    heavy = "print(sorted({'torch', 'scipy.stats', 'opacus', 'pandas', 'matplotlib'} & {*sys.modules}))"
    assert said_by(heavy) == "[]\n"


@pytest.mark.parametrize(
    "program",
    [
        "with generators_restored():\n    shard(5)\n    print(draw())",
        "with generators_restored():\n    shard(4)\n    draw()\n    shard(5)\n    print(draw())",
        # As private training in an app that imports torch nowhere else.
        "with generators_restored():\n    shard(5)\n    with generators_restored():\n        draw()\n    print(draw())",
        "with generators_restored():\n"
        "    shard(5)\n    with generators_restored():\n        shard(4)\n        draw()\n    print(draw())",
    ],
)
def test_it_draws_the_same_whenever_it_is_imported(program: str, imported_before: str) -> None:
    assert said_by(program) == imported_before


def test_what_is_drawn_afterwards_does_not_follow_from_the_seed_of_a_shard() -> None:
    inside = "with generators_restored():\n    shard(5)\n    draw()\n    print(sys.modules['torch'].initial_seed())\n"
    shards, afterwards = said_by(inside + "print(sys.modules['torch'].initial_seed())").split()
    assert afterwards != shards  # torch seeds itself at random when it is imported
    assert said_by(inside).split() == [shards]


@pytest.mark.parametrize("side", ["client", "server"])
def test_flowers_heartbeat_draws_from_a_generator_of_its_own(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a thread beside train(), and beside the sampling of clients."""
    monkeypatch.setattr(heartbeat, "random", random)  # as in a new process
    beaten = threading.Event()

    def beat() -> bool:
        beaten.set()
        return True

    def states() -> tuple[object, object]:
        before = random.getstate()
        sender = heartbeat.HeartbeatSender(beat)
        sender.start()
        assert beaten.wait(30)
        sender.stop()  # it has drawn the time of its next beat
        return before, random.getstate()

    if side == "client":
        with generators_restored():
            before, after = states()
    else:
        with InProcessGrid(toy_app(), 1) as grid, pytest.raises(RoundFailed):  # no client of ours runs in this process
            GradientCoding(FedAvg(), uncoded(2)).start(grid, initial_arrays(), num_rounds=1)
        before, after = states()
    assert after == before


class Device:
    """A kind of accelerator, as far as seeding sees it."""

    def __init__(self, name: str, *, several: bool, used: bool = True) -> None:
        self.__name__, self.state, self.used = name, [1], used
        end = "_all" if several else ""
        setattr(self, f"manual_seed{end}", lambda number: self.state.append(number))
        setattr(self, f"get_rng_state{end}", lambda: [*self.state])
        setattr(self, f"set_rng_state{end}", lambda state: setattr(self, "state", [*state]))
        if several:
            self.is_initialized = lambda: self.used

    def is_available(self) -> bool:
        return True


@pytest.mark.parametrize(("name", "several"), [("cuda", True), ("xpu", True), ("mps", False)])
@pytest.mark.parametrize("used", [True, False])
def test_accelerators_are_seeded_and_restored(
    name: str, several: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    device = Device(f"torch.{name}", several=several, used=used)
    monkeypatch.setattr(torch, name, device)
    with generators_restored():
        seed_generators(7, 3, 5)
        first = device.state[-1]
        assert device.state == [1, first]
        seed_generators(7, 3, 6)
        assert device.state[-1] != first
    assert device.state == [1] if used or not several else device.state[-1] == torch.initial_seed()
