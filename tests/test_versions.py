"""A Flower that is newer than the tested ones is a warning, not a refusal."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import flwr.serverapp.strategy
import pytest

import fl_gradcode._versions as versions
from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("installed", ["1.41.0", "1.42.0", "1.42.7", "1.9.0", "1.42.1.dev20261101"])
def test_tested_and_older_versions_are_no_news(installed: str) -> None:
    assert versions.newer_flower(installed) is None


@pytest.mark.parametrize("installed", ["1.43.0", "1.43.0.dev20261101", "2.0.0", "1.100"])
def test_a_newer_version_is_named_with_what_to_try(installed: str) -> None:
    sentence = versions.newer_flower(installed)
    assert sentence is not None
    assert f"Flower {installed} is newer" in sentence and "try Flower 1.42 first" in sentence


def test_a_run_on_a_newer_version_warns_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "TESTED_FLOWER", ("1.1", "1.2"))
    strategy = GradientCoding(flwr.serverapp.strategy.FedAvg(), fractional_repetition(4, 1))
    with InProcessGrid(toy_app(), 4) as grid, caplog.at_level(logging.WARNING):
        result = strategy.start(grid, initial_arrays(), num_rounds=1)
    assert len(result.arrays) == 2
    assert "was tested with (1.1 to 1.2)" in caplog.text


def test_pip_takes_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, last = versions.TESTED_FLOWER
    major, minor = map(int, last.split("."))
    assert f"flwr>={first},<{major}.{minor + 1}" in project["dependencies"]
