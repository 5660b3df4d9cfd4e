"""`fl-gradcode plan`: which scheme pays for these workers.

The planner and what it needs of SciPy are imported when the command runs, so that other commands start without them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.status import Status

from ..errors import InvalidSetting
from ._errors import one_sentence
from ._output import print_lines

if TYPE_CHECKING:
    from .plan_source import Source

__all__ = ["LAWS", "plan"]

#: Names of the laws, as in `latency.POPULATIONS`.
LAWS = (
    "none",
    "lognormal",
    "exponential",
    "shifted-exponential",
    "pareto",
    "bimodal",
    "serverless",
    "virtual-machines",
    "phones",
)


_SILENT = 5.0  # seconds until a plan whose output is piped says how far it is


def plan(
    source: Annotated[
        str,
        typer.Argument(
            help=f"A law ({', '.join(LAWS)}); a .csv, .tsv or .npz of measured seconds (one column for each worker and "
            "one row for each round, or a header with worker,seconds[,round,shards,computing]); or a run's ledger "
            "(.jsonl)."
        ),
    ],
    workers: Annotated[
        int | None, typer.Option("--workers", "-n", help="Number of workers. Not needed if the file determines it.")
    ] = None,
    model: Annotated[float, typer.Option(help="Size of the model, in MB.")] = 0.0,
    link: Annotated[float | None, typer.Option(help="Network bandwidth of a client, in Mbit/s each way.")] = None,
    compute_share: Annotated[
        float | None,
        typer.Option(help="Share of a job's time that grows with its shards (default: from the file, or 0.8)."),
    ] = None,
    s: Annotated[list[int] | None, typer.Option("--s", help="Tolerance to try; may be given several times.")] = None,
    unit: Annotated[
        str | None, typer.Option(help="Unit of a file's times: s, ms or us (default: from the column's name, or s).")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Name of the array in an .npz file.")] = None,
    add_transfer: Annotated[
        bool, typer.Option("--add-transfer", help="Add the transfer to a file's times, which do not include it.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Also write a figure (.png, .svg, .pdf).")] = None,
    every: Annotated[bool, typer.Option("--all", help="Print all schemes, not only those that matter.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the simulated runs.")] = 0,
    matmul: Annotated[
        bool,
        typer.Option("--matmul", help="Plan coded matrix products instead of rounds; --model is the product's size."),
    ] = False,
) -> None:
    """Find out whether coding pays for these clients: round times, costs and the lines to paste."""
    with one_sentence():
        from .plan_source import read_source

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
        n = _number_of_workers(workers, read)
        if matmul:
            if s:
                raise InvalidSetting("--s applies to rounds, and --matmul plans a product for every k: leave --s out.")
            _plan_products(read, n, model, seed, figure, as_json=as_json)
        else:
            _plan_rounds(read, n, model, seed, figure, s, every=every, as_json=as_json)


def _plan_rounds(
    read: Source, n: int, megabytes: float, seed: int, figure: Path | None, tolerances: list[int] | None, *,
    every: bool, as_json: bool,
) -> None:  # fmt: skip
    """Prints which scheme to take for rounds."""
    if read.rounds == 1:
        raise InvalidSetting(
            f"{read.told}: one round does not tell how the next ones go, so there is no verdict. Give at least ten."
        )
    from ..planning import make_plan
    from .plan_output import draw_plan, plan_as_json, plan_remarks, plan_table

    console = Console()
    with _progress(console, as_json=as_json) as progress:
        result = make_plan(
            read.latency,
            n,
            model_megabytes=megabytes,
            tolerances=tolerances or None,
            seed=seed,
            share=read.split.share,
            progress=progress,
        )
    if figure is not None:
        draw_plan(result, figure, told=f"{n} workers, {read.told}")
    if as_json:
        typer.echo(json.dumps(plan_as_json(result, read), indent=2))
        return
    _print_verdict(console, result.verdict)
    print_lines(console, ["", *(f"    {line}" for line in result.recommended.scheme.to_paste.splitlines()), ""])
    for remark in plan_remarks(result, read):
        console.print(remark, highlight=False, markup=False)
    console.print(plan_table(result, read, uploads=bool(megabytes), every=every))
    if figure is not None:
        print_lines(console, [f"Figure: {figure}"])


def _plan_products(
    read: Source, n: int, megabytes: float, seed: int, figure: Path | None, *, as_json: bool
) -> None:  # fmt: skip
    """Prints which k to take for a coded matrix product."""
    from ..planning import plan_products
    from .plan_output import draw_products, products_as_json, products_table

    console = Console()
    with _spinner(console, as_json=as_json):
        result = plan_products(read.latency, n, megabytes=megabytes, seed=seed)
    if figure is not None:
        draw_products(result, figure, title=f"A coded product on {n} workers, {read.told}")
    if as_json:
        typer.echo(json.dumps(products_as_json(result, read.told), indent=2))
        return
    console.print(products_table(result, f"A product on {n} workers, {read.told}"))
    _print_verdict(console, result.verdict)
    print_lines(console, ["", f"    {result.best.python}", ""])
    if figure is not None:
        print_lines(console, [f"Figure: {figure}"])


def _print_verdict(console: Console, verdict: str) -> None:
    console.print(verdict[0].upper() + verdict[1:], highlight=False)


def _spinner(console: Console, *, as_json: bool) -> AbstractContextManager[object]:
    """Returns a spinner for people at a terminal; nothing for pipes and JSON."""
    return console.status("Simulating runs ...") if console.is_terminal and not as_json else nullcontext()


@contextmanager
def _progress(console: Console, *, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """Says how far a long plan is: beside a spinner at a terminal, otherwise in lines on stderr every few seconds."""
    said = time.monotonic()
    with _spinner(console, as_json=as_json) as spinner:

        def progress(done: int, of: int) -> None:
            nonlocal said
            if isinstance(spinner, Status):
                spinner.update(f"Simulating runs: {done} of {of} schemes ...")
            elif time.monotonic() - said > _SILENT:
                said = time.monotonic()
                typer.echo(f"{done} of {of} schemes are simulated.", err=True)

        yield progress


def _number_of_workers(given: int | None, read: Source) -> int:
    """Returns the number of workers, from the option or from what was read.

    Raises:
        InvalidSetting: Neither says it, they differ, or there are too few workers to plan for.
    """
    if given is None and read.n is None:
        raise InvalidSetting("The number of workers is missing: pass --workers N.")
    if given is not None and read.n is not None and given != read.n:
        raise InvalidSetting(f"--workers {given}, but {read.told}. Leave --workers out, or give a table for {given}.")
    chosen = given if given is not None else read.n
    assert chosen is not None
    if chosen < 2:
        found = f"--workers {chosen}" if given is not None else read.told
        raise InvalidSetting(f"{found}: nobody is there to share the work with; planning needs at least 2 workers.")
    return chosen
