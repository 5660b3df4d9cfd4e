"""A run that is killed goes on where it ended: every round once, and the model of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from fl_gradcode import GradientCode, GradientCoding, Ledger, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode.checkpoints.checkpoint import Checkpoint, Saved
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.testing import InProcessGrid
from tests.codes.samples import at_small_points
from tests.conftest import flat, initial_arrays, toy_app
from tests.strategy.rows import round_row

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 6


class Killed(BaseException):
    """As SIGKILL: nothing catches it. (A test with a real one is below.)"""


INNER: dict[str, Callable[..., FedAvg]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda **kwargs: FedAvgM(server_momentum=0.9, **kwargs),
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
}


def sampled(name: str) -> FedAvg:
    """Half of the shards in each round, drawn from the generator of `random`."""
    return INNER[name](fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.5, min_evaluate_nodes=1)


#: The strategies of all starts.
STARTED: list[GradientCoding] = []


def start(
    folder: Path,
    inner: Strategy | None = None,
    *,
    rounds: int = ROUNDS,
    killed_in: int | None = None,
    evaluate: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    arrays: ArrayRecord | None = None,
    latency: Latency | None = None,
    **options: Any,
) -> tuple[Any, GradientCoding]:
    """A new process, as far as the strategy can tell."""

    def kill(server_round: int, *_: Any) -> None:
        if server_round == killed_in:
            raise Killed

    options.setdefault("sees", None if "send" in options else "mean")  # strategies of a test's own only keep things
    strategy = GradientCoding(
        inner or sampled("FedAdam"),
        options.pop("code", None) or fractional_repetition(6, 1),
        ledger=folder / "ledger.jsonl",
        checkpoint=folder / "run.ckpt",
        on_round_end=kill,
        **options,
    )
    STARTED.append(strategy)
    with InProcessGrid(toy_app(), strategy.code.n) as inner_grid:
        grid = inner_grid if latency is None else VirtualGrid(inner_grid, latency)
        result = strategy.start(grid, arrays or initial_arrays(), num_rounds=rounds, evaluate_fn=evaluate)
    return result, strategy


def rounds_of(folder: Path) -> list[int]:
    return [row["round"] for row in Ledger.read(folder / "ledger.jsonl")]


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("central", [False, True])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(name: str, central: bool, tmp_path: Path) -> None:
    seen: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(server_round)
        return MetricRecord({"norm": float(np.linalg.norm(flat(arrays)))})

    measure = evaluate if central else None
    random.seed(3)
    whole, _ = start(tmp_path / "whole", sampled(name), evaluate=measure)
    random.seed(3)
    seen.clear()
    for killed_in in (1, 4):
        with pytest.raises(Killed):
            start(tmp_path / "killed", sampled(name), killed_in=killed_in, evaluate=measure)
        random.seed(99)  # another process draws other numbers, unless it goes on
    again, strategy = start(tmp_path / "killed", sampled(name), evaluate=measure)
    assert (flat(again.arrays) == flat(whole.arrays)).all()
    assert rounds_of(tmp_path / "killed") == [*range(1, ROUNDS + 1)]
    assert [row["round"] for row in strategy.ledger.rows] == [*range(1, ROUNDS + 1)]
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        ours, theirs = getattr(again, kind), getattr(whole, kind)
        assert [*ours] == [*theirs]
        for number, metrics in theirs.items():
            timeless = {key for key in metrics if "seconds" not in key}
            assert {key: ours[number][key] for key in timeless} == {key: metrics[key] for key in timeless}
    # Killed before the checkpoint of rounds 1 and 4: those rounds were run again, no other was.
    assert seen == ([0, 0, 1, 2, 3, 4, 5, 6] if central else [])


def test_the_first_row_behind_a_restart_says_so(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path, killed_in=4)
    start(tmp_path)
    rows = Ledger.read(tmp_path / "ledger.jsonl")
    assert [row["round"] for row in rows if row.get("resumed")] == [4]
    assert [row["round"] for row in rows if "holders" in row] == [1, 4]
    assert len({row["run"] for row in rows}) == 1
    assert all(abs(row["ended-at"] - time.time()) < 600 for row in rows)


def test_a_run_that_is_done_is_not_run_again_but_may_go_on_for_longer(tmp_path: Path) -> None:
    first, _ = start(tmp_path)
    again, strategy = start(tmp_path)
    assert (flat(again.arrays) == flat(first.arrays)).all()
    assert [*again.train_metrics_clientapp] == [*first.train_metrics_clientapp]
    assert rounds_of(tmp_path) == [*range(1, ROUNDS + 1)]
    start(tmp_path, rounds=ROUNDS + 2)
    assert rounds_of(tmp_path) == [*range(1, ROUNDS + 3)]
    assert strategy.run == Ledger.read(tmp_path / "ledger.jsonl")[-1]["run"]


def test_what_the_constructor_is_given_anew_holds(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path, FedAvgM(fraction_evaluate=0.0, server_learning_rate=1.0, server_momentum=0.9), killed_in=3)
    inner = FedAvgM(fraction_evaluate=0.0, server_learning_rate=0.5, server_momentum=0.9)
    start(tmp_path, inner)
    assert inner.server_learning_rate == 0.5
    assert inner.momentum_vector is not None


def test_how_adaptive_rounds_are_sent_is_chosen_as_before(tmp_path: Path) -> None:
    latency = Latency(compute=scaled(lognormal(1.0, 0.3), {0: 8.0}))
    options: dict[str, Any] = {"send": "adaptive", "code": fractional_repetition(6, 2), "latency": latency}
    with pytest.raises(Killed):
        start(tmp_path / "a", FedAvg(fraction_evaluate=0.0), killed_in=8, rounds=12, **options)
    _, strategy = start(tmp_path / "a", FedAvg(fraction_evaluate=0.0), rounds=8, **options)
    _, whole = start(tmp_path / "b", FedAvg(fraction_evaluate=0.0), rounds=8, **options)
    assert [row["way"] for row in strategy.ledger.rows[:7]] == [row["way"] for row in whole.ledger.rows[:7]]
    assert strategy._run is not None
    assert strategy._run.modes._history.rounds >= 7  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another code": ({"code": cyclic_repetition(6, 1, rng=np.random.default_rng(0))}, "another code."),
    "more shards": ({"code": fractional_repetition(8, 1)}, "another code"),
    "another seed": ({"seed": 7}, "another seed (0, now 7)"),
    "another strategy": ({"inner": FedAvg()}, "another strategy ('FedAdam', now 'FedAvg')"),
    "another model": ({"arrays": ArrayRecord([np.zeros((2, 2), np.float32), np.zeros(5, np.float32)])}, "array '0'"),
    "another run": ({"run": "mine"}, "and this is run 'mine'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_of_something_else_is_refused_and_left_alone(what: str, tmp_path: Path) -> None:
    start(tmp_path, rounds=2)
    before = (tmp_path / "run.ckpt").read_bytes(), (tmp_path / "ledger.jsonl").read_bytes()
    options, sentence = REFUSED[what]
    with pytest.raises(InvalidSetting, match=sentence.replace("(", "\\(").replace(")", "\\)")) as error:
        start(tmp_path, **options)
    assert "name another file" in str(error.value)
    assert before == ((tmp_path / "run.ckpt").read_bytes(), (tmp_path / "ledger.jsonl").read_bytes())


def test_a_code_with_other_last_bits_is_the_same_code(tmp_path: Path) -> None:
    """Kinds of processor differ in how they round."""
    code = cyclic_repetition(6, 2, rng=np.random.default_rng(0))
    with pytest.raises(Killed):
        start(tmp_path, code=code, killed_in=2)
    rounded = code.B * (1 + 1e-12 * np.random.default_rng(1).standard_normal(code.B.shape))
    start(tmp_path, code=GradientCode(rounded, 2, code.name))
    assert rounds_of(tmp_path) == [*range(1, ROUNDS + 1)]
    for other in (cyclic_repetition(6, 2, rng=np.random.default_rng(1)), GradientCode(-code.B, 2, code.name)):
        with pytest.raises(InvalidSetting, match="another code"):
            start(tmp_path, code=other)


def test_a_code_of_the_same_size_at_other_points_is_another_code(tmp_path: Path) -> None:
    """Of a run that an earlier version has begun."""
    with pytest.raises(Killed):
        start(tmp_path, FedAvg(), code=at_small_points(6, 1), killed_in=2)
    with pytest.raises(InvalidSetting, match="another code"):
        start(tmp_path, FedAvg(), code=reed_solomon(6, 1))
    start(tmp_path, FedAvg(), code=at_small_points(6, 1))  # the old one still decodes
    assert rounds_of(tmp_path) == [*range(1, ROUNDS + 1)]


def test_a_checkpoint_needs_an_absolute_path_of_a_file(tmp_path: Path) -> None:
    for path, text in (("run.ckpt", "is a relative path"), (tmp_path, "is a folder")):
        with pytest.raises(InvalidSetting, match=text):
            Checkpoint(path)
    with pytest.raises(InvalidSetting, match="cannot be written"):
        Checkpoint("/dev/null/run.ckpt")


def test_two_runs_cannot_have_one_checkpoint(tmp_path: Path) -> None:
    with Checkpoint(tmp_path / "run.ckpt").locked(), pytest.raises(InvalidSetting, match="in use by another run"):
        start(tmp_path)
    start(tmp_path, rounds=1)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -30])
def test_a_damaged_checkpoint_is_a_sentence(cut: int, tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    file = tmp_path / "run.ckpt"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InvalidSetting, match=r"is damaged|cannot be read"):
        start(tmp_path)


def test_a_flipped_bit_of_the_model_is_noticed(tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    file = tmp_path / "run.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidSetting, match="is damaged"):
        start(tmp_path)


def test_a_checkpoint_of_a_later_version_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_gradcode.checkpoints.checkpoint._FORMAT", 2)
    start(tmp_path, rounds=1)
    monkeypatch.undo()
    with pytest.raises(InvalidSetting, match="has format 2; this version reads 1"):
        start(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, rounds=2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    saved = Checkpoint(tmp_path / "run.ckpt").load()
    assert saved is not None
    with pytest.raises(InvalidSetting, match="No space left on device. The one before it is still there"):
        Checkpoint(tmp_path / "run.ckpt").save(saved)
    monkeypatch.undo()
    assert start(tmp_path, rounds=3)[1].ledger.rows[-1]["round"] == 3


def test_a_torn_last_line_of_the_ledger_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    other = json.dumps(round_row("other", 1).to_json())
    path.write_text(f"{other}\n{other[:30]}")
    Ledger(path).append(round_row("mine", 1))
    assert [row["run"] for row in Ledger.read(path)] == ["other", "mine"]
    path.write_text(other)  # whole, without its end
    Ledger(path).append(round_row("mine", 1))
    assert [row["run"] for row in Ledger.read(path)] == ["other", "mine"]


def test_rows_of_other_runs_stay_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for run, number in (("a", 1), ("b", 1), ("b", 2), ("a", 2), ("b", 3)):
        ledger.append(round_row(run, number))
    again = Ledger(path)
    assert [row.round for row in again.resume("b", 1)] == [1]
    assert [(row["run"], row["round"]) for row in Ledger.read(path)] == [("a", 1), ("b", 1), ("a", 2)]


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    """Nothing of it is unpickled: a file from elsewhere may be wrong, never run."""
    start(tmp_path, rounds=1)
    assert b"pickle" not in (tmp_path / "run.ckpt").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nobody_had(tmp_path: Path) -> None:
    """SIGKILL, seven times, wherever the process is: in a round, in the ledger, in the checkpoint."""
    rounds = 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.strategy.kept_run"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(program, cwd=ROOT, env=environment, text=True, **pipes) as forking:
        assert forking.stdin is not None and forking.stdout is not None
        requests, answers = forking.stdin, forking.stdout

        def process(folder: Path) -> int:
            """Of whom the next line says how it ended."""
            folder.mkdir(exist_ok=True)
            print(rounds, folder, file=requests, flush=True)
            return int(answers.readline())

        process(tmp_path / "whole")
        assert int(answers.readline()) == 0
        rng = np.random.default_rng(1)
        killed = 0
        while killed < 7:
            one = process(tmp_path / "killed")
            target = killed * 5 + 1
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # it has got somewhere: now wait for a random moment
                ledger = tmp_path / "killed" / "ledger.jsonl"
                if ledger.exists() and ledger.read_bytes().count(b"\n") >= target:
                    break
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 0.05)))
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
            ended = int(answers.readline())
            if ended == 0:
                break  # it was faster
            assert ended == -signal.SIGKILL
            killed += 1
        process(tmp_path / "killed")
        assert int(answers.readline()) == 0
        requests.close()
    assert killed >= 4
    with np.load(tmp_path / "whole" / "final.npz") as a, np.load(tmp_path / "killed" / "final.npz") as b:
        assert all((a[name] == b[name]).all() for name in a.files)
    rows = Ledger.read(tmp_path / "killed" / "ledger.jsonl")
    assert [row["round"] for row in rows] == [*range(1, rounds + 1)]
    assert len({row["run"] for row in rows}) == 1
    assert sum(bool(row.get("resumed")) for row in rows) >= 3


def test_any_dtype_of_a_model_is_kept_bit_by_bit(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    record = ArrayRecord({"h": torch.ones(3, dtype=torch.float16), "d": torch.ones(2, dtype=torch.float64)})
    checkpoint = Checkpoint(tmp_path / "x.ckpt")
    checkpoint.save(Saved("run", 3, record, {}))
    saved = checkpoint.load()
    assert saved is not None and saved.arrays == record and saved.round == 3


def test_a_file_that_is_no_ledger_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(b"PK\x03\x04 a checkpoint\nwithout an end of line")
    with pytest.raises(InvalidSetting, match="is not a ledger, and nothing was written to it"):
        Ledger(path)
    assert path.read_bytes() == b"PK\x03\x04 a checkpoint\nwithout an end of line"
