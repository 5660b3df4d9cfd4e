"""The command line for privacy: `fl-gradcode privacy` prints what noise costs, `fl-gradcode keys` makes key files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..codes import GradientCode, cyclic_repetition, fractional_repetition, uncoded
from ..errors import FlGradcodeError
from ..privacy import (
    DPSGD,
    BudgetLedger,
    IntegerNoise,
    epsilon_of,
    noise_multiplier_for,
    read_keys,
    rotate_keys,
    write_keys,
)
from ._assignment_file import read_assignment
from ._errors import one_sentence

__all__ = ["keys", "privacy"]

keys = typer.Typer(
    help="Make, replace and check the keys from which all holders of a shard draw the same noise.",
    no_args_is_help=True,
    suggest_commands=False,  # click does
)

_CODES: dict[str, Callable[[int, int], GradientCode]] = {
    "fractional": fractional_repetition,
    "cyclic": lambda n, s: cyclic_repetition(n, s, rng=np.random.default_rng(0)),
    "uncoded": lambda n, s: uncoded(n),
}


def privacy(
    rounds: Annotated[int, typer.Option(help="Number of rounds of the run.")],
    sample_rate: Annotated[
        float | None, typer.Option(help="Probability of each record to be in a step's batch.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps on a shard in each round.")] = 1,
    epsilon: Annotated[
        float | None, typer.Option(help="The epsilon you want; prints the noise that this needs.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="The noise you have; prints the epsilon that it costs.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Probability with which the bound on epsilon may fail.")] = 1e-5,
    holders: Annotated[
        int, typer.Option(help="Workers that hold a shard, usually s + 1; independent noise pays for each.")
    ] = 1,
    max_grad_norm: Annotated[
        float, typer.Option(help="Clipping norm of a record's gradient, or of a shard's update, for the line to paste.")
    ] = 1.0,
    accountant: Annotated[str, typer.Option(help="prv, or rdp, which is faster and less tight.")] = "prv",
    central: Annotated[
        bool, typer.Option("--central", help="Compute for CentralNoise: one release of each shard per round.")
    ] = False,
    integer: Annotated[
        bool,
        typer.Option("--integer", help="Compute for IntegerNoise: one release of each shard a round, under masks."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the noise multiplier for an epsilon, or the epsilon for a noise multiplier, shared and independent."""
    with one_sentence():
        if (epsilon is None) == (noise_multiplier is None):
            raise FlGradcodeError("Say either --epsilon, to learn the noise, or --noise-multiplier, to learn epsilon.")
        for option, value in (("--rounds", rounds), ("--holders", holders)):
            if value < 1:
                raise FlGradcodeError(f"{option} {value} must be at least 1.")
        if central or integer:
            option = "--central" if central else "--integer"
            if central and integer:
                raise FlGradcodeError("--central and --integer are two kinds of noise: say one.")
            if sample_rate not in (None, 1.0) or steps != 1:
                raise FlGradcodeError(f"{option} releases whole updates: leave --sample-rate and --steps out.")
            sample_rate, holders = 1.0, 1
            accountant = IntegerNoise.accountant if integer else accountant
        if sample_rate is None:
            raise FlGradcodeError(
                "The sample rate is missing: pass --sample-rate Q, the batch size over the number of records."
            )
        found: list[dict[str, Any]] = []
        common: dict[str, Any] = {
            "max_grad_norm": max_grad_norm,
            "sample_rate": sample_rate,
            "steps": steps,
            "delta": delta,
            "accountant": accountant,
        }
        for noise in ("shared", "independent") if holders > 1 else ("shared",):
            draft = DPSGD(noise_multiplier=1.0 if noise_multiplier is None else noise_multiplier, noise=noise, **common)
            spend = draft.spend(rounds, holders=holders)
            sigma = noise_multiplier
            if sigma is None:
                assert epsilon is not None
                least = noise_multiplier_for(
                    epsilon, delta, sample_rate=sample_rate, steps=spend.steps, accountant=accountant
                )
                sigma = math.ceil(least * 1e4) / 1e4  # up: it is going to be pasted
            spent = replace(draft, noise_multiplier=sigma).spend(rounds, holders=holders)
            found.append(
                {
                    "noise": "central" if central else "integer" if integer else noise,
                    "noise-multiplier": sigma,
                    "epsilon": epsilon_of([spent], delta, accountant=accountant),
                    "releases-a-round": draft.releases(holders),
                }
            )
    if as_json:
        typer.echo(json.dumps({"rounds": rounds, "holders": holders, **common, "modes": found}, indent=2))
        return
    console = Console()
    whole = "noise after decoding" if central else "integer noise in each shard" if integer else ""
    asked = whole or f"{steps} steps each, sample rate {sample_rate:.4g}"
    console.print(f"{rounds} rounds, {asked}, delta {delta:g}", highlight=False)
    console.print(_table(found, "shard" if whole else "record"))
    best = found[0]
    line = (
        f"privacy=CentralNoise(noise_multiplier={best['noise-multiplier']:g}, clipping_norm={max_grad_norm:g}, "
        f"delta={delta:g})"
        if central
        else f"privacy=DPSGD(noise_multiplier={best['noise-multiplier']:g}, max_grad_norm={max_grad_norm:g}, "
        f"sample_rate={sample_rate:.10g}, steps={steps}, delta={delta:g})"
    )
    if integer:
        line = (
            f"privacy=IntegerNoise(noise_multiplier={best['noise-multiplier']:g}, clipping_norm={max_grad_norm:g}, "
            f"delta={delta:g})"
        )
    console.print(f"    {line}\n", highlight=False, soft_wrap=True, markup=False)


@keys.command("make")
def make(
    folder: Annotated[
        Path, typer.Argument(help="Folder to make; its folders node-0, node-1, ... go to the nodes, with their data.")
    ],
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.")] = None,
    stragglers: Annotated[int, typer.Option("--stragglers", "-s", help="Straggler tolerance s of the code.")] = 0,
    code: Annotated[
        str, typer.Option(help=f"Code that says who holds which shards: {', '.join(_CODES)}.")
    ] = "fractional",
    assignment: Annotated[
        Path | None, typer.Option(help="In place of a code: a JSON file with the list of shards of each worker.")
    ] = None,
) -> None:
    """Make new keys: for each worker a folder with the keys of the shards that it holds, and no others."""
    with one_sentence():
        held = read_assignment(assignment) if assignment is not None else _of_code(code, workers, stragglers)
        paths = write_keys(folder, held)
    shards = len({shard for one in held for shard in one})
    typer.echo(
        f"Keys of {shards} shards for {len(paths)} workers in {folder}. Bring each node its own, and start it with"
    )
    typer.echo("    --node-config 'partition-id=0 num-partitions=... privacy-dir=\"/path/to/node-0\" max-epsilon=3.0'")
    typer.echo("Never bring one to the server: anyone who has a shard's key can remove its noise.")


@keys.command("rotate")
def rotate(
    folder: Annotated[Path, typer.Argument(help="Folder as `keys make` made it, with the folders of all workers.")],
) -> None:
    """Make new keys for the same holders, between two runs. Privacy that was spent stays spent."""
    with one_sentence():
        paths = rotate_keys(folder)
        generation = read_keys(paths[0].parent).generation
    typer.echo(
        f"Keys of generation {generation} for {len(paths)} workers in {folder}. Bring every node its new keys.json."
    )


@keys.command("check")
def check(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    delta: Annotated[float, typer.Option(help="Delta at which epsilons are computed.")] = 1e-5,
) -> None:
    """Print which keys a node has, without the secrets, and what its shards have spent so far."""
    with one_sentence():
        node = read_keys(folder)
        ledger = BudgetLedger(folder / "spent")
        table = Table(title=f"worker {node.worker}, keys of generation {node.generation}", box=box.SIMPLE_HEAD)
        for column in ("shard", "key", "runs", "rounds", "epsilon"):
            table.add_column(column, justify="right")
        for shard in sorted({*node.secrets, *ledger.shards}):
            entries = ledger.entries(shard)
            table.add_row(
                str(shard),
                "yes" if shard in node.secrets else "no",
                str(len({one.run for one in entries})),
                str(len(entries)),
                f"{ledger.epsilon(shard, delta):.3g}",
            )
    Console().print(table)


def _table(found: list[dict[str, Any]], unit: str) -> Table:
    whose = "a record of a shard" if unit == "record" else "a whole shard"
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left",
        caption=f"epsilon: of {whose}, over the run; releases of a shard's update per round.",
    )  # fmt: skip
    for column in ("noise", "multiplier", "epsilon", "releases"):
        table.add_column(column, justify="left" if column == "noise" else "right")
    for one in found:
        table.add_row(
            one["noise"], f"{one['noise-multiplier']:.6g}", f"{one['epsilon']:.3f}", str(one["releases-a-round"])
        )
    return table


def _of_code(name: str, workers: int | None, stragglers: int) -> list[tuple[int, ...]]:
    if name not in _CODES:
        raise FlGradcodeError(f"--code {name!r} must be one of {', '.join(_CODES)}; give others by --assignment FILE.")
    if workers is None:
        raise FlGradcodeError("The number of workers is missing: pass --workers N, or --assignment FILE.")
    made = _CODES[name](workers, stragglers)
    return [made.shards_of(worker) for worker in range(made.n)]
