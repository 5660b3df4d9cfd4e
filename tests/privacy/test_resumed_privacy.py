"""A private run that is killed and goes on from its checkpoint: nothing is spent twice, nothing is forgotten."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fl_gradcode import GradientCoding
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.privacy import CentralNoise
from tests.conftest import flat
from tests.privacy.private_app import keys_for
from tests.privacy.test_run_privacy import ANY_CODE, CODES, clients, hand_computed, private, start

ROUNDS = 4


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def kept(code: Any, folder: Path, killed_in: int | None = None, **options: Any) -> GradientCoding:
    def kill(server_round: int, *_: Any) -> None:
        if server_round == killed_in:  # the round was answered and charged, its checkpoint is not written
            raise Killed

    options = {"run": "r", "checkpoint": folder / "run.ckpt", "ledger": folder / "ledger.jsonl", **options}
    return private(code, on_round_end=kill, **options)


@ANY_CODE
def test_the_model_and_what_every_node_has_spent_are_those_of_an_undisturbed_run(name: str, tmp_path: Path) -> None:
    code = CODES[name]
    keys_for(code, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for killed_in in (1, 3):
        with pytest.raises(Killed):
            start(kept(code, tmp_path / "killed", killed_in), clients(code, tmp_path / "killed"), ROUNDS)
    found = {}
    for folder in ("whole", "killed"):
        strategy = kept(code, tmp_path / folder)
        result = start(strategy, clients(code, tmp_path / folder), ROUNDS)
        told = [row["train"]["privacy"]["epsilon"] for row in strategy.ledger.rows]
        assert told == pytest.approx([hand_computed(number) for number in range(1, ROUNDS + 1)], rel=1e-9)
        files = sorted((tmp_path / folder).glob("node-*/spent/*.jsonl"))
        found[folder] = flat(result.arrays), [path.read_text() for path in files]
    assert (found["whole"][0] == found["killed"][0]).all()
    assert found["whole"][1] and found["whole"][1] == found["killed"][1]


def test_if_the_account_is_lost_everybody_counts_as_asked(tmp_path: Path) -> None:
    code = CODES["fractional"]
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 3), clients(code, tmp_path), ROUNDS)
    (tmp_path / "run.ckpt.privacy").unlink()
    strategy = kept(code, tmp_path)
    start(strategy, clients(code, tmp_path), ROUNDS)
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(ROUNDS), rel=1e-9)


def central(tmp_path: Path, killed_in: int | None = None, **changes: Any) -> GradientCoding:
    noise = CentralNoise(noise_multiplier=5.0, clipping_norm=0.5, accountant="rdp", **changes)
    return kept(CODES["fractional"], tmp_path, killed_in, privacy=noise)


@pytest.mark.parametrize("folder", [False, True])
def test_noise_that_was_drawn_for_a_lost_round_counts(folder: bool, tmp_path: Path) -> None:
    """The model of the lost round may have been seen; the round is drawn anew, with other noise."""
    changes: dict[str, Any] = {"folder": str(tmp_path / "spent")} if folder else {}
    grid = lambda: clients(CODES["fractional"], tmp_path / "keys")  # noqa: E731
    with pytest.raises(Killed):
        start(central(tmp_path, 3, **changes), grid(), ROUNDS)
    strategy = central(tmp_path, **changes)
    start(strategy, grid(), ROUNDS)
    noise = strategy.options.privacy
    assert isinstance(noise, CentralNoise)
    told = [row["train"]["privacy"]["epsilon"] for row in strategy.ledger.rows]
    assert told[1] == pytest.approx(noise.epsilon(2)) and told[-1] == pytest.approx(noise.epsilon(ROUNDS + 1))


def test_a_budget_for_all_rounds_is_not_exceeded_by_a_lost_one(tmp_path: Path) -> None:
    budget = CentralNoise(noise_multiplier=5.0, clipping_norm=0.5, accountant="rdp").epsilon(ROUNDS) * 1.001
    grid = lambda: clients(CODES["fractional"], tmp_path / "keys")  # noqa: E731
    with pytest.raises(Killed):
        start(central(tmp_path, 3, max_epsilon=budget), grid(), ROUNDS)
    with pytest.raises(InvalidSetting, match=f"Run {ROUNDS - 1} rounds at most"):
        start(central(tmp_path, max_epsilon=budget), grid(), ROUNDS)
    strategy = central(tmp_path, max_epsilon=budget)
    start(strategy, grid(), ROUNDS - 1)
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] <= budget


@pytest.mark.parametrize("other", [CentralNoise(noise_multiplier=50.0, clipping_norm=0.5, accountant="rdp"), None])
def test_rounds_that_are_done_are_not_priced_by_other_noise(other: Any, tmp_path: Path) -> None:
    grid = lambda: clients(CODES["fractional"], tmp_path / "keys")  # noqa: E731
    with pytest.raises(Killed):
        start(central(tmp_path, 3), grid(), ROUNDS)
    with pytest.raises(InvalidSetting, match="a run with another privacy promise. Go on with the same one"):
        start(kept(CODES["fractional"], tmp_path, privacy=other), grid(), ROUNDS)
