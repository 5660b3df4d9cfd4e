"""An audit from outside: guess from what is released whether a record was there, and bound epsilon by the guesses.

The guesser knows everything but the key: all other records, the weights, the settings. With one step on all records the
best that it can do is to look along the record's own gradient.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import nn

from fl_gradcode.privacy import Spend, epsilon_of
from fl_gradcode.privacy.dp_optimizer import wrap
from fl_gradcode.privacy.key_derivation import KeyContext, PRFStream
from tests.privacy.direct import linear

DELTA = 1e-5
SIGMA, CLIP, SIZE, OTHERS, REPETITIONS = 2.0, 0.5, 4, 6, 500
#: Enough where the two cases hardly overlap: 100 scores judge. If all are told apart they prove an epsilon of 3.1, by
#: bounds of 0.0125^(1/100) and its complement, and if two are not, 2.6; what is claimed there is 2.0.
FEW = 200

Scores = Callable[[bool, int], float]


def least_epsilon(present: NDArray[np.float64], absent: NDArray[np.float64]) -> float:
    """What epsilon is at least, with 95 % confidence, for scores with and without the record.

    The threshold is found on one half of the scores and judged on the other, by Clopper and Pearson's bounds.

    References:
        Jagielski, Ullman, Oprea, "Auditing differentially private machine learning", NeurIPS 2020.
    """

    def bound(threshold: float, there: NDArray[np.float64], not_there: NDArray[np.float64]) -> float:
        best = 0.0
        for hits, alarms in ((there > threshold, not_there > threshold), (not_there <= threshold, there <= threshold)):
            k, n = int(hits.sum()), len(hits)
            few = float(beta.ppf(0.0125, k, n - k + 1)) if k else 0.0  # four bounds at a time: 95 % for all
            k, n = int(alarms.sum()), len(alarms)
            many = float(beta.ppf(1 - 0.0125, k + 1, n - k)) if k < n else 1.0
            best = max(best, math.log(max(few - DELTA, 1e-300) / many))
        return best

    thresholds = np.quantile(np.concatenate([present[::2], absent[::2]]), np.linspace(0.02, 0.98, 97))
    chosen = max(thresholds, key=lambda threshold: bound(float(threshold), present[::2], absent[::2]))
    return bound(float(chosen), present[1::2], absent[1::2])


def audit(scores: Scores, repetitions: int = REPETITIONS) -> float:
    there = np.array([scores(True, i) for i in range(repetitions)])
    not_there = np.array([scores(False, repetitions + i) for i in range(repetitions)])
    return least_epsilon(there, not_there)


def data(present: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Records that leave the first weight alone, and one with a gradient twenty times too long along it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(OTHERS + 1, SIZE, generator=generator)
    x[:, 0] = 0
    x[-1] = torch.tensor([10 * CLIP, 0, 0, 0])
    y = torch.randn(OTHERS + 1, 1, generator=generator)
    y[-1] = 1.0
    count = OTHERS + present
    return x[:count], y[:count]


def key(repetition: int, weight: float, purpose: str = "noise", *, bound: bool = True) -> bytes:
    """Of a secret of its own for each repetition."""
    weights = hashlib.sha256(f"{weight if bound else 0.0}".encode()).digest()
    context = KeyContext("r", 1, 0, weights, bytes(32), bytes(32))
    return context.derive(hashlib.sha256(f"secret {repetition}".encode()).digest(), purpose)  # type: ignore[arg-type]


@cache
def released(
    present: bool,
    repetition: int,
    *,
    weight: float = 0.0,
    steps: int = 1,
    rate: float = 1.0,
    noise_multiplier: float = SIGMA,
    max_grad_norm: float = CLIP,
    bound: bool = True,
) -> NDArray[np.float64]:
    """The update that leaves: of the sum of gradients, in units of the clipping norm. (Cached: do not change it.)"""
    x, y = data(present)
    net = linear(SIZE, weight)
    noise, sampling = (PRFStream(key(repetition, weight, purpose, bound=bound)) for purpose in ("noise", "sample"))
    wrapped = wrap(net, noise, mode="hooks", noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    optimizer = wrapped.optimizer(torch.optim.SGD(net.parameters(), lr=1e-6), expected_batch_size=1.0)
    criterion = wrapped.criterion(nn.MSELoss())
    for _ in range(steps):
        batch = np.flatnonzero(sampling.uniform(len(x)) < rate)
        if not len(batch):
            optimizer.take(None)
            continue
        wrapped.batch_drawn(len(batch))
        optimizer.zero_grad()
        criterion(wrapped.model(x[batch]), y[batch]).backward()
        optimizer.step()
    wrapped.unwrap()
    return (weight - net.weight.detach().double().numpy().ravel()) / (1e-6 * CLIP)


def along(update: NDArray[np.float64]) -> float:
    return -float(update[0])  # the record's gradient is negative there


@pytest.fixture(autouse=True)
def _no_hook_warnings() -> None:
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # pytest restores them


def claimed(steps: int, rate: float = 1.0, noise_multiplier: float = SIGMA) -> float:
    return epsilon_of([Spend(noise_multiplier, rate, steps)], DELTA)


def test_one_step_leaks_less_than_is_claimed() -> None:
    there, not_there = (
        np.array([along(released(present, i)) for i in range(start, start + REPETITIONS)])
        for present, start in ((True, 0), (False, REPETITIONS))
    )
    # The statistic is the best there is: the means are apart by what one record may change, one clipping norm.
    assert there.mean() - not_there.mean() == pytest.approx(1.0, abs=5 * SIGMA * math.sqrt(2 / REPETITIONS))
    assert there.std() == pytest.approx(SIGMA, rel=0.15) and not_there.std() == pytest.approx(SIGMA, rel=0.15)
    assert 0 < least_epsilon(there, not_there) < claimed(1)


def test_several_steps_leak_more_and_less_than_is_claimed() -> None:
    # The means are apart by sqrt(steps) / sigma = 1.5 standard deviations, three times as far as after the step above.
    sigma = 4 / 3
    found = audit(lambda present, i: along(released(present, i, steps=4, noise_multiplier=sigma)))
    assert 0.5 < found < claimed(4, noise_multiplier=sigma)


def test_hidden_batches_leak_less_than_is_claimed() -> None:
    assert audit(lambda present, i: along(released(present, i, steps=4, rate=0.25))) < claimed(4, 0.25)


def test_noise_ten_times_too_small_is_caught() -> None:
    found = audit(lambda present, i: along(released(present, i, noise_multiplier=SIGMA / 10)), FEW)
    assert found > claimed(1)


def test_clipping_left_out_is_caught() -> None:
    # The same noise as ever, and a bound that clips nothing.
    found = audit(
        lambda present, i: along(released(present, i, noise_multiplier=SIGMA / 1000, max_grad_norm=1000 * CLIP)), FEW
    )
    assert found > claimed(1)


def two_answers(present: bool, repetition: int, *, bound: bool) -> float:
    """The difference of two answers to requests with other weights; the record's gradient is another in the second."""
    first = released(present, repetition)  # a key that is not bound to the weights is the one for weights of 0
    second = released(present, repetition, weight=1 / CLIP / 10 * 0.999, bound=bound)
    return along(first - second)


def test_noise_used_twice_is_caught_and_keys_bound_to_the_weights_prevent_it() -> None:
    assert audit(lambda present, i: two_answers(present, i, bound=False)) > claimed(2)
    assert audit(lambda present, i: two_answers(present, i, bound=True)) < claimed(2)


def test_the_bound_holds_where_epsilon_is_known() -> None:
    """Randomised response tells the truth with chance e^eps / (1 + e^eps): exactly eps."""
    rng, epsilon = np.random.default_rng(0), 2.0
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = []
    for _ in range(60):
        there = (rng.random(2000) < truth) + 1e-3 * rng.random(2000)
        not_there = (rng.random(2000) > truth) + 1e-3 * rng.random(2000)
        found.append(least_epsilon(there, not_there))
    assert np.mean(np.array(found) > epsilon) <= 0.05 and np.mean(found) > 1.6
