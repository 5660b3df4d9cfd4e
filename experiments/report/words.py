"""Sentences of the report; every number in them is computed from the rows."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.compare.problems import LAWS, PROBLEMS
from experiments.report.blocks import number, percent, points, spread
from experiments.report.data import Results, Run, missing, titles
from experiments.report.measures import (
    Spread,
    Target,
    adaptive_ratios,
    best_coded,
    closest_asynchronous,
    coded,
    fastest_inexact,
    finals,
    regret,
    time_ratio,
    times_to,
)
from experiments.report.tables import BOUND

__all__ = [
    "CHARGED",
    "LIMITS",
    "LONG",
    "MADE",
    "READING",
    "SCHEMES",
    "baselines",
    "checks",
    "in_short",
    "lacking",
    "law_summary",
    "provenance",
    "summary",
    "target_sentence",
]

READING = (
    "Final accuracy is the mean of a run's last 3 evaluations. The target counts as reached at the first evaluation "
    "that is at or above it, provided that the next two evaluations are, too (or all that are left before the run "
    "ends). Otherwise the table says never, which means not before the run ended. A baseline whose rounds are shorter "
    "than those of partial work runs for up to twice as many rounds, until partial work has finished. The time is "
    "interpolated linearly between the evaluation that reaches the target and the one before. Ratios are computed "
    "seed by seed and then averaged. ± is the sample standard deviation over seeds, and bands in figures show the "
    "minimum and the maximum. Exact schemes give the same model after each round (a test shows this). They therefore "
    "share one trajectory, which is trained once per seed and shown at the times of each scheme's own rounds. Owned "
    "labels are those that only the slow clients have."
)
LONG = (
    "A baseline with short rounds ends when partial work has finished. The baselines below were run for as long as "
    "waiting for all takes (`--suite long`), which is many times the rounds. This shows whether they reach the target "
    "later."
)
CHARGED = (
    "Time is virtual. A job takes `slowdown * (fixed + compute * shards + transfer * megabytes)` seconds: computing "
    "grows with the number of shards that a worker trains, and transfer with the bytes. Work that is no longer needed "
    "is not cancelled. The node stays busy until it has finished, and its work and bytes are counted. Evaluation by "
    "the server takes no time, nor do encoding and decoding. All schemes meet the same clients, data, initial models "
    "and draws of latency, and use the same local optimiser and learning rate."
)
LIMITS = (
    "Time is virtual: there is no real network and no real device. The latency laws are shaped by published "
    "measurements, and were not measured here.",
    "The models are small: a small CNN, logistic regression and a small character model.",
    "All shards take the same time, however many examples they have. On Adult one country has 90 % of the examples, "
    "but its shard takes no longer than the smallest.",
    "FedBuff gives all clients the same weight, as in its paper, instead of weighting by examples. With unequal "
    "shards it therefore optimises another objective. Its latencies are drawn by the clock and not by rounds, which "
    "favours it under laws with lasting slow spells.",
    "A baseline whose rounds are shorter runs for up to twice the rounds, until partial work has finished. Only the "
    "first problem shows some baselines for longer.",
    "Storage, and moving the raw data that redundancy needs, cost nothing here.",
    "No client joins, leaves or crashes during a run.",
    "The map of regimes has no workers that are always slow, for which coding gains most, and no transfer.",
)
MADE = (
    "The last command makes this page from the rows that it names, and runs no experiments. The commands before it "
    "make these rows, if you do not have them:"
)
SCHEMES = (
    "**repetition**: groups of workers hold the same shards, and each worker sends one sum (fractional repetition).",
    "**cyclic**, **general**: each worker sends one combination of its shards, and any n - s replies decode.",
    "**repetition, m = 2**: repetition with replies of half the length and one more copy of each shard.",
    "**partial work**: the assignment of repetition, but each message asks for one shard. A second copy of a shard is "
    "started if the first takes long.",
    "**uncoded replication**: the same, but second copies are started at once.",
    "**adaptive**: the run chooses between these ways to send by the times of its last rounds.",
    "**drop the slowest**, **deadline**, **over-select**: rounds end without the slowest clients, whose data is lost.",
    "**FedProx, partial epochs**: slow clients train fewer steps. **Semi-asynchronous**, **FedBuff**: the server does "
    "not wait for rounds, and uses stale updates.",
)


def target_sentence(goal: Target) -> str:
    """Defines the target."""
    seeds = len(goal.waiting.values)
    sd = goal.waiting.sd
    minus = "of one seed, so nothing is subtracted" if sd is None else f"minus its standard deviation, {points(sd)}"
    return (
        f"The target is {100 * goal.level:.1f} %: the mean final accuracy of waiting for all "
        f"({100 * goal.waiting.mean:.1f} % over {seeds} seed{'s' * (seeds != 1)}), {minus}."
    )


def in_short(problems: Sequence[Results], goals: Mapping[str, Target | None]) -> list[str]:
    """What the page shows in all: the main problem, then how often coding wins, loses, and is beaten."""
    sentences = _main(problems, goals)
    ratios, beaten = [], 0
    for results in problems:
        goal = goals[results.problem]
        for schemes in results.laws.values() if goal else ():
            assert goal
            best, other = best_coded(schemes, goal.level), fastest_inexact(schemes, goal.level)
            ratio = time_ratio(schemes[best[0]], schemes.get("wait", {}), goal.level) if best else None
            if best and ratio:
                ratios.append(ratio.mean)
                beaten += other is not None and other[1].mean < best[1].mean
    if not ratios:
        return sentences
    wins, losses = sum(ratio <= 0.95 for ratio in ratios), sum(ratio > 1.0005 for ratio in ratios)
    sentences += [
        f"Over all {len(ratios)} combinations of data and latency law on this page, the fastest coded scheme is at "
        f"least 5 % faster than waiting for all in {wins}, and slower in {losses}. In the others it gains little or "
        "nothing.",
        f"In {beaten} of the {len(ratios)}, a baseline that loses data, steps or freshness reaches the same accuracy "
        "sooner than the fastest coded scheme.",
    ]
    return [*sentences, *checks(problems, goals)]


def _main(problems: Sequence[Results], goals: Mapping[str, Target | None]) -> list[str]:
    """Of the first problem under its first law."""
    for results in problems[:1]:
        goal, law = goals[results.problem], results.headline
        best = best_coded(results.laws[law], goal.level) if goal and law else None
        if not (goal and law and best):
            continue
        schemes, title = results.laws[law], titles(results.problem)
        ratio = time_ratio(schemes[best[0]], schemes.get("wait", {}), goal.level)
        dropped, owned = finals(schemes.get("drop-owners", {})), finals(schemes.get("drop-owners", {}), "owned")
        text = f"**{results.title}, {LAWS[law][0]}.** Waiting for all ends with {percent(goal.waiting)} %."
        if ratio:
            text += (
                f" The fastest code ({title[best[0]]}) ends with the same model, and takes {spread(ratio, digits=2)} "
                "of the time to the target accuracy."
            )
        if dropped and owned:
            text += (
                f" Dropping the slow clients ends with {percent(dropped)} %, and {percent(owned)} % on the labels that "
                "only they have."
            )
        return [text]
    return []


def summary(results: Results, law: str, goal: Target | None) -> list[str]:
    """The sentences over the first figure of a problem."""
    schemes, title = results.laws[law], titles(results.problem)
    if goal is None:
        return ["The trajectory of the exact schemes has no row yet, so there is no target, and no time to it."]
    parts = [f"Waiting for all ends with {percent(goal.waiting)} %"]
    plain = Spread.of(run.total for run in schemes.get("wait", {}).values())
    parts[0] += f" after {spread(plain)} virtual seconds." if plain else "; its round times have no row yet."
    parts.append(target_sentence(goal))
    coding = [" ".join(_coding(schemes, title, goal))]
    others = [" ".join(_asynchronous(schemes, title, goal) + _others(schemes, title, goal))]
    return [" ".join(parts), *coding, *_losing(results, schemes, title), *others]


def _coding(schemes: Mapping[str, Mapping[int, Run]], title: Mapping[str, str], goal: Target) -> list[str]:
    best = best_coded(schemes, goal.level)
    if best is None:
        return ["No coded scheme reaches it in the rows that there are."]
    scheme, times = best
    ratio = time_ratio(schemes[scheme], schemes.get("wait", {}), goal.level)
    text = f"**The fastest coded scheme is {title[scheme]}: it reaches the target in {spread(times)} s**"
    text += f", **{spread(ratio, digits=2)} of the time of waiting for all**" if ratio else ""
    parts = [text + ", with the same models."]
    uncoded = Spread.of(times_to(schemes.get("replication", {}), goal.level).values())
    if uncoded:
        parts.append(
            "Uncoded replication, which has the same storage and begins every second copy at once, takes "
            f"{spread(uncoded)} s."
        )
    return parts


def _losing(results: Results, schemes: Mapping[str, Mapping[int, Run]], title: Mapping[str, str]) -> list[str]:
    """What dropping the slow clients does to what only they know."""
    runs = schemes.get("drop-owners", {})
    accuracy, owned = finals(runs), finals(runs, "owned")
    if accuracy is None:
        return []
    text = f"{title['drop-owners'].capitalize()} ends with {percent(accuracy)} %"
    if owned is not None:
        text += f", and {percent(owned)} % on the labels that only the slow clients have"
        whole = finals({seed: Run({}, curve) for seed, curve in results.trajectories.items()}, "owned")
        text += f"; with the exact schemes these are at {percent(whole)} %" if whole else ""
    return [text + "."]


def _others(schemes: Mapping[str, Mapping[int, Run]], title: Mapping[str, str], goal: Target) -> list[str]:
    """Inexact baselines that reach the target with every seed, fastest first."""
    best = best_coded(schemes, goal.level)
    found = []
    for scheme, runs in schemes.items():
        times = list(times_to(runs, goal.level).values())
        known = Spread.of(times)
        if scheme not in ("wait", "replication") and not coded(scheme) and known and all(t is not None for t in times):
            found.append(
                (known.mean, f"{title[scheme]} ({spread(known)} s)", best is not None and known.mean < best[1].mean)
            )
    if not found:
        return ["No baseline that loses data, steps or freshness reaches the target with every seed."]
    text = "Inexact baselines that reach the target with every seed: " + ", ".join(one for _, one, _ in sorted(found))
    faster = sum(is_faster for *_, is_faster in found)
    return [text + f"; {faster or 'none'} of them faster than the fastest coded scheme."]


def _asynchronous(schemes: Mapping[str, Mapping[int, Run]], title: Mapping[str, str], goal: Target) -> list[str]:
    closest = closest_asynchronous(schemes, goal.level)
    if closest is None:
        return []
    side = "above" if closest.above >= 0 else "below"
    return [
        f"Of the asynchronous baselines, {title[closest.scheme]} comes closest to the target: it ends with "
        f"{percent(closest.accuracy)} %, {points(closest.above)} {side} it."
    ]


def _word(ratio: float) -> str:
    if ratio > 1.0005:
        return "loses to waiting for all"
    if ratio > 0.9995:
        return "gains nothing over waiting for all"
    return "beats waiting for all" if ratio <= 0.95 else "gains less than 5 % on waiting for all"


def law_summary(results: Results, law: str, goal: Target | None) -> str:
    """Whether coding wins or loses under a law, plainly."""
    schemes, title = results.laws.get(law, {}), titles(results.problem)
    parts = []
    best = best_coded(schemes, goal.level) if goal else None
    if goal and best:
        scheme, times = best
        ratio = time_ratio(schemes[scheme], schemes.get("wait", {}), goal.level)
        if ratio:
            word = _word(ratio.mean)
            parts.append(
                f"**Coding {word} here**: the fastest coded scheme, {title[scheme]}, takes {spread(times)} s to the "
                f"target, {ratio.mean:.2f} of the time of waiting for all."
            )
        slower = []
        for name, runs in schemes.items():
            one = time_ratio(runs, schemes.get("wait", {}), goal.level) if coded(name) else None
            if one and one.mean > 1.005:
                slower.append(f"{title[name]} ({one.mean:.2f})")
        parts.append(
            "Slower than waiting for all: " + ", ".join(slower) + "." if slower else "No coded scheme is slower."
        )
    if law in results.hindsight:
        planned, optimum, ratio_of_means = regret(results.hindsight[law])
        verdict = str(results.hindsight[law]["verdict"]).rstrip(".")
        parts.append(
            f'The planner says: "{verdict}." It chose {planned}; best in hindsight: {optimum}; '
            f"ratio of their mean round seconds: {ratio_of_means:.3f}."
        )
    return " ".join(parts)


def checks(problems: Iterable[Results], goals: Mapping[str, Target | None]) -> list[str]:
    """The two bounds, over everything that has rows: a sentence for each."""
    regrets = []
    ratios = []
    for results in problems:
        regrets += [(regret(row)[2], f"{results.title}, {LAWS[law][0]}") for law, row in results.hindsight.items()]
        for law in results.laws:
            found = adaptive_ratios(results, law, goals[results.problem])
            ratios += [(ratio, f"{results.title}, {LAWS[law][0]}, seed {seed}") for seed, (ratio, _) in found.items()]
    parts = []
    for what, values in (
        ("The planner's choice takes at most {} of the round time of the best exact scheme in hindsight", regrets),
        ("Adaptive takes at most {} of plain FedAvg's time to the target", ratios),
    ):
        if values:
            most, where = max(values)
            word = "within" if most <= BOUND else "**above**"
            within = sum(value <= BOUND for value, _ in values)
            parts.append(
                f"{what.format(f'{most:.3f}')} ({where}), {word} the bound of {BOUND}; {within} of {len(values)} cases "
                "are within it."
            )
    return parts


def lacking(results: Results) -> str:
    """What has no row yet; empty if everything has."""
    few, many, which = missing(results)
    return f"**Rows are missing**: {few} of {many} tasks. {which}." if few else ""


def provenance(rows: Iterable[dict[str, Any]]) -> str:
    """Versions, commits, time and machine."""
    rows = list(rows)
    versions = sorted({", ".join(f"{name} {value}" for name, value in row["versions"].items()) for row in rows})
    commits = Counter(row["commit"] or "unknown" for row in rows)
    hours = sum(row["real-seconds"] for row in rows) / 3600
    return (
        f"{len(rows)} rows, made with {'; '.join(versions)} at commit "
        + ", ".join(f"{commit} ({count})" for commit, count in commits.most_common())
        + f", in {number(hours)} hours of one core. Virtual times do not depend on the machine. This page was made on "
        f"{os.cpu_count()} cores ({_processor()}), without a GPU."
    )


def baselines(problems: Iterable[Results]) -> str:
    """How the baselines are set, beside what was tuned."""
    tolerances = sorted({PROBLEMS[results.problem].s for results in problems})
    return (
        f"Codes tolerate s = {' or '.join(map(str, tolerances))} stragglers, as in the table above. The baselines are "
        "set as follows. The deadline, also that of FedProx, is 1.5 times the median time of a job of one shard. "
        "Over-selection waits for n / 1.3 replies. A semi-asynchronous round ends after 0.8 n replies, whichever "
        "round they belong to. FedBuff changes the model after every n / 3 updates, weighted by (1 + staleness)^-0.5, "
        "and as many trainings as there are clients count as a round. Partial work starts a second copy of a shard "
        "when the first has taken twice as long as one of the idle holder's own jobs, and uncoded replication starts "
        "it at once."
    )


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
