"""`python -m experiments.bound`: how far rounds with one shard a message are from the clairvoyant bound.

Each number is a mean over simulated runs. "bound" is in units of plain rounds, which wait for all; the other columns
of one shard a message are in units of the bound. `adaptive` is run by the library on a virtual clock and is in units
of plain rounds: it may not be above 1.02 where coding does not pay, nor under loads that change (a line for each).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.rounds import Scheme, round_seconds
from experiments.switching import SCENARIOS, over_plain
from fl_gradcode.codes import fractional_repetition
from fl_gradcode.latency import Latency, bimodal, exponential, named, pareto, shifted_exponential
from fl_gradcode.planning import clairvoyant_rounds, partial_work, steady_rounds, wait_for_all

__all__ = ["LAWS", "bound", "main"]

N = 24
LAWS: dict[str, Latency] = {
    "all alike": named("none"),
    "shifted exponential": named("shifted-exponential"),
    "serverless": named("serverless"),
    "virtual machines": named("virtual-machines"),
    "phones": named("phones"),
    "Exp(1)": Latency(compute=exponential()),
    "1 + Exp(0.5)": Latency(compute=shifted_exponential(1.0, 0.5)),
    "Pareto(1.5)": Latency(compute=pareto(1.5)),
    "bimodal, 5 % x 10": Latency(compute=bimodal(0.05, 10.0)),
}
_SIGMAS = (0.1, 0.2, 0.35, 0.6, 1.0)  # spreads of the noise under loads that change
_PATIENCES = ("learned", 2.0, 0.0)


def bound(rounds: int = 60, runs: int = 6, adaptive: bool = True) -> Table:
    """Print the table, and return it.

    Args:
        rounds: Rounds of a run; the first sixth is ignored.
        runs: Simulated runs of each cell.
        adaptive: Whether to run `adaptive` too, which takes most of the time.
    """
    logging.disable(logging.WARNING)
    first = rounds // 6
    heads = ["law", "holders", "bound / plain", "learned / bound", "patience 2 / bound", "at once / bound"]
    table = Table(*heads, *(["adaptive / plain"] if adaptive else []), title=f"n = k = {N}")
    console = Console(width=120)
    for law, latency in track(LAWS.items(), console=Console(stderr=True)):
        draws = [latency.parts(seed=1000 + seed, n=N, rounds=rounds) for seed in range(runs)]
        plain = np.mean([steady_rounds(wait_for_all(N), parts).seconds[first:].mean() for parts in draws])
        for holders in (2, 4):
            schemes = [partial_work(N, holders - 1, patience=patience) for patience in _PATIENCES]  # type: ignore[arg-type]
            best = np.mean(
                [one[first:].mean() for parts in draws if (one := clairvoyant_rounds(schemes[0], parts)) is not None]
            )
            ratios = [
                np.mean([steady_rounds(one, parts).seconds[first:].mean() for parts in draws]) / best for one in schemes
            ]
            cells = [f"{best / plain:.2f}", *(f"{one:.2f}" for one in ratios)]
            if adaptive:
                scheme = Scheme(fractional_repetition(N, holders - 1), "adaptive", 0.0)
                mine = round_seconds(scheme, latency, rounds=rounds, idle=False, seed=1000, n=N)
                theirs = steady_rounds(wait_for_all(N), draws[0]).seconds
                cells.append(f"{sum(mine) / theirs.sum():.2f}")
            table.add_row(law, str(holders), *cells)
    console.print(table)
    for name, scenario in SCENARIOS.items() if adaptive else ():
        most = []
        for sigma in _SIGMAS:
            ratio = max(over_plain(scenario, sigma, rounds=rounds, seed=seed) for seed in range(3))
            most.append(f"{ratio:.2f} (sigma {sigma:g})")
        console.print(f"adaptive / plain at most, {name}: {', '.join(most)}", soft_wrap=True, highlight=False)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bound", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="of a run, at least 12")
    parser.add_argument("--runs", type=int, default=6, help="simulated runs of each cell")
    parser.add_argument("--no-adaptive", action="store_true", help="leave the library's own runs out")
    options = parser.parse_args(arguments)
    if options.rounds < 12 or options.runs < 1:
        parser.error(f"--rounds {options.rounds} must be at least 12 and --runs {options.runs} at least 1")
    bound(options.rounds, options.runs, not options.no_adaptive)


if __name__ == "__main__":
    main()
