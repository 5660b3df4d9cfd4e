"""Named populations hold the measured facts that they state, and stay near the measured tables."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fl_gradcode
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, Law
from fl_gradcode.latency.populations import POPULATIONS, named, phones, serverless, virtual_machines

TRACES = Path(fl_gradcode.__file__).parents[2] / "shared" / "data" / "traces"
real = pytest.mark.skipif(not TRACES.is_dir(), reason="the measured tables are not here")


def rounds(
    latency: Latency, *, seed: int, n: int, rounds: int, shards: float = 1.0, megabytes: float = 0.0
) -> NDArray[np.float64]:
    return latency.parts(seed=seed, n=n, rounds=rounds).seconds(shards, megabytes)


# Serverless workers.


@cache
def calls() -> NDArray[np.float64]:
    """256 workers, 400 rounds."""
    return rounds(serverless(), seed=1, n=256, rounds=400)


def test_a_serverless_call_takes_its_measured_median() -> None:
    for load, seconds in ((1.0, 0.639 + 1.127), (4.0, 0.639 + 4 * 1.127)):
        times = rounds(serverless(), seed=0, n=64, rounds=150, shards=load)
        assert np.median(times) == pytest.approx(seconds, rel=0.01)


def test_serverless_calls_have_the_measured_tail() -> None:
    relative = calls() / np.median(calls(), axis=1, keepdims=True)  # around each round's median, as measured
    assert np.quantile(relative, 0.95) == pytest.approx(1.25, rel=0.01)
    assert np.quantile(relative, 0.99) == pytest.approx(1.68, rel=0.03)
    assert np.quantile(relative, 0.999) == pytest.approx(16.0, rel=0.15)  # 102 calls are above it
    assert (relative > 10).mean() == pytest.approx(0.0019, rel=0.2)
    assert 25 < relative.max() < 42.5
    assert relative.min() == pytest.approx(0.8, rel=0.02)


def test_the_tail_of_a_serverless_call_is_known_exactly() -> None:
    law = serverless().slowdown
    assert isinstance(law, Law) and law.marginal is not None
    at = np.array([0.79, 1.0, 1.25, 1.68, 10.0, 16.0, 42.0])
    np.testing.assert_allclose(1 - law.marginal(0).cdf(at), [1, 0.5, 0.05, 0.01, 0.0019, 0.001, 0.0], atol=1e-12)


def test_serverless_calls_have_no_memory() -> None:
    slow = calls() > 1.3 * 1.766
    assert slow[1:][slow[:-1]].mean() == pytest.approx(slow.mean(), abs=0.01)
    assert slow.mean(axis=0).max() < 0.12  # nobody is slow for good


# Virtual machines.


@cache
def machines() -> NDArray[np.float64]:
    return rounds(virtual_machines(), seed=2, n=60, rounds=1500)


def test_a_virtual_machine_is_slow_as_often_and_as_long_as_measured() -> None:
    slow = machines() > 3.0
    assert slow.mean() == pytest.approx(0.05, rel=0.15)
    # From round to round, although a law's tick is half a round.
    assert slow[1:][slow[:-1]].mean() == pytest.approx(0.95, abs=0.005)
    assert slow[1:][~slow[:-1]].mean() == pytest.approx(0.05 * 0.05 / 0.95, rel=0.15)
    assert np.median(machines()[slow]) / np.median(machines()[~slow]) == pytest.approx(11.0, rel=0.02)
    assert np.log(machines()[~slow]).std() == pytest.approx(0.1, rel=0.03)


def test_spells_of_a_virtual_machine_last_tens_of_rounds() -> None:
    text = ["".join("S" if x > 3.0 else "." for x in column) for column in machines().T]
    lengths = [len(run) for row in text for run in row.strip("S").split(".") if run]
    assert np.mean(lengths) == pytest.approx(20.0, rel=0.15)
    assert np.quantile(lengths, 0.9) > 35


def test_a_slow_virtual_machine_is_slow_in_all_that_it_does() -> None:
    one, four = (rounds(virtual_machines(0.8), seed=2, n=10, rounds=300, shards=x) for x in (1.0, 4.0))
    np.testing.assert_allclose(four / one, 0.2 + 4 * 0.8)


# Phones.


def test_phones_differ_for_good_and_from_draw_to_draw() -> None:
    parts = [phones().parts(seed=seed, n=200, rounds=6) for seed in range(3)]
    for one in parts:
        pace = one.compute / one.fixed  # what is left besides the common slowdown
        np.testing.assert_allclose(pace, np.broadcast_to(pace[0], pace.shape))
    devices = [one.compute[0] / one.fixed[0] for one in parts]
    assert (devices[0] == devices[1]).mean() < 0.3
    jitter = np.log(parts[0].fixed / 0.2)
    assert jitter.std() == pytest.approx(0.1, rel=0.1) and abs(np.corrcoef(jitter[0], jitter[1])[0, 1]) < 0.25


def test_compute_and_link_of_a_phone_have_nothing_to_do_with_each_other() -> None:
    parts = phones().parts(seed=5, n=3000, rounds=1)
    pace, link = (parts.compute / parts.fixed)[0], (parts.transfer / parts.fixed)[0]
    assert abs(np.corrcoef(pace, link)[0, 1]) < 0.07


def test_the_spread_of_phones_is_that_of_their_scores() -> None:
    parts = phones(0.5).parts(seed=0, n=4000, rounds=1)
    pace = parts.compute[0] / parts.fixed[0]  # 1 for a median phone
    assert np.quantile(pace, 0.5) == pytest.approx(1.0, rel=0.1)
    # Ten devices stand for all: the measured tenth and ninetieth percent lie between two of them.
    assert np.quantile(pace, 0.87) < 1548 / 274 < np.quantile(pace, 0.93)
    assert np.quantile(pace, 0.07) < 1548 / 3414 < np.quantile(pace, 0.13)


def published_scores() -> list[float]:
    with (TRACES / "flash_ai_benchmark_phones.csv").open(newline="") as lines:
        return [float(row["CPU_F_AI_Score"]) for row in csv.DictReader(lines)]


@real
def test_quantiles_of_phones_are_those_of_the_table() -> None:
    scores = np.array(published_scores())
    assert len(scores) == 333 and scores.max() / scores.min() == pytest.approx(41, rel=0.02)
    assert np.quantile(scores, [0.1, 0.5, 0.9]) == pytest.approx([274, 1548, 3414], rel=0.01)
    ours = phones().compute, phones(scores=scores).compute
    pace = [np.sort([law.draw(0, i, 2) for i in range(4000)]) for law in ours if isinstance(law, Law)]
    quantiles = [0.25, 0.45, 0.55, 0.75]  # inside the steps
    assert np.quantile(pace[0], quantiles) == pytest.approx(np.quantile(pace[1], quantiles), rel=0.12)
    assert pace[0].mean() == pytest.approx(pace[1].mean(), rel=0.1)


@real
def test_the_stored_scores_are_quantiles_of_the_table() -> None:
    scores = published_scores()
    law = phones(1.0).compute
    assert isinstance(law, Law) and law.marginal is not None
    stored = 1548 / np.array(law.marginal(0).atoms)[::-1]
    assert stored == pytest.approx(np.quantile(scores, np.arange(0.05, 1.0, 0.1)), rel=0.02)


def test_a_megabyte_each_way_takes_a_median_phone_half_a_second() -> None:
    parts = phones().parts(seed=6, n=2000, rounds=1)
    both_ways = 2 * parts.transfer[0] * 0.2 / parts.fixed[0]
    assert np.median(both_ways) == pytest.approx(0.52, rel=0.05)
    assert (both_ways.min(), both_ways.max()) == pytest.approx((0.25, 1.752))


@real
def test_links_of_phones_are_those_of_the_table() -> None:
    with (TRACES / "flash_network_speed.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    measured = [1000 / float(row["down_mean_kBps"]) + 1000 / float(row["up_mean_kBps"]) for row in rows]
    law = phones().transfer
    assert isinstance(law, Law) and law.marginal is not None
    stored = 2 * np.array(law.marginal(0).atoms)  # a megabyte down and one up
    assert stored == pytest.approx(np.quantile(measured, np.arange(0.05, 1.0, 0.1)), rel=0.02)


@pytest.mark.parametrize("wrong", [[], [1.0, 0.0], [1.0, np.nan], [-2.0]])
def test_scores_that_are_no_numbers_above_zero_are_refused(wrong: list[float]) -> None:
    with pytest.raises(InvalidSetting, match=r"^Scores of devices must be finite numbers above 0\.$"):
        phones(scores=wrong)


# All of them.


@pytest.mark.parametrize("name", list(POPULATIONS))
def test_a_healthy_client_takes_about_a_second(name: str) -> None:
    times = rounds(named(name), seed=0, n=50, rounds=40)
    assert np.isfinite(times).all()
    assert np.median(times) == pytest.approx(1.766 if name == "serverless" else 1.0, rel=0.35)


@pytest.mark.parametrize("name", [name for name in POPULATIONS if name != "serverless"])
@pytest.mark.parametrize("compute", [0.0, 0.3, 1.0])
def test_the_share_of_compute_is_what_grows_with_the_shards(name: str, compute: float) -> None:
    one, three = (rounds(named(name, compute), seed=4, n=40, rounds=10, shards=x) for x in (1.0, 3.0))
    growth = np.median(three / one)
    assert growth == pytest.approx(1 + 2 * compute, rel=0.15 if name == "phones" else 1e-9)


@pytest.mark.parametrize("compute", [-0.1, 1.5, float("nan")])
def test_a_share_outside_is_refused_everywhere(compute: float) -> None:
    sentence = rf"^compute={compute}: the share of a second that is compute must lie in 0\.\.1\.$"
    for name in POPULATIONS:
        with pytest.raises(InvalidSetting, match=sentence):
            named(name, compute)
    for make in (phones, virtual_machines):
        with pytest.raises(InvalidSetting, match=sentence):
            make(compute)


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    known = re.escape(", ".join(POPULATIONS))
    with pytest.raises(InvalidSetting, match=rf"^There is no law 'phone'; choose one of {known}, or give a file\.$"):
        named("phone")
