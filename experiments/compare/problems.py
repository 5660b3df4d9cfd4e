"""What is compared: learning problems on real data, and laws of latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fl_gradcode.latency import Latency, lognormal, named, scaled

__all__ = ["LAWS", "OWNERS", "PROBLEMS", "Problem", "latency_of", "slow_owners"]

#: Workers 0 to 2 are always slow under the law "slow owners", and own two labels in the problem "slow owners".
OWNERS = 3
_SLOWER = 10.0


@dataclass(frozen=True)
class Problem:
    """A data set, how it is split over n clients, and how they train; `seed` varies between repetitions.

    Attributes:
        title: For people.
        n: Number of clients, each with a shard of its own.
        s: Straggler tolerance of the codes.
        rounds: Server rounds.
        every: Rounds between two evaluations on the whole test set.
    """

    title: str
    dataset: str
    partitioner: str
    n: int
    model: str
    s: int = 2
    rounds: int = 60
    every: int = 3
    alpha: float = 0.3
    owners: int = 0
    train_examples: int = 0
    learning_rate: float = 0.1
    batch_size: int = 32
    local_epochs: int = 1

    def run_config(self, data_dir: str, seed: int) -> dict[str, Any]:
        """What the ClientApp reads."""
        return {
            "dataset": self.dataset,
            "data-dir": data_dir,
            "train-examples": self.train_examples,
            "partitioner": self.partitioner,
            "alpha": self.alpha,
            "owners": self.owners,
            "model": self.model,
            "local-epochs": self.local_epochs,
            "batch-size": self.batch_size,
            "learning-rate": self.learning_rate,
            "seed": seed,
        }


PROBLEMS: dict[str, Problem] = {
    "slow-owners": Problem(
        "Fashion-MNIST, 3 of 30 clients own two labels",
        "fashion-mnist",
        "owned-labels",
        30,
        "small-cnn",
        owners=OWNERS,
        train_examples=12_000,
    ),
    "dirichlet-0.1": Problem(
        "Fashion-MNIST, Dirichlet 0.1",
        "fashion-mnist",
        "dirichlet",
        30,
        "small-cnn",
        alpha=0.1,
        train_examples=12_000,
    ),
    "dirichlet-0.3": Problem(
        "Fashion-MNIST, Dirichlet 0.3", "fashion-mnist", "dirichlet", 30, "small-cnn", train_examples=12_000
    ),
    "mnist": Problem("MNIST, two labels a client", "mnist", "pathological", 30, "small-cnn", train_examples=12_000),
    "heart-disease": Problem(
        "Heart disease, 4 hospitals",
        "heart-disease",
        "natural",
        4,
        "logistic",
        s=1,
        rounds=30,
        every=1,
        batch_size=16,
    ),
    "adult": Problem("Adult, 20 countries", "adult", "natural", 20, "logistic", rounds=30, every=1),
    "shakespeare": Problem(
        "Shakespeare, 99 speakers on 30 clients",
        "shakespeare",
        "natural",
        30,
        "char",
        train_examples=20_000,
        learning_rate=0.3,
    ),
    "digits": Problem(
        "Digits, 3 of 12 clients own two labels",
        "digits",
        "owned-labels",
        12,
        "logistic",
        rounds=20,
        every=2,
        owners=OWNERS,
        learning_rate=0.5,
    ),
}


def slow_owners(owners: int = OWNERS) -> Latency:
    """The first workers are always slow."""
    slow = scaled(lognormal(1.0, 0.3), dict.fromkeys(range(owners), _SLOWER))
    return Latency(fixed=0.2, compute=0.8, slowdown=slow)


#: A second a shard for a healthy client, 80 % of it compute (serverless: 1.77 s, 64 %).
LAWS: dict[str, tuple[str, Callable[[], Latency]]] = {
    "slow-owners": ("3 workers always 10x slower", slow_owners),
    "none": ("all alike", lambda: named("none")),
    "shifted-exponential": ("shifted exponential", lambda: named("shifted-exponential")),
    "serverless": ("serverless (heavy tail)", lambda: named("serverless")),
    "virtual-machines": ("virtual machines (bursts)", lambda: named("virtual-machines")),
    "phones": ("phones", lambda: named("phones")),
}


def latency_of(law: str) -> Latency:
    """The latency of that name."""
    return LAWS[law][1]()
