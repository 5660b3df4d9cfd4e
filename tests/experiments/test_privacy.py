"""Accuracy against epsilon: a coded private round is the uncoded one, runs resume, and the page says what rows say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg

from clients.app import app as client_app
from clients.data import load_dataset
from clients.models import build_model
from experiments.compare.store import ROOT, Store, Task
from experiments.compare.synchronous import quiet
from experiments.privacy.__main__ import PAGE, ROWS, main
from experiments.privacy.measures import Paired, Results, final
from experiments.privacy.page import page
from experiments.privacy.runs import run
from experiments.privacy.tasks import BASELINE, EPSILONS, PROBLEMS, SCHEMES, SUITES, TUNED, latency
from fl_gradcode import GradientCode, GradientCoding, VirtualGrid, uncoded
from fl_gradcode.privacy import DPSGD, write_keys
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, relative

DIGITS = PROBLEMS["digits"]
ROUNDS = 2


def after_a_round(code: GradientCode, folder: Path, arrays: ArrayRecord, number: int) -> ArrayRecord:
    """Under the experiment's stragglers; each round is a run of its own, so that it can begin from any weights."""
    problem = DIGITS.problem
    privacy = DPSGD(
        noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=DIGITS.sample_rate, steps=DIGITS.steps, accountant="rdp"
    )
    config = {**problem.run_config("", 0), "learning-rate": 1.0, "privacy-dir": str(folder)}
    with InProcessGrid(client_app, problem.n, run_config=config) as inner:
        grid = VirtualGrid(inner, latency(), seed=number)
        strategy = GradientCoding(FedAvg(**quiet), code, privacy=privacy, run=f"run-{number}")
        return strategy.start(grid, arrays, 1, timeout=1e9).arrays


@pytest.mark.parametrize("scheme", ["shared-fractional", "shared-cyclic"])
def test_every_round_of_coded_private_training_gives_the_model_of_waiting_for_all_with_the_same_keys(
    scheme: str, tmp_path: Path
) -> None:
    """Round by round from the same weights: keys are bound to them, so one last bit that differs changes all noise."""
    make = SCHEMES[scheme].code
    assert make is not None
    code = make(DIGITS.problem.n, DIGITS.problem.s)
    write_keys(tmp_path / "coded", [code.shards_of(worker) for worker in range(code.n)])
    for shard in range(code.k):  # everybody trains the own shard, with the secret that its holders share
        holder = tmp_path / "coded" / f"node-{code.holders_of(shard)[0]}"
        shutil.copytree(holder, tmp_path / "alone" / f"node-{shard}")
    dataset = load_dataset(DIGITS.problem.dataset)
    arrays = ArrayRecord(build_model(DIGITS.problem.model, dataset, seed=0).state_dict())
    for number in range(ROUNDS):
        coded = after_a_round(code, tmp_path / "coded", arrays, number)
        alone = after_a_round(uncoded(code.k), tmp_path / "alone", arrays, number)
        assert relative(coded, alone) < 1e-5
        moved = np.linalg.norm(flat(alone) - flat(arrays))
        assert np.linalg.norm(flat(coded) - flat(alone)) < 1e-5 * moved  # of the noisy update, too
        arrays = coded


@pytest.mark.stress
def test_a_killed_run_goes_on_and_a_complete_one_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task(task.problem, task.law, task.scheme, 0, 1, task.options) for task in SUITES["quick"]()]
    first = {task.scheme: task for task in tasks}
    few = [first[name] for name in ("no-privacy", "no-noise", "shared-fractional")]
    monkeypatch.setitem(SUITES, "quick", lambda: few)
    rows = tmp_path / "rows.jsonl"
    Store(rows).add(few[0], run(few[0], "", tmp_path / "keys"))
    done = rows.read_bytes()
    # Killed while it wrote its second row, and while another had made its keys.
    rows.write_bytes(done + b'{"hash": "12')
    (tmp_path / "keys" / few[2].hash / "node-0").mkdir(parents=True)
    command = ["--quick", "--out", str(tmp_path), "--processes", "1"]
    assert main(command) == 0
    assert set(Store(rows).rows()) == {task.hash for task in few}
    assert rows.read_bytes().startswith(done)
    complete = rows.read_bytes()
    (tmp_path / PAGE).unlink()
    assert main(command) == 0
    assert rows.read_bytes() == complete
    assert (tmp_path / PAGE).read_text().startswith("# Privacy, measured")
    assert (tmp_path / "images" / "privacy-accuracy.png").stat().st_size > 10_000
    row = Store(rows).rows()[few[2].hash]
    assert row["epsilon"] == pytest.approx(dict(few[2].options)["epsilon"], abs=0.05)
    assert row["epsilon-of-ledger"] == pytest.approx(row["epsilon"], abs=1e-3)


def test_missing_data_are_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "fashion-mnist" in capsys.readouterr().out


def test_the_page_in_the_docs_is_made_from_the_rows_in_the_docs() -> None:
    rows = Store(ROOT / ROWS).rows()
    assert set(rows) == {task.hash for name in ("main", "tuning") for task in SUITES[name]()}
    assert (ROOT / "docs" / PAGE).read_text() == page(Results(rows.values()))


def test_the_rows_in_the_docs_show_what_was_asked_for() -> None:
    """The same accuracy as FedAvg + Opacus with everyone present, in less time; and what the others lose."""
    results = Results(Store(ROOT / ROWS).rows().values())
    assert len(results.seeds) == 3
    shared = results.paired(["shared-fractional", "shared-cyclic"], EPSILONS)
    independent = results.paired(["independent-cyclic"], EPSILONS)
    assert shared is not None and independent is not None and len(shared.values) == 9
    assert abs(shared.mean) < 0.01 and shared.interval[0] < 0.005
    assert independent.interval[1] < -0.05
    base = results.seconds(BASELINE)
    for scheme in ("shared-fractional", "shared-cyclic"):
        assert (found := results.seconds(scheme)) and base and found.mean < base.mean / 3
    for epsilon in EPSILONS:
        for row in results.runs("drop", epsilon):
            assert final(row, "owned") == 0
        noise = {name: {r["noise-multiplier"] for r in results.runs(name, epsilon)} for name in results.schemes[2:]}
        assert noise["shared-fractional"] == noise["shared-cyclic"] == noise[BASELINE] == noise["drop"]
        assert min(noise["independent-cyclic"]) > max(noise[BASELINE])


def test_the_chosen_settings_were_tuned_on_the_baseline_and_on_another_seed() -> None:
    assert {task.scheme for task in SUITES["tuning"]()} == {BASELINE, "no-privacy"} == set(TUNED)
    assert not {task.seed for task in SUITES["tuning"]()} & {task.seed for task in SUITES["main"]()}


def test_paired_differences_have_the_standard_error_of_their_mean() -> None:
    def row(scheme: str, seed: int, accuracy: float) -> dict[str, Any]:
        task = {"scheme": scheme, "seed": seed, "options": [["epsilon", 1.0]]}
        return {"hash": f"{scheme}{seed}", "task": task, "points": [{"accuracy": accuracy}]}

    rows = [row(BASELINE, seed, 0.5 + 0.1 * seed) for seed in range(4)]
    rows += [row("shared-cyclic", seed, 0.5 + 0.1 * seed + gain) for seed, gain in enumerate((0.01, 0.03, 0.02))]
    paired = Results(rows).paired(["shared-cyclic"], [1.0])
    assert paired is not None and json.dumps(np.round(paired.values, 9).tolist()) == "[0.01, 0.03, 0.02]"
    assert paired.mean == pytest.approx(0.02) and paired.error == pytest.approx(0.01 / np.sqrt(3))
    assert paired.interval == pytest.approx((0.02 - 4.302653 * paired.error, 0.02 + 4.302653 * paired.error))
    assert Paired((0.1,)).error != Paired((0.1,)).error  # NaN: one value has none
