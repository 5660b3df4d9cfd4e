"""`python -m experiments.report`: rows of the comparison become a page, as HTML and Markdown. It runs nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from experiments.compare.store import ROOT
from experiments.report import regime
from experiments.report.data import read_rows
from experiments.report.page import write_html, write_markdown
from experiments.report.sections import display, page

__all__ = ["main"]

_TITLE = "Coding against waiting, dropping and asynchrony"
_ROWS = ROOT / "out" / "compare" / "rows.jsonl"
_MAP_RUNS = 6


def main(arguments: list[str] | None = None) -> int:
    """Write the page; the exit code is 2 if there are no rows."""
    options = _options(arguments)
    console = Console(soft_wrap=True)
    paths = [Path(path).expanduser() for path in options.rows or [_ROWS]]
    rows = read_rows(paths)
    if not rows:
        console.print(
            f"There are no rows in {', '.join(map(display, paths))}: `python -m experiments.compare --suite quick "
            f"--rows {display(paths[0])}` makes some in a few minutes, `--suite main --data-dir DATA` the whole "
            "comparison."
        )
        return 2
    sources = {row["task"]["problem"]: path for path in paths for row in read_rows([path])}
    command = "python -m experiments.report"
    if options.rows:
        command += "".join(f" --rows {display(path)}" for path in paths)
    if options.map_runs != _MAP_RUNS and not options.no_map:
        command += f" --map-runs {options.map_runs}"
    regimes = None if options.no_map else regime.compute(runs=options.map_runs)
    lead, blocks = page(rows, sources, regimes, command)
    out = Path(options.out).expanduser()
    write_html(out / "report.html", _TITLE, lead, blocks)
    write_markdown(out / "report.md", _TITLE, lead, blocks)
    console.print(f"{len(rows)} rows; {display(out / 'report.html')} and {display(out / 'report.md')}")
    if options.docs:
        write_markdown(ROOT / "docs" / "report.md", _TITLE, lead, blocks)
        console.print("docs/report.md and docs/images/report-*.png")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--rows", action="append", help="file of rows; may be given more than once")
    parser.add_argument("--out", default=str(ROOT / "out" / "report"))
    parser.add_argument("--docs", action="store_true", help="write docs/report.md and its images too")
    parser.add_argument(
        "--no-map", action="store_true", help="leave out the map of regimes, which takes most of the time"
    )
    parser.add_argument("--map-runs", type=int, default=_MAP_RUNS, help="simulated runs of each cell of the map")
    options = parser.parse_args(arguments)
    if options.map_runs < 1:
        parser.error(f"--map-runs {options.map_runs} must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
