"""The page: tables and sentences, every number of them computed from rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from experiments.privacy.measures import Paired, Results, final
from experiments.privacy.tasks import BASELINE, DELTA, OWNERS, PROBLEMS, SCHEMES, TUNED
from experiments.report.blocks import NOTHING, percent, spread
from experiments.report.measures import LAST, Spread

__all__ = ["page"]

_TELLING = 0.02  # width of an interval that tells something
_SHARED = ("shared-fractional", "shared-cyclic")
_INDEPENDENT = ("independent-fractional", "independent-cyclic")


def page(results: Results) -> str:
    """In Markdown; its figure lies in images/."""
    private = PROBLEMS[results.rows[0]["task"]["problem"]]
    problem, rounds = private.problem, int(results.rows[0]["task"]["rounds"])
    epsilons = _series(f"{epsilon:g}" for epsilon in results.epsilons)
    seeds = _series(map(str, results.seeds))
    told = (_equality(results) + _faster(results), _independent(results), _dropping(results))
    parts = [
        "# Privacy, measured",
        "This page compares the accuracy of private training with and without coding, at the same epsilon and with "
        f"slow clients. Setting: {problem.title}. These owners are always ten times slower than the others. There "
        f"are {rounds} rounds of {private.steps} steps, in virtual time, with the seeds {seeds}. Epsilon is {epsilons} "
        f"for the whole run at delta {DELTA:g}, per record. All numbers are computed from rows that `make privacy` "
        "wrote. [Privacy](privacy.md) explains what the schemes promise, and to whom.",
        "**In short:**",
        "\n".join(f"* {text.strip()}" for text in told if text),
        "![Accuracy against epsilon, and time to finish](images/privacy-accuracy.png)",
        f"Left: mean, minimum and maximum over {len(results.seeds)} seeds. Markers of the same epsilon are spread "
        "out sideways to keep them apart. Horizontal lines have no privacy guarantee: training without privacy, and "
        "private training without its noise. Right: virtual time of all rounds, which does not depend on the noise.",
        "The table has the mean ± standard deviation over seeds. The difference is taken seed by seed, and is given "
        f"± its standard error ({len(results.seeds)} pairs):",
        _table(results),
        "## Is it the same accuracy?",
        _paired_words(results),
        _paired_table(results),
        "Accuracy (%) of each seed:",
        _by_seed(results),
        "## How it was measured",
        _method(results),
        "## What was not shown",
        _limits(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _series(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _equality(results: Results) -> str:
    paired = results.paired(_SHARED, results.epsilons)
    if paired is None or len(paired.values) < 3:
        return ""
    low, high = (100 * end for end in paired.interval)
    if high - low > 100 * _TELLING:
        verdict = "would need more runs to show whether they differ in accuracy"
    elif low <= 0 <= high:
        verdict = "do not differ measurably in accuracy"
    else:
        verdict = f"differ by {_points(paired.mean)} in accuracy"
    return (
        f"Coded training with shared noise and FedAvg + Opacus with all clients {verdict} at the same epsilon. "
        f"The difference is {_signed(paired.mean)} ± {100 * paired.error:.2f} points (95 % interval {low:+.2f} to "
        f"{high:+.2f}; {len(paired.values)} pairs over seeds and epsilons, mean of both codes). "
    )


def _faster(results: Results) -> str:
    base = results.seconds(BASELINE)
    times = [(name, results.seconds(name)) for name in _SHARED]
    told = [
        f"{values.mean:.0f} s ({SCHEMES[name].title.split(', ')[1]})" for name, values in times if values is not None
    ]
    times_told = " and ".join(told)
    return f"The coded runs take {times_told}, and waiting for all takes {base.mean:.0f} s. " if base and told else ""


def _independent(results: Results) -> str:
    told = []
    for name in _INDEPENDENT:
        least = results.paired([name], results.epsilons[:1])
        most = results.paired([name], results.epsilons[-1:])
        if least and most:
            kappa = max((row["kappa"] for row in results.runs(name, results.epsilons[0])), default=1.0)
            told.append(
                f"{_signed(least.mean)} points at epsilon {results.epsilons[0]:g} and {_signed(most.mean)} at "
                f"{results.epsilons[-1]:g} under the {SCHEMES[name].title.split(', ')[1]} code, whose decoding "
                + (f"multiplies the noise's variance by {kappa**2:.0f} here" if kappa > 1.001 else "adds no noise")
            )
    if not told:
        return ""
    return (
        f"With independent noise, the same epsilon requires more noise. The difference is then {'; and '.join(told)}. "
    )


def _dropping(results: Results) -> str:
    dropped = [results.spread("drop", epsilon, lambda row: final(row, "owned")) for epsilon in results.epsilons]
    paired = results.paired(["drop"], results.epsilons)
    found = results.seconds("drop")
    if paired is None or found is None or None in dropped:
        return ""
    most = max(max(values.values) for values in dropped if values)
    return (
        f"Dropping the slowest {SCHEMES['drop'].drop} is fastest ({found.mean:.0f} s) and {_points(paired.mean)} "
        f"{'less' if paired.mean < 0 else 'more'} accurate. Its accuracy on the labels that only the owners "
        f"have is {100 * most:.0f} %."
    )


def _table(results: Results) -> str:
    lines = [
        "| scheme | epsilon | noise multiplier | accuracy (%) | worst class (%) | owned labels (%) | virtual s | "
        "difference to FedAvg + Opacus (points) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in results.schemes:
        for epsilon in results.epsilons_of(name):
            rows = results.runs(name, epsilon)
            if not rows:
                continue
            paired = results.paired([name], [epsilon]) if epsilon is not None and name != BASELINE else None
            cells = [
                SCHEMES[name].title,
                NOTHING if epsilon is None else f"{epsilon:g}",
                f"{rows[0]['noise-multiplier']:.3f}" if "noise-multiplier" in rows[0] else NOTHING,
                *(percent(Spread.of(final(row, what) for row in rows)) for what in ("accuracy", "worst", "owned")),
                spread(results.seconds(name), digits=0),
                NOTHING if paired is None else _with_error(paired),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paired_words(results: Results) -> str:
    return (
        "Each run draws new noise and batches, so the models differ, and accuracies can only agree in distribution. "
        "In a single round the agreement is exact up to float rounding: from the same weights and keys, a coded round "
        "gives the same model as a round without a code in which all clients answer. (A test shows this for the "
        "fractional and the cyclic code.) Over several rounds it is not exact, because keys are bound to the weights: "
        "if the last bit of a weight differs, all later noise differs.\n\n"
        "The table has the accuracy with shared noise minus that of FedAvg + Opacus, in points, with Student's "
        'interval at 95 %. The two runs of a pair share data, split and initial model. For "both", the mean of the '
        "two codes is taken first."
    )


def _paired_table(results: Results) -> str:
    lines = ["| code | epsilon | pairs | mean ± standard error | 95 % interval |", "|---|---:|---:|---:|---:|"]
    every = results.epsilons
    cases = [(SCHEMES[name].title.split(", ")[1], [name], [epsilon]) for name in _SHARED for epsilon in every]
    cases += [(SCHEMES[name].title.split(", ")[1], [name], every) for name in _SHARED] + [("both", [*_SHARED], every)]
    for title, names, epsilons in cases:
        paired = results.paired(names, epsilons)
        if paired is not None and len(paired.values) > 1:
            low, high = (100 * end for end in paired.interval)
            told = f"{epsilons[0]:g}" if len(epsilons) == 1 else "all"
            lines.append(
                f"| {title} | {told} | {len(paired.values)} | {_with_error(paired)} | {low:+.2f} to {high:+.2f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _by_seed(results: Results) -> str:
    lines = [
        "| scheme | epsilon | " + " | ".join(f"seed {seed}" for seed in results.seeds) + " |",
        "|---|---:|" + "---:|" * len(results.seeds),
    ]
    for name in results.schemes:
        for epsilon in results.epsilons_of(name):
            rows = {row["task"]["seed"]: row for row in results.runs(name, epsilon)}
            if rows:
                told = [f"{100 * final(rows[s], 'accuracy'):.2f}" if s in rows else NOTHING for s in results.seeds]
                cells = [SCHEMES[name].title, NOTHING if epsilon is None else f"{epsilon:g}", *told]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _method(results: Results) -> str:
    private = PROBLEMS[results.rows[0]["task"]["problem"]]
    options = dict(TUNED[BASELINE][0])
    plain = dict(TUNED["no-privacy"][0])["learning-rate"]
    hours = sum(row["real-seconds"] for row in results.rows) / 60
    lines = [
        "* **One app.** All schemes run `clients/app.py`. FedAvg + Opacus is Flower's own FedAvg around it, with "
        '`DPSGD(noise="independent")` in `train_config`. It uses the clipping and accounting of Opacus, Poisson '
        "batches, noise that each client draws for itself, and one holder per shard.",
        "* **Epsilon** covers all rounds together, by the accountant PRV. The noise multiplier is the smallest that "
        f"keeps it. Independent noise under a code with s = {private.problem.s} counts as {private.problem.s + 1} "
        "releases per round, each with its own batches. The ledger of each coded run agrees: the epsilon spent differs "
        f"from that of the table by at most {_ledger_gap(results):.3f}.",
        f"* **Learning.** The model is {private.problem.model}, the sample rate {private.sample_rate:g} (about "
        f"{private.problem.batch_size} records per step), the clipping norm {options['clip']:g}, and the learning rate "
        f"{options['learning-rate']:g}. *Clipping without noise* is the same training with a noise multiplier of "
        "1e-6. It shows which part of the gap to no privacy is due to clipping. *No privacy* is plain SGD on the same "
        f"number of records per round, with learning rate {plain:g}.",
        f"* **Final accuracy** is the mean of a run's last {LAST} evaluations on the whole test set. There is an "
        f"evaluation every {private.problem.every} rounds. The owned labels are 8 and 9.",
        "* **Time.** A healthy client takes about a second for a shard, 80 % of it computing, with lognormal jitter. "
        f"The {OWNERS} owners take ten times as long. Computing time grows with the number of shards. Waiting for all "
        "means waiting for the owners. The cyclic code waits for any 10 of the 12 clients, each with 3 shards, and the "
        "fractional code for one client of each group of 3.",
        "* **Keys** for shared noise are made for each run, in the output folder.",
        f"* **Cost.** The {len(results.rows)} runs took {hours:.0f} minutes on one core of a machine that was busy "
        "with other work.",
    ]
    return "\n".join(lines) + _tuning(results)


def _tuning(results: Results) -> str:
    if not results.tuning:
        return ""
    rows = sorted(results.tuning, key=lambda row: (row["task"]["scheme"] != BASELINE, -final(row, "accuracy")))
    seed = rows[0]["task"]["seed"]
    lines = [
        "\n\nClipping norm and learning rate were tuned once, for FedAvg + Opacus at epsilon 3 on seed "
        f"{seed}. The learning rate without privacy was tuned on the same seed. No coded scheme was tuned. "
        f"{_choice(rows)}",
        "\n| scheme | clipping norm | learning rate | accuracy (%) |\n|---|---:|---:|---:|",
    ]
    for row in rows:
        options = dict(row["task"]["options"])
        clip = f"{options['clip']:g}" if "clip" in options else NOTHING
        lines.append(
            f"| {SCHEMES[row['task']['scheme']].title} | {clip} | {options['learning-rate']:g} | "
            f"{100 * final(row, 'accuracy'):.1f} |"
        )
    return "\n".join(lines)


def _choice(rows: list[dict[str, Any]]) -> str:
    """Where the settings that were taken stand among those that were tried."""
    private = [row for row in rows if row["task"]["scheme"] == BASELINE]
    (ours,) = [row for row in private if dict(TUNED[BASELINE][0]).items() <= dict(row["task"]["options"]).items()]
    behind = final(private[0], "accuracy") - final(ours, "accuracy")
    if not behind:
        return ""
    return (
        "The settings were chosen from an earlier run with other noise, by the last evaluation only. In the run shown "
        f"here, the chosen settings are {_points(behind)} behind the best, which is little more than the effect of "
        "other noise. All private schemes use the same settings, so none of them has an advantage."
    )


def _limits(results: Results) -> str:
    paired = results.paired(_SHARED, results.epsilons)
    private, plain = (
        [values for epsilon in results.epsilons if (values := results.accuracy(BASELINE, epsilon))],
        results.accuracy("no-privacy", None),
    )
    told = []
    if paired is not None and len(paired.values) > 1:
        low, high = (100 * end for end in paired.interval)
        told.append(
            "* Equality is shown only to the width of the interval: a difference of less than about "
            f"{max(abs(low), abs(high)):.1f} points would not have been noticed. Pairs with the same seed and "
            "different epsilons are treated as independent, although they share the split of the data."
        )
    if plain is not None and any(values.mean > plain.mean for values in private):
        told.append(
            "* *No privacy* is not an upper bound here. If clients' data differs, plain SGD with few steps per round "
            "does worse than clipped SGD, whose learning rate can be higher. The upper bound is clipping without noise."
        )
    told += [
        "* There is one small model, one data set and one split. With more rounds all accuracies would continue to "
        "rise. All schemes run the same number of rounds.",
        "* The stragglers are the same clients in all rounds. The cyclic code's amplification depends on who answers, "
        "so with other stragglers the accuracy of independent noise would differ, and that of shared noise would not.",
        "* Virtual time includes only computing and waiting. `make bench ARGS=private_step` measures what keyed noise "
        "costs a client.",
        "* Privacy itself is not measured but computed by the accountant.",
    ]
    return "\n".join(told)


def _ledger_gap(results: Results) -> float:
    gaps = [
        abs(row["epsilon-of-ledger"] - dict(row["task"]["options"])["epsilon"])
        for row in results.rows
        if "epsilon-of-ledger" in row
    ]
    return max(gaps, default=0.0)


def _with_error(paired: Paired) -> str:
    error = "" if len(paired.values) < 2 else f" ± {100 * paired.error:.2f}"
    return f"{_signed(paired.mean)}{error}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-0.00", "+0.00")


def _points(share: float) -> str:
    return f"{abs(100 * share):.1f} points"
