"""What is compared: schemes, epsilons, seeds, and the settings that were tuned on the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.compare.problems import Problem, slow_owners
from experiments.compare.store import Task
from fl_gradcode import GradientCode
from fl_gradcode.codes import cyclic_repetition, fractional_repetition
from fl_gradcode.latency import Latency

__all__ = [
    "BASELINE",
    "DELTA",
    "EPSILONS",
    "OWNERS",
    "PROBLEMS",
    "SCHEMES",
    "SUITES",
    "TUNED",
    "TUNING_SEED",
    "Private",
    "Scheme",
    "cost_of",
    "latency",
]

#: Workers 0 and 1 are always slow and own two labels: as many as the codes tolerate.
OWNERS = 2
DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0)
_SEEDS = (0, 1, 2)
TUNING_SEED, _TUNING_EPSILON = 100, 3.0
_LAW = "slow-owners"


@dataclass(frozen=True)
class Private:
    """A problem, and what private training needs besides.

    Attributes:
        problem: Data, split, model; its batch size and learning rate are those of training without privacy.
        sample_rate: Chance of each record to be in a step's batch; one constant for all shards.
        steps: A round.
    """

    problem: Problem
    sample_rate: float
    steps: int = 5


def _split(title: str, dataset: str, *, rounds: int, every: int, batch_size: int) -> Problem:
    return Problem(
        title,
        dataset,
        "owned-labels",
        12,
        "small-cnn",
        rounds=rounds,
        every=every,
        owners=OWNERS,
        batch_size=batch_size,
    )


PROBLEMS = {
    # 4,800 records to train on for an owner, 3,840 for another: 64 a batch on average.
    "fashion-mnist": Private(
        _split("Fashion-MNIST, 2 of 12 clients own two labels", "fashion-mnist", rounds=30, every=3, batch_size=64),
        sample_rate=0.016,
    ),
    "digits": Private(
        _split("Digits, 2 of 12 clients own two labels", "digits", rounds=6, every=2, batch_size=16), sample_rate=0.16
    ),
}


@dataclass(frozen=True)
class Scheme:
    """How a round is run.

    Attributes:
        title: For people.
        noise: None: no privacy. "none": batches and clipping of private training, without its noise.
        code: None: plain FedAvg.
        drop: So many of the slowest are not waited for.
    """

    title: str
    noise: Literal["shared", "independent", "none"] | None
    code: Callable[[int, int], GradientCode] | None = None
    drop: int = 0


def _cyclic(n: int, s: int) -> GradientCode:
    return cyclic_repetition(n, s, rng=np.random.default_rng(0))


BASELINE = "opacus"
SCHEMES = {
    "no-privacy": Scheme("no privacy, waiting for all", None),
    "no-noise": Scheme("clipping without noise, waiting for all", "none"),
    BASELINE: Scheme("FedAvg + Opacus, waiting for all", "independent"),
    "drop": Scheme("FedAvg + Opacus, dropping the slowest 2", "independent", drop=2),
    "shared-fractional": Scheme("shared noise, fractional", "shared", fractional_repetition),
    "shared-cyclic": Scheme("shared noise, cyclic", "shared", _cyclic),
    "independent-fractional": Scheme("independent noise, fractional", "independent", fractional_repetition),
    "independent-cyclic": Scheme("independent noise, cyclic", "independent", _cyclic),
}

#: On seed 100: the settings that were tried, the chosen one first. Private: of the baseline at epsilon 3, by accuracy;
#: all private schemes at all epsilons take what is best for it.
TUNED: dict[str, tuple[tuple[tuple[str, float], ...], ...]] = {
    BASELINE: (
        (("clip", 1.0), ("learning-rate", 1.0)),
        (("clip", 1.0), ("learning-rate", 0.25)),
        (("clip", 1.0), ("learning-rate", 0.5)),
        (("clip", 1.0), ("learning-rate", 2.0)),
        (("clip", 0.5), ("learning-rate", 1.0)),
        (("clip", 0.5), ("learning-rate", 2.0)),
        (("clip", 2.0), ("learning-rate", 0.25)),
        (("clip", 2.0), ("learning-rate", 0.5)),
    ),
    "no-privacy": (
        (("learning-rate", 0.1),),
        (("learning-rate", 0.03),),
        (("learning-rate", 0.3),),
        (("learning-rate", 1.0),),
    ),
}


def latency() -> Latency:
    """A second a shard for a healthy client, 80 % of it compute; the owners take ten times as long."""
    return slow_owners(OWNERS)


def cost_of(task: Task) -> float:
    """About how many seconds it takes, for the progress bar: a guess."""
    private = PROBLEMS[task.problem]
    shards = 2.5 * private.problem.n if task.scheme.endswith("cyclic") else private.problem.n
    return task.rounds * private.steps * shards * (0.012 if SCHEMES[task.scheme].noise else 0.005)


def tasks_of(problem: str, *, epsilons: tuple[float, ...] = EPSILONS, seeds: tuple[int, ...] = _SEEDS) -> list[Task]:
    """All schemes on one problem."""
    return [
        Task(problem, _LAW, name, seed, PROBLEMS[problem].problem.rounds, options)
        for seed in seeds
        for name, scheme in SCHEMES.items()
        for options in _options(scheme, epsilons)
    ]


def _options(scheme: Scheme, epsilons: tuple[float, ...]) -> list[tuple[tuple[str, float], ...]]:
    if scheme.noise is None:
        return [TUNED["no-privacy"][0]]
    if scheme.noise == "none":
        return [TUNED[BASELINE][0]]
    return [(*TUNED[BASELINE][0], ("epsilon", epsilon)) for epsilon in epsilons]


def _tuning() -> list[Task]:
    """What was tried to choose learning rates and the clipping norm."""
    return [
        Task(
            "fashion-mnist",
            _LAW,
            scheme,
            TUNING_SEED,
            PROBLEMS["fashion-mnist"].problem.rounds,
            options if scheme == "no-privacy" else (*options, ("epsilon", _TUNING_EPSILON)),
        )
        for scheme, tried in TUNED.items()
        for options in tried
    ]


SUITES: dict[str, Callable[[], list[Task]]] = {
    "main": lambda: tasks_of("fashion-mnist"),
    "quick": lambda: tasks_of("digits", epsilons=(3.0, 8.0), seeds=(0,)),
    "tuning": _tuning,
}
