"""The idea in one picture: four clients, one of them slow, under waiting, dropping and coding.

`python -m experiments.idea` prints the picture as text, as it stands in the README, and draws docs/images/idea.png from
real rounds of plain Flower and of this library on a virtual clock. docs/images/assignments.png shows who stores what.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fl_gradcode import (
    EarlyStopGrid,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
)
from fl_gradcode.latency import Latency, constant, scaled
from fl_gradcode.testing import InProcessGrid

__all__ = ["Picture", "as_text", "draw", "draw_assignments", "main", "pictures"]

ROOT = Path(__file__).resolve().parents[1]
#: How many times slower than a client that needs one second for its own data.
SLOWNESS = (1.0, 1.2, 0.9, 8.0)
CLIENTS = len(SLOWNESS)
LETTERS = "ABCD"
_PER_SECOND = 5  # characters
_SHOWN = 17.0  # seconds of the run in the figure


@dataclass(frozen=True)
class Bar:
    """One job: a client trains some pieces of data, one after the other."""

    client: int
    data: str
    began: float
    finished: float


@dataclass(frozen=True)
class Picture:
    """A run under one scheme: its jobs, the ends of its rounds, and the data in each round's model."""

    title: str
    bars: list[Bar]
    ends: list[float]
    used: str


def pictures(rounds: int) -> list[Picture]:
    """Runs the three schemes for some rounds; all of them meet the same clients."""
    plain, coded = FedAvg(fraction_evaluate=0.0), fractional_repetition(n=CLIENTS, s=1)
    own = list(LETTERS)
    # A client's own data first: the bars of a job have the right length, whichever order its pieces are trained in.
    held = [
        "".join(sorted((LETTERS[j] for j in coded.shards_of(i)), key=lambda one: one != LETTERS[i]))
        for i in range(CLIENTS)
    ]
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), coded, verify=0)
    return [
        _run("Waiting for all", plain, own, rounds, wait_for=CLIENTS),
        _run("Dropping the slowest", FedAvg(fraction_evaluate=0.0), own, rounds, wait_for=CLIENTS - 1),
        _run("Coding", strategy, held, rounds, wait_for=None),
    ]


def _run(title: str, strategy: FedAvg | GradientCoding, data: list[str], rounds: int, wait_for: int | None) -> Picture:
    latency = Latency(fixed=0.2, compute=0.8, slowdown=scaled(constant(1.0), dict(enumerate(SLOWNESS))))
    app = ClientApp(mods=[gradient_coding_mod])
    app.train()(_train)
    ends: list[float] = []
    with InProcessGrid(app, num_nodes=CLIENTS) as nodes:
        virtual = VirtualGrid(nodes, latency)
        grid = virtual if wait_for is None else EarlyStopGrid(virtual, stop_after=wait_for)

        def note(server_round: int, arrays: ArrayRecord) -> None:
            if server_round:
                ends.append(virtual.now())

        strategy.start(grid, ArrayRecord([np.zeros(1)]), num_rounds=rounds, evaluate_fn=note)
        bars = [Bar(job.worker, data[job.worker], job.began, job.finished) for job in virtual.jobs]
    if isinstance(strategy, GradientCoding):
        assert all(row["train"]["outcome"] == "exact" for row in strategy.ledger.rows)
        return Picture(title, bars, ends, LETTERS)
    in_time = {bar.client for bar in bars if bar.finished <= ends[0] + 1e-9}
    return Picture(title, bars, ends, "".join(LETTERS[client] for client in sorted(in_time)))


def _train(message: Message, context: Context) -> Message:
    """Adds the number of the data to the model: what is shown are the times, not what is learnt."""
    (model,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    arrays = ArrayRecord([model + float(context.node_config["partition-id"])])
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def as_text(runs: list[Picture]) -> str:
    """The first round of each scheme, in characters: a letter is a piece of data, the bar the end of the round."""
    lines = []
    width = round(_PER_SECOND * max(run.ends[0] for run in runs))
    for run in runs:
        end = round(_PER_SECOND * run.ends[0])
        lines.append(f"{run.title}: a round takes {run.ends[0]:.1f} s, and the model learns from {' '.join(run.used)}")
        for bar in sorted(run.bars[:CLIENTS], key=lambda one: one.client):
            length = round(_PER_SECOND * (bar.finished - bar.began))
            pieces = np.array_split(np.arange(length), len(bar.data))
            text = "".join(letter * len(piece) for letter, piece in zip(bar.data, pieces, strict=True))
            line = text[:end].ljust(end) + "|" + text[end:width].lower()
            lines.append(f"  client {bar.client + 1}  {line}".rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(runs: list[Picture], path: Path) -> None:
    """The same seconds of all three runs: a row a client, a bar a job, a line the end of a round."""
    figure = Figure(figsize=(9.0, 5.4), layout="constrained", facecolor="white")
    panels = figure.subplots(len(runs), 1, sharex=True)
    colours = {"A": "#9CC4E0", "B": "#6BA3CC", "C": "#C3DBED", "D": "#E69F00"}
    for panel, run in zip(panels, runs, strict=True):
        for bar in (bar for bar in run.bars if bar.began < _SHOWN):
            step = (bar.finished - bar.began) / len(bar.data)
            lost = bar.client == CLIENTS - 1 and not any(abs(end - bar.finished) < 1e-6 for end in run.ends)
            for place, letter in enumerate(bar.data):
                left = bar.began + place * step
                panel.barh(
                    bar.client,
                    step,
                    0.78,
                    left=left,
                    color="#DDDDDD" if lost else colours[letter],
                    edgecolor="white",
                    hatch="///" if lost else "",
                    linewidth=0.8,
                )
                if left + step / 2 < _SHOWN:
                    panel.text(
                        left + step / 2, bar.client, letter, ha="center", va="center", fontsize=8, color="#202124"
                    )
        seen = [end for end in run.ends if end <= _SHOWN]
        for end in seen:
            panel.axvline(end, color="#202124", linewidth=1.2)
        panel.set_ylim(CLIENTS - 0.5, -0.5)
        panel.set_xlim(0, _SHOWN)
        panel.set_yticks(range(CLIENTS), [f"client {client + 1}" for client in range(CLIENTS)])
        panel.tick_params(length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        plural = "" if len(seen) == 1 else "s"
        learnt = "learns from all data" if run.used == LETTERS else f"never learns from {LETTERS[-1]}"
        panel.set_title(f"{run.title}: {len(seen)} round{plural}, and the model {learnt}", loc="left", fontsize=10)
    panels[-1].set_xlabel("time (seconds); a vertical line is the end of a round")
    handles = [
        Patch(facecolor=colours["B"], label="data of clients 1 to 3"),
        Patch(facecolor=colours["D"], label="data of the slow client"),
        Patch(facecolor="#DDDDDD", hatch="///", edgecolor="white", label="finished too late for its round"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncol=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_assignments(path: Path) -> None:
    """Who stores which shard under two codes, with six clients and s = 2: a row a client, a column a shard."""
    codes = {
        "Fractional repetition: groups store the same": fractional_repetition(n=6, s=2),
        "Cyclic repetition: shifted by one": cyclic_repetition(n=6, s=2, rng=np.random.default_rng(0)),
    }
    figure = Figure(figsize=(8.0, 3.5), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (title, code) in zip(panels, codes.items(), strict=True):
        held = np.zeros((code.n, code.k))
        for client in range(code.n):
            held[client, list(code.shards_of(client))] = 1
        panel.imshow(held, cmap="Blues", vmin=0, vmax=1.8, aspect="auto")
        for client, shard in np.argwhere(held):
            panel.text(shard, client, chr(ord("A") + shard), ha="center", va="center", color="#202124")
        panel.set_xticks(np.arange(code.k + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(code.n + 1) - 0.5, minor=True)
        panel.grid(which="minor", color="white", linewidth=2)
        panel.tick_params(which="both", length=0)
        panel.set_xticks(range(code.k), [chr(ord("A") + shard) for shard in range(code.k)])
        panel.set_yticks(range(code.n), [f"client {client + 1}" for client in range(code.n)])
        panel.set_xlabel("shard")
        panel.spines[:].set_visible(False)
        panel.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Print the text and write the figure."""
    parser = argparse.ArgumentParser(prog="python -m experiments.idea", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the two figures")
    options = parser.parse_args(arguments)
    runs = pictures(rounds=16)
    print(as_text(runs))
    draw(runs, options.out / "idea.png")
    draw_assignments(options.out / "assignments.png")


if __name__ == "__main__":
    main()
