"""Several products with one coded matrix, and one with another; the results and reports go into files."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_gradcode.matmul import CodedMatrix, coded_matmul, mds_product

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Multiply; any worker may be missing."""
    config: Any = context.run_config
    folder = Path(str(config["folder"]))
    rng = np.random.default_rng(0)
    A = rng.standard_normal((50, 40))
    code = mds_product(int(config["nodes"]), int(config["nodes"]) - 1)
    started = time.time()
    matrix = CodedMatrix(grid, A, code, timeout=120.0)
    products = {f"product-{i}": matrix.multiply(rng.standard_normal((40, 30))) for i in range(int(config["count"]))}
    # The same grid: whoever still owes an answer is left alone.
    products["other"] = coded_matmul(matrix.grid, A.T, A, code, timeout=120.0)
    seconds = time.time() - started
    (folder / "wake-up").touch()
    np.savez(folder / "products.npz", **products)  # type: ignore[arg-type]  # its stub knows no names
    reports = [asdict(report) for report in matrix.reports]
    (folder / "reports.json").write_text(json.dumps({"seconds": seconds, "reports": reports}))
