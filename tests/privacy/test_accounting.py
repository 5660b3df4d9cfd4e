"""Epsilon: the table of privacy.md, Google's accountant, a closed form, and laws."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from scipy.optimize import brentq
from scipy.stats import norm

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.privacy.accounting import Spend, composed, epsilon_of, noise_multiplier_for
from fl_gradcode.privacy.settings import DPSGD, CentralNoise, privacy_from_json, privacy_to_json

DELTA = 1e-5
# privacy.md, section 5: history, then RDP, PRV and dp-accounting's PLD.
TABLE: list[tuple[list[Spend], float | None, float, float]] = [
    ([Spend(1, 0.05, 200)], 5.368, 4.776, 4.766),
    ([Spend(2, 0.2, 100)], 5.496, 5.034, 5.023),
    ([Spend(1, 0.25, 100)], 20.180, 18.473, 18.463),
    ([Spend(5, 1, 50)], 7.077, 6.583, 6.573),
    ([Spend(1, 1 / 7, 21)], 5.765, 5.015, 5.005),
    ([Spend(1.2, 0.1, 50), Spend(1.5, 0.1, 50)], 4.926, 4.414, 4.404),
    ([Spend(1, 0.01, 1000)], None, 1.838, 1.828),
]
ROUNDING = 1.1e-3  # of the table, and 1e-3


def pld(spends: list[Spend]) -> float:
    accountant = pld_privacy_accountant.PLDAccountant()
    for one in spends:
        gaussian = dp_event.GaussianDpEvent(one.noise_multiplier)
        step = gaussian if one.sample_rate == 1 else dp_event.PoissonSampledDpEvent(one.sample_rate, gaussian)
        accountant.compose(step, one.steps)
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(row[0]))
def test_epsilon_is_the_tables_and_that_of_another_accountant(row: Any) -> None:
    spends, rdp, prv, theirs = row
    if rdp is not None:
        assert epsilon_of(spends, DELTA, accountant="rdp") == pytest.approx(rdp, abs=ROUNDING)
    tight = epsilon_of(spends, DELTA)
    assert tight == pytest.approx(prv, abs=ROUNDING)
    truth = pld(spends)
    assert truth == pytest.approx(theirs, abs=ROUNDING)
    assert truth < tight < truth + 0.02  # from above: a bound that is below the truth is none


def gaussian_epsilon(sigma: float) -> float:
    """Of one release without subsampling: Balle and Wang, "Improving the Gaussian mechanism", 2018."""

    def excess(epsilon: float) -> float:
        one, other = norm.cdf(0.5 / sigma - epsilon * sigma), norm.cdf(-0.5 / sigma - epsilon * sigma)
        return float(one - math.exp(epsilon) * other - DELTA)

    return float(brentq(excess, 0, 200))


def test_three_gaussians_are_one_with_less_noise_by_the_closed_form() -> None:
    truth = gaussian_epsilon(2 / math.sqrt(3))
    assert truth == pytest.approx(3.708635, abs=1e-6)
    for spends in ([Spend(2, 1, 3)], [Spend(2, 1, 1)] * 3, [Spend(2 / math.sqrt(3), 1, 1)]):
        assert truth < epsilon_of(spends, DELTA) < truth + 0.011
        assert truth < epsilon_of(spends, DELTA, accountant="rdp") < 1.2 * truth
    # Unequal ones too: the inverse squares of the noise add up.
    together = gaussian_epsilon(1 / math.sqrt(1 / 1.5**2 + 1 / 3**2 + 1 / 4**2))
    unequal = epsilon_of([Spend(1.5, 1, 1), Spend(3, 1, 1), Spend(4, 1, 1)], DELTA)
    assert together < unequal < together + 0.02


def test_the_order_of_spends_and_how_they_are_split_do_not_matter() -> None:
    parts = [Spend(1.2, 0.1, 20), Spend(1.5, 0.1, 50), Spend(1.2, 0.1, 30), Spend(1.2, 0.1, 0), Spend(9.0, 0.0, 7)]
    whole = {epsilon_of(order, DELTA, accountant="rdp") for order in itertools.permutations(parts)}
    assert whole == {epsilon_of(TABLE[5][0], DELTA, accountant="rdp")}
    assert composed(parts[:4]) == (Spend(1.2, 0.1, 50), Spend(1.5, 0.1, 50))
    # One set of steps is one value, however it is written.
    assert composed([Spend(2, 1, 1)] * 3) == composed([Spend(2.0, 1.0, 3)])


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    for accountant in ("prv", "rdp"):
        assert epsilon_of([], DELTA, accountant=accountant) == 0
        assert epsilon_of([Spend(1, 0.5, 0)], DELTA, accountant=accountant) == 0
        assert epsilon_of([Spend(0, 0.0, 5)], DELTA, accountant=accountant) == 0  # no record is ever in a batch
        assert epsilon_of([Spend(0, 0.5, 1)], DELTA, accountant=accountant) == math.inf
        assert epsilon_of([Spend(2, 1, 1), Spend(0, 0.01, 1)], DELTA, accountant=accountant) == math.inf


@pytest.mark.parametrize(
    ("spend", "least", "most"),
    [
        (Spend(1e-300, 0.2, 1), math.inf, math.inf),  # a division by zero
        (Spend(1e-160, 0.2, 1), math.inf, math.inf),  # a sum without end
        (Spend(1e-9, 0.2, 3), 1e17, 1e20),
        (Spend(0.05, 1, 100), 1e4, 1e6),
        (Spend(0.5, 0.5, 5000), 1e3, 1e5),  # minutes and gigabytes, if it were computed tightly
        (Spend(100.0, 0.01, 10**9), 1, 20),
        (Spend(1.0, 0.5, 10**400), math.inf, math.inf),  # no float holds it
        (Spend(1e200, 1, 1), 0, 0.2),  # an overflow
        (Spend(1e12, 0.3, 10), 0, 0.2),
    ],
)
def test_extremes_end_soon_and_in_an_upper_bound(spend: Spend, least: float, most: float) -> None:
    began = time.process_time()
    assert least <= epsilon_of([spend], DELTA) <= most
    assert time.process_time() - began < 20


def test_what_would_take_minutes_is_by_the_fast_accountant() -> None:
    for spend in (Spend(100.0, 0.01, 10**7), Spend(0.5, 0.5, 5000)):
        assert epsilon_of([spend], DELTA) == epsilon_of([spend], DELTA, accountant="rdp")
    below = Spend(100.0, 0.01, 10**6)
    assert epsilon_of([below], DELTA) < epsilon_of([below], DELTA, accountant="rdp")


def test_more_noise_costs_less_and_more_steps_cost_more() -> None:
    by_noise = [epsilon_of([Spend(s, 0.2, 30)], DELTA, accountant="rdp") for s in (0.01, 0.1, 0.5, 1, 2, 8, 1e4, 1e10)]
    assert by_noise == sorted(by_noise, reverse=True) and by_noise[0] > 1000 > 0.2 > by_noise[-1]
    by_steps = [epsilon_of([Spend(1, 0.2, t)], DELTA, accountant="rdp") for t in (0, 1, 10, 10**3, 10**6, 10**12)]
    assert by_steps == sorted(by_steps) and len(set(by_steps)) == 6


def test_an_unknown_accountant_or_delta_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="accountant='gdp' must be one of prv, rdp"):
        epsilon_of([Spend(1, 1, 1)], DELTA, accountant="gdp")
    for delta in (0, 1, -1, 2, math.nan):
        with pytest.raises(InvalidSetting, match=f"delta={delta} must lie between 0 and 1"):
            epsilon_of([Spend(1, 1, 1)], delta)


# Noise multipliers of privacy.md, section 5, for 30 rounds of 5 steps: sample rate, epsilon, RDP, PRV.
MULTIPLIERS = [(0.05, 1, 2.734, 2.539), (0.05, 3, 1.270, 1.191), (1 / 7, 3, 2.832, 2.642), (0.25, 8, 2.146, 2.021)]


@pytest.mark.parametrize(("rate", "epsilon", "rdp", "prv"), MULTIPLIERS)
def test_the_table_s_noise_is_what_each_epsilon_takes(rate: float, epsilon: float, rdp: float, prv: float) -> None:
    for accountant, known in (("rdp", rdp), ("prv", prv)):
        less, more = (
            epsilon_of([Spend(known * part, rate, 150)], DELTA, accountant=accountant) for part in (0.99, 1.01)
        )
        assert more <= epsilon < less


@pytest.mark.parametrize(("rate", "epsilon", "rdp", "prv"), MULTIPLIERS[:3:2])
def test_calibrated_noise_is_the_tables_and_meets_its_target(
    rate: float, epsilon: float, rdp: float, prv: float
) -> None:
    for accountant, known in (("rdp", rdp), ("prv", prv)):
        found = noise_multiplier_for(epsilon, DELTA, sample_rate=rate, steps=150, accountant=accountant)
        assert found == pytest.approx(known, rel=0.01)
        assert epsilon_of([Spend(found, rate, 150)], DELTA, accountant=accountant) <= epsilon
        # And by Google's accountant, with little to spare under the tight one.
        theirs = pld([Spend(found, rate, 150)])
        assert theirs <= epsilon
        assert accountant == "rdp" or theirs > epsilon - 0.03


def test_calibration_refuses_what_no_noise_reaches() -> None:
    with pytest.raises(InvalidSetting, match=r"No noise multiplier up to 10000 .*Choose a larger epsilon"):
        noise_multiplier_for(0.01, DELTA, sample_rate=0.3, steps=10, accountant="rdp")
    with pytest.raises(InvalidSetting, match=r"No noise multiplier up to 10000 .*Choose a larger epsilon"):
        noise_multiplier_for(0.005, DELTA, sample_rate=0.3, steps=10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epsilon": 0}, "epsilon=0 must lie between 0 and 100"),
        ({"epsilon": 100}, "epsilon=100 must lie"),
        ({"epsilon": math.nan}, "epsilon=nan must lie"),
        ({"sample_rate": 0}, "sample_rate=0 must be above 0"),
        ({"sample_rate": 1.5}, "sample_rate=1.5 must be above 0 and at most 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"delta": 1}, "delta=1 must lie between"),
        ({"accountant": "gdp"}, "accountant='gdp' must be one of"),
    ],
)
def test_calibration_refuses_values_that_make_no_sense(change: dict[str, Any], reason: str) -> None:
    values = {"epsilon": 1.0, "delta": DELTA, "sample_rate": 0.1, "steps": 10, **change}
    with pytest.raises(InvalidSetting, match=reason):
        noise_multiplier_for(values.pop("epsilon"), values.pop("delta"), **values)


def test_settings_for_an_epsilon_spend_it() -> None:
    common: dict[str, Any] = {"max_grad_norm": 1.0, "sample_rate": 1 / 7, "steps": 5, "accountant": "rdp"}
    shared = DPSGD.for_epsilon(3, rounds=30, holders=3, **common)
    assert shared.noise_multiplier == pytest.approx(2.832, rel=0.01) and shared.max_epsilon == 3
    assert 2.95 < shared.epsilon(30, holders=3) <= 3  # of a shard that three hold: one release
    independent = DPSGD.for_epsilon(3, rounds=30, holders=3, noise="independent", **common)
    suspicious = DPSGD.for_epsilon(3, rounds=30, holders=3, honest_server=False, **common)
    assert independent.noise_multiplier == suspicious.noise_multiplier > 1.5 * shared.noise_multiplier
    assert pld([Spend(independent.noise_multiplier, 1 / 7, 3 * 150)]) <= 3
    assert independent.epsilon(30, holders=3) <= 3 < independent.epsilon(31, holders=3)
    assert DPSGD.for_epsilon(3, rounds=30, **common, max_epsilon=8.0, grad_sample_mode="ghost").max_epsilon == 8
    with pytest.raises(InvalidSetting, match="rounds=0 must be a whole number"):
        DPSGD.for_epsilon(3, rounds=0, **common)


def test_independent_noise_costs_what_the_design_says() -> None:
    shared = DPSGD(noise_multiplier=2.0, max_grad_norm=1.0, sample_rate=0.2, steps=100)
    assert shared.epsilon(1, holders=3) == pytest.approx(5.03, abs=0.006)
    assert replace(shared, noise="independent").epsilon(1, holders=3) == pytest.approx(9.32, abs=0.006)


def test_noise_on_the_sum_costs_one_gaussian_a_round() -> None:
    central = CentralNoise(noise_multiplier=5.0, clipping_norm=1.0)
    assert central.epsilon(30) == pytest.approx(4.87, abs=0.02)
    assert gaussian_epsilon(5 / math.sqrt(30)) < central.epsilon(30, holders=4) < 4.9


GOOD: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.1, "steps": 5}
NUMBERS = [0, -1, math.inf, math.nan, True, "1", None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("noise_multiplier", value) for value in NUMBERS],
        *[("max_grad_norm", value) for value in NUMBERS],
        *[("sample_rate", value) for value in (0, -0.1, 1.01, math.nan, True, "0.1", None)],
        *[("steps", value) for value in (0, -1, 2.0, True, "3", None)],
        *[("delta", value) for value in (0, 1, -1e-5, math.nan, True, "1e-5", None)],
        *[("max_epsilon", value) for value in (0, -1, math.nan, True, "8", None)],
        *[("noise", value) for value in ("none", "", None)],
        *[("grad_sample_mode", value) for value in ("ew", "functorch", None)],
        *[("accountant", value) for value in ("gdp", None)],
        *[("honest_server", value) for value in ("no", 0, None)],
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name_and_value(name: str, value: object) -> None:
    with pytest.raises(InvalidSetting) as caught:
        DPSGD(**{**GOOD, name: value})
    assert f"{name}={value}" in str(caught.value).replace("'", "") and "must" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "7", "[]", "null", "{}", '{"kind": "none"}', '{"kind": "dp-sgd"}', '{"kind": "dp-sgd", "sigma": 1}']
)
def test_settings_of_a_message_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read .*are both sides of one version"):
        privacy_from_json(text)
    with pytest.raises(InvalidSetting, match="noise_multiplier=0"):  # its values are checked too
        privacy_from_json(privacy_to_json(DPSGD(**GOOD)).replace('"noise_multiplier": 1.0', '"noise_multiplier": 0'))


def test_settings_travel_unchanged() -> None:
    for one in (
        DPSGD(**GOOD, noise="independent", max_epsilon=3.25, honest_server=False),
        DPSGD(**GOOD),
        CentralNoise(noise_multiplier=0.1, clipping_norm=1 / 3, folder="/x"),
    ):
        assert privacy_from_json(privacy_to_json(one)) == one
        assert privacy_to_json(privacy_from_json(privacy_to_json(one))) == privacy_to_json(one)
