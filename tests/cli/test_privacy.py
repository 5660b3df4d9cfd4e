"""`fl-gradcode privacy` and `fl-gradcode keys`, as a user calls them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from opacus.accountants import create_accountant
from typer.testing import CliRunner

from fl_gradcode import fractional_repetition
from fl_gradcode.cli.app import app
from fl_gradcode.privacy import DPSGD, BudgetLedger, CentralNoise, Spend, read_keys
from fl_gradcode.privacy.budget_ledger import Request


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.stderr


def of_opacus(noise: float, rate: float, steps: int, delta: float = 1e-5) -> float:
    accountant = create_accountant(mechanism="prv")
    accountant.history = [(noise, rate, steps)]
    return float(accountant.get_epsilon(delta=delta))


def test_noise_for_an_epsilon_and_the_line_to_paste() -> None:
    asked = ["--rounds", "30", "--steps", "5", "--sample-rate", "0.05", "--epsilon", "3", "--holders", "3"]
    code, out, _ = call("privacy", *asked)
    assert code == 0
    (line,) = [one.strip() for one in out.splitlines() if one.strip().startswith("privacy=")]
    pasted = eval(line.removeprefix("privacy="), {"DPSGD": DPSGD})
    assert of_opacus(pasted.noise_multiplier, 0.05, 150) <= 3.0
    assert of_opacus(0.995 * pasted.noise_multiplier, 0.05, 150) > 3.0
    code, out, _ = call("privacy", *asked, "--json")
    shared, independent = json.loads(out)["modes"]
    assert shared["releases-a-round"] == 1
    assert independent["releases-a-round"] == 3
    assert of_opacus(independent["noise-multiplier"], 0.05, 450) <= 3.0


def test_what_a_noise_costs() -> None:
    code, out, _ = call(
        "privacy", "--rounds", "20", "--steps", "10", "--sample-rate", "0.05", "--noise-multiplier", "1", "--json"
    )
    assert code == 0
    (mode,) = json.loads(out)["modes"]
    assert mode["epsilon"] == pytest.approx(4.776, abs=1e-3)  # the table of the accountants


def test_central_noise() -> None:
    code, out, _ = call("privacy", "--rounds", "30", "--central", "--noise-multiplier", "5", "--max-grad-norm", "2")
    assert code == 0
    (line,) = [one.strip() for one in out.splitlines() if one.strip().startswith("privacy=")]
    pasted = eval(line.removeprefix("privacy="), {"CentralNoise": CentralNoise})
    assert (pasted.noise_multiplier, pasted.clipping_norm) == (5.0, 2.0)
    assert pasted.epsilon(30) == pytest.approx(4.87, abs=0.02)  # by a third accountant, of privacy loss distributions


WRONG: dict[str, tuple[str, str]] = {
    "neither": ("--rounds 3 --sample-rate 0.1", "Say either --epsilon"),
    "both": ("--rounds 3 --sample-rate 0.1 --epsilon 1 --noise-multiplier 1", "Say either --epsilon"),
    "no rate": ("--rounds 3 --epsilon 1", "The sample rate is missing"),
    "rate": ("--rounds 3 --epsilon 1 --sample-rate 2", "sample_rate=2.0 must be a number from"),
    "rounds": ("--rounds 0 --epsilon 1 --sample-rate 0.1", "--rounds 0 must be at least 1"),
    "holders": ("--rounds 3 --epsilon 1 --sample-rate 0.1 --holders 0", "--holders 0 must be at least 1"),
    "steps": ("--rounds 3 --epsilon 1 --sample-rate 0.1 --steps 0", "steps=0 must be"),
    "epsilon": ("--rounds 3 --epsilon -1 --sample-rate 0.1", "epsilon=-1.0 must lie between"),
    "tiny epsilon": ("--rounds 3 --epsilon 0.001 --sample-rate 1", "No noise multiplier up to"),
    "noise": ("--rounds 3 --noise-multiplier 0 --sample-rate 1", "noise_multiplier=0.0 must be"),
    "delta": ("--rounds 3 --epsilon 1 --sample-rate 1 --delta 1", "delta=1.0 must lie"),
    "norm": ("--rounds 3 --epsilon 1 --sample-rate 1 --max-grad-norm 0", "max_grad_norm=0.0 must be"),
    "accountant": ("--rounds 3 --epsilon 1 --sample-rate 1 --accountant gdp", "'gdp' must be one of prv, rdp"),
    "central": ("--rounds 3 --epsilon 1 --central --steps 5", "leave --sample-rate and --steps out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_sentence(case: str) -> None:
    arguments, sentence = WRONG[case]
    code, out, error = call("privacy", *arguments.split())
    assert (code, out) == (2, "")
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_keys_for_a_code(tmp_path: Path) -> None:
    code, out, _ = call("keys", "make", str(tmp_path / "keys"), "--workers", "6", "--stragglers", "2")
    assert code == 0
    assert "Keys of 6 shards for 6 workers" in out
    made = fractional_repetition(6, 2)
    files = [tmp_path / "keys" / f"node-{worker}" / "keys.json" for worker in range(6)]
    nodes = [read_keys(file.parent) for file in files]
    for worker, node in enumerate(nodes):
        assert sorted(node.secrets) == sorted(made.shards_of(worker))
        assert stat.S_IMODE(files[worker].stat().st_mode) == 0o600
        for shard, secret in node.secrets.items():
            assert secret.hex() not in out
            assert all(nodes[other].secrets[shard] == secret for other in made.holders_of(shard))


def test_keys_for_an_assignment_and_their_rotation(tmp_path: Path) -> None:
    (tmp_path / "who.json").write_text("[[0, 1], [1, 2], [2, 0]]")
    folder = str(tmp_path / "keys")
    assert call("keys", "make", folder, "--assignment", str(tmp_path / "who.json"))[0] == 0
    before = [read_keys(tmp_path / "keys" / f"node-{worker}") for worker in range(3)]
    code, out, _ = call("keys", "rotate", folder)
    assert code == 0
    assert "generation 2" in out
    after = [read_keys(tmp_path / "keys" / f"node-{worker}") for worker in range(3)]
    assert [sorted(node.secrets) for node in after] == [[0, 1], [1, 2], [0, 2]]
    assert not {*before[0].secrets.values()} & {*after[0].secrets.values()}


def test_check_shows_what_was_spent_and_no_secret(tmp_path: Path) -> None:
    call("keys", "make", str(tmp_path), "--workers", "2", "--stragglers", "1")
    node = tmp_path / "node-0"
    ledger = BudgetLedger(node / "spent")
    ledger.charge(Request(0, "r", 1, "c", Spend(1.0, 0.05, 200)), delta=1e-5)
    code, out, _ = call("keys", "check", str(node))
    assert code == 0
    assert "4.78" in out
    assert all(secret.hex() not in out for secret in read_keys(node).secrets.values())


BAD: dict[str, tuple[str, str]] = {
    "no workers": ("make {}/k", "The number of workers is missing"),
    "unknown code": ("make {}/k -n 4 --code magic", "--code 'magic' must be one of"),
    "too many stragglers": ("make {}/k -n 4 -s 4", "s=4"),
    "bad assignment": ("make {}/k --assignment {}/bad.json", "must hold, as JSON"),
    "no worker": ("make {}/k --assignment {}/empty.json", "must hold, as JSON"),
    "missing file": ("make {}/k --assignment {}/none.json", "must hold, as JSON"),
    "nothing to rotate": ("rotate {}", "make keys first"),
    "nothing to check": ("check {}", "There is no key file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_call_of_keys_is_one_sentence(case: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"0": "x"}')
    (tmp_path / "empty.json").write_text("[]")
    arguments, sentence = BAD[case]
    code, out, error = call("keys", *arguments.replace("{}", str(tmp_path)).split())
    assert (code, out) == (2, "")
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_keys_are_not_overwritten(tmp_path: Path) -> None:
    call("keys", "make", str(tmp_path), "--workers", "2")
    before: Any = read_keys(tmp_path / "node-0").secrets
    code, _, error = call("keys", "make", str(tmp_path), "--workers", "2")
    assert code == 2
    assert "already exists" in error
    assert read_keys(tmp_path / "node-0").secrets == before
