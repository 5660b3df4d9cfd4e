"""Mean round times in virtual time: every way to send, under several latency laws, from an idle start and in steady
state.

`python -m experiments.rounds` prints a table beside independently simulated figures. The app does nothing, so that
thousands of rounds take seconds; what is measured is the library's own waiting: strategy, stop rules and virtual clock.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fl_gradcode import GradientCode, GradientCoding, Shards, VirtualGrid, gradient_coding_mod
from fl_gradcode.codes import cyclic_repetition, fractional_repetition
from fl_gradcode.latency import Latency, bimodal, exponential, lognormal, pareto, shifted_exponential
from fl_gradcode.testing import InProcessGrid

__all__ = ["LATENCIES", "REFERENCE", "Scheme", "mean_seconds", "round_seconds", "schemes"]

N = 64
FOREVER = 1e9
LATENCIES = {
    "Exp(1), all compute": Latency(compute=exponential(1.0)),
    "Exp(1), load-independent": Latency(fixed=exponential(1.0)),
    "1 + Exp(0.5), all compute": Latency(compute=shifted_exponential(1.0, 0.5)),
    "lognormal 0.1, all compute": Latency(compute=lognormal(1.0, 0.1)),
    "bimodal 5 % x 10, all compute": Latency(compute=bimodal(0.05, 10.0, jitter=0.1)),
    "Pareto(1.5), all compute": Latency(compute=pareto(1.5)),
}


@dataclass(frozen=True)
class Scheme:
    """A way to run rounds: no code (plain FedAvg), or a code and how it sends."""

    code: GradientCode | None = None
    send: Literal["coded", "shards", "adaptive"] = "coded"
    patience: float | Literal["learned"] = 0.0


def schemes(n: int = N) -> dict[str, Scheme]:
    """The compared ways, replication 4 (2 where it says so)."""
    return {
        "uncoded": Scheme(),
        "any-(n-s)": Scheme(cyclic_repetition(n, 3, rng=np.random.default_rng(0))),
        "repetition": Scheme(fractional_repetition(n, 3)),
        "partial work": Scheme(fractional_repetition(n, 3), "shards"),
        "partial work, patience 2": Scheme(fractional_repetition(n, 3), "shards", 2.0),
        "repetition, r = 2": Scheme(fractional_repetition(n, 1)),
        "partial work, r = 2": Scheme(fractional_repetition(n, 1), "shards"),
    }


# (idle start, steady state) of two independent simulations of the same laws, where they exist; a range where those two
# drew the rate of a worker once a round, or once a job. Partial work from an idle start: of workers that go round their
# shards in a fixed order, which is 2 to 7 % slower than to hand out the shard that fewest are working on.
REFERENCE: dict[tuple[str, str], tuple[str, str]] = {
    ("Exp(1), all compute", "uncoded"): ("4.74", "4.7"),
    ("Exp(1), all compute", "any-(n-s)"): ("11.6", "12.2"),
    ("Exp(1), all compute", "repetition"): ("3.38", "5.1"),
    ("Exp(1), all compute", "partial work"): ("2.14", "2.2 to 2.6"),
    ("Exp(1), all compute", "repetition, r = 2"): ("4.06", "4.6"),
    ("Exp(1), all compute", "partial work, r = 2"): ("3.08", "3.2"),
    ("Exp(1), load-independent", "uncoded"): ("4.74", "4.7"),
    ("Exp(1), load-independent", "any-(n-s)"): ("2.91", "3.05"),
    ("Exp(1), load-independent", "repetition"): ("0.85", "1.3"),
    ("1 + Exp(0.5), all compute", "uncoded"): ("3.37", "3.4"),
    ("1 + Exp(0.5), all compute", "any-(n-s)"): ("9.84", "10.1"),
    ("1 + Exp(0.5), all compute", "repetition"): ("5.70", "6.7"),
    ("1 + Exp(0.5), all compute", "partial work"): ("2.88", "3.2"),
    ("bimodal 5 % x 10, all compute", "uncoded"): ("10.4", "10.4"),
    ("bimodal 5 % x 10, all compute", "any-(n-s)"): ("17.8", "25"),
    ("bimodal 5 % x 10, all compute", "repetition"): ("4.1", "5.1"),
    ("bimodal 5 % x 10, all compute", "partial work"): ("2.24", "2.4 to 3.6"),
    ("Pareto(1.5), all compute", "uncoded"): ("43", "40"),
    ("Pareto(1.5), all compute", "any-(n-s)"): ("30", "52"),
    ("Pareto(1.5), all compute", "repetition"): ("7.2", "12.4"),
    ("Pareto(1.5), all compute", "partial work"): ("4.9", "5.2 to 7.5"),
}

app = ClientApp(mods=[gradient_coding_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Nothing: only the waiting is of interest."""
    assert context.node_config["partition-id"] is not None
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def round_seconds(
    scheme: Scheme, latency: Latency, *, rounds: int, idle: bool, seed: int = 0, n: int = N
) -> list[float]:
    """Virtual seconds of each round; with `idle` every round meets idle workers, else they come as the last one left
    them."""
    seconds: list[float] = []
    runs = [(seed + number, 1) for number in range(rounds)] if idle else [(seed, rounds)]
    with InProcessGrid(app, n) as inner:
        for one_seed, length in runs:
            grid = VirtualGrid(inner, latency, seed=one_seed)
            fedavg = FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
            initial = ArrayRecord([np.zeros(1, np.float32)])
            if scheme.code is None:
                times: list[float] = []
                fedavg.start(grid, initial, length, timeout=FOREVER, evaluate_fn=_clock(grid, times))
                seconds += np.diff(times).tolist()
            else:
                send = Shards(scheme.patience) if scheme.send == "shards" else scheme.send
                strategy = GradientCoding(fedavg, scheme.code, send=send, verify=0)
                strategy.start(grid, initial, length, timeout=FOREVER)
                seconds += [row["train"]["seconds"]["waiting"] for row in strategy.ledger.rows]
    return seconds


def mean_seconds(scheme: Scheme, latency: Latency, *, rounds: int, idle: bool, seed: int = 0) -> tuple[float, float]:
    """Mean and its standard error; in steady state without the first twentieth, by batch means."""
    seconds = np.array(round_seconds(scheme, latency, rounds=rounds, idle=idle, seed=seed))
    if not idle:
        seconds = seconds[rounds // 20 :]
        seconds = seconds[: len(seconds) // 20 * 20].reshape(20, -1).mean(axis=1)
    return float(seconds.mean()), float(seconds.std(ddof=1) / np.sqrt(len(seconds)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m experiments.rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1500, help="of each cell")
    rounds = parser.parse_args(arguments).rounds
    table = Table("law", "scheme", "idle start", "reference", "steady state", "reference", title=f"n = k = {N}")
    console = Console(width=120)
    for law, latency in track(LATENCIES.items(), console=Console(stderr=True)):
        for name, scheme in schemes().items():
            expected = REFERENCE.get((law, name), ("", ""))
            cells = []
            for idle, reference in zip((True, False), expected, strict=True):
                mean, error = mean_seconds(scheme, latency, rounds=rounds, idle=idle)
                cells += [f"{mean:.2f} ± {error:.2f}", reference]
            table.add_row(law, name, *cells)
        table.add_section()
    console.print(table)


def _clock(grid: VirtualGrid, times: list[float]) -> Callable[[int, ArrayRecord], None]:
    return lambda server_round, arrays: times.append(grid.now())


if __name__ == "__main__":
    main()
