"""A private run that is killed and goes on from its checkpoint: nothing is spent twice, nothing is forgotten."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord

from fl_gradcode import GradientCoding, Ledger, VirtualGrid
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency
from fl_gradcode.privacy import CentralNoise
from fl_gradcode.privacy.run_account import Account
from fl_gradcode.strategy.resume import request_of
from tests.conftest import flat
from tests.privacy.private_app import initial, keys_for, settings
from tests.privacy.test_run_account import ANY_CODE, CODES, clients, hand_computed, private, rounds_of, start

ROUNDS = 4


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def kept(code: Any, folder: Path, killed_in: int | None = None, **options: Any) -> GradientCoding:
    def kill(server_round: int, *_: Any) -> None:
        if server_round == killed_in:  # the round was answered and charged, its checkpoint is not written
            raise Killed

    options = {"run": "r", "verify": 0, "checkpoint": folder / "run.ckpt", "ledger": folder / "ledger.jsonl", **options}
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
    start(strategy, clients(code, tmp_path), 6)
    assert numbers(strategy) == [1, 2, 5, 6]  # the ledger has 3, and behind it 4 may have been asked
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(6), rel=1e-9)


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
    with pytest.raises(InvalidSetting, match="a run with another privacy promise. Continue with the same one"):
        start(kept(CODES["fractional"], tmp_path, privacy=other), grid(), ROUNDS)


def run_on(strategy: GradientCoding, grid: Any, config: dict[str, Any] | None = None) -> Any:
    with grid:
        virtual = VirtualGrid(grid, Latency(compute=1.0))
        asked = ConfigRecord(config or {})
        return strategy.start(virtual, initial(), num_rounds=ROUNDS, timeout=1000.0, train_config=asked)


def numbers(strategy: GradientCoding) -> list[int]:
    return [row["round"] for row in strategy.ledger.rows]


@pytest.mark.parametrize("change", ["message", "independent noise", "nothing"])
def test_a_round_that_would_be_asked_otherwise_is_not_asked_again(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed in round 3; its answers would be other ones now: its number is spent, as the account says."""
    code = CODES["cyclic"]
    options: dict[str, Any] = {"privacy": settings(noise="independent")} if change == "independent noise" else {}
    with pytest.raises(Killed):
        run_on(kept(code, tmp_path, 3, **options), clients(code, tmp_path))
    again = kept(code, tmp_path, **options)
    run_on(again, clients(code, tmp_path), {"local-epochs": 2} if change == "message" else None)
    holders = 3 if options else 1
    assert numbers(again) == ([1, 2, 3, 4] if change == "nothing" else [1, 2, 4])
    assert ("Round 3 had already been asked for" in caplog.text) == (change != "nothing")
    assert all(row["train"]["outcome"] == "exact" and not row["train"]["rejected"] for row in again.ledger.rows)
    told = again.ledger.rows[-1]["train"]["privacy"]["epsilon"]
    assert told == pytest.approx(hand_computed(ROUNDS, holders), rel=1e-9)
    nodes = [rounds_of(tmp_path, worker, shard) for worker in range(6) for shard in code.shards_of(worker)]
    assert all(len(rounds) == len(set(rounds)) for rounds in nodes)  # nobody answers a number twice
    # A run that is done stays done, and its account with it.
    run_on(kept(code, tmp_path, **options), clients(code, tmp_path), {"local-epochs": 3})
    assert [row["round"] for row in Ledger.read(tmp_path / "ledger.jsonl")] == numbers(again)


def test_another_app_or_run_config_is_another_request() -> None:
    def grid(**run: Any) -> Any:
        return SimpleNamespace(run=SimpleNamespace(**run))

    options = private(CODES["cyclic"]).options
    config = {"fab_hash": "a", "override_config": {"lr": 0.1, "privacy-dir": "/x"}}
    one = request_of(grid(**config), options, None)
    assert request_of(grid(**config), options, ConfigRecord()) == one
    others = [
        request_of(grid(**{**config, "fab_hash": "b"}), options, None),
        request_of(grid(**{**config, "override_config": {"lr": 0.2}}), options, None),
        request_of(grid(**config), options, ConfigRecord({"epochs": 2})),
        request_of(grid(**config), private(CODES["cyclic"], seed=1).options, None),
        request_of(grid(**config), private(CODES["cyclic"], privacy=settings(steps=4)).options, None),
        request_of(grid(run_id=1), options, None),
    ]
    assert len({one, *others}) == 1 + len(others)


def test_an_account_older_than_the_checkpoint_is_not_believed(tmp_path: Path) -> None:
    code = CODES["fractional"]
    for killed_in in (1, 3):
        with pytest.raises(Killed):
            start(kept(code, tmp_path, killed_in), clients(code, tmp_path), ROUNDS)
        if killed_in == 1:
            shutil.copy(tmp_path / "run.ckpt.privacy", tmp_path / "backup")
    shutil.copy(tmp_path / "backup", tmp_path / "run.ckpt.privacy")
    strategy = kept(code, tmp_path)
    start(strategy, clients(code, tmp_path), 6)
    assert numbers(strategy) == [1, 2, 5, 6]  # the ledger has 3, and behind it 4 may have been asked
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(6), rel=1e-9)


def test_a_checkpoint_older_than_the_account_goes_on_behind_it(tmp_path: Path) -> None:
    code = CODES["fractional"]
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 2), clients(code, tmp_path), ROUNDS)
    shutil.copy(tmp_path / "run.ckpt", tmp_path / "backup")  # after round 1
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 3), clients(code, tmp_path), ROUNDS)
    shutil.copy(tmp_path / "backup", tmp_path / "run.ckpt")
    strategy = kept(code, tmp_path)
    start(strategy, clients(code, tmp_path), ROUNDS)
    assert numbers(strategy) == [1, 4]
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(hand_computed(ROUNDS), rel=1e-9)


def test_a_name_is_not_begun_anew_without_its_checkpoint(tmp_path: Path) -> None:
    code = CODES["fractional"]
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 3), clients(code, tmp_path), ROUNDS)
    (tmp_path / "run.ckpt").unlink()
    with pytest.raises(InvalidSetting, match="Run 'r' has already asked for rounds up to 3"):
        start(kept(code, tmp_path), clients(code, tmp_path), ROUNDS)
    strategy = kept(code, tmp_path, run="another")
    start(strategy, clients(code, tmp_path), ROUNDS)
    assert numbers(strategy) == [1, 2, 3, 4]


def test_noise_that_was_never_drawn_is_not_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first round, while it waited for nodes."""

    def killed(*_: Any) -> None:
        raise Killed

    grid = lambda: clients(CODES["fractional"], tmp_path / "keys")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("fl_gradcode.strategy.run.Run.begin", killed)
        with pytest.raises(Killed):
            start(central(tmp_path), grid(), ROUNDS)
    assert (tmp_path / "run.ckpt").exists()
    strategy = central(tmp_path)
    start(strategy, grid(), ROUNDS)
    noise = strategy.options.privacy
    assert isinstance(noise, CentralNoise)
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] == pytest.approx(noise.epsilon(ROUNDS))


def restore(folder: Path, backup: Path) -> None:
    for name in ("run.ckpt", "run.ckpt.privacy"):
        shutil.copy(backup / name, folder / name)


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_if_both_files_are_put_back_the_ledger_tells_what_was_asked_since(noise: Any, tmp_path: Path) -> None:
    code = CODES["cyclic"]
    options: dict[str, Any] = {"privacy": settings(noise=noise)}
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 1, **options), clients(code, tmp_path), 8)
    shutil.copytree(tmp_path, tmp_path / "backup")
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 3, **options), clients(code, tmp_path), 8)
    restore(tmp_path, tmp_path / "backup")
    with pytest.MonkeyPatch.context() as patch:  # a start for no more than is done must not cut off what tells
        patch.setattr("fl_gradcode.strategy.run.Run.begin", lambda *_: pytest.fail("something was begun"))
        start(kept(code, tmp_path, **options), clients(code, tmp_path), 0)
    strategy = kept(code, tmp_path, **options)
    start(strategy, clients(code, tmp_path), 8)
    assert numbers(strategy) == [5, 6, 7, 8]  # 4 may have been under way
    told = strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"]
    assert told == pytest.approx(hand_computed(8, 3 if noise == "independent" else 1), rel=1e-9)
    for worker in range(6):
        for shard in code.shards_of(worker):
            spent = rounds_of(tmp_path, worker, shard)
            assert len(spent) == len(set(spent))


def test_if_both_files_are_put_back_noise_that_was_drawn_since_counts(tmp_path: Path) -> None:
    grid = lambda: clients(CODES["fractional"], tmp_path / "keys")  # noqa: E731
    with pytest.raises(Killed):
        start(central(tmp_path, 2), grid(), ROUNDS)
    shutil.copytree(tmp_path, tmp_path / "backup")  # drawn: 2
    with pytest.raises(Killed):
        start(central(tmp_path, 4), grid(), ROUNDS)  # 3 more: rounds 2 to 4
    restore(tmp_path, tmp_path / "backup")
    strategy = central(tmp_path)
    start(strategy, grid(), ROUNDS)  # and again 3
    noise = strategy.options.privacy
    assert isinstance(noise, CentralNoise)
    assert strategy.ledger.rows[-1]["train"]["privacy"]["epsilon"] >= noise.epsilon(2 + 3 + 3)


def test_a_lost_account_costs_no_more_however_often_the_server_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for nodes, say."""

    def killed(*_: Any) -> None:
        raise Killed

    code = CODES["fractional"]
    with pytest.raises(Killed):
        start(kept(code, tmp_path, 2), clients(code, tmp_path), 5)
    (tmp_path / "run.ckpt.privacy").unlink()
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr("fl_gradcode.strategy.run.Run.begin", killed)
            with pytest.raises(Killed):
                start(kept(code, tmp_path), clients(code, tmp_path), 5)
    strategy = kept(code, tmp_path)
    start(strategy, clients(code, tmp_path), 5)
    assert numbers(strategy) == [1, 4, 5]  # the ledger had 2


def test_another_number_of_holders_makes_no_account_stale() -> None:
    few = Account.new({0: 1, 1: 1}).released([0], (1, 1))
    many = Account.new({0: 2, 1: 2}).merged(few.state)
    assert few.covers(many.state) and many.covers(few.state)
    more = many.drawn([1])
    assert not few.covers(more.state)
    assert few.merged(more.state).holders == {0: 2, 1: 2} and few.merged(more.state).covers(more.state)
