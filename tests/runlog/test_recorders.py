"""TensorBoard, MLflow and pandas get the numbers that the ledger has. The real libraries are used where installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.runlog import RoundRow, figures_of, jobs_frame, rounds_frame, to_mlflow, to_tensorboard
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app
from tests.runlog.ledger_rows import phase, rejected, row, typed, write


def run(**options: Any) -> GradientCoding:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), **options)
    with InProcessGrid(toy_app(), 4) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=3)
    return strategy


def test_the_figures_of_a_round_are_its_numbers() -> None:
    evaluated = phase(outcome="skipped", **{"decodable-after-replies": None, "decodable-after-seconds": None})
    one = row(3, straggling=[4, 5], rejected=[rejected(4, "x")], evaluate=evaluated)
    figures = figures_of(RoundRow.from_json(one))
    assert figures["train/exact"] == 1.0 and figures["evaluate/exact"] == 0.0
    assert (figures["train/stragglers"], figures["train/rejected"], figures["train/used"]) == (2.0, 1.0, 2.0)
    assert figures["train/waiting-seconds"] == 2.0 and figures["train/megabytes-down"] == 1e-4
    assert "evaluate/decodable-after-seconds" not in figures and "train/epsilon" not in figures
    assert all(type(value) is float and math.isfinite(value) for value in figures.values())


def test_a_ledger_becomes_a_frame_with_a_row_for_each_phase(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [row(1, **{"ended-at": 0.5}), row(2, evaluate=phase(outcome="skipped", kappa=None))]
    frame = rounds_frame(write(tmp_path / "ledger.jsonl", rows))
    assert frame[["round", "phase", "outcome"]].to_numpy().tolist() == [
        [1, "train", "exact"], [2, "train", "exact"], [2, "evaluate", "skipped"],
    ]  # fmt: skip
    assert frame["ended_at"][0] == pandas.Timestamp("1970-01-01T00:00:00.5Z") and pandas.isna(frame["ended_at"][1])
    assert frame["waiting_seconds"].tolist() == [2.0] * 3
    assert math.isnan(frame["kappa"][2]) and frame["kappa"].dtype == "float64"
    assert {name.replace("_", "-") for name in frame.columns} >= {
        name.partition("/")[2] for one in typed(rows) for name in figures_of(one)
    }
    assert rounds_frame(typed(rows)).equals(frame)
    assert rounds_frame([]).columns.tolist() == frame.columns.tolist()


def test_a_ledger_in_memory_and_its_file_give_the_same_frames(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    ledger = run(ledger=tmp_path / "ledger.jsonl").ledger
    for frame_of in (rounds_frame, jobs_frame):
        assert frame_of(ledger).equals(frame_of(tmp_path / "ledger.jsonl"))
        assert frame_of(ledger).equals(frame_of(ledger.rounds))
    assert len(rounds_frame(ledger)) == 3


def test_the_jobs_of_a_ledger_become_a_frame() -> None:
    pytest.importorskip("pandas")
    frame = jobs_frame(typed([row(1), row(2, seconds=(3.0, None, 5.0))]))
    assert frame[frame["round"] == 2][["worker", "asked", "seconds", "computing"]].to_numpy().tolist() == [
        [0, 2, 3.0, 1.5], [2, 2, 5.0, 2.5],
    ]  # fmt: skip


def test_tensorboard_gets_each_round_while_the_run_goes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, seen = tmp_path / "board", []
    record = to_tensorboard(folder, more=lambda server_round, arrays: {"tensors": len(arrays)})

    def read() -> Any:
        events = EventAccumulator(str(folder))
        events.Reload()
        return events

    def both(server_round: int, arrays: Any, values: dict[str, Any]) -> None:
        record(server_round, arrays, values)
        seen.append(len(read().Tensors("train/used")))

    strategy = run(on_round_end=both)
    assert seen == [1, 2, 3]
    events = read()
    for name, value in figures_of(strategy.ledger.rounds[-1]).items():
        told = events.Tensors(name)[-1]
        assert told.step == 3 and told.tensor_proto.float_val[0] == pytest.approx(value, rel=1e-6)
    assert [one.tensor_proto.float_val[0] for one in events.Tensors("tensors")] == [2.0] * 3


def test_a_relative_folder_is_refused() -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(InvalidSetting, match="absolute path"):
        to_tensorboard("board")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, about SQLAlchemy
def test_mlflow_gets_each_round(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with mlflow.start_run(run_name="coded") as active:
        strategy = run(on_round_end=to_mlflow(more=lambda server_round, arrays: {"round": server_round}))
    client = mlflow.MlflowClient()
    assert [(one.step, one.value) for one in client.get_metric_history(active.info.run_id, "round")] == [
        (1, 1.0), (2, 2.0), (3, 3.0),
    ]  # fmt: skip
    kept = client.get_run(active.info.run_id).data
    assert kept.metrics.items() >= figures_of(strategy.ledger.rounds[-1]).items()
    assert kept.tags["fl-gradcode.code"] == "fractional repetition, n=4, k=4, s=1"


@pytest.mark.parametrize(
    ("package", "make", "extra"),
    [
        ("tensorboard", lambda: to_tensorboard("/board"), "tensorboard"),
        ("mlflow", to_mlflow, "mlflow"),
        ("pandas", lambda: rounds_frame([]), "pandas"),
    ],
    ids=["tensorboard", "mlflow", "pandas"],
)
def test_a_missing_package_is_told_with_its_extra(
    package: str, make: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"pip install '{extra}"):
        make()
