"""What a round costs the server with up to 10,000 clients, in CPU seconds and over plain FedAvg: make bench ARGS=scale.

All schemes run in this process, one after the other, on the same kind of virtual clock, with a model of a few numbers
and clients that train nothing, so that what is left is what each client costs by itself. The time of the clients, and
of the virtual clock that stands for the transport, is measured apart: a server of a deployment does not spend it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from rich.console import Console

from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition, gradient_coding_mod
from fl_gradcode.grid import Arrival
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.testing import InProcessGrid

__all__ = ["SIZES", "Cost", "costs", "scale", "slope"]

SIZES = (250, 500, 1000, 2000, 4000, 10_000)
#: Scheme -> the CPU time over plain FedAvg's that this project aims for.
SCHEMES: dict[str, float | None] = {
    "plain FedAvg": None,
    "coded vectors": 1.5,
    "one shard a message": 2.0,
    "adaptive": None,
}
_STRAGGLERS = 2
_SETTLED = 4  # rounds until copies have been compared and an adaptive run has chosen
_console = Console()


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a round once a run has settled.

    Attributes:
        scheme: One of `SCHEMES`.
        n: Number of clients.
        first: Seconds of the first round, in the whole process.
        seconds: Seconds of a later round, in the whole process.
        server: Seconds of a later round, without those of the clients and of the clock.
    """

    scheme: str
    n: int
    first: float
    seconds: float
    server: float


class _Clock(VirtualGrid):
    """A virtual clock that counts the CPU seconds of the process which are no server's.

    These are its own, which stand for Flower's transport, and those of the clients.
    """

    seconds, depth = 0.0, 0

    def _begin(self) -> float:
        self.depth += 1
        return time.process_time()

    def _end(self, began: float) -> None:
        self.depth -= 1
        if not self.depth:
            self.seconds += time.process_time() - began

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        began = self._begin()
        tokens = super().push(messages)
        self._end(began)
        return tokens

    def next_arrival(self, deadline: float | None) -> Arrival | None:
        began = self._begin()
        arrival = super().next_arrival(deadline)
        self._end(began)
        return arrival

    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        began = self._begin()
        replies = super().fetch(arrivals)
        self._end(began)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        began = self._begin()
        replies = super().send_and_receive(messages, timeout=timeout)
        self._end(began)
        return replies


def _app(*, coded: bool) -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod] if coded else [])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        old: Any = message.content["arrays"]
        new = ArrayRecord([array + np.float32(shard) for array in old.to_numpy_ndarrays()])
        return Message(RecordDict({"arrays": new, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def costs(scheme: str, n: int, *, rounds: int = 0, seed: int = 0) -> Cost:
    """Returns what a round of a scheme costs with n clients.

    Args:
        scheme: One of `SCHEMES`.
        n: Number of clients.
        rounds: Number of rounds, of which the first four are left out; 0 for six more, or for an adaptive run as many
            as are between two of its decisions.
        seed: Seed of the latencies.
    """
    inner = FedAvg(fraction_evaluate=0.0)
    strategy: Strategy = inner
    if scheme != "plain FedAvg":
        send: Any = {"coded vectors": "coded", "one shard a message": "shards", "adaptive": "adaptive"}[scheme]
        strategy = GradientCoding(inner, fractional_repetition(n, _STRAGGLERS), send=send)
    rounds = rounds or _SETTLED + (16 if scheme == "adaptive" else 6)
    marks: list[tuple[float, float]] = []
    with InProcessGrid(_app(coded=strategy is not inner), n) as clients:
        grid = _Clock(clients, Latency(compute=lognormal(sigma=0.6)), seed=seed)

        def mark(server_round: int, arrays: ArrayRecord) -> None:
            marks.append((time.process_time(), grid.seconds))

        strategy.start(grid, ArrayRecord([np.zeros(10, np.float32)]), num_rounds=rounds, evaluate_fn=mark)
    whole = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
    elsewhere = [after[1] - before[1] for before, after in itertools.pairwise(marks)]
    server = [one - other for one, other in zip(whole, elsewhere, strict=True)]
    # Means: Python's garbage collection falls into some rounds and not into others, and belongs to both.
    return Cost(scheme, n, whole[0], statistics.fmean(whole[_SETTLED:]), statistics.fmean(server[_SETTLED:]))


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Returns the exponent by which the second number grows with the first, from a fit of their logarithms."""
    x, y = np.log(np.array(pairs)).T
    return float(np.polyfit(x, y, 1)[0])


def scale(sizes: Sequence[int] = SIZES, figure: Path | None = None) -> list[Cost]:
    """Print what a round costs at each number of clients, and how that grows."""
    found: list[Cost] = []
    for n in sizes:
        plain: Cost | None = None
        for scheme in SCHEMES:
            cost = costs(scheme, n)
            plain = plain or cost
            found.append(cost)
            _console.print(
                f"n = {n:6d}, {scheme:20s}: server {cost.server:7.3f} s a round, "
                f"[bold]{cost.server / plain.server:5.2f}[/] of plain FedAvg's; process {cost.seconds:7.3f} s, "
                f"{cost.seconds / plain.seconds:5.2f}; first round {cost.first:7.3f} s",
                highlight=False,
                soft_wrap=True,
            )
    for scheme, asked in SCHEMES.items():
        of = [one for one in found if one.scheme == scheme]
        if len(of) > 1:
            grows = slope([(one.n, one.server) for one in of])
            target = "" if asked is None else f"; asked: at most {asked:g} of plain FedAvg's"
            _console.print(f"{scheme}: the server's time grows as n^[bold]{grows:.2f}[/]{target}.", highlight=False)
    if figure is not None:
        draw(found, figure)
    return found


def draw(found: Sequence[Cost], path: Path) -> None:
    """Draw the server's CPU seconds a round over the number of clients, and their ratio to plain FedAvg's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    looks = zip(SCHEMES, (("#666666", "o"), ("#0072B2", "^"), ("#009E73", "s"), ("#E69F00", "D")), strict=True)
    plain = {one.n: one.server for one in found if one.scheme == "plain FedAvg"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for scheme, (colour, marker) in looks:
        of = [one for one in found if one.scheme == scheme]
        sizes = [one.n for one in of]
        grows = slope([(one.n, one.server) for one in of])
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6}
        left.plot(sizes, [one.server for one in of], label=f"{scheme}: slope {grows:.2f}", **look)
        right.plot(sizes, [one.server / plain[one.n] for one in of], label=scheme, **look)
    left.set(title="CPU seconds of the server a round", xlabel="clients", yscale="log")
    right.set(title="Ratio to plain FedAvg", xlabel="clients", ylim=(0, None))
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_xticks(sorted(plain), [f"{n:,}" for n in sorted(plain)])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(loc="upper left", frameon=False, fontsize=9)
    figure.suptitle("Server cost of a round over the number of clients, in one process", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the costs, and draw them if a path is given."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scale", description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, help="numbers of clients")
    parser.add_argument("--figure", type=Path, help="write a PNG")
    options = parser.parse_args(arguments)
    scale(options.sizes or SIZES, options.figure)


if __name__ == "__main__":
    for name in ("flwr", "fl_gradcode"):
        logging.getLogger(name).setLevel(logging.ERROR)
    main()
