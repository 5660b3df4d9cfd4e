"""The commands about coded products: their rows, tables and figures; NumPy alone is the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from clients.data import load_dataset
from experiments import bench_matmul, product_table, ridge
from fl_gradcode.matmul import polynomial

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"


def test_a_coded_gram_product_gives_numpys_classifier() -> None:
    data = load_dataset("digits")
    task = ridge.Task("any 16 of 20", "pareto", "digits", 60, 4)
    rows, weights = ridge.run(task, data)
    expected = ridge.directly(data, task)
    assert np.linalg.norm(weights - expected) < 1e-10 * np.linalg.norm(expected)
    assert [row["batch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["examples"] == len(data.train_x)
    assert rows[-1]["accuracy"] > 0.85
    plain, _ = ridge.run(ridge.Task("no code", "pareto", "digits", 60, 4), data)
    assert [row["accuracy"] for row in rows] == [row["accuracy"] for row in plain]
    assert plain[-1]["seconds"] > 2 * rows[-1]["seconds"]
    # All 20 blocks, or 16 larger ones, make up Z^T [Z, Y]: 60 x 70 float64 a batch.
    assert plain[-1]["megabytes-up"] * 1e6 == pytest.approx(4 * 60 * 70 * 8, rel=0.4)  # and headers


@pytest.mark.skipif(not (REAL / "adult").is_dir(), reason="needs the data folder beside the project")
def test_so_it_does_on_adult() -> None:
    data = load_dataset("adult", str(REAL), 3000)
    task = ridge.Task("any 12 of 20", "virtual-machines", "adult", 80, 3)
    rows, weights = ridge.run(task, data)
    expected = ridge.directly(data, task)
    assert np.linalg.norm(weights - expected) < 1e-9 * np.linalg.norm(expected)
    assert rows[-1]["accuracy"] > 0.8


def test_the_command_writes_rows_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ridge.main(["--features", "20", "--batches", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert len(rows) == len(ridge.LAWS) * len(ridge.SCHEMES) * 2
    assert out.count("| pareto |") == len(ridge.SCHEMES)
    assert all(row["off"] < 1e-8 for row in rows if "off" in row)
    assert (tmp_path / "ridge-digits.png").stat().st_size > 10_000


def test_the_table_of_errors_in_the_docs_is_the_command_s() -> None:
    page = (ROOT / "docs" / "coded-products.md").read_text()
    rows = re.findall(r"^\| polynomial \((\d+), 1, \d+\) \| (\d+) \| (\d+) \| random \|(.*)$", page, re.MULTILINE)
    assert len(rows) == 3
    for p, n, k, cells in rows:
        told = [float(x) for x in re.findall(r"\*\*(\S+) / (\S+)\*\*", cells)[0]]
        errors = product_table.errors_of(polynomial(int(n), int(p), int(p)), 60)
        assert int(k) == int(p) ** 2
        # Fewer sets: the worst is no worse, and the median about the same.
        assert errors.max() <= 3 * told[1] and told[0] / 3 <= np.median(errors) <= 3 * told[0]


def test_the_benchmark_says_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    bench_matmul.products(size=128, repeats=1, count=25)
    out = " ".join(capsys.readouterr().out.split())
    assert "asked: at most 2.5 %" in out and "stores 1/4 of A and 1/4 of B" in out
    assert float(re.findall(r"pareto: .*?: ([\d.]+)x", out)[0]) >= 2
