"""What is placed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards: five .csv and a folder of images."""
    folder = tmp_path / "source"
    (folder / "s10" / "cats").mkdir(parents=True)
    for i in range(1, 6):
        (folder / f"s{i}.csv").write_text("x,y\n" + "1,2\n" * i)
    (folder / "s10" / "cats" / "1.png").write_bytes(b"meow")
    (folder / ".DS_Store").write_text("x")
    (folder / "s10" / ".DS_Store").write_text("x")
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=np.arange(120).reshape(60, 2), y=rng.integers(0, 4, 60))
    return path
