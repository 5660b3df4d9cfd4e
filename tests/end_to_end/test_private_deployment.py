"""Private training of placed shards with four SuperNodes: one is killed and returns, one has a small budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.engine import Engine
from experiments.make_shards import main as make_shards
from fl_gradcode import Ledger, fractional_repetition
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.privacy import DPSGD, BudgetLedger, write_keys
from tests.end_to_end.conftest import ROOT, prepared

pytestmark = pytest.mark.slow

ROUNDS = 4  # what comes after a round is told in the next one
CODE = fractional_repetition(4, 1)  # groups (0, 2) and (1, 3): the two that drop out have a partner each
KILLED, SHORT = 2, 1
PRIVACY = DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, steps=2)
#: Enough for one round.
BUDGET = PRIVACY.epsilon(1) * 1.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    write_keys(folder / "keys", [CODE.shards_of(worker) for worker in range(CODE.n)])
    make_shards(["--dataset", "digits", "--shards", str(CODE.k), "--out", str(folder / "shards")])
    place = ["place", str(folder / "shards"), str(folder / "placed"), "--workers", str(CODE.n), "--s", str(CODE.s)]
    assert CliRunner().invoke(command_line, place).exit_code == 0

    def node_config(number: int) -> str:
        node = f"node-{number}"
        budget = f" max-epsilon={BUDGET}" if number == SHORT else ""
        return f'shards-dir="{folder / "placed" / node}" privacy-dir="{folder / "keys" / node}"{budget}'

    ledger = folder / "ledger.jsonl"
    state = {"killed": False, "back": False}
    engine = prepared(Engine(CODE.n, deployed=True, folder=folder / "engine", node_config=node_config))
    with engine:

        def kill_and_restart() -> None:
            done = len(ledger.read_text().splitlines()) if ledger.exists() else 0
            if done >= 1 and not state["killed"]:
                engine.kill_node(KILLED)
                state["killed"] = True
            if done >= 2 and not state["back"]:
                engine.start_node(KILLED)
                state["back"] = True

        config = {
            "num-server-rounds": ROUNDS,
            "num-clients": CODE.n,
            "fraction-evaluate": 0.0,
            "code": "fractional",
            "stragglers": CODE.s,
            "dp": "shared",
            "noise-multiplier": PRIVACY.noise_multiplier,
            "sample-rate": PRIVACY.sample_rate,
            "local-steps": PRIVACY.steps,
            "ledger": str(ledger),
        }
        outcome = engine.run(ROOT, config, timeout=400, while_waiting=kill_and_restart)
    assert outcome.completed, outcome.log
    assert state["back"]
    return Ledger.read(ledger)


def test_every_round_is_the_update_of_all_shards(rows: list[dict[str, Any]]) -> None:
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * ROUNDS
    assert all(row["train"]["privacy"]["other-requests"] == {} for row in rows)


def test_epsilon_is_that_of_one_release_a_round(rows: list[dict[str, Any]]) -> None:
    told = [row["train"]["privacy"]["epsilon"] for row in rows]
    assert told == pytest.approx([PRIVACY.epsilon(number) for number in range(1, ROUNDS + 1)])


def test_a_holder_without_budget_is_a_straggler_with_a_reason(rows: list[dict[str, Any]]) -> None:
    # In time, or after the others had completed the round: the ledger keeps the reason of both.
    entries = [one for row in rows for one in [*row["train"]["rejected"], *row["train"]["late"]]]
    assert any(f"above the budget of {BUDGET:g}" in (one["reason"] or "") for one in entries)
    assert not any(SHORT in row["train"]["used"] for row in rows[1:])


def test_ledgers_of_all_holders_count_each_round_once(rows: list[dict[str, Any]], folder: Path) -> None:
    for worker in range(CODE.n):
        ledger = BudgetLedger(folder / "keys" / f"node-{worker}" / "spent")
        for shard in CODE.shards_of(worker):
            rounds = [entry.round for entry in ledger.entries(shard)]
            assert len(rounds) == len(set(rounds))
            assert sorted(rounds) == list(range(1, max(rounds, default=0) + 1))  # those it missed as well
            if worker == SHORT:
                assert max(rounds, default=0) <= 1
