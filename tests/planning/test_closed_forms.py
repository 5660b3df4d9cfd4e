"""Closed forms of round times against rounds that are drawn, against formulas of the papers, and golden numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import (
    Latency,
    Law,
    Marginal,
    Parts,
    bimodal,
    bursty,
    constant,
    device_classes,
    exponential,
    from_quantiles,
    lognormal,
    pareto,
    poisson_stragglers,
    scaled,
    shifted_exponential,
    trace,
)
from fl_gradcode.planning.closed_forms import (
    best_fraction,
    coded_matvec_seconds,
    exponential_seconds,
    harmonic,
    idle_distribution,
    idle_mean,
)
from fl_gradcode.planning.schemes import (
    Scheme,
    any_code,
    drop_slowest,
    over_selection,
    partial_work,
    repetition,
    wait_for_all,
)
from fl_gradcode.planning.simulation import idle_rounds

N, ROUNDS = 8, 5_000
SCHEMES = {
    "wait for all": wait_for_all(N),
    "any n - 1": any_code(N, 1),
    "any n - 3": any_code(N, 3),
    "drop 2": drop_slowest(N, 2),
    "repetition, s = 1": repetition(N, 1),
    "repetition, s = 2, uneven": repetition(N, 2),
    "repetition, s = 3": repetition(N, 3),
    "repetition, m = 2": repetition(N, 2, m=2),
    "repetition, m = 2, uneven": repetition(N, 1, m=2),
}
MEASURED = [0.7, 0.8, 0.9, 1.0, 1.0, 1.1, 1.3, 2.0, 9.0]
# What is drawn for 5,000 rounds: by worker and tick, or (device classes: one draw for good, a burst: one state at a
# time) by worker and seed. A law's own `draw` is all that is used of it.
BY_TICK: dict[str, Law] = {
    "exponential": exponential(2.0),
    "shifted exponential": shifted_exponential(1.0, 0.5),
    "Pareto 3": pareto(3.0, 0.5),
    "lognormal": lognormal(2.0, 1.0),
    "two speeds": bimodal(0.05, 10.0, base=2.0),
    "two speeds with jitter": bimodal(0.05, 10.0, jitter=0.2),
    "quantiles": from_quantiles([0.0, 0.5, 0.9, 0.99], [0.5, 1.0, 2.0, 20.0]),
    "one column": trace(MEASURED),
    "scaled": scaled(lognormal(1.0, 0.5), {0: 10.0, 3: 0.1, 4: 2.0, 5: 0.0}),
    "silent or at once": scaled(exponential(), {7: math.inf, 2: 0.0}),
}
BY_SEED: dict[str, Law] = {
    "device classes": device_classes([0.4, 0.8, 1.0, 1.0, 1.3, 5.0]),
    "in the middle of bursts": bursty(0.02, 0.1, 11.0, jitter=0.1),
}
LAWS = {**BY_TICK, **BY_SEED}


@cache
def draws(name: str) -> NDArray[np.float64]:
    """Shape (rounds, workers): independent rounds."""
    if name in BY_TICK:
        draw = BY_TICK[name].draw
        return np.array([[draw(11, worker, t) for worker in range(N)] for t in range(ROUNDS)])
    draw = BY_SEED[name].draw
    if name == "in the middle of bursts":  # drawing its states is slow
        return np.array([[draw(seed, i, 3) for i in range(N)] for seed in range(2_000)])
    return np.array([[draw(seed, worker, 0) for worker in range(N)] for seed in range(4 * ROUNDS)])


def by_hand(scheme: Scheme, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """When each round may end: from what the schemes promise, not from how it is computed."""
    ordered = np.sort(seconds, axis=1)
    if scheme.enough is not None:
        return np.asarray(ordered[:, scheme.enough - 1])
    groups = [np.sort(seconds[:, list(group)], axis=1)[:, scheme.m - 1] for group in scheme.groups]
    return np.asarray(np.max(groups, axis=0))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize("name", list(LAWS))
def test_mean_from_an_idle_start_is_that_of_drawn_rounds(name: str, scheme: Scheme) -> None:
    actual = idle_mean(scheme, Latency(fixed=LAWS[name]))
    rounds = by_hand(scheme, draws(name))
    assert actual is not None
    if not np.isfinite(rounds).all():
        assert actual == math.inf == rounds.mean()
        return
    noise = float(rounds.std()) / math.sqrt(len(rounds))
    assert actual == pytest.approx(rounds.mean(), rel=0.01, abs=3.5 * noise)
    assert noise < (0.06 if name in BY_SEED else 0.025) * actual  # so that the line above says something


@pytest.mark.parametrize("name", ["shifted exponential", "device classes"])
def test_most_comparisons_with_drawn_rounds_are_sharp(name: str) -> None:
    for scheme in SCHEMES.values():
        rounds = by_hand(scheme, draws(name))
        assert idle_mean(scheme, Latency(fixed=LAWS[name])) == pytest.approx(rounds.mean(), rel=0.015)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_simulated_idle_rounds_end_when_the_scheme_says(scheme: Scheme) -> None:
    seconds = draws("lognormal")[:300]
    zero = np.zeros_like(seconds)
    once = idle_rounds(scheme, Parts(seconds, zero, zero))
    np.testing.assert_allclose(once.seconds, by_hand(scheme, seconds))
    loaded = idle_rounds(scheme, Parts(zero, seconds, zero))
    np.testing.assert_allclose(loaded.seconds, by_hand(scheme, seconds * scheme.loads))
    assert once.messages == N and once.computed == scheme.loads.sum()


@cache
def heavy_draws() -> NDArray[np.float64]:
    law = pareto(1.5)
    return np.array([[law.draw(5, worker, t) for worker in range(N)] for t in range(5000)])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_median_under_an_infinite_variance_is_that_of_drawn_rounds(scheme: Scheme) -> None:
    law = pareto(1.5)
    assert law.marginal is not None
    marginals = [law.marginal(worker) for worker in range(N)]
    rounds = np.sort(by_hand(scheme, heavy_draws()))
    for share in (0.1, 0.5, 0.9):
        at = idle_distribution(scheme, marginals, rounds[[int(share * len(rounds))]])
        assert at[0] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(rounds)))


def test_median_of_waiting_for_all_under_an_infinite_variance_is_known() -> None:
    law = pareto(1.5)
    assert law.marginal is not None
    median = (1 - 0.5 ** (1 / N)) ** (-1 / 1.5)
    at = idle_distribution(wait_for_all(N), [law.marginal(i) for i in range(N)], np.array([median]))
    assert at[0] == pytest.approx(0.5)


@pytest.mark.parametrize("expected", [0.5, 2.0])
def test_poisson_stragglers_take_the_formula_of_a_timeout(expected: float) -> None:
    # Each job is 1 - c fixed and c a shard; a straggler takes D more. (1 - c) + c (s + 1) + D P(N > s).
    slower, c = 3.0, 0.6
    law = poisson_stragglers(N, expected, 1 + slower)
    latency = Latency(fixed=law, compute=c)
    parts = latency.parts(seed=2, n=N, rounds=6000)
    for s in (0, 1, 2):
        formula = 1 + c * (s + 1) + slower * stats.poisson(expected).sf(s)
        assert idle_rounds(any_code(N, s), parts).seconds.mean() == pytest.approx(formula, rel=0.01)
        assert idle_mean(any_code(N, s), latency) is None  # how many straggle is common to all


# Independent formulas.


def harmonic_by_hand(n: int) -> Fraction:
    return sum((Fraction(1, i) for i in range(1, n + 1)), Fraction(0))


def test_harmonic_numbers_are_sums_of_fractions() -> None:
    for n in (0, 1, 2, 10, 64):
        assert harmonic(n) == pytest.approx(float(harmonic_by_hand(n)))


def test_exponential_order_statistics_are_sums_of_spacings() -> None:
    for n, v in product((1, 2, 5, 12), (1, 2, 4, 12)):
        if v <= n:
            spacings = sum((Fraction(1, n - i) for i in range(v)), Fraction(0))
            assert exponential_seconds(n, v, mean=3.0, shift=0.5) == pytest.approx(0.5 + 3 * float(spacings))
    for s in range(N):
        latency = Latency(fixed=0.25, compute=shifted_exponential(1.0, 0.5))
        formula = 0.25 + (s + 1) * exponential_seconds(N, N - s, mean=0.5, shift=1.0)
        assert idle_mean(any_code(N, s), latency) == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize(("n", "s"), [(8, 1), (8, 3), (64, 3), (12, 2)])
def test_repetition_under_exponentials_is_the_last_of_the_groups(n: int, s: int) -> None:
    groups = n // (s + 1)
    formula = 0.5 + 2.0 * float(harmonic_by_hand(groups)) / (s + 1)
    assert idle_mean(repetition(n, s), Latency(fixed=shifted_exponential(0.5, 2.0))) == pytest.approx(formula, rel=1e-6)
    loaded = (s + 1) * formula
    assert idle_mean(repetition(n, s), Latency(compute=shifted_exponential(0.5, 2.0))) == pytest.approx(
        loaded, rel=1e-6
    )


@pytest.mark.parametrize("alpha", [1.5, 3.0])
@pytest.mark.parametrize("v", [1, 5, 7, 8])
def test_pareto_order_statistics_are_the_gamma_formula(alpha: float, v: int) -> None:
    gamma = math.gamma
    formula = 2 * gamma(N + 1) * gamma(N - v + 1 - 1 / alpha) / (gamma(N - v + 1) * gamma(N + 1 - 1 / alpha))
    # Another way: X_(v) = U_(n-v+1)^(-1/alpha), and a uniform order statistic is a Beta variable.
    beta = stats.beta(N - v + 1, v)
    assert 2 * beta.expect(lambda u: u ** (-1 / alpha)) == pytest.approx(formula, rel=1e-4)
    assert idle_mean(drop_slowest(N, N - v), Latency(fixed=pareto(alpha, 2.0))) == pytest.approx(formula, rel=2e-4)


@pytest.mark.parametrize(("alpha", "s"), [(1.5, 1), (1.5, 3), (0.8, 1), (0.3, 3), (3.0, 1)])
def test_repetition_under_pareto_is_the_gamma_formula(alpha: float, s: int) -> None:
    r = s + 1
    g, power = N // r, 1 / (r * alpha)
    formula = 2 * math.gamma(g + 1) * math.gamma(1 - power) / math.gamma(g + 1 - power)
    assert idle_mean(repetition(N, s), Latency(fixed=pareto(alpha, 2.0))) == pytest.approx(formula, rel=1e-3)


@pytest.mark.parametrize(
    ("scheme", "alpha"),
    [(wait_for_all(N), 1.0), (wait_for_all(N), 0.7), (any_code(N, 1), 0.5), (repetition(N, 1), 0.5)],
)
def test_a_mean_that_is_infinite_is_said_to_be(scheme: Scheme, alpha: float) -> None:
    assert idle_mean(scheme, Latency(fixed=pareto(alpha))) == math.inf


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_two_speeds_are_the_binomial_formulas(p: float) -> None:
    f, latency = 10.0, Latency(fixed=bimodal(p, 10.0))
    assert idle_mean(wait_for_all(N), latency) == pytest.approx(1 + (f - 1) * (1 - (1 - p) ** N))
    for s in (1, 3):
        assert idle_mean(any_code(N, s), latency) == pytest.approx(1 + (f - 1) * stats.binom(N, p).sf(s))
        r = s + 1
        assert idle_mean(repetition(N, s), latency) == pytest.approx(1 + (f - 1) * (1 - (1 - p**r) ** (N // r)))


def test_distribution_is_that_of_all_patterns() -> None:
    # Workers that are all different: 2^8 patterns of who is done, one by one.
    chance = np.linspace(0.1, 0.9, N)
    marginals = [Marginal(lambda x, p=p: np.full(len(x), p)) for p in chance]  # type: ignore[misc]
    for scheme in SCHEMES.values():
        total = 0.0
        for pattern in product((False, True), repeat=N):
            done = np.array([pattern])
            if by_hand(scheme, np.where(done, 0.0, 1.0))[0] == 0.0:
                total += float(np.prod(np.where(done, chance, 1 - chance)))
        assert idle_distribution(scheme, marginals, np.zeros(1))[0] == pytest.approx(total)


# The tables of the papers' setting: n = 64.

EXP, PARETO = exponential(), pareto(1.5)
SLOW = bimodal(0.05, 10.0)
JITTER = bimodal(0.05, 10.0, jitter=0.05)
GOLDEN: list[tuple[str, Latency, Sequence[int], Sequence[float]]] = [
    ("Exp(1), load-independent", Latency(fixed=EXP), (0, 1, 3, 7, 10), (4.74, 3.74, 2.91, 2.15, 1.81)),
    ("Exp(1), all compute", Latency(compute=EXP), (0, 1, 3, 7, 10), (4.74, 7.49, 11.64, 17.2, 20.0)),
    (".1 r + Exp(1)", Latency(EXP, 0.1), (0, 1, 3, 7, 10), (4.84, 3.94, 3.31, 2.95, 2.91)),
    (".3 r + Exp(1)", Latency(EXP, 0.3), (0, 1, 3, 7, 10), (5.05, 4.34, 4.11, 4.55, 5.11)),
    ("r + Exp(1)", Latency(EXP, 1.0), (0, 1, 3, 7, 10), (5.74, 5.74, 6.91, 10.2, 12.8)),
    ("r + Pareto(1.5)", Latency(PARETO, 1.0), (1, 3, 7, 10), (16.1, 11.4, 12.3, 14.4)),
    ("Pareto(1.5), all compute", Latency(compute=PARETO), (1, 3, 7, 10), (28.3, 29.6, 34.4, 37.5)),
    ("r + LogN(0, 1)", Latency(lognormal(1.0, 1.0), 1.0), (0, 1, 3, 7, 10), (12.7, 9.5, 9.1, 11.3, 13.7)),
    ("(1 + .2 r) x10", Latency(1.0, 0.2, slowdown=JITTER), (0, 1, 3, 7, 10), (12.1, 12.1, 8.15, 3.1, 3.4)),
    ("(1 + r) x10", Latency(1.0, 1.0, slowdown=JITTER), (0, 1, 3, 7, 10), (20.1, 25.8, 22.7, 10.75, 12.7)),
]


@pytest.mark.parametrize(("latency", "tolerances", "means"), [g[1:] for g in GOLDEN], ids=[g[0] for g in GOLDEN])
def test_the_published_table_of_any_code(latency: Latency, tolerances: Sequence[int], means: Sequence[float]) -> None:
    for s, mean in zip(tolerances, means, strict=True):
        assert idle_mean(any_code(64, s), latency) == pytest.approx(mean, rel=0.015)


@pytest.mark.parametrize(
    ("latency", "means"),
    [
        (Latency(fixed=EXP), (2.03, 0.845, 0.34)),
        (Latency(compute=EXP), (4.06, 3.38, 2.72)),
        (Latency(EXP, 1.0), (4.03, 4.85, 8.34)),
        (Latency(PARETO, 1.0), (6.3, 5.8, 9.3)),
        (Latency(1.0, 0.2, slowdown=JITTER), (2.43, 1.83, 2.5)),
        (Latency(1.0, 1.0, slowdown=JITTER), (5.2, 5.1, 8.7)),
    ],
)
def test_the_published_table_of_repetition(latency: Latency, means: Sequence[float]) -> None:
    for r, mean in zip((2, 4, 8), means, strict=True):
        assert idle_mean(repetition(64, r - 1), latency) == pytest.approx(mean, rel=0.015)


def test_two_speeds_without_jitter_have_the_published_means() -> None:
    latency = Latency(compute=SLOW)
    means = [idle_mean(scheme, latency) for scheme in (wait_for_all(64), any_code(64, 3), repetition(64, 3))]
    assert means == pytest.approx([9.66, 18.35, 4.00], abs=0.006)
    others = [(Latency(compute=PARETO), 7.2), (Latency(compute=shifted_exponential(1.0, 0.5)), 5.70)]
    assert [idle_mean(repetition(64, 3), one) for one, _ in others] == pytest.approx([x for _, x in others], rel=0.01)


@pytest.mark.parametrize(
    "law", [exponential(), pareto(1.5), lognormal(1.0, 1.0), bimodal(0.05, 10.0)], ids=lambda law: law.name
)
def test_repetition_is_never_later_than_any_code_of_the_same_load(law: Law) -> None:
    for s in (1, 3):
        every, first = any_code(N, s), repetition(N, s)
        seconds = np.array([[law.draw(0, worker, t) for worker in range(N)] for t in range(500)])
        assert (by_hand(first, seconds) <= by_hand(every, seconds)).all()
        assert idle_mean(first, Latency(law, law.draw(0, 0, 0))) <= idle_mean(every, Latency(law, law.draw(0, 0, 0)))  # type: ignore[operator]


# A coded product of a matrix and a vector.


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 5.0])
def test_best_fraction_is_found_by_trying(mu: float) -> None:
    n = 4000
    seconds = [coded_matvec_seconds(n, k, mu=mu) for k in range(1, n)]
    assert best_fraction(mu) == pytest.approx((1 + int(np.argmin(seconds))) / n, abs=0.002)


def test_coded_product_takes_the_time_of_its_order_statistic() -> None:
    for k in (1, 6, 12):
        scheme = drop_slowest(12, 12 - k)
        law = shifted_exponential(1 / k, 1 / (k * 2.0))
        assert coded_matvec_seconds(12, k, mu=2.0) == pytest.approx(idle_mean(scheme, Latency(fixed=law)), rel=1e-6)
    assert coded_matvec_seconds(1, 1, mu=4.0) == pytest.approx(1.25)  # on one worker: 1 + 1 / mu


def test_fractions_at_the_ends() -> None:
    assert best_fraction(1e-9) < 1e-3
    assert best_fraction(1e4) == pytest.approx(1.0, abs=1e-3)
    for mu in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidSetting, match=rf"^mu={mu} must be greater than 0\.$"):
            best_fraction(mu)
    for v in (0, 9):
        with pytest.raises(
            InvalidSetting, match=rf"^v={v}: of n=8 answers, the one that is waited for is number 1 to 8\.$"
        ):
            exponential_seconds(8, v)


# Where there is a closed form, and where it has corners.


@pytest.mark.parametrize(
    ("scheme", "latency"),
    [
        (partial_work(N, 1), Latency(fixed=EXP)),
        (wait_for_all(N), Latency(fixed=EXP, compute=EXP)),
        (wait_for_all(N), Latency(fixed=EXP, slowdown=lognormal())),
        (wait_for_all(N), Latency(fixed=trace(np.ones((2, 3))))),
        (wait_for_all(N), Latency(fixed=1.0, slowdown=trace(np.ones((2, 3))))),
    ],
)
def test_there_is_no_closed_form_where_draws_are_not_independent_or_added_up(scheme: Scheme, latency: Latency) -> None:
    assert idle_mean(scheme, latency) is None


def test_only_what_is_used_of_a_latency_counts() -> None:
    latency = Latency(fixed=EXP, transfer=EXP)
    assert idle_mean(wait_for_all(N), latency) == pytest.approx(float(harmonic_by_hand(N)))
    assert idle_mean(wait_for_all(N), latency, model_megabytes=1.0) is None


@pytest.mark.parametrize("make", [wait_for_all, lambda n: repetition(n, 2, m=2), lambda n: any_code(n, 3)])
def test_what_is_fixed_adds_and_what_slows_multiplies(make: Callable[[int], Scheme]) -> None:
    scheme = make(N)
    load, megabytes = int(scheme.loads[0]), 10.0 * (1 + 1 / scheme.m)
    one = idle_mean(scheme, Latency(fixed=EXP))
    assert one is not None
    latency = Latency(fixed=0.5, compute=EXP, transfer=0.25, slowdown=3.0)
    assert idle_mean(scheme, latency, model_megabytes=10.0) == pytest.approx(3 * (0.5 + load * one + 0.25 * megabytes))
    latency = Latency(fixed=0.5, compute=2.0, transfer=0.25, slowdown=EXP)
    assert idle_mean(scheme, latency, model_megabytes=10.0) == pytest.approx((0.5 + 2 * load + 0.25 * megabytes) * one)
    assert idle_mean(scheme, Latency(0.5, 2.0)) == pytest.approx(0.5 + 2 * load)
    assert idle_mean(scheme, Latency(0.5, 2.0, slowdown=0.0)) == idle_mean(scheme, Latency()) == 0.0
    assert idle_mean(scheme, Latency(slowdown=EXP)) == 0.0


@pytest.mark.parametrize("law", [constant(1.0), exponential()], ids=lambda law: law.name)
def test_who_never_answers_matters_only_where_they_are_waited_for(law: Law) -> None:
    silent = Latency(fixed=scaled(law, {0: math.inf}))
    everybody = Latency(fixed=law)
    for scheme in (wait_for_all(N), any_code(N, 0)):
        assert idle_mean(scheme, silent) == math.inf
    seven = wait_for_all(7)
    assert idle_mean(any_code(N, 1), silent) == pytest.approx(idle_mean(seven, everybody), rel=1e-6)
    two = Latency(fixed=scaled(law, {0: math.inf, 4: math.inf}))  # 8 workers in 4 groups: 0 and 4 are one
    assert idle_mean(repetition(N, 1), two) == math.inf
    apart = Latency(fixed=scaled(law, {0: math.inf, 5: math.inf}))
    assert idle_mean(repetition(N, 1), apart) is not None and math.isfinite(idle_mean(repetition(N, 1), apart))  # type: ignore[arg-type]


def test_a_silent_speed_makes_the_mean_infinite_unless_it_never_happens() -> None:
    for jitter in (0.0, 0.1):
        assert idle_mean(repetition(N, 3), Latency(fixed=bimodal(0.1, math.inf, jitter=jitter))) == math.inf
        alike = idle_mean(repetition(N, 3), Latency(fixed=bimodal(0.0, 5.0, jitter=jitter)))
        never = idle_mean(repetition(N, 3), Latency(fixed=bimodal(0.0, math.inf, jitter=jitter)))
        assert never == pytest.approx(alike)


def test_a_speed_of_zero_keeps_the_jitter_of_the_other() -> None:
    mean = idle_mean(wait_for_all(1), Latency(fixed=bimodal(0.3, 0.0, base=2.0, jitter=0.5)))
    assert mean == pytest.approx(0.7 * 2.0 * math.exp(0.125), rel=1e-3)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_seconds_may_be_of_any_size(unit: float) -> None:
    one = idle_mean(repetition(N, 1), Latency(fixed=lognormal(1.0, 1.0)))
    assert one is not None
    assert idle_mean(repetition(N, 1), Latency(fixed=lognormal(unit, 1.0))) == pytest.approx(unit * one, rel=1e-4)


def test_over_selection_waits_for_as_many_as_are_needed() -> None:
    for n in range(2, 300):
        scheme = over_selection(n)
        assert scheme.enough == -(-10 * n // 13) and not scheme.exact
    with pytest.raises(InvalidSetting, match=r"^factor=0\.9 of over-selection must be at least 1\.$"):
        over_selection(10, 0.9)


@pytest.mark.parametrize("share", [0.8, 0.3, 1 / 3])
@pytest.mark.parametrize("shards", [1, 3, 4, 7])
def test_scaling_a_law_of_few_values_misses_none_of_them(share: float, shards: int) -> None:
    """4 * 0.8 + 0.2 is not 3.4 in floating point, and 34 / 3.4 not 10: a value that is missed has probability 0."""
    latency = Latency(fixed=1 - share, compute=share, slowdown=bimodal(0.05, 10.0))
    one = latency.marginal(0, shards=shards, megabytes=0.0)
    assert one is not None and one.atoms is not None
    assert one.cdf(np.array(one.atoms)) == pytest.approx([0.95, 1.0])
    groups = [len(group) for group in repetition(8, 2).groups]
    loads = repetition(8, 2).loads
    unit = 1 - share + share * loads[0]
    ended = np.prod([1 - 0.05**size for size in groups])  # both groups hold four: all loads are alike
    assert idle_mean(repetition(8, 2), latency) == pytest.approx(unit * (ended + 10 * (1 - ended)))
