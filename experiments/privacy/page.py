"""The page: tables and sentences, every number of them computed from rows."""

from __future__ import annotations

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
    epsilons = ", ".join(f"{epsilon:g}" for epsilon in results.epsilons)
    seeds = ", ".join(map(str, results.seeds))
    parts = [
        "# Privacy, measured",
        f"Accuracy at the same epsilon, under stragglers: {problem.title}; the owners are always ten times slower than "
        f"the others. {rounds} rounds of {private.steps} steps; epsilon {epsilons} for the whole run at delta "
        f"{DELTA:g}, per record; seeds {seeds}; virtual time. All numbers on this page are computed from rows that "
        "`make privacy` wrote. What the schemes promise, and to whom: [privacy](privacy.md).",
        f"**In short.** {_equality(results)}{_faster(results)}{_independent(results)}{_dropping(results)}",
        "![Accuracy against epsilon, and time to finish](images/privacy-accuracy.png)",
        f"Left: mean over {len(results.seeds)} seeds, with the least and the most. Markers of one epsilon are spread "
        "out sideways to be told apart. Horizontal lines promise nothing: training without privacy, and private "
        "training without its noise. Right: virtual time of all rounds, which noise does not change.",
        f"Mean ± standard deviation over seeds; the difference is taken seed by seed, ± its standard error "
        f"({len(results.seeds)} pairs):",
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


def _equality(results: Results) -> str:
    paired = results.paired(_SHARED, results.epsilons)
    if paired is None or len(paired.values) < 3:
        return ""
    low, high = (100 * end for end in paired.interval)
    if high - low > 100 * _TELLING:
        verdict = "would have to run more often to be told apart in accuracy"
    elif low <= 0 <= high:
        verdict = "cannot be told apart in accuracy"
    else:
        verdict = f"differ by {_points(paired.mean)} in accuracy"
    return (
        f"Coded training with shared noise and FedAvg + Opacus with everyone present {verdict} at the same epsilon: "
        f"the difference is {_signed(paired.mean)} ± {100 * paired.error:.2f} points (95 % interval {low:+.2f} to "
        f"{high:+.2f}; {len(paired.values)} pairs over seeds and epsilons, the mean of both codes). "
    )


def _faster(results: Results) -> str:
    base = results.seconds(BASELINE)
    times = [(name, results.seconds(name)) for name in _SHARED]
    told = [
        f"{values.mean:.0f} s ({SCHEMES[name].title.split(', ')[1]})" for name, values in times if values is not None
    ]
    return f"They take {' and '.join(told)} where waiting for all takes {base.mean:.0f} s. " if base and told else ""


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
    return f"With independent noise the same epsilon takes more noise, and the difference becomes {'; '.join(told)}. "


def _dropping(results: Results) -> str:
    dropped = [results.spread("drop", epsilon, lambda row: final(row, "owned")) for epsilon in results.epsilons]
    paired = results.paired(["drop"], results.epsilons)
    found = results.seconds("drop")
    if paired is None or found is None or None in dropped:
        return ""
    most = max(max(values.values) for values in dropped if values)
    return (
        f"Dropping the slowest {SCHEMES['drop'].drop} is fastest ({found.mean:.0f} s) and {_points(paired.mean)} "
        f"{'less' if paired.mean < 0 else 'more'} accurate: its accuracy on the labels that only the owners "
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
        "Noise and batches are drawn anew in each run, so models differ and accuracy agrees in distribution only. "
        "Round by round the agreement is exact: from the same weights and keys, a coded round gives the model of a "
        "round without a code in which everybody answered, to float rounding (a test shows it, fractional and cyclic). "
        "Over rounds it is not, since keys are bound to the weights: a last bit that differs makes all later noise "
        "differ.\n\n"
        "Shared noise minus FedAvg + Opacus, in points of accuracy; the interval is Student's, at 95 %. Pairs share "
        "data, split and initial model; of both codes, the mean is taken first."
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
        '`DPSGD(noise="independent")` in `train_config`: Opacus\' clipping and accounting, Poisson batches, noise of '
        "the client's own, one holder a shard.",
        f"* **Epsilon** is that of all rounds together, by the accountant PRV; the noise multiplier is the least that "
        f"keeps it. Independent noise under a code of s = {private.problem.s} counts {private.problem.s + 1} releases "
        "a round, of batches of their own. The ledger of each coded run agreed with it: the table's epsilons were "
        f"spent to within {_ledger_gap(results):.3f}.",
        f"* **Learning.** {private.problem.model}, sample rate {private.sample_rate:g} (about "
        f"{private.problem.batch_size} records a step), clipping norm {options['clip']:g}, learning rate "
        f"{options['learning-rate']:g}. Clipping *without noise* is the same training with a noise multiplier of 1e-6: "
        f"what is left of the gap to no privacy is clipping's. *No privacy* is plain SGD on as many records a round, "
        f"learning rate {plain:g}.",
        "* **Final accuracy** is the mean of a run's last "
        f"{LAST} evaluations on the whole test set, every {private.problem.every} rounds. Labels 8 and 9 are owned.",
        f"* **Time.** A healthy client takes about a second for a shard, 80 % of it compute, with lognormal jitter; "
        f"the {OWNERS} owners ten times that. Compute grows with the number of shards. Waiting for all waits for the "
        "owners, as the cyclic code does not: it waits for any 10 of 12, which have 3 shards each. The fractional code "
        "waits for one of each group of 3.",
        "* **Keys** of shared noise are made anew for each run, in the output folder.",
        f"* {len(results.rows)} runs, {hours:.0f} minutes of one core on a machine that was busy with other work.",
    ]
    return "\n".join(lines) + _tuning(results)


def _tuning(results: Results) -> str:
    if not results.tuning:
        return ""
    rows = sorted(results.tuning, key=lambda row: (row["task"]["scheme"] != BASELINE, -final(row, "accuracy")))
    seed = rows[0]["task"]["seed"]
    lines = [
        f"\n\nClipping norm and learning rate were tuned once, on FedAvg + Opacus at epsilon 3 on seed {seed}, and no "
        f"privacy's learning rate on the same seed. No coded scheme was tuned. {_choice(rows)}",
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
        "The choice was made from a first run of the same settings with other noise, by the last evaluation alone. In "
        f"the run shown here what was chosen is {_points(behind)} behind the best, which is little more than other "
        "noise makes: all private schemes share it, so that none gains."
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
            f"* Equality is shown to the width of the interval: a difference of less than about "
            f"{max(abs(low), abs(high)):.1f} points would not have been seen. Pairs of one seed and several epsilons "
            "are taken for independent: they share the data's split."
        )
    if plain is not None and any(values.mean > plain.mean for values in private):
        told.append(
            "* No privacy is no ceiling here: where clients' data differ, plain SGD of few steps a round does worse "
            "than clipped SGD, whose learning rate can be higher. The ceiling is clipping without noise."
        )
    told += [
        "* One small model, one data set, one split. With more rounds all accuracies would go on rising; the time that "
        "was given is the same for all.",
        "* Which clients straggle stays the same over a run. The cyclic code's amplification depends on who answers: "
        "other stragglers would give independent noise another accuracy, and shared noise the same.",
        "* Virtual time counts compute and waiting. What keyed noise costs a client is measured by "
        "`make bench ARGS=private_step`.",
        "* Privacy itself is not measured here but accounted.",
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
