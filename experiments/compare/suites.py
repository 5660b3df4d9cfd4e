"""Which tasks belong to a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from experiments.compare.problems import LAWS, PROBLEMS
from experiments.compare.runs import EXACT, INEXACT
from experiments.compare.store import Task

__all__ = ["SERVERS", "SOONER", "SOONER_SEEDS", "SUITES", "TUNED", "cost_of", "order_of", "sooner_of"]

SEEDS = (0, 1, 2)
#: What was tuned, on seed 100 of the problem and law "slow-owners": the settings that were tried, the chosen one first.
TUNED: dict[str, tuple[tuple[tuple[str, float], ...], ...]] = {
    "fedprox": ((("mu", 0.01),), (("mu", 0.001),), (("mu", 0.1),)),
    "fedbuff": (
        (("server-rate", 1.0), ("staleness", 0.5)),
        (("server-rate", 0.3), ("staleness", 0.5)),
        (("server-rate", 3.0), ("staleness", 0.5)),
        (("server-rate", 1.0), ("staleness", 0.0)),
    ),
}
_TUNING_SEED = 100


def cost_of(task: Task) -> float:
    """About how many seconds it takes, for the progress bar: a guess."""
    problem = PROBLEMS[task.problem]
    if task.scheme == "hindsight":
        return 8.0
    if task.scheme in EXACT and task.law:
        return 0.05 * task.rounds
    if "as-long-as-waiting" in dict(task.options):
        return 4.0 * task.rounds
    each = {"small-cnn": 0.9, "char": 0.3}.get(problem.model, 0.05)
    return each * task.rounds * (1.5 if task.scheme != "exact" else 1.0)


def order_of(task: Task) -> tuple[Any, ...]:
    """A key to sort tasks by, so that a comparison which is stopped early has whole seeds.

    The models of exact schemes come before baselines, and baselines with fewer steps after those with all. Then the
    first problem comes before others, seed by seed, and what takes long before what does not.
    """
    inexact = task.scheme in INEXACT
    shorter = inexact and STEPS in task.options
    return inexact, shorter, [*PROBLEMS].index(task.problem), task.seed, -cost_of(task)


def tasks_of(
    problem: str,
    laws: Iterable[str],
    *,
    inexact: Iterable[str] = tuple(INEXACT),
    exact: Iterable[str] = tuple(EXACT),
    seeds: Iterable[int] = SEEDS,
    rounds: int | None = None,
) -> list[Task]:
    """All schemes on one problem."""
    length = rounds or PROBLEMS[problem].rounds
    seeds = tuple(seeds)
    tasks = [Task(problem, "", "exact", seed, length) for seed in seeds]
    for law in laws:
        tasks.append(Task(problem, law, "hindsight", 0, length))
        for seed in seeds:
            tasks += [Task(problem, law, scheme, seed, length) for scheme in exact]
            tasks += [Task(problem, law, scheme, seed, length, _options(scheme)) for scheme in inexact]
    return tasks


def _options(scheme: str) -> tuple[tuple[str, float], ...]:
    return TUNED[scheme][0] if scheme in TUNED else ()


def _tuning() -> list[Task]:
    return [
        Task("slow-owners", "slow-owners", scheme, _TUNING_SEED, PROBLEMS["slow-owners"].rounds, options)
        for scheme, tried in TUNED.items()
        for options in tried
    ]


def _main() -> list[Task]:
    """All schemes, all laws, three seeds, on Fashion-MNIST whose slow clients own labels."""
    return tasks_of("slow-owners", LAWS)


def _data() -> list[Task]:
    """The other data sets, under the laws that differ most, with the baselines that came closest."""
    tasks = []
    for problem in ("dirichlet-0.1", "dirichlet-0.3", "mnist", "shakespeare"):
        tasks += tasks_of(problem, ("slow-owners", "serverless"), inexact=("drop-owners", "fedbuff"))
    for problem in ("heart-disease", "adult"):
        # With 4 hospitals, dropping 3 leaves one, and 4 / 1.3 are all.
        inexact = tuple(name for name in INEXACT if problem == "adult" or name not in ("drop-owners", "over-selection"))
        tasks += tasks_of(problem, LAWS, inexact=inexact)
    for problem in ("dirichlet-0.1", "shakespeare"):
        tasks += [Task(problem, law, "hindsight", 0, PROBLEMS[problem].rounds) for law in LAWS]
    return tasks


def _long() -> list[Task]:
    """The headline's baselines that never saw enough of the slow clients, given as long as waiting for all takes."""
    return [
        Task("slow-owners", "slow-owners", scheme, seed, 60, (*_options(scheme), ("as-long-as-waiting", 1.0)))
        for scheme, seeds in (("semi", SEEDS), ("fedbuff", SEEDS[:1]))
        for seed in seeds
    ]


def _quick() -> list[Task]:
    """A few minutes: digits, which need no files."""
    return tasks_of("digits", LAWS, seeds=(0, 1, 2))


def _smoke() -> list[Task]:
    """Seconds: whether everything runs, and resumes."""
    return tasks_of("digits", ("slow-owners",), seeds=(0,), rounds=4)


#: Seeds that nothing was chosen by, and what the schemes of "sooner" may have besides.
SOONER_SEEDS = (10, 11, 12, 13, 14)
SOONER = ("sooner", "sooner-smoke")  # these suites have tables of their own
AVERAGE, ADAM, STEPS = ("average", 0.25), ("adam", 0.03), ("steps", 0.6)
SERVERS: dict[str, tuple[tuple[str, float], ...]] = {"FedAvg": (), "FedAdam": (ADAM,)}


def sooner_of(
    problem: str, laws: Iterable[str], seeds: Iterable[int], rounds: int, baselines: Iterable[str]
) -> list[Task]:
    """Server optimisers, averaged models, 8 holders, fewer steps, bounded staleness; and baselines likewise."""
    tasks: list[Task] = []
    for seed in seeds:
        for server in SERVERS.values():
            tasks += [
                Task(problem, "", "exact", seed, rounds, tuple(sorted((*server, AVERAGE, *steps))))
                for steps in ((), (STEPS,))
            ]
        for law in laws:
            for steps in ((), (STEPS,)):
                tasks.append(Task(problem, law, "wait", seed, rounds, steps))
                tasks += [
                    Task(problem, law, "partial", seed, rounds, tuple(sorted((*steps, ("holders", float(holders))))))
                    for holders in (3, 8)
                ]
            tasks.append(Task(problem, law, "stale", seed, rounds, (AVERAGE,)))
            tasks += [
                Task(problem, law, scheme, seed, rounds, tuple(sorted((*_options(scheme), *server, *steps, AVERAGE))))
                for scheme in baselines
                for server in SERVERS.values()
                for steps in ((), (STEPS,))
            ]
    return tasks


def _sooner() -> list[Task]:
    """What brings plain rounds to the target sooner, compared fairly: some five hours on two cores."""
    main = sooner_of("slow-owners", LAWS, SOONER_SEEDS, 60, ("drop-owners", "over-selection", "fedprox", "semi"))
    others = [
        *sooner_of("dirichlet-0.1", ("shifted-exponential", "phones", "slow-owners"), SOONER_SEEDS, 60, ()),
        *sooner_of("adult", LAWS, SOONER_SEEDS, 30, ("fedprox", "semi")),
        *sooner_of("shakespeare", ("serverless", "slow-owners"), SOONER_SEEDS, 60, ()),
    ]
    return [*main, *others]


def _sooner_smoke() -> list[Task]:
    """Minutes, on digits, which need no files."""
    return sooner_of("digits", ("none", "phones", "slow-owners"), (10, 11), 20, ("drop-owners", "fedprox", "semi"))


SUITES: dict[str, Callable[[], list[Task]]] = {
    "quick": _quick,
    "main": _main,
    "data": _data,
    "long": _long,
    "tuning": _tuning,
    "smoke": _smoke,
    "sooner": _sooner,
    "sooner-smoke": _sooner_smoke,
}
