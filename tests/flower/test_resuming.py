"""A run that is killed goes on where it ended: every round once, and the model of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_gradcode import GradientCoding, Ledger, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode.checkpoint import Checkpoint, Saved
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.strategy_state import StrategyState, Unstorable, decode, encode
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app

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

    strategy = GradientCoding(
        inner or sampled("FedAdam"),
        options.pop("code", None) or fractional_repetition(6, 1),
        ledger=folder / "ledger.jsonl",
        checkpoint=folder / "run.ckpt",
        on_round_end=kill,
        **options,
    )
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


def test_a_strategy_may_keep_itself(tmp_path: Path) -> None:
    class Counting(FedAvg):
        def __init__(self) -> None:
            super().__init__(fraction_evaluate=0.0)
            self._lock = object()
            self.count = 0

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.count += 1
            return super().aggregate_train(server_round, replies)

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "deep": {"a": [np.arange(3), (1, 2)]}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]
            assert (state["deep"]["a"][0] == np.arange(3)).all() and state["deep"]["a"][1] == (1, 2)

    with pytest.raises(Killed):
        start(tmp_path, Counting(), killed_in=3)
    inner = Counting()
    start(tmp_path, inner)
    assert inner.count == ROUNDS


def test_an_attribute_that_cannot_be_kept_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner = FedAvg(fraction_evaluate=0.0)
    inner.history = object()  # type: ignore[attr-defined]
    start(tmp_path, inner, rounds=1)
    assert "FedAvg.history is a object" in caplog.text and "state_dict()" in caplog.text
    caplog.clear()
    start(tmp_path / "plain", FedAvg(fraction_evaluate=0.0), rounds=1)
    assert "cannot hold" not in caplog.text


def test_how_adaptive_rounds_are_sent_is_chosen_as_before(tmp_path: Path) -> None:
    latency = Latency(compute=scaled(lognormal(1.0, 0.3), {0: 8.0}))
    options: dict[str, Any] = {"send": "adaptive", "code": fractional_repetition(6, 2), "latency": latency}
    with pytest.raises(Killed):
        start(tmp_path / "a", FedAvg(fraction_evaluate=0.0), killed_in=8, rounds=12, **options)
    _, strategy = start(tmp_path / "a", FedAvg(fraction_evaluate=0.0), rounds=8, **options)
    _, whole = start(tmp_path / "b", FedAvg(fraction_evaluate=0.0), rounds=8, **options)
    assert [row["way"] for row in strategy.ledger.rows[:7]] == [row["way"] for row in whole.ledger.rows[:7]]
    assert strategy._here.ways._history.rounds >= 7  # type: ignore[attr-defined]


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


def test_a_checkpoint_needs_an_absolute_path_of_a_file(tmp_path: Path) -> None:
    for path, text in (("run.ckpt", "is relative"), (tmp_path, "is a folder")):
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
    monkeypatch.setattr("fl_gradcode.checkpoint._FORMAT", 2)
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
    path.write_text('{"run": "other", "round": 1}\n{"run": "oth')
    Ledger(path).append({"run": "mine", "round": 1})
    assert [row["run"] for row in Ledger.read(path)] == ["other", "mine"]
    path.write_text('{"run": "other", "round": 1}')  # whole, without its end
    Ledger(path).append({"run": "mine", "round": 1})
    assert [row["run"] for row in Ledger.read(path)] == ["other", "mine"]


def test_rows_of_other_runs_stay_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for run, number in (("a", 1), ("b", 1), ("b", 2), ("a", 2), ("b", 3)):
        ledger.append({"run": run, "round": number})
    again = Ledger(path)
    assert [row["round"] for row in again.resume("b", 1)] == [1]
    assert [(row["run"], row["round"]) for row in Ledger.read(path)] == [("a", 1), ("b", 1), ("a", 2)]


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    """Nothing of it is unpickled: a file from elsewhere may be wrong, never run."""
    start(tmp_path, rounds=1)
    assert b"pickle" not in (tmp_path / "run.ckpt").read_bytes()
    with pytest.raises(Unstorable, match="ndarray"):
        encode(np.array([object()]), [])


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nobody_had(tmp_path: Path) -> None:
    """SIGKILL, seven times, wherever the process is: in a round, in the ledger, in the checkpoint."""
    rounds = 40
    program = [sys.executable, "-m", "tests.programs.kept_run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def process(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        arguments = [*program, str(folder), str(rounds)]
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    whole = process(tmp_path / "whole")
    rng = np.random.default_rng(1)
    killed = 0
    while killed < 7:
        one = process(tmp_path / "killed")
        target = killed * 5 + 1
        deadline = time.monotonic() + 60
        while one.poll() is None and time.monotonic() < deadline:  # it has got somewhere: now wait for a random moment
            ledger = tmp_path / "killed" / "ledger.jsonl"
            if ledger.exists() and ledger.read_bytes().count(b"\n") >= target:
                break
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        one.send_signal(signal.SIGKILL)
        if one.wait() == 0:
            break  # it was faster
        killed += 1
    last = process(tmp_path / "killed")
    assert last.wait(timeout=100) == 0 and whole.wait(timeout=100) == 0
    assert killed >= 4
    with np.load(tmp_path / "whole" / "final.npz") as a, np.load(tmp_path / "killed" / "final.npz") as b:
        assert all((a[name] == b[name]).all() for name in a.files)
    rows = Ledger.read(tmp_path / "killed" / "ledger.jsonl")
    assert [row["round"] for row in rows] == [*range(1, rounds + 1)]
    assert len({row["run"] for row in rows}) == 1
    assert sum(bool(row.get("resumed")) for row in rows) >= 3


ARRAYS: Any = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)
)
SIMPLE: Any = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | ARRAYS
KEYS: Any = st.text() | st.integers() | st.tuples(st.text())
VALUES: Any = st.recursive(
    SIMPLE, lambda one: st.lists(one) | st.tuples(one, one) | st.dictionaries(KEYS, one), max_leaves=8
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@given(VALUES)
@settings(deadline=None, max_examples=200)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    blobs: list[bytes] = []
    assert same(decode(json.loads(json.dumps(encode(value, blobs))), blobs), value)


def test_generators_and_records_come_back_as_they_were() -> None:
    rng, python = np.random.default_rng(1), random.Random(2)
    rng.random(3)
    value = {"rng": rng, "python": python, "arrays": initial_arrays(), "scalar": np.float32(0.1)}
    value |= {"metrics": MetricRecord({"a": 1, "b": [0.5, 2.0]}), "config": ConfigRecord({"x": b"y", "z": "t"})}
    blobs: list[bytes] = []
    again = decode(json.loads(json.dumps(encode(value, blobs))), blobs)
    assert again["rng"].random() == rng.random() and again["python"].random() == python.random()
    assert again["arrays"] == value["arrays"] and again["scalar"] == value["scalar"]
    assert dict(again["metrics"].items()) == {"a": 1, "b": [0.5, 2.0]}
    assert dict(again["config"].items()) == {"x": b"y", "z": "t"}


def test_what_is_no_plain_value_is_named() -> None:
    with pytest.raises(Unstorable, match="Thread"):
        encode({"a": [threading.Thread()]}, [])


def test_a_strategy_inside_a_strategy_is_kept_too() -> None:
    class Around(FedAvg):
        def __init__(self, inside: FedAvgM) -> None:
            super().__init__()
            self.inside = inside

    first, second = Around(FedAvgM()), Around(FedAvgM())
    state, other = StrategyState(first), StrategyState(second)
    assert state.changed() == {}
    first.inside.momentum_vector = {"0": np.ones(2)}  # type: ignore[assignment]
    other.restore(state.changed())
    vector: Any = second.inside.momentum_vector
    assert (vector["0"] == 1).all()


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
    with pytest.raises(InvalidSetting, match="is no ledger, and nothing was written to it"):
        Ledger(path)
    assert path.read_bytes() == b"PK\x03\x04 a checkpoint\nwithout an end of line"
