"""The comparison of server optimisers, averaged models and bounded staleness: what its runs do, and its tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAdam

from experiments import sooner
from experiments.compare import __main__ as compare
from experiments.compare.asynchronous import semi_asynchronous
from experiments.compare.runs import run
from experiments.compare.store import Store, Task
from experiments.compare.suites import ADAM, AVERAGE, STEPS, SUITES, sooner_of
from experiments.compare.synchronous import WorkShareGrid, quiet, server_strategy
from fl_gradcode.latency import Latency
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat
from tests.experiments.test_compare import constant_app, zeros


def test_the_optimiser_of_a_baseline_without_rounds_is_flowers_own() -> None:
    with InProcessGrid(constant_app(), 3) as inner:
        theirs = server_strategy(dict([ADAM]))
        assert isinstance(theirs, FedAdam) and theirs.eta == 0.03
        expected = theirs.start(inner, zeros(), num_rounds=4).arrays
        grid = WorkShareGrid(inner, Latency(compute=1.0))
        options: Any = {"wanted": 3, "rounds": 4, "on_update": lambda number, arrays: None}
        actual = semi_asynchronous(grid, zeros(), optimiser=FedAdam(**{**quiet, "eta": 0.03}), **options)
    assert np.allclose(flat(actual), flat(expected), rtol=1e-5)


@pytest.mark.parametrize("scheme", ["exact", "semi", "fedprox", "stale", "drop-owners"])
def test_a_share_of_the_steps_takes_a_share_of_the_time(scheme: str) -> None:
    law = "" if scheme == "exact" else "none"
    whole, part = (run(Task("digits", law, scheme, 10, 4, options), "")["work"] for options in ((), (STEPS,)))
    for work, share in ((whole, 1.0), (part, 0.6)):  # each message is charged with the share, at most for FedProx
        assert work["shards"] == pytest.approx(share * work["messages"]) or (
            scheme == "fedprox" and work["shards"] <= share * work["messages"]
        )


def test_exact_rounds_of_more_holders_and_fewer_steps_take_less_time() -> None:
    def seconds(*options: tuple[str, float], scheme: str = "partial") -> float:
        return float(sum(run(Task("digits", "phones", scheme, 10, 10, tuple(sorted(options))), "")["seconds"]))

    plain, three, eight = seconds(scheme="wait"), seconds(("holders", 3.0)), seconds(("holders", 8.0))
    assert eight < three < plain
    assert seconds(("holders", 3.0), STEPS) < three


def test_the_average_is_measured_and_changes_no_training() -> None:
    with_average, without = (run(Task("digits", "", "exact", 10, 6, options), "") for options in ((AVERAGE,), ()))
    assert [one["accuracy"] for one in with_average["points"]] == [one["accuracy"] for one in without["points"]]
    later = with_average["points"][1:]
    assert all({"accuracy-averaged", "owned-averaged", "worst-averaged"} <= one.keys() for one in later)
    assert any(one["accuracy-averaged"] != one["accuracy"] for one in later)


def test_tables_have_a_line_for_each_way_and_a_ratio_of_one_for_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = sooner_of("digits", ("phones",), (10,), 4, ("drop-owners", "semi"))
    monkeypatch.setitem(SUITES, "sooner-smoke", lambda: tasks)
    store = Store(tmp_path / "rows.jsonl")
    assert sooner.main(["--suite", "sooner-smoke", "--rows", str(store.path)]) == 1
    for task in tasks:
        store.add(task, run(task, ""))
    assert sooner.main(["--suite", "sooner-smoke", "--rows", str(store.path)]) == 0
    told = capsys.readouterr().out
    assert "| waiting for all | 1.00 |" in told
    for title in (
        "exact, r = 8 + FedAdam, 60 % of the steps",
        "semi-asynchronous + FedAdam, 60 % of the steps",
        "bounded staleness",
    ):
        assert told.count(f"| {title} |") == 4
    assert "owned, averaged" in told


def test_the_suite_has_new_seeds_and_treats_all_schemes_alike() -> None:
    tasks = SUITES["sooner"]()
    assert {task.seed for task in tasks} == {10, 11, 12, 13, 14}
    main = [task for task in tasks if task.problem == "slow-owners" and task.law == "phones" and task.seed == 10]
    for scheme in ("drop-owners", "over-selection", "fedprox", "semi"):
        assert {dict(task.options).get("adam") for task in main if task.scheme == scheme} == {None, 0.03}
        assert {dict(task.options).get("steps") for task in main if task.scheme == scheme} == {None, 0.6}
        assert all(AVERAGE in task.options for task in main if task.scheme == scheme)


def test_a_part_of_a_suite_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "sooner", "--rows", str(tmp_path / "rows.jsonl"), "--data-dir", str(tmp_path / "none")]
    counts = []
    for part in ([], ["--problem", "adult"], ["--problem", "adult", "--seeds", "10", "11"]):
        assert compare.main([*arguments, *part]) == 2  # there are no data
        counts.append(int(re.search(r"sooner: (\d+) tasks", capsys.readouterr().out)[1]))  # type: ignore[index]
    adult = sum(task.problem == "adult" for task in SUITES["sooner"]())
    assert counts == [len(SUITES["sooner"]()), adult, adult * 2 // 5]
