"""The comparison: exact schemes follow one trajectory, baselines do what they are called, and runs resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy

from clients.app import app as client_app
from clients.data import load_dataset
from clients.models import build_model
from experiments.compare.__main__ import main
from experiments.compare.asynchronous import fedbuff, semi_asynchronous
from experiments.compare.problems import LAWS, PROBLEMS, latency_of
from experiments.compare.runs import EXACT, INEXACT, run
from experiments.compare.store import ROOT, Store, Task
from experiments.compare.suites import SUITES, TUNED
from experiments.compare.synchronous import PartialProx, WorkShareGrid, quiet
from fl_gradcode import GradientCoding, Shards, VirtualGrid, gradient_coding_mod
from fl_gradcode.latency import Latency, constant, scaled
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, relative
from tests.programs.conftest import write_hospitals

DIGITS = PROBLEMS["digits"]


def constant_app(step: float = 1.0) -> ClientApp:
    """Every training adds `step`, whatever the model."""
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert context.node_config["partition-id"] is not None
        arrays: Any = message.content["arrays"]
        moved = ArrayRecord([array + np.float32(step) for array in arrays.to_numpy_ndarrays()])
        content = RecordDict({"arrays": moved, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


def zeros() -> ArrayRecord:
    return ArrayRecord([np.zeros(3, np.float32)])


# One trajectory for all exact schemes


def trained(law: str, strategy: Strategy) -> list[ArrayRecord]:
    """The models of six rounds from the same weights, and the first one."""
    dataset = load_dataset(DIGITS.dataset)
    initial = ArrayRecord(build_model(DIGITS.model, dataset, seed=0).state_dict())
    models: list[ArrayRecord] = []
    with InProcessGrid(client_app, DIGITS.n, run_config=DIGITS.run_config("", 0)) as inner:
        grid = VirtualGrid(inner, latency_of(law), seed=0)
        strategy.start(grid, initial, 6, timeout=1e9, evaluate_fn=lambda _, arrays: models.append(arrays))
    return models


@cache
def waiting_for_all(law: str) -> list[ArrayRecord]:
    return trained(law, FedAvg(**quiet))


@pytest.mark.parametrize("scheme", [name for name in EXACT if name != "wait"])
@pytest.mark.parametrize("law", ["slow-owners", "virtual-machines"])
def test_every_exact_scheme_follows_the_model_of_waiting_for_all(scheme: str, law: str) -> None:
    """Real training: this is why the comparison computes the trajectory once, and only times the schemes."""
    _, make, send, patience = EXACT[scheme]
    assert make is not None
    how = Shards(patience) if send == "shards" else send
    coded = trained(law, GradientCoding(FedAvg(**quiet), make(DIGITS.n, DIGITS.s), send=how))
    plain = waiting_for_all(law)
    assert len(plain) == len(coded) == 7
    assert max(relative(a, b) for a, b in zip(coded, plain, strict=True)) < 1e-5


@pytest.mark.parametrize("scheme", ["partial", "repetition-m2"])
def test_the_app_that_does_nothing_takes_the_time_of_the_one_that_trains(scheme: str) -> None:
    seconds = run(Task("digits", "slow-owners", scheme, 0, 5), "")["seconds"]
    dataset = load_dataset(DIGITS.dataset)
    initial = ArrayRecord(build_model(DIGITS.model, dataset, seed=0).state_dict())
    _, make, send, patience = EXACT[scheme]
    assert make is not None
    with InProcessGrid(client_app, DIGITS.n, run_config=DIGITS.run_config("", 0)) as inner:
        coding = GradientCoding(
            FedAvg(**quiet), make(DIGITS.n, DIGITS.s), send=Shards(patience) if send == "shards" else send, verify=0
        )
        coding.start(VirtualGrid(inner, latency_of("slow-owners"), seed=0), initial, 5, timeout=1e9)
    assert [row["train"]["seconds"]["waiting"] for row in coding.ledger.rows] == pytest.approx(seconds, abs=1e-4)


# Baselines


def test_semi_asynchronous_rounds_end_with_the_wanted_reply_and_late_ones_join_the_next() -> None:
    latency = Latency(compute=scaled(constant(1.0), {3: 2.5}))
    ends: list[float] = []
    with InProcessGrid(constant_app(), 4) as inner:
        grid = VirtualGrid(inner, latency)
        model = semi_asynchronous(
            grid, zeros(), wanted=3, rounds=4, on_update=lambda number, arrays: ends.append(grid.now())
        )
    # Rounds 1 and 2 take 1 s each from the fast three. At 2.5 the late one is first in round 3, which two of the fast
    # ones complete at 3.0; the third fast one (3.0) opens round 4, with the two that finish at 4.0.
    assert ends == pytest.approx([1.0, 2.0, 3.0, 4.0])
    assert flat(model) == pytest.approx([4.0] * 3)  # each round moves by one mean update


def test_fedbuff_discounts_what_is_stale_and_never_waits() -> None:
    latency = Latency(compute=scaled(constant(1.0), {0: 3.5}))
    ends: list[float] = []
    with InProcessGrid(constant_app(), 3) as inner:
        grid = VirtualGrid(inner, latency)
        model = fedbuff(
            grid,
            zeros(),
            buffer=2,
            server_rate=1.0,
            staleness=0.5,
            updates=4,
            until=1e9,
            on_update=lambda number, arrays: ends.append(grid.now()),
        )
    # Two fast workers fill the buffer at 1, 2, 3. Whoever is first in it goes on from the model before it was full: one
    # version behind. At 3.5 worker 0 comes, three versions behind, and at 4 the fast one that is one behind.
    assert ends == pytest.approx([1.0, 2.0, 3.0, 4.0])
    one, three = 1 / np.sqrt(2), 1 / np.sqrt(4)
    assert flat(model) == pytest.approx([1.0 + 2 * (one + 1) / 2 + (three + one) / 2] * 3)


def test_fedprox_trains_for_as_long_as_the_deadline_allows() -> None:
    shares: dict[int, float] = {}
    app = constant_app()

    def watch(worker: int, message: Message, reply: Message) -> Message:
        shares[worker] = float(message.content["config"]["work-share"])  # type: ignore[arg-type]
        return reply

    latency = Latency(fixed=0.2, compute=0.8, slowdown=scaled(constant(1.0), {0: 10.0, 1: 1.5}))
    with InProcessGrid(app, 4, tamper=watch) as inner:
        grid = WorkShareGrid(inner, latency)
        PartialProx(deadline=1.2, least=0.05, mu=0.1).start(grid, zeros(), 1, timeout=1e9)
        assert grid.now() == pytest.approx(10 * (0.2 + 0.8 * 0.05))
    assert shares == pytest.approx({0: 0.05, 1: 0.75, 2: 1.0, 3: 1.0})


def test_a_client_trains_the_share_of_its_steps_that_it_is_asked_for() -> None:
    points = run(Task("digits", "slow-owners", "fedprox", 0, 2, (("mu", 0.0),)), "")["work"]
    assert points["messages"] == 24 and points["shards"] < 24


@pytest.mark.parametrize("scheme", INEXACT)
def test_every_baseline_runs_on_and_may_go_on_until_partial_work_has_ended(scheme: str) -> None:
    row = run(Task("digits", "slow-owners", scheme, 1, 4), "")
    last = row["points"][-1]
    assert 4 <= last["round"] <= 8 and last["seconds"] > 0
    assert row["points"][0]["round"] == 0 and row["points"][0]["accuracy"] < 0.3 < last["accuracy"]
    json.dumps(row, allow_nan=False)


def test_dropping_the_owners_never_learns_their_labels() -> None:
    row = run(Task("digits", "slow-owners", "drop-owners", 0, 8), "")
    assert row["points"][-1]["owned"] == 0.0 and row["points"][-1]["worst"] == 0.0


def test_hindsight_and_plan_agree(tmp_path: Path) -> None:
    write_hospitals(tmp_path / "heart_disease")  # of the data, the size of the model is all that matters here
    row = run(Task("heart-disease", "none", "hindsight", 0, 30), str(tmp_path))
    assert row["planned"] == "wait for all" and not row["codes"] and "do not code" in row["verdict"]


# Tasks and rows


def test_a_task_has_the_same_hash_in_every_process_and_another_for_every_change() -> None:
    task = Task("digits", "none", "wait", 0, 20)
    # Rows that were committed are found again by it: a change of the hash must be wanted (`_VERSION`).
    assert task.hash == "4981a5e052981cca"
    others = [
        Task("mnist", "none", "wait", 0, 20),
        Task("digits", "phones", "wait", 0, 20),
        Task("digits", "none", "partial", 0, 20),
        Task("digits", "none", "wait", 1, 20),
        Task("digits", "none", "wait", 0, 21),
        Task("digits", "none", "wait", 0, 20, (("mu", 0.1),)),
    ]
    assert len({task.hash, *(other.hash for other in others)}) == 7


def test_a_line_that_was_cut_off_is_run_again_and_harms_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.jsonl")
    first, second, third = (Task("digits", "none", "wait", seed, 2) for seed in range(3))
    store.add(first, {"seconds": [1.0]})
    store.add(second, {"seconds": [2.0]})
    text = store.path.read_text()
    store.path.write_text(text[:-40])
    assert store.missing([first, second, third, third]) == [second, third]
    store.add(second, {"seconds": [2.0]})
    assert store.missing([first, second]) == []
    assert store.rows()[first.hash]["task"]["seed"] == 0 and store.rows()[first.hash]["versions"]["flwr"] == "1.41.0"


def test_suites_hold_what_they_promise() -> None:
    main = SUITES["main"]()
    assert {task.law for task in main} == {"", *LAWS} and {task.seed for task in main} == {0, 1, 2}
    assert {task.scheme for task in main} == {"exact", "hindsight", *EXACT, *INEXACT}
    assert len({task.hash for task in main}) == len(main)
    for task in (task for suite in SUITES.values() for task in suite()):
        assert task.problem in PROBLEMS and (not task.law or task.law in LAWS)
        tuned = TUNED[task.scheme][0] if task.scheme in TUNED else ()
        assert {*tuned} <= {*task.options} or task.seed == 100


@pytest.mark.slow
@pytest.mark.stress
def test_a_comparison_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "experiments.compare", "--suite", "smoke", "--rows", str(rows), "--processes", "1"]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None:
        if rows.exists() and rows.read_text().count("\n") >= 3:
            break
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(timeout=10)
    before = Store(rows).rows()
    assert before
    assert main(command[3:]) == 0
    after = Store(rows).rows()
    assert set(after) == {task.hash for task in SUITES["smoke"]()}
    assert all(after[key] == row for key, row in before.items())
    assert main(command[3:]) == 0  # nothing is left to do


def test_missing_data_are_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "main", "--rows", str(tmp_path / "rows.jsonl"), "--data-dir", str(tmp_path)]
    assert main(arguments) == 2
    assert "lacks" in capsys.readouterr().out and not (tmp_path / "rows.jsonl").exists()
