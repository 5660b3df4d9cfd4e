"""Which blocks a page has, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.compare.problems import LAWS, PROBLEMS
from experiments.compare.store import ROOT
from experiments.report import figures, regime, tables, words
from experiments.report.blocks import Block, Bullets, Code, Fold, Heading, Shown, Text, points
from experiments.report.data import Results, read, suite_of
from experiments.report.measures import Target, rise, target

__all__ = ["display", "page"]


# A figure of curves is shown if what is learnt is so many times what seeds differ by, and a point: else it is noise.
_CLEAR, _POINT = 3.0, 0.01


def page(
    rows: Sequence[dict[str, Any]], sources: Mapping[str, Path], regimes: regime.Regimes | None, report: str
) -> tuple[str, list[Block]]:
    """(first paragraph, blocks) of the page: a summary, then each problem with its details folded away.

    Args:
        rows: Of all problems.
        sources: Problem -> file that its rows were read from.
        regimes: None leaves the map out.
        report: The command that makes the page.
    """
    problems = read(rows)
    goals = {results.problem: target(results) for results in problems}
    blocks: list[Block] = _summary(problems, goals)
    for place, results in enumerate(problems):
        blocks += _problem(results, goals[results.problem], first=not place)
    if regimes:
        blocks += _regimes(regimes)
    blocks += _measured(problems, rows)
    commands = dict.fromkeys(
        _compare(suite, sources[results.problem])
        for results in problems
        for suite in [suite_of(results.problem), *(["long"] if results.long else [])]
    )
    blocks += [Heading("How to make this page", "made"), Text(words.MADE), Code("\n".join([*commands, report]))]
    seeds = sorted({seed for results in problems for seed in results.seeds})
    lead = (
        "This page compares coding with waiting for all clients, with dropping the slowest, and with asynchronous "
        "training. All schemes meet the same clients, data and delays, on a virtual clock, with the seeds "
        f"{', '.join(map(str, seeds)) or '(none yet)'}. Every number is computed from rows that "
        "`python -m experiments.compare` wrote. The server's strategy is FedAvg throughout. With FedAdam for all, "
        "exact rounds stay ahead where the same clients are always slow, and FedProx or dropping are faster where "
        "other clients are slow in each round; docs/staleness.md has these times, and what that costs in labels and "
        "in the worst class."
    )
    return lead, blocks


def _summary(problems: Sequence[Results], goals: Mapping[str, Target | None]) -> list[Block]:
    sentences = words.in_short(problems, goals)
    if not sentences:
        return []
    blocks: list[Block] = [Heading("Summary", "summary"), Bullets(sentences), tables.in_short(problems, goals)]
    return [*blocks, Fold("What the names of the schemes mean", [Bullets(words.SCHEMES)])]


def _problem(results: Results, goal: Target | None, *, first: bool) -> list[Block]:
    name, law = results.problem, results.headline
    blocks: list[Block] = [Heading(results.title, name)]
    if lacking := words.lacking(results):
        blocks.append(Text(lacking))
    if law is None:
        return blocks
    blocks.append(Text(f"{PROBLEMS[name].n} clients, {LAWS[law][0]}."))
    blocks.append(Bullets(words.summary(results, law, goal)))
    shown, more = _curves(results, law, goal, first=first)
    if first:
        blocks += [*shown, *_timelines(results, law)]
    else:
        more = [*shown, *more]
    details = [tables.headline(results, law, goal)]
    if results.long:
        more += [Text(words.LONG), tables.long(results, goal)]
    if first:
        more = [Text(words.READING), *more, _work(results, law)]
    blocks.append(Fold(f"Details: {LAWS[law][0]}", [*details, *more]))
    return blocks + _laws(results, goal, law)


def _curves(results: Results, law: str, goal: Target | None, *, first: bool) -> tuple[list[Block], list[Block]]:
    """(the figure of time, more figures) of a problem: those that show more than what seeds differ by."""
    name, owners = results.problem, PROBLEMS[results.problem].owners
    seeds = f"Mean over {len(results.seeds)} seeds, band from minimum to maximum."
    found = rise(results, law, "accuracy")
    if found and not _clear(found):
        text = (
            f"There is no figure of accuracy over time: after the first evaluation accuracy rises by "
            f"{points(found[0])}, and seeds differ by {points(found[1])}."
        )
        return [Text(text)], []
    caption = (
        f"Time to accuracy, {LAWS[law][0]}. {seeds} Lines further left are faster. The axis is logarithmic, "
        "so equal distances are equal ratios."
    )
    alt = "Test accuracy over virtual time, one line for each scheme"
    time = Shown(f"{name}-time", figures.accuracy_over_time(results, law, goal), alt, caption)
    more: list[Block] = []
    worst = rise(results, law, "worst")
    if worst is None or _clear(worst):
        owned = " and on the labels that only the slow clients have" if owners else ""
        more.append(
            Shown(
                f"{name}-worst",
                figures.worst_over_time(results, law),
                "Accuracy on the worst class over virtual time",
                f"Accuracy on the worst class{owned}, which the mean over classes hides. {seeds}",
            )
        )
    if first:
        more.append(
            Shown(
                f"{name}-rounds",
                figures.accuracy_over_rounds(results, law, goal),
                "Test accuracy over server rounds",
                f"Accuracy by round, whatever time a round takes. All exact schemes share one line. {seeds}",
            )
        )
    return [time], more


def _clear(rise_and_band: tuple[float, float]) -> bool:
    learnt, band = rise_and_band
    return learnt >= max(_CLEAR * band, _POINT)


def _timelines(results: Results, law: str) -> list[Block]:
    timelines = figures.timelines(results, law)
    if timelines is None:
        return []
    caption = (
        "The first rounds of seed 0. Each row is a worker, each bar a job, and each vertical line the end of a round. "
        "If a worker sent several replies in a round and one was used, all are shown as used."
    )
    return [Shown(f"{results.problem}-timelines", timelines, "Timelines of the first rounds", caption)]


def _work(results: Results, law: str) -> Block:
    caption = (
        "Computing and bytes in a round, whether or not they were needed. For FedBuff, as many trainings as there are "
        "clients count as a round. Mean over seeds, whiskers from minimum to maximum. The table has the totals, which "
        "include the additional rounds of baselines that ran for longer."
    )
    alt = "Shard trainings and megabytes per round"
    return Shown(f"{results.problem}-work", figures.work(results, law), alt, caption)


def _laws(results: Results, goal: Target | None, headline: str) -> list[Block]:
    others = [law for law in LAWS if law != headline and law in results.laws]
    blocks: list[Block] = []
    if others:
        glance = tables.at_a_glance(results, goal)
        blocks += (
            [Heading("Under every law of latency", f"{results.problem}-laws", 3), glance] if len(others) > 1 else []
        )
    sentences, folded = [], []
    for law in [headline, *others]:
        text = words.law_summary(results, law, goal)
        if text:
            sentences.append(f"**{LAWS[law][0][0].upper()}{LAWS[law][0][1:]}.** {text}")
        if law != headline:
            folded.append(tables.headline(results, law, goal, short=True))
    if sentences:
        blocks.append(Bullets(sentences))
    checks = [table for table in (tables.hindsight(results), tables.adaptive(results, goal)) if table.rows]
    if folded or checks:
        blocks.append(Fold("Tables: the other laws, the planner against hindsight, adaptive", [*folded, *checks]))
    return blocks


def _regimes(regimes: regime.Regimes) -> list[Block]:
    text = (
        f"There are {regimes.n} workers, each busy until it has finished. The library simulates every exact scheme "
        "that the planner compares, with s = 1, 2, 3, 4, 5, 7. The colour and the number of a cell are the speed-up of "
        "the fastest coded scheme over waiting for all. The label names the scheme and its s: rep is repetition, pw "
        "partial work, and rp replication (partial work that starts second copies at once). Of the schemes within 4 % "
        "of the fastest, the one with the smallest s is named. In the upper maps every job also has lognormal jitter, "
        "sigma 0.1. **No code** means that the gain is below 5 %, the planner's threshold. On the left, where one "
        "shard per message is allowed, coding is hardly ever slower, since second copies start only when a worker is "
        "idle. On the right, where each worker sends one coded reply and computes s + 1 shards for it, coding is "
        "slower wherever computing dominates and tails are light."
    )
    caption = (
        "Where coding pays. Purple: coding is faster. Orange: it is slower. The map is simulated when the page is made."
    )
    figure = regime.draw(regimes)
    return [
        Heading("Where coding pays, and where it does not", "regimes"),
        Shown("regimes", figure, "Map of the speed-up of coding over compute share and tail", caption),
        Fold("How to read the map", [Text(text)]),
    ]


def _measured(problems: Sequence[Results], rows: Sequence[dict[str, Any]]) -> list[Block]:
    details: list[Block] = [tables.settings(problems), Text(words.baselines(problems))]
    tuned = tables.tuned(problems)
    if tuned.rows:
        details.append(tuned)
    details.append(Text(words.provenance(rows)))
    measured: list[Block] = [Heading("How it was measured", "measured"), Text(words.CHARGED)]
    measured.append(Fold("Hyperparameters, baselines, tuning, versions", details))
    return [*measured, Heading("Limits", "limits"), Bullets(words.LIMITS)]


def _compare(suite: str, path: Path) -> str:
    """The command that writes the rows of a suite; kept rows are compressed, and a run does not write to them."""
    data = "" if suite == "quick" else " --data-dir DATA"
    rows = f"out/compare/{suite}.jsonl" if path.suffix == ".gz" else display(path)
    return f"python -m experiments.compare --suite {suite}{data} --rows {rows}"


def display(path: Path) -> str:
    """As short as can be: from the repository's root, if it lies there."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
