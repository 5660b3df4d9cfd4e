"""torch is seeded whenever the app imports it, and never imported by the library for that."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable
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


INSIDE = "with generators_restored():\n"
#: What is drawn, and the number that torch is seeded with; the same afterwards.
TOLD = "    print(draw(), sys.modules['torch'].initial_seed())\nprint(sys.modules['torch'].initial_seed())\n"
IMPORTED_BEFORE = f"import torch\n{INSIDE}    shard(5)\n{TOLD}"
IMPORTED_INSIDE = f"{INSIDE}    shard(5)\n{TOLD}"
DRAWN = [
    IMPORTED_INSIDE,
    f"{INSIDE}    shard(4)\n    draw()\n    shard(5)\n{TOLD}",
    # As private training in an app that imports torch nowhere else.
    f"{INSIDE}    shard(5)\n    {INSIDE}        draw()\n{TOLD}",
    f"{INSIDE}    shard(5)\n    {INSIDE}        shard(4)\n        draw()\n{TOLD}",
]
WATCHERS = "print(len(sys.meta_path))\n"
WITHOUT_TORCH = f"{INSIDE}    shard(5)\nassert 'torch' not in sys.modules\n{WATCHERS}"
HEAVY = "print(sorted({'torch', 'scipy.stats', 'opacus', 'pandas', 'matplotlib'} & {*sys.modules}))\n"
PROGRAMS = [IMPORTED_BEFORE, *DRAWN, WITHOUT_TORCH, WATCHERS, HEAVY]

#: Each program has a process of its own without torch, forked from one that has imported everything else.
FORKING = """
import os
for program in PROGRAMS:
    print(MARK, flush=True)
    child = os.fork()
    if child == 0:
        try:
            exec(program)
            sys.stdout.flush()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, program
"""
MARK = "the next program"


@pytest.fixture(scope="module")
def said_by() -> Callable[[str], str]:
    """What each program prints."""
    text = f"{NODE}\nPROGRAMS, MARK = {PROGRAMS!r}, {MARK!r}\n{FORKING}"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    before, *said = done.stdout.split(f"{MARK}\n")
    assert before == "" and len(said) == len(PROGRAMS)
    return dict(zip(PROGRAMS, said, strict=True)).__getitem__


def test_a_node_that_does_not_need_torch_does_not_import_it(said_by: Callable[[str], str]) -> None:
    assert said_by(WITHOUT_TORCH) == said_by(WATCHERS) != ""
    assert said_by(HEAVY) == "[]\n"


@pytest.mark.parametrize("program", DRAWN)
def test_it_draws_the_same_whenever_it_is_imported(program: str, said_by: Callable[[str], str]) -> None:
    drawn, _ = said_by(program).splitlines()
    assert drawn == said_by(IMPORTED_BEFORE).splitlines()[0] != ""


def test_what_is_drawn_afterwards_does_not_follow_from_the_seed_of_a_shard(said_by: Callable[[str], str]) -> None:
    inside, afterwards = said_by(IMPORTED_INSIDE).splitlines()
    seed_of_the_shard = inside.split()[-1]
    assert seed_of_the_shard.isdigit() and afterwards.isdigit()
    assert afterwards != seed_of_the_shard  # torch seeds itself at random when it is imported
    assert said_by(DRAWN[1]).splitlines()[0].split()[-1] == seed_of_the_shard


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
