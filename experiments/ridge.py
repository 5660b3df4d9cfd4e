"""Ridge regression on random features, by coded Gram products over nodes of which some are slow.

    python -m experiments.ridge --dataset mnist --data-dir ../shared/data

Training data arrive in batches. For each the server has Z^T [Z, Y] computed by the nodes, Z the batch's random Fourier
features and Y its labels, adds it up and solves for the classifier: one product a batch, which is most of the work.
Compared in virtual time: no code (20 blocks, all are waited for) and polynomial codes. Every product is exact up to
rounding, so that all schemes have one trajectory over batches; what differs is when it gets there, and what it moves.
One run meets one draw of slow moments: the column "expected" has the mean over runs, from `plan_products`.
Rows, a table and a figure are written into out/ridge.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from clients.data import load_dataset
from clients.dataset import Dataset
from experiments.ridge_figure import draw, markdown
from fl_gradcode import VirtualGrid
from fl_gradcode.latency import named
from fl_gradcode.matmul import CodedMatrix, ProductCode, coded_matmul_worker, polynomial, uncoded_product
from fl_gradcode.planning import plan_products
from fl_gradcode.testing import InProcessGrid

__all__ = ["SCHEMES", "Task", "directly", "main", "run"]

ROOT = Path(__file__).resolve().parents[1]
N = 20
SCHEMES = ("no code", "any 16 of 20", "any 12 of 20")
LAWS = ("pareto", "virtual-machines")
_RIDGE = 1e-3  # times the number of examples


@dataclass(frozen=True)
class Task:
    """One run: who computes the products, under which law, of which data."""

    scheme: str
    law: str
    dataset: str
    features: int
    batches: int
    seed: int = 0

    @property
    def code(self) -> ProductCode:
        """The code of the scheme."""
        makers = {
            "no code": lambda: uncoded_product(4, 5),
            "any 16 of 20": lambda: polynomial(N, 4, 4),
            "any 12 of 20": lambda: polynomial(N, 3, 4),
        }
        return makers[self.scheme]()


class _Features:
    """cos(x W + b): inner products of these approximate a Gaussian kernel (Rahimi and Recht 2007)."""

    def __init__(self, data: Dataset, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        flat = data.train_x.reshape(len(data.train_x), -1)
        some = flat[rng.permutation(len(flat))[:1000]].astype(np.float64)
        # As wide as a typical distance between two examples.
        width = float(np.median(np.linalg.norm(some[: len(some) // 2] - some[-(len(some) // 2) :], axis=1))) / 2
        self.W = rng.standard_normal((flat.shape[1], count)) / width
        self.b = rng.uniform(0, 2 * np.pi, count)

    def __call__(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.asarray(np.cos(x.reshape(len(x), -1).astype(np.float64) @ self.W + self.b) * np.sqrt(2 / len(self.b)))


def _batches(data: Dataset, task: Task) -> list[NDArray[np.intp]]:
    order = np.random.default_rng(task.seed).permutation(len(data.train_x))
    return list(np.array_split(order, task.batches))


def _labels(y: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    return np.asarray(np.eye(classes)[y] - 1 / classes)


def _solve(total: NDArray[np.float64], examples: int, features: int) -> NDArray[np.float64]:
    gram = total[:, :features] + _RIDGE * examples * np.eye(features) / features
    return np.asarray(np.linalg.solve(gram, total[:, features:]))


def directly(data: Dataset, task: Task) -> NDArray[np.float64]:
    """The classifier of all batches by NumPy alone, from the stacked features: the oracle."""
    z = _Features(data, task.features, task.seed)(data.train_x)
    y = _labels(data.train_y, data.classes)
    # Ridge as least squares with added rows: no Gram matrix at all.
    penalty = np.sqrt(_RIDGE * len(z) / task.features) * np.eye(task.features)
    stacked = np.concatenate([z, penalty]), np.concatenate([y, np.zeros((task.features, data.classes))])
    return np.asarray(np.linalg.lstsq(*stacked, rcond=None)[0])


def run(task: Task, data: Dataset) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
    """One row a batch, and the classifier at the end."""
    features = _Features(data, task.features, task.seed)
    test = features(data.test_x)
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    total = np.zeros((task.features, task.features + data.classes))
    rows: list[dict[str, Any]] = []
    seen = down = up = 0
    with InProcessGrid(app, N) as grid:
        virtual = VirtualGrid(grid, named(task.law), seed=task.seed)
        stops = None
        for number, batch in enumerate(_batches(data, task), start=1):
            z = features(data.train_x[batch])
            y = _labels(data.train_y[batch], data.classes)
            # Another A each time, so nothing is kept; the same grid, which knows who still owes an answer.
            product = CodedMatrix(stops or virtual, z.T, task.code, timeout=None, keep=False)
            stops = product.grid
            total += product.multiply(np.concatenate([z, y], axis=1), server_round=number)
            (report,) = product.reports
            seen, down, up = seen + len(batch), down + report.bytes_down, up + report.bytes_up
            weights = _solve(total, seen, task.features)
            rows.append(
                {
                    **asdict(task),
                    "batch": number,
                    "examples": seen,
                    "seconds": virtual.now(),
                    "accuracy": float((np.argmax(test @ weights, axis=1) == data.test_y).mean()),
                    "megabytes-down": down / 1e6,
                    "megabytes-up": up / 1e6,
                    "condition": report.condition,
                }
            )
        # Of a worker, needed or not, in units of what it computes without a code.
        rows[-1]["computed"] = sum(job.shards for job in virtual.jobs) / (N * task.batches)
    return rows, weights


def _expected(task: Task) -> float:
    """Mean virtual seconds of all batches, over many draws."""
    k = task.code.k
    plan = plan_products(named(task.law), N, ks=[k])
    return task.batches * next(line.steady for line in plan.lines if line.k == k)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every scheme under every law; write rows, table and figure."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ridge", description=__doc__)
    parser.add_argument("--dataset", default="digits", help="digits needs no files (default: %(default)s)")
    parser.add_argument("--data-dir", default="", help="folder of the data set's files, or its parent")
    parser.add_argument("--features", type=int, default=1000, help="random features (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "ridge", help="folder (default: out/ridge)")
    options = parser.parse_args(arguments)
    if options.features < 1 or options.batches < 1 or options.seed < 0:
        parser.error("--features and --batches must be at least 1, and --seed at least 0.")
    data = load_dataset(options.dataset, str(Path(options.data_dir).resolve()) if options.data_dir else "")
    tasks = [
        Task(scheme, law, options.dataset, options.features, options.batches, options.seed)
        for law in LAWS
        for scheme in SCHEMES
    ]
    expected = directly(data, tasks[0])
    rows: list[dict[str, Any]] = []
    for task in track(tasks, "Multiplying", console=Console(stderr=True), transient=True):
        some, weights = run(task, data)
        some[-1]["expected"] = _expected(task)
        some[-1]["off"] = float(np.linalg.norm(weights - expected) / np.linalg.norm(expected))
        rows += some
    options.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (options.out / f"{options.dataset}.jsonl").write_text(text, encoding="utf-8")
    draw(rows, options.out / f"ridge-{options.dataset}.png")
    Console(width=200).print(markdown(rows), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
