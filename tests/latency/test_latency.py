"""Latency laws against their closed forms, and the sum of their parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import (
    Latency,
    Law,
    bimodal,
    bursty,
    constant,
    exponential,
    lognormal,
    pareto,
    read_trace,
    scaled,
    shifted_exponential,
    trace,
)

# For each law its distribution in scipy's words; a bimodal law has the two levels of a Bernoulli variable.
CONTINUOUS = {
    "exponential": (exponential(2.5), stats.expon(scale=2.5)),
    "shifted exponential": (shifted_exponential(1.5, 0.5), stats.expon(loc=1.5, scale=0.5)),
    "lognormal": (lognormal(2.0, 0.6), stats.lognorm(s=0.6, scale=2.0)),
    "pareto": (pareto(3.0, 2.0), stats.pareto(b=3.0, scale=2.0)),
}
EVERY = {
    "constant": lambda: constant(2.0),
    "exponential": lambda: exponential(2.5),
    "shifted exponential": lambda: shifted_exponential(1.5, 0.5),
    "lognormal": lambda: lognormal(2.0, 0.6),
    "pareto": lambda: pareto(3.0),
    "bimodal": lambda: bimodal(0.3, 10.0, jitter=0.1),
    "bursty": lambda: bursty(0.1, 0.3, 10.0, jitter=0.1),
    "one column": lambda: trace(np.arange(1.0, 1001.0)),
    "columns": lambda: trace(np.arange(1.0, 13.0).reshape(4, 3)),
    "scaled": lambda: scaled(lognormal(), {1: 3.0}),
}


@pytest.fixture(params=list(EVERY.values()), ids=list(EVERY))
def make(request: pytest.FixtureRequest) -> Callable[[], Law]:
    return request.param  # type: ignore[no-any-return]


@cache
def draws(law: Law, workers: int = 20, ticks: int = 1000) -> NDArray[np.float64]:
    return np.array([[law.draw(1, worker, tick) for tick in range(ticks)] for worker in range(workers)])


# What each law draws.


@pytest.mark.parametrize(("law", "expected"), CONTINUOUS.values(), ids=CONTINUOUS.keys())
def test_law_has_its_mean_median_and_shape(law: Law, expected: stats.rv_continuous) -> None:
    values = draws(law)
    assert values.mean() == pytest.approx(expected.mean(), rel=0.02)
    assert np.median(values) == pytest.approx(expected.median(), rel=0.02)
    assert stats.kstest(values.ravel(), expected.cdf).pvalue > 0.001
    # Sharper in the tails than the test above: what should be uniform, as an exponential and as a normal variable.
    assert -np.log(expected.sf(values)).mean() == pytest.approx(1.0, rel=0.02)
    assert stats.norm.ppf(expected.cdf(values)).std() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(("law", "expected"), CONTINUOUS.values(), ids=CONTINUOUS.keys())
def test_workers_and_ticks_are_independent(law: Law, expected: stats.rv_continuous) -> None:
    uniform = expected.cdf(draws(law))
    assert np.unique(uniform).size == uniform.size
    for one, other in ((uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / math.sqrt(one.size)


def test_a_constant_is_constant() -> None:
    assert {constant(2.5).draw(seed, worker, 3) for seed in range(3) for worker in range(3)} == {2.5}
    assert constant(math.inf).draw(0, 0, 0) == math.inf


def test_bimodal_is_slow_with_its_probability() -> None:
    values = draws(bimodal(0.3, 10.0, base=2.0))
    assert set(values.ravel()) == {2.0, 20.0}
    assert (values == 20.0).mean() == pytest.approx(0.3, rel=0.02)
    assert values.mean() == pytest.approx(2.0 * (0.7 + 0.3 * 10.0), rel=0.02)


def test_bimodal_jitter_is_lognormal_around_both_levels() -> None:
    values = draws(bimodal(0.3, 100.0, base=2.0, jitter=0.2))
    slow = values > 20.0
    assert slow.mean() == pytest.approx(0.3, rel=0.03)
    assert stats.kstest(values[~slow], stats.lognorm(s=0.2, scale=2.0).cdf).pvalue > 0.001
    assert stats.kstest(values[slow], stats.lognorm(s=0.2, scale=200.0).cdf).pvalue > 0.001


@pytest.mark.parametrize(("probability", "level"), [(0.0, 1.0), (1.0, 10.0)])
def test_bimodal_at_the_ends_has_one_level(probability: float, level: float) -> None:
    assert {bimodal(probability, 10.0).draw(0, worker, 0) for worker in range(50)} == {level}


# Slow spells.


def test_bursty_follows_its_markov_chain() -> None:
    enter, leave = 0.05, 0.2
    slow = draws(bursty(enter, leave, 10.0), 300, 1024) == 10.0
    assert slow.mean() == pytest.approx(enter / (enter + leave), rel=0.02)
    began = ~slow[:, :-1] & slow[:, 1:]
    ended = slow[:, :-1] & ~slow[:, 1:]
    assert began.sum() / (~slow[:, :-1]).sum() == pytest.approx(enter, rel=0.02)
    assert ended.sum() / slow[:, :-1].sum() == pytest.approx(leave, rel=0.02)
    # Spells that began after the first tick and ended before the last: 1 / leave ticks long on average.
    lengths = [len(run) for row in slow for run in "".join("S" if x else "." for x in row).strip("S").split(".") if run]
    assert np.mean(lengths) == pytest.approx(1 / leave, rel=0.02)
    assert np.var(lengths) == pytest.approx((1 - leave) / leave**2, rel=0.05)  # geometric


def test_bursty_starts_in_its_long_run_state() -> None:
    slow = [bursty_law().draw(5, worker, 0) == 10.0 for worker in range(4000)]
    assert np.mean(slow) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))


@cache
def bursty_law() -> Law:
    return bursty(0.1, 0.3, 10.0)


def test_spells_run_on_at_any_tick() -> None:
    # Wherever an implementation may cut time into pieces, the chain does not notice.
    slow = draws(bursty(0.02, 0.02, 10.0), 400, 1024) == 10.0
    changes = (slow[:, 1:] != slow[:, :-1]).mean(axis=0)
    assert changes.mean() == pytest.approx(0.02, rel=0.03)
    assert changes.max() < 0.02 + 6 * math.sqrt(0.02 * 0.98 / 400)


def test_bursty_may_be_asked_in_any_order() -> None:
    ticks = [3000, 0, 255, 256, 257, 1500, 511, 512]
    late = bursty(0.1, 0.3, 10.0, jitter=0.2)
    early = bursty(0.1, 0.3, 10.0, jitter=0.2)
    assert {t: late.draw(1, 2, t) for t in ticks} == {t: early.draw(1, 2, t) for t in sorted(ticks)}


def test_bursty_at_the_ends() -> None:
    assert {bursty(0.0, 0.0, 10.0).draw(0, worker, 300) for worker in range(20)} == {1.0}
    assert {bursty(1.0, 0.0, 10.0).draw(0, worker, 300) for worker in range(20)} == {10.0}
    assert {bursty(0.0, 1.0, 10.0, base=3.0).draw(0, worker, 7) for worker in range(20)} == {3.0}
    alternating = [bursty(1.0, 1.0, 10.0).draw(0, 0, t) for t in range(600)]
    assert all(a != b for a, b in pairwise(alternating))


def test_bursty_jitter_is_lognormal() -> None:
    values = draws(bursty(0.0, 1.0, 10.0, base=2.0, jitter=0.2), 5)
    assert stats.kstest(values.ravel(), stats.lognorm(s=0.2, scale=2.0).cdf).pvalue > 0.001


# Laws are reproducible.


def test_same_seed_worker_and_tick_give_the_same_value(make: Callable[[], Law]) -> None:
    one, other = make(), make()
    triples = [(seed, worker, tick) for seed in (0, 7) for worker in range(3) for tick in (0, 5, 300)]
    assert [one.draw(*t) for t in triples] == [other.draw(*t) for t in reversed(triples)][::-1]
    assert all(isinstance(one.draw(*t), float) for t in triples)
    assert all(one.draw(*t) >= 0 for t in triples)


@pytest.mark.parametrize("name", ["exponential", "shifted exponential", "lognormal", "pareto", "bimodal", "bursty"])
def test_another_seed_worker_or_tick_gives_another_value(name: str) -> None:
    law = EVERY[name]()
    values = [law.draw(seed, worker, tick) for seed in range(4) for worker in range(4) for tick in range(4)]
    assert len(set(values)) == 64


# Traces.


def test_a_trace_is_walked_down_and_around() -> None:
    law = trace([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    assert [law.draw(9, 0, t) for t in range(5)] == [1, 2, 1, 2, 1]
    assert [law.draw(9, 2, t) for t in range(3)] == [100, 200, 100]
    assert [law.draw(9, worker, 1) for worker in range(7)] == [2, 20, 200, 2, 20, 200, 2]


@pytest.mark.parametrize("times", [[1.0, 2.0, 5.0], [[1.0], [2.0], [5.0]]])
def test_one_column_is_drawn_from_at_random(times: list[float]) -> None:
    values = draws(trace(times), 6, 1000).ravel()
    assert set(values) == {1.0, 2.0, 5.0}
    for time in (1.0, 2.0, 5.0):
        assert (values == time).mean() == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / values.size))


def test_changing_the_table_that_was_given_does_not_change_the_trace() -> None:
    times = np.ones((2, 2))
    law = trace(times, name="mine")
    times[:] = 7.0
    assert law.draw(0, 0, 0) == 1.0
    assert law.name == "mine"


@pytest.mark.parametrize("times", [[], np.ones((2, 2, 2)), np.ones((0, 3)), 1.0])
def test_a_trace_of_another_shape_is_refused(times: NDArray[np.float64]) -> None:
    sentence = re.escape(f"A trace has shape (ticks, workers) or (ticks,), not {np.shape(times)}.")
    with pytest.raises(InvalidSetting, match=f"^{sentence}$"):
        trace(times)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_refused_with_its_place(bad: float) -> None:
    table = np.ones((3, 2))
    table[2, 1] = bad
    with pytest.raises(InvalidSetting, match=rf"^The trace has {bad} at row 2, column 1; times are at least 0\.$"):
        trace(table)
    with pytest.raises(InvalidSetting, match=rf"^The trace has {bad} at row 1, column 0; times are at least 0\.$"):
        trace([1.0, bad])


@pytest.mark.parametrize(
    "text", ["1,2.5\n3,4\n", "a,b\n1,2.5\n3,4\n", "w0, w1\r\n1, 2.5\r\n\r\n3,4e0\r\n", "\n1,2.5\n\n3,4"]
)
def test_a_csv_trace_is_read_with_or_without_a_header(tmp_path: Path, text: str) -> None:
    file = tmp_path / "times.csv"
    file.write_bytes(text.encode())
    assert read_trace(file).tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert read_trace(str(file)).dtype == np.float64


def test_a_csv_with_one_column_is_a_trace_too(tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_text("seconds\n1\n2\n")
    assert read_trace(tmp_path / "times.csv").tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("text", ["", "seconds\n", "\n\n"])
def test_an_empty_csv_makes_no_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(InvalidSetting, match="^The trace times.csv has no rows of times"):
        trace(read_trace(tmp_path / "times.csv"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1,2\n3\n", "a row of 1 cells in line 2, and line 1 has 2"),
        ("1,2\n3,fast\n", "'fast' as column 2 in line 2; it must be a number"),
        ("a,b\n1,2\nc,d\n", "'c' as a in line 3; it must be a number"),
    ],
)
def test_a_csv_that_is_no_table_of_numbers_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(InvalidSetting, match=rf"^The trace times\.csv has {sentence}"):
        read_trace(tmp_path / "times.csv")


def test_an_npz_trace_is_read_by_key(tmp_path: Path) -> None:
    file = tmp_path / "times.npz"
    np.savez(file, train=np.array([[1, 2]]), evaluate=np.array([[3.0, 4.0]]))
    assert read_trace(file, key="evaluate").tolist() == [[3.0, 4.0]]
    assert read_trace(file, key="train").dtype == np.float64
    for key in (None, "fit"):
        sentence = r"^The trace times\.npz has arrays train, evaluate: name one of them as key\.$"
        with pytest.raises(InvalidSetting, match=sentence):
            read_trace(file, key=key)


def test_an_npz_trace_with_one_array_needs_no_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "times.npz", train=np.ones(3))
    assert read_trace(tmp_path / "times.npz").tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(InvalidSetting, match="has arrays train: name one of them"):
        read_trace(tmp_path / "times.npz", key="other")


def test_a_trace_that_cannot_be_found_or_read_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.csv")
    with pytest.raises(InvalidSetting, match=f"^There is no trace file {re.escape(repr(missing))}\\.$"):
        read_trace(missing)
    with pytest.raises(InvalidSetting, match="^There is no trace file"):
        read_trace(tmp_path)
    (tmp_path / "times.txt").write_text("1,2\n")
    with pytest.raises(InvalidSetting, match=r"^A trace is a \.csv, \.tsv or \.npz file, not 'times\.txt'\.$"):
        read_trace(tmp_path / "times.txt")


# Slow for good.


@pytest.mark.parametrize("factors", [{0: 10.0, 2: 0.5}, [10.0, 1.0, 0.5]])
def test_scaled_multiplies_some_workers(factors: dict[int, float] | list[float]) -> None:
    law = lognormal()
    slow = scaled(law, factors)
    for worker, factor in enumerate((10.0, 1.0, 0.5, 1.0, 1.0)):
        assert slow.draw(3, worker, 4) == law.draw(3, worker, 4) * factor


def test_scaled_keeps_its_factors_when_the_mapping_changes() -> None:
    factors = {0: 2.0}
    law = scaled(constant(1.0), factors)
    factors[0] = 9.0
    assert law.draw(0, 0, 0) == 2.0


@pytest.mark.parametrize("law", [lognormal(), constant(1.0), constant(0.0), trace([[0.0, 0.0], [1.0, 0.0]])])
def test_an_infinite_factor_silences_a_worker(law: Law) -> None:
    silent = scaled(law, {1: math.inf})
    assert [silent.draw(0, 1, tick) for tick in range(4)] == [math.inf] * 4
    assert silent.draw(0, 0, 1) == law.draw(0, 0, 1)


# The sum of the parts.


def seconds(latency: Latency, shards: float, megabytes: float, *, at: tuple[int, int, int] = (0, 0, 0)) -> float:
    seed, worker, tick = at
    return latency.seconds(seed=seed, worker=worker, tick=tick, shards=shards, megabytes=megabytes)


def seconds_to_evaluate(latency: Latency, shards: float, megabytes: float) -> float:
    return latency.seconds(seed=0, worker=0, tick=0, shards=shards, megabytes=megabytes, evaluating=True)


def test_seconds_are_fixed_plus_compute_plus_transfer() -> None:
    latency = Latency(fixed=2.0, compute=3.0, transfer=constant(0.5))
    assert seconds(latency, 4, 10) == 2.0 + 3.0 * 4 + 0.5 * 10
    assert seconds(latency, 0, 0) == 2.0
    assert seconds(Latency(), 4, 10) == 0.0


def test_evaluation_takes_its_share_of_the_compute_alone() -> None:
    latency = Latency(fixed=2.0, compute=constant(3.0), transfer=0.5)
    assert seconds_to_evaluate(latency, 4, 10) == pytest.approx(2.0 + 0.3 * 12 + 5.0)
    slow = Latency(fixed=2.0, compute=3.0, transfer=0.5, evaluation=2.0)
    assert seconds_to_evaluate(slow, 4, 10) == 2.0 + 2.0 * 12 + 5.0
    assert seconds(slow, 4, 10) == 2.0 + 12 + 5.0


def test_a_part_without_load_costs_nothing_even_if_it_never_ends() -> None:
    latency = Latency(fixed=1.0, compute=constant(math.inf), transfer=math.inf)
    assert seconds(latency, 0, 0) == 1.0
    assert seconds(latency, 1, 0) == math.inf
    assert seconds(latency, 0, 1) == math.inf


def test_one_draw_serves_all_shards_of_a_job() -> None:
    latency = Latency(compute=exponential(1.0))
    one = seconds(latency, 1, 0, at=(4, 2, 9))
    assert seconds(latency, 6, 0, at=(4, 2, 9)) == pytest.approx(6 * one)
    assert seconds(latency, 6, 3, at=(4, 2, 9)) == pytest.approx(6 * one)
    assert seconds(latency, 1, 0, at=(4, 2, 10)) != one


def test_the_parts_draw_independently() -> None:
    law = exponential(1.0)
    grid = list(product(range(3), range(20), range(50)))
    laws = (Latency(fixed=law), Latency(compute=law), Latency(transfer=law))
    parts = np.array([[seconds(latency, 1, 1, at=at) for latency in laws] for at in grid])
    assert np.unique(parts).size == parts.size  # the parts of one seed are not those of the next
    assert (np.abs(np.corrcoef(parts.T) - np.eye(3)) < 4 / math.sqrt(len(grid))).all()
    whole = [seconds(Latency(law, law, law), 1, 1, at=at) for at in grid]
    np.testing.assert_allclose(whole, parts.sum(axis=1))


# What is refused, and how it is said.


@pytest.mark.parametrize(
    ("make_wrong", "name"),
    [
        (lambda: constant(-1.0), "value"),
        (lambda: exponential(-1.0), "mean"),
        (lambda: shifted_exponential(-1.0, 1.0), "shift"),
        (lambda: lognormal(-1.0), "median"),
        (lambda: lognormal(sigma=-1.0), "sigma"),
        (lambda: pareto(2.0, -1.0), "minimum"),
        (lambda: bimodal(0.1, -1.0), "slowdown"),
        (lambda: bimodal(0.1, 2.0, base=-1.0), "base"),
        (lambda: bimodal(0.1, 2.0, jitter=-1.0), "jitter"),
        (lambda: bursty(0.1, 0.1, -1.0), "slowdown"),
        (lambda: bursty(0.1, 0.1, 2.0, base=-1.0), "base"),
        (lambda: bursty(0.1, 0.1, 2.0, jitter=-1.0), "jitter"),
        (lambda: scaled(constant(1.0), {3: -1.0}), "factor of worker 3"),
        (lambda: scaled(constant(1.0), [1.0, -1.0]), "factor of worker 1"),
    ],
)
def test_a_negative_parameter_is_refused_by_name(make_wrong: Callable[[], Law], name: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"^{name}=-1\.0 of a latency law must be at least 0\.$"):
        make_wrong()


def test_a_parameter_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"^mean=nan of a latency law must be at least 0\.$"):
        exponential(math.nan)
    with pytest.raises(InvalidSetting, match=r"^enter=nan of a latency law is a probability"):
        bursty(math.nan, 0.1, 2.0)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_what_is_no_probability_is_refused_by_name(value: float) -> None:
    for make_wrong, name in (
        (lambda: bimodal(value, 2.0), "probability"),
        (lambda: bursty(value, 0.1, 2.0), "enter"),
        (lambda: bursty(0.1, value, 2.0), "leave"),
    ):
        sentence = rf"^{name}={value} of a latency law is a probability: it must lie in 0\.\.1\.$"
        with pytest.raises(InvalidSetting, match=sentence):
            make_wrong()


@pytest.mark.parametrize("alpha", [0.0, -2.0, math.nan])
def test_a_pareto_law_needs_a_positive_exponent(alpha: float) -> None:
    with pytest.raises(InvalidSetting, match=rf"^alpha={alpha} of a Pareto law must be greater than 0\.$"):
        pareto(alpha)
    with pytest.raises(ValueError, match="Pareto"):  # the builtin that a caller expects
        pareto(alpha)
