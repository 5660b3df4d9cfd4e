"""Which blocks a page has, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.compare.problems import LAWS, PROBLEMS
from experiments.compare.store import ROOT
from experiments.report import figures, regime, tables, words
from experiments.report.blocks import Block, Heading, Shown, Text
from experiments.report.data import Results, read, suite_of
from experiments.report.measures import Target, target

__all__ = ["display", "page"]


def page(
    rows: Sequence[dict[str, Any]], sources: Mapping[str, Path], regimes: regime.Regimes | None, report: str
) -> tuple[str, list[Block]]:
    """(first paragraph, blocks) of the page.

    Args:
        rows: Of all problems.
        sources: Problem -> file that its rows were read from.
        regimes: None leaves the map out.
        report: The command that makes the page.
    """
    problems = read(rows)
    goals = {results.problem: target(results) for results in problems}
    blocks: list[Block] = []
    for place, results in enumerate(problems):
        command = f"{_compare(results.problem, sources[results.problem])}\n{report}"
        blocks += _problem(results, goals[results.problem], command, reading=not place)
    if any(results.hindsight or results.laws for results in problems):
        blocks += [Heading("Two checks", "checks"), Text(words.checks(problems, goals))]
    if regimes:
        blocks += _regimes(regimes, report)
    blocks += _measured(problems, rows)
    seeds = sorted({seed for results in problems for seed in results.seeds})
    lead = (
        f"Every scheme on the same clients, data, seeds and draws of latency, in virtual time; seeds "
        f"{', '.join(map(str, seeds)) or 'none yet'}. All numbers on this page are computed from rows that "
        "`python -m experiments.compare` wrote."
    )
    return lead, blocks


def _problem(results: Results, goal: Target | None, command: str, *, reading: bool) -> list[Block]:
    name, law = results.problem, results.headline
    blocks: list[Block] = [Heading(results.title, name)]
    if lacking := words.lacking(results):
        blocks.append(Text(lacking))
    if law is None:
        return blocks
    n = PROBLEMS[name].n
    blocks.append(Text(f"{n} clients, {LAWS[law][0]}. {words.summary(results, law, goal)}"))
    seeds = f"Mean over {len(results.seeds)} seeds, band from least to most."
    owned = " and on the labels that only the slow clients have" if PROBLEMS[name].owners else ""
    lines = {
        "time": (
            figures.accuracy_over_time(results, law, goal),
            "Test accuracy over virtual time, one line a scheme",
            f"Time to accuracy, {LAWS[law][0]}. {seeds} The further left a line, the sooner; the axis is logarithmic, "
            "so equal distances are equal ratios.",
        )
    }
    shown = [Shown(f"{name}-{key}", *value, command) for key, value in lines.items()]
    blocks += [*shown, tables.headline(results, law, goal)]
    if results.long:
        blocks += [Text(words.LONG), tables.long(results, goal)]
    if reading:
        blocks.append(Text(words.READING))
    blocks.append(
        Shown(
            f"{name}-worst",
            figures.worst_over_time(results, law),
            "Accuracy on the worst class over virtual time",
            f"What the mean hides: accuracy on the worst class{owned}. {seeds}",
            command,
        )
    )
    blocks.append(
        Shown(
            f"{name}-rounds",
            figures.accuracy_over_rounds(results, law, goal),
            "Test accuracy over server rounds",
            f"What a round is worth, whatever it takes: all exact schemes are one line. {seeds}",
            command,
        )
    )
    timelines = figures.timelines(results, law)
    if timelines is not None:
        caption = (
            "The first rounds of seed 0: a line a worker, a bar a job, a vertical line the end of a round. Where a "
            "worker sent several replies in a round, all count as used if one was."
        )
        blocks.append(Shown(f"{name}-timelines", timelines, "Timelines of the first rounds", caption, command))
    work = (
        "Compute and bytes, needed or not, a round; FedBuff's round is as many trainings as there are clients. Mean "
        "over seeds, whiskers from least to most. The table has the totals, in which baselines that ran on have more "
        "rounds."
    )
    blocks.append(
        Shown(f"{name}-work", figures.work(results, law), "Shard trainings and megabytes a round", work, command)
    )
    return blocks + _laws(results, goal, law)


def _laws(results: Results, goal: Target | None, headline: str) -> list[Block]:
    blocks: list[Block] = []
    others = [law for law in LAWS if law != headline and law in results.laws]
    if others:
        blocks += [
            Heading("Under every law of latency", f"{results.problem}-laws", 3),
            tables.at_a_glance(results, goal),
        ]
    for law in [headline, *others]:
        text = words.law_summary(results, law, goal)
        if text:
            blocks.append(Text(f"**{LAWS[law][0][0].upper()}{LAWS[law][0][1:]}.** {text}"))
        if law != headline:
            blocks.append(tables.headline(results, law, goal, short=True))
    for table in (tables.hindsight(results), tables.adaptive(results, goal)):
        if table.rows:
            blocks.append(table)
    return blocks


def _regimes(regimes: regime.Regimes, report: str) -> list[Block]:
    text = (
        f"{regimes.n} workers, each busy until it has finished; simulated by the library for every exact scheme that "
        "the planner compares, s = 1, 2, 3, 4, 5, 7. A cell's colour and number are the speed-up of the fastest "
        "coded scheme over waiting for all, its label the scheme: rep repetition, pw partial work, rp replication "
        "(partial work that begins second copies at once), then s; of those within 4 % of the fastest the one with "
        "the smallest s. In the upper maps every job has lognormal jitter besides, sigma 0.1. **No code**: the gain "
        "is below 5 %, the planner's threshold. On the left, where a shard a message is allowed, coding hardly ever "
        "loses, since second copies begin only when somebody is idle; on the right, where each worker sends one "
        "coded reply and computes s + 1 shards for it, it loses wherever compute dominates and tails are light."
    )
    caption = (
        "Where coding pays. Purple: coding is faster; orange: it is slower. It is simulated when the page is made."
    )
    figure = regime.draw(regimes)
    return [
        Heading("Where coding pays, and where it does not", "regimes"),
        Text(text),
        Shown("regimes", figure, "Map of the speed-up of coding over compute share and tail", caption, report),
    ]


def _measured(problems: Sequence[Results], rows: Sequence[dict[str, Any]]) -> list[Block]:
    blocks: list[Block] = [Heading("How it was measured", "measured"), Text(words.CHARGED)]
    blocks += [tables.settings(problems), Text(words.baselines(problems))]
    tuned = tables.tuned(problems)
    if tuned.rows:
        blocks.append(tuned)
    blocks.append(Text(words.provenance(rows)))
    return [*blocks, Heading("Not shown, and limits", "limits"), Text(words.LIMITS)]


def _compare(problem: str, path: Path) -> str:
    suite = suite_of(problem)
    data = "" if suite == "quick" else " --data-dir DATA"
    return f"python -m experiments.compare --suite {suite}{data} --rows {display(path)}"


def display(path: Path) -> str:
    """As short as can be: from the repository's root, if it lies there."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
