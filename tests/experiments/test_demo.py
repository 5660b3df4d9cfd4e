"""The demo's figure says in its title what was found, and no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.demo import Run, _found, schemes
from experiments.idea import LETTERS, pictures


def runs(coded_accuracy: float, worst_when_dropping: float) -> list[Run]:
    last = {
        "wait": {"seconds": 90.0, "accuracy": 0.9, "class-accuracies": [0.5, 1.0]},
        "drop": {"seconds": 10.0, "accuracy": 0.8, "class-accuracies": [worst_when_dropping, 1.0]},
        "coded": {"seconds": 20.0, "accuracy": coded_accuracy, "class-accuracies": [0.5, 1.0]},
    }
    return [Run(scheme, [last[scheme.key]], "") for scheme in schemes(Path("ledger.jsonl"))]


@pytest.mark.parametrize(
    ("accuracy", "worst", "says"),
    [
        (
            0.9,
            0.0,
            "Coding is 4.5 times as fast as waiting for all, with the same accuracy; dropping never learns some",
        ),
        (0.8, 0.1, "Coding is 4.5 times as fast as waiting for all"),
    ],
)
def test_the_title_of_the_demo_s_figure_is_what_its_rows_show(accuracy: float, worst: float, says: str) -> None:
    title = _found(runs(accuracy, worst))
    assert title.removesuffix(" labels") == says


def test_the_picture_of_the_idea_shows_the_slow_client_s_data_lost_only_by_dropping() -> None:
    waiting, dropping, coding = pictures(rounds=3)
    assert [run.used for run in (waiting, dropping, coding)] == [LETTERS, "ABC", LETTERS]
    assert dropping.ends[-1] < coding.ends[-1] < waiting.ends[-1] / 3
