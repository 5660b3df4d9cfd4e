"""`fl-gradcode status`: what a run has done so far, from its ledger.

The planner is imported when advice is asked for, so that commands start without it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from .._files import replace_file
from ..errors import InvalidSetting
from ..runlog import LedgerReader, RoundLine, RunRows, RunStatus, as_json, gone_of, status_of
from ._errors import one_sentence
from .status_page import TO_PASTE, draw_all, draw_status, heading, rounds_table, told_notice

if TYPE_CHECKING:
    from ..runlog import Advice

__all__ = ["status"]

_WIDTH = 100  # columns of the output if it is no terminal
_PLAN_EVERY = 60.0  # seconds between two plans while following, since the run needs the machine too


def status(
    ledger: Annotated[Path, typer.Argument(help="The ledger (.jsonl) that the run writes.")],
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of a run in the file, or its beginning; all: a line for each run. Default: the last run."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of last rounds to list.")] = 10,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue until Ctrl-C; in a pipe, print a line for each new round.")
    ] = False,
    until_round: Annotated[int | None, typer.Option(help="With --follow: stop once this round is done.")] = None,
    every: Annotated[float, typer.Option(help="With --follow: seconds between updates.")] = 2.0,
    no_plan: Annotated[bool, typer.Option("--no-plan", help="Leave out the planner's recommendation.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page for a browser to this file; with --follow it is kept up to date."),
    ] = None,
    as_object: Annotated[
        bool, typer.Option("--json", help="Print JSON; with --follow one line for each new round.")
    ] = False,
) -> None:
    """Show what a run has done so far: its rounds, slow and failed workers, where time went, and what to change."""
    with one_sentence():
        _check(rounds, follow, until_round, every, run, html)
    view = _View(LedgerReader(ledger), run, rounds, plans=not no_plan, as_object=as_object, html=html)
    if follow:
        with suppress(KeyboardInterrupt):
            view.follow(until_round, every)
        view.write_html(None)  # nothing changes any more
        return
    with one_sentence():
        view.reader.read()
        there = view.reader.last is not None
        printed = view.page() if there else None
    if printed is None:
        typer.echo(f"fl-gradcode: {view.nothing}", err=True)
        raise typer.Exit(1)
    view.show(printed)
    view.write_html(None)


def _check(
    rounds: int,
    follow: bool,
    until_round: int | None,
    every: float,
    run: str | None,
    html: Path | None,
) -> None:
    if rounds < 1:
        raise InvalidSetting(f"--rounds {rounds} must be at least 1.")
    if until_round is not None and not follow:
        raise InvalidSetting(f"--until-round {until_round} says when to stop following: give --follow too.")
    if until_round is not None and run == "all":
        raise InvalidSetting(f"--until-round {until_round} is about one run: leave out --run all, or name the run.")
    if not 0 < every < float("inf"):
        raise InvalidSetting(f"--every {every} must be a number of seconds greater than 0.")
    if html is not None and run == "all":
        raise InvalidSetting("--html shows one run: leave out --run all, or name the run.")
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise InvalidSetting(f"--html {str(html)!r} would be overwritten: name a file that ends with .html.")


class _View:
    """The views of a ledger, one look after the other.

    Args:
        reader: Reader of the ledger.
        run: Name of the run to show, its beginning, or "all"; None: the last run.
        rounds: Number of last rounds to list.
        plans: Whether to show the planner's recommendation.
        as_object: Whether to print JSON.
        html: File that gets a page for a browser; None: none is written.
    """

    def __init__(
        self, reader: LedgerReader, run: str | None, rounds: int, *, plans: bool, as_object: bool, html: Path | None
    ) -> None:
        self.reader, self.run, self.rounds, self.plans, self.as_object = reader, run, rounds, plans, as_object
        self.html, self.every = html, 2.0
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=_WIDTH)
        self.following = False
        self._advice: tuple[str, int, float, Advice] | None = None
        self._status: RunStatus | None = None
        self._told: dict[int, RoundLine] = {}
        self._warned: set[str] = set()
        self._of = ""

    @property
    def nothing(self) -> str:
        """What to say if there is no row yet."""
        if not self.reader.exists:
            return f"There is no file {str(self.reader.path)!r} yet; --follow waits for it."
        return f"The ledger {str(self.reader.path)!r} has no rounds yet; --follow waits for the first."

    def show(self, page: RenderableType | str) -> None:
        """Prints a page. A line to paste is never broken."""
        if isinstance(page, str):
            typer.echo(page)
            return
        for part in page.renderables if isinstance(page, Group) else [page]:
            self.console.print(part, soft_wrap=isinstance(part, Text) and part.overflow == TO_PASTE)

    def page(self) -> RenderableType | str:
        """Returns the whole page of what was read."""
        if self.run == "all":
            each = [status_of(one) for one in self.reader.runs.values()]
            if self.as_object:
                return self._dumped([as_json(one, self.rounds) for one in each])
            return draw_all(each, now=time.time())
        self._status = status_of(self._chosen())
        return self._draw()

    def write_html(self, refresh: float | None) -> None:
        """Writes the page for a browser, if one was asked for and there is a round.

        Args:
            refresh: Seconds after which a browser loads it again; None: never.
        """
        if self.html is None or self._status is None:
            return
        from .status_html import status_html

        run = self.reader.runs[self._status.run]
        advice = self._advised(run, gone_of(self._status.workers)) if self.plans else None
        page = status_html(self._status, advice, rounds=max(self.rounds, 30), now=time.time(), refresh=refresh)
        with one_sentence():
            replace_file(self.html, page)

    def follow(self, until: int | None, every: float) -> None:
        """Looks again and again, until a round is done."""
        self.following = True
        if self.console.is_terminal and not self.as_object:
            self._follow_live(until, every)
            return
        waiting = False
        while True:
            with one_sentence():
                new = self.reader.read()
                if new and self.reader.last is None:  # the file was emptied
                    self._status, self._of, waiting = None, "", False
                elif new:
                    self._append()
                self.write_html(every)
            if not waiting and self.reader.last is None:
                typer.echo(f"Waiting for the first round in {str(self.reader.path)!r}.", err=True)
                waiting = True
            if self._reached(until):
                return
            time.sleep(every)

    def _follow_live(self, until: int | None, every: float) -> None:
        self.every = every
        page = self._look()
        try:
            with Live(page, console=self.console, auto_refresh=False, transient=True) as live:
                while not self._reached(until):
                    time.sleep(every)
                    page = self._look()
                    live.update(page, refresh=True)
        finally:
            if self.reader.last is not None:  # the whole page, including what did not fit on the screen
                self.show(page)

    def _look(self) -> RenderableType:
        """Returns the page as it is now. It says how long ago the last round was, so that it always changes."""
        with one_sentence():
            new = self.reader.read()
            if self.reader.last is None:
                self._status = None
                return Text(f"Waiting for the first round in {str(self.reader.path)!r}; Ctrl-C ends.")
            page = self.page() if new or self._status is None else self._draw()
            self.write_html(self.every)  # also without a new round: then it says so after a while
            return page

    def _append(self) -> None:
        """Prints what is new."""
        if self.run == "all" or self.as_object:
            self.show(self.page())
            return
        now, chosen = time.time(), self._chosen()
        status = self._status = status_of(chosen)
        if chosen.name != self._of:
            self._of, self._warned = chosen.name, set()
            self.console.print(*heading(status, now=now), sep="\n")
            self.console.print(rounds_table(status.rounds[-self.rounds :]))
        else:
            new = [one for one in status.rounds if self._told.get(one.round) != one]
            if new:
                self.console.print(rounds_table(new, header=False))
        self._told = {one.round: one for one in status.rounds}
        for notice in status.notices:
            if notice.key not in self._warned:
                self.console.print(told_notice(notice))
        self._warned = {notice.key for notice in status.notices}

    def _chosen(self) -> RunRows:
        runs = self.reader.runs
        if self.run is None:
            assert self.reader.last is not None
            return runs[self.reader.last]
        found = [name for name in runs if name == self.run] or [name for name in runs if name.startswith(self.run)]
        if len(found) != 1:
            names = ", ".join([*runs][-5:])
            how = "is the beginning of several runs" if found else "is not in the ledger"
            raise InvalidSetting(f"The run {self.run!r} {how}; the ledger has {len(runs)}, the last of them {names}.")
        return runs[found[0]]

    def _draw(self) -> RenderableType | str:
        assert self._status is not None
        run = self.reader.runs[self._status.run]
        advice = self._advised(run, gone_of(self._status.workers)) if self.plans else None
        others = [name for name in self.reader.runs if name != run.name]
        if self.as_object:
            told = {"advice": None if advice is None else {k.replace("_", "-"): v for k, v in asdict(advice).items()}}
            return self._dumped({**as_json(self._status, self.rounds), **told, "other-runs": others})
        return draw_status(
            self._status,
            advice,
            rounds=self.rounds,
            now=time.time(),
            others=len(others),
            ascii_only=self.console.options.ascii_only,
        )

    def _advised(self, run: RunRows, gone: list[int]) -> Advice:
        """Returns the planner's advice. While following it is renewed only now and then."""
        from ..runlog import advise

        last, now = run.rounds[-1].round, time.monotonic()
        if self._advice is not None and self._advice[0] == run.name:
            _, at, made, advice = self._advice
            if at == last or (now < made + _PLAN_EVERY and advice.python):
                return advice
        advice = advise(run.recent, gone=gone, holders=run.holders)
        self._advice = run.name, last, now, advice
        return advice

    def _dumped(self, value: Any) -> str:
        return json.dumps(value, indent=None if self.following else 2)

    def _reached(self, until: int | None) -> bool:
        return until is not None and self._status is not None and self._status.last.round >= until
