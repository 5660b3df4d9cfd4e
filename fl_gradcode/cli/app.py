"""The command line: `fl-gradcode plan`, and the commands for privacy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import FlGradcodeError
from ..latency import POPULATIONS
from ..planning import Line, RoundPlan, make_plan, plan_products
from .place import place
from .plan import Source, read_source
from .plan_output import as_json as products_as_json
from .plan_output import draw_plan, draw_products, seconds_text, table_of
from .privacy import keys, one_sentence, privacy
from .status import status

__all__ = ["app", "main"]

app = typer.Typer(
    help="Gradient coding for Flower: rounds that neither wait for slow clients nor lose their data.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """Gradient coding for Flower: rounds that neither wait for slow clients nor lose their data."""


@app.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(
            help=f"A law ({', '.join(POPULATIONS)}); a .csv or .npz of measured seconds (one column a worker and one "
            "row a round, or a header with worker,seconds[,round,shards,computing]); or a run's ledger (.jsonl)."
        ),
    ],
    workers: Annotated[
        int | None, typer.Option("--workers", "-n", help="Number of workers; a file may say it.")
    ] = None,
    model: Annotated[float, typer.Option(help="Size of the model, MB.")] = 0.0,
    link: Annotated[float | None, typer.Option(help="Link speed of a client, Mbit/s each way.")] = None,
    compute_share: Annotated[
        float | None,
        typer.Option(help="Share of a job's time that grows with its shards [0.8, or what a ledger says]."),
    ] = None,
    s: Annotated[list[int] | None, typer.Option("--s", help="Tolerances to try; may be given several times.")] = None,
    unit: Annotated[str, typer.Option(help="Of a file's times: s, ms or us.")] = "s",
    key: Annotated[str | None, typer.Option(help="Which array of an .npz file.")] = None,
    add_transfer: Annotated[
        bool, typer.Option("--add-transfer", help="A file's times are without the transfer: it comes on top.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Write a figure (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Annotated[int, typer.Option(help="Of the simulated runs.")] = 0,
    matmul: Annotated[
        bool,
        typer.Option("--matmul", help="Plan coded matrix products instead of rounds; --model: the product's size."),
    ] = False,
) -> None:
    """Does coding pay for these clients? Round times, costs, and the line to paste."""
    console = Console()
    with one_sentence():
        read = read_source(
            source,
            n=workers,
            compute_share=compute_share,
            model_megabytes=model,
            link=link,
            unit=unit,
            key=key,
            transfer_included=not add_transfer,
        )
        n = _workers(workers, read)
        if matmul:
            _plan_products(console, read, n, model, s, figure, as_json, seed)
            return
        with console.status("Simulating runs ...") if console.is_terminal else _Quiet():
            result = make_plan(read.latency, n, model_megabytes=model, tolerances=s or None, seed=seed)
        if figure is not None:
            draw_plan(result, figure, title=f"{n} workers, {read.told}")
    if as_json:
        typer.echo(json.dumps(_as_json(result, read), indent=2))
        return
    console.print(_table(result, read, uploads=bool(model)))
    console.print(result.verdict[0].upper() + result.verdict[1:], highlight=False)
    if result.slow:
        console.print(f"Slow for good: workers {', '.join(map(str, result.slow))}.", highlight=False)
    console.print(f"\n    {result.recommended.scheme.python}\n", highlight=False, soft_wrap=True, markup=False)
    if read.fits:
        best = read.fits[0]
        console.print(f"Closest law: {best.code} (Kolmogorov-Smirnov distance {best.distance:.2f}).", highlight=False)
    if figure is not None:
        console.print(f"Figure: {figure}", highlight=False, soft_wrap=True)


def _plan_products(
    console: Console, read: Source, n: int, megabytes: float, s: list[int] | None, figure: Path | None, as_json: bool,
    seed: int,
) -> None:  # fmt: skip
    """Which k to take for a product."""
    if s:
        raise FlGradcodeError("--s is about rounds; a product is planned for every k, with --matmul alone.")
    with console.status("Simulating products ...") if console.is_terminal and not as_json else _Quiet():
        result = plan_products(read.latency, n, megabytes=megabytes, seed=seed)
    if figure is not None:
        draw_products(result, figure, title=f"A coded product on {n} workers, {read.told}")
    if as_json:
        typer.echo(json.dumps(products_as_json(result, read.told), indent=2))
        return
    console.print(table_of(result, f"A product on {n} workers, {read.told}"))
    console.print(result.verdict[0].upper() + result.verdict[1:], highlight=False)
    console.print(f"\n    {result.best.python}\n", highlight=False, soft_wrap=True, markup=False)
    if figure is not None:
        console.print(f"Figure: {figure}", highlight=False, soft_wrap=True)


app.command()(place)
app.command()(privacy)
app.command()(status)
app.add_typer(keys, name="keys")


def main() -> None:
    """Entry point of the command `fl-gradcode`."""
    app()


def _workers(given: int | None, read: Source) -> int:
    if given is None and read.n is None:
        raise FlGradcodeError("The number of workers is missing: say --workers N.")
    if given is not None and read.n is not None and given != read.n:
        raise FlGradcodeError(f"--workers {given}, but {read.told}. Leave --workers out, or give a table for {given}.")
    chosen = given if given is not None else read.n
    assert chosen is not None
    if chosen < 2:
        raise FlGradcodeError(f"{chosen} worker has nobody to share its work with: planning needs at least 2.")
    return chosen


def _table(result: RoundPlan, read: Source, *, uploads: bool) -> Table:
    caption = (
        "run: mean seconds a round over a run, where workers that were not needed are still busy; ±: its standard "
        "error; gain: against waiting for all; idle: seconds of a round that finds everybody idle (* closed form); "
        f"work: times what plain FedAvg computes; {'up: MB of all replies of a round; ' if uploads else ''}"
        "holds: shards that a worker stores; †: loses data."
    )
    table = Table(
        title=f"{result.n} workers, {read.told}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        padding=(0, 1, 0, 0), caption=caption, caption_justify="left",
    )  # fmt: skip
    table.add_column("scheme", no_wrap=True)
    columns = ["run", "±", "gain", "idle", "work", *(["up"] if uploads else []), "holds"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in result.lines:
        cells = [
            seconds_text(line.steady),
            seconds_text(line.error, 1),
            f"{result.speedup(line):.2f}x",
            seconds_text(line.idle) + ("*" if line.closed_form else " "),
            f"{line.computed:.2f}x",
            *([f"{line.upload:.3g}"] if uploads else []),
            str(line.storage),
        ]
        style = "bold green" if line is result.recommended else None if line.scheme.exact else "dim"
        table.add_row(line.scheme.name + ("" if line.scheme.exact else " †"), *cells, style=style)
    return table


def _as_json(result: RoundPlan, read: Source) -> dict[str, Any]:
    return {
        "source": read.told,
        "workers": result.n,
        "verdict": result.verdict,
        "recommended": _line(result.recommended),
        "slow-for-good": list(result.slow),
        "fits": [{"law": one.code, "distance": one.distance} for one in read.fits],
        "schemes": [_line(line) for line in result.lines],
    }


def _line(line: Line) -> dict[str, Any]:
    numbers = {
        "seconds-over-a-run": line.steady,
        "standard-error": line.error,
        "seconds-idle-start": line.idle,
        "computed": line.computed,
        "megabytes-up": line.upload,
    }
    return {
        "scheme": line.scheme.name,
        "s": line.scheme.s,
        "exact": line.scheme.exact,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "idle-start-is-closed-form": line.closed_form,
        "shards-stored": line.storage,
        "python": line.scheme.python,
    }


class _Quiet:
    """No spinner where nobody looks."""

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, *_: object) -> None:
        """Nothing."""
