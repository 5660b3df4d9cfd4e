"""Integer noise is the discrete Gaussian, the same on all holders, and covers whatever leaves."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from fl_gradcode.codes import fractional_repetition
from fl_gradcode.masking import integer_noise
from fl_gradcode.privacy import IntegerNoise
from fl_gradcode.secagg import ShardResult, decode, discrete_gaussian
from fl_gradcode.secagg.keys import noise_key
from tests.secagg.samples import REQUEST, body_of, class_integers, replies_of, results_for, sealed, seed_of

KEY = hashlib.sha256(b"noise").digest()


def law(sigma: float, most: int) -> np.ndarray:
    """Probabilities of -most..most."""
    x = np.arange(-most, most + 1)
    weights = np.exp(-(x**2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7, 40.0])
def test_samples_have_the_law(sigma: float) -> None:
    size = 120_000
    samples = discrete_gaussian(KEY, sigma, size)
    most = math.ceil(12 * sigma)
    counts = np.bincount(samples + most, minlength=2 * most + 1)
    expected = size * law(sigma, most)
    enough = expected >= 10
    chi = float(((counts[enough] - expected[enough]) ** 2 / expected[enough]).sum())
    degrees = int(enough.sum())
    assert chi < degrees + 5 * math.sqrt(2 * degrees)
    assert counts[~enough].sum() <= 10 + 3 * expected[~enough].sum()


@pytest.mark.parametrize("sigma", [1.0, 3.0, 1000.5, 4.2e6, 2.0**30])
def test_the_variance_is_within_three_standard_errors(sigma: float) -> None:
    size = 60_000
    samples = discrete_gaussian(KEY, sigma, size).astype(np.float64)
    variance = sigma**2 if sigma > 10 else float((law(sigma, 60) * np.arange(-60, 61) ** 2).sum())
    assert abs(samples.var() - variance) < 3 * variance * math.sqrt(2 / size)
    assert abs(samples.mean()) < 3 * sigma / math.sqrt(size)


def test_the_sampler_is_exact_where_floats_do_not_settle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = discrete_gaussian(KEY, 1000.5, 400)
    monkeypatch.setattr(integer_noise, "_CLOSE", 2.0)  # every comparison by rational numbers
    assert (discrete_gaussian(KEY, 1000.5, 400) == plain).all()


def test_comparisons_draw_as_many_bits_as_they_need() -> None:
    half = Fraction(math.log(2))  # close to, and not exactly, where exp(-gamma) is a half
    words = integer_noise._Words(KEY)
    drawn = int(math.exp(-float(half)) * 2**64)
    assert integer_noise._below_exp(words, 0, half)
    assert not integer_noise._below_exp(words, 2**64 - 1, half)
    exact = 2**63 - 1  # the first 64 bits do not settle it for some of these
    results = [integer_noise._below_exp(words, exact + shift, half) for shift in range(-2000, 2000, 100)]
    assert results == sorted(results, reverse=True) and abs(drawn - 2**63) < 2**14
    assert integer_noise._below_exp(words, 2**64 - 1, Fraction(0))


def test_holders_draw_the_same_and_keys_are_bound_to_the_request() -> None:
    assert (discrete_gaussian(KEY, 5.0, 50) == discrete_gaussian(KEY, 5.0, 50)).all()
    zeros, ones = (np.full(3, value, np.int32) for value in (0, 1))
    bound = [
        (REQUEST, 0, zeros),
        (bytes(32), 0, zeros),
        (REQUEST, 1, zeros),
        (REQUEST, 0, ones),
        (REQUEST, 0, zeros[:2]),
    ]
    assert len({noise_key(seed_of(0), *one) for one in bound}) == 5
    with pytest.raises(ValueError, match="sigma"):
        discrete_gaussian(KEY, 0.0, 3)


def test_the_noise_of_a_sum_is_that_of_all_its_shards() -> None:
    code = fractional_repetition(8, 1)
    body = body_of(code, size=20_000, metrics=0, privacy=IntegerNoise(noise_multiplier=0.1, clipping_norm=1.0))
    sigma = body.quantiser.noise
    still = {j: ShardResult(np.zeros(20_000, np.float32), 5.0, np.zeros(0)) for j in range(8)}
    manifest = sealed(body)
    replies = replies_of(manifest, still)
    assert replies[0].payload() == replies[4].payload()
    (found,) = decode(manifest, replies[:4])
    variance = 8 * sigma**2
    assert abs(float(found.integers.astype(np.float64).var()) - variance) < 3 * variance * math.sqrt(2 / 20_000)
    zeros = np.zeros(20_000, np.int32)
    expected = sum(discrete_gaussian(noise_key(seed_of(j % 4), REQUEST, j, zeros), sigma, 20_000) for j in range(8))
    assert (found.integers == expected).all()


def test_with_noise_nothing_leaves_that_noise_does_not_cover() -> None:
    """No weight, no metric, no count of clipped entries, and no count of shards that failed."""
    noise = IntegerNoise(noise_multiplier=1.0, clipping_norm=0.1)
    body = body_of(fractional_repetition(8, 1), metrics=0, privacy=noise)
    results = dict[int, ShardResult | None](results_for(body, weight=0.5))
    plain = [class_integers(body, c, results) for c in range(4)]
    results[5] = None
    failed = [class_integers(body, c, results) for c in range(4)]
    for part in ("metrics", "check", "status"):
        assert all((one[part] == other[part]).all() for one, other in zip(plain, failed, strict=True))
    (found,) = decode(sealed(body), replies_of(sealed(body), results))
    assert (found.weight, found.clipped, found.metrics.tolist()) == (8.0, None, [])
