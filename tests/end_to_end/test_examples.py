"""An example as its page says: `flwr run` in Flower's simulation engine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from experiments.engine import Engine
from tests.end_to_end.conftest import ROOT, on_engine

pytestmark = [pytest.mark.slow, on_engine("simulation")]


def test_an_example_prints_what_its_page_says(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are compared to three digits: the last ones depend on the processor."""
    monkeypatch.setattr(engine, "logs_of_all", True)
    example, app = ROOT / "examples" / "quickstart-sklearn", tmp_path / "app"
    shutil.copytree(example / "coded", app, ignore=shutil.ignore_patterns("__pycache__"))
    outcome = engine.run(app, {}, timeout=300.0, nodes=6, cpus=2)
    assert outcome.completed, outcome.log
    page = (example / "README.md").read_text()
    said = re.findall(r"^round (\d): accuracy .*, loss ([0-9.]+)$", page, re.MULTILINE)
    printed = re.findall(r"round (\d): accuracy .*, loss ([0-9.]+)", outcome.log)
    assert len(said) == 6 and [one for one, _ in printed] == [one for one, _ in said]
    for (_, ours), (_, theirs) in zip(printed, said, strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3)
    assert "from 3 of 6 workers" in outcome.log
