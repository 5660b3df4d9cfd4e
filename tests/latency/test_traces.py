"""Times that were measured: what is read, what is refused, and laws that are fitted back to draws of known ones."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import fl_gradcode.latency as laws
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import (
    Fit,
    Law,
    bimodal,
    bursty,
    exponential,
    fit,
    lognormal,
    pareto,
    read_trace,
    shifted_exponential,
    trace,
)

FAMILIES: dict[str, Callable[..., Law]] = {
    name: getattr(laws, name) for name in ("shifted_exponential", "lognormal", "pareto", "bimodal", "bursty")
}
ROWS, WORKERS = 500, 10


@cache
def table(law: Law) -> NDArray[np.float64]:
    """What a run with this law would show: a row a round, and a round is two ticks."""
    return np.array([[law.draw(3, worker, 2 * t) for worker in range(WORKERS)] for t in range(ROWS)])


def numbers(found: Fit) -> list[float]:
    """The parameters in the code of a fit."""
    return [float(text) for text in re.findall(r"(?<![a-z_])\d[\d.e+-]*", found.code.split("(", 1)[1])]


def family(found: Fit) -> str:
    return found.code.split("(")[0]


# What is fitted.


@pytest.mark.parametrize(
    ("law", "name", "parameters", "rel"),
    [
        (shifted_exponential(1.5, 0.5), "shifted_exponential", [1.5, 0.5], 0.04),
        (lognormal(2.0, 0.3), "lognormal", [2.0, 0.3], 0.03),
        (lognormal(0.01, 1.2), "lognormal", [0.01, 1.2], 0.04),
        (pareto(1.5, 2.0), "pareto", [1.5, 2.0], 0.04),
        (pareto(3.0, 0.001), "pareto", [3.0, 0.001], 0.04),
        (bimodal(0.1, 10.0, base=2.0, jitter=0.1), "bimodal", [0.1, 10.0, 2.0, 0.1], 0.06),
        (bimodal(0.3, 25.0, base=2.0, jitter=0.2), "bimodal", [0.3, 25.0, 2.0, 0.2], 0.05),
    ],
    ids=lambda value: value.name if isinstance(value, Law) else None,
)
def test_the_law_that_drew_is_found_with_its_parameters(
    law: Law, name: str, parameters: list[float], rel: float
) -> None:
    first, *others = fit(table(law))
    assert family(first) == name
    assert numbers(first) == pytest.approx(parameters, rel=rel)
    assert first.distance < 0.025  # a Kolmogorov-Smirnov distance of 5,000 draws is 1.36 / sqrt(5000) at 5 %
    assert all(other.aic > first.aic for other in others)


def test_an_exponential_is_one_without_a_shift() -> None:
    first = fit(table(exponential(2.0)))[0]
    shift, mean = numbers(first)
    assert family(first) == "shifted_exponential" and shift < 0.01 and mean == pytest.approx(2.0, rel=0.04)


@pytest.mark.parametrize(
    "law", [lognormal(2.0, 0.3), pareto(2.0), bimodal(0.2, 9.0, jitter=0.1)], ids=lambda law: law.name
)
def test_the_code_of_a_fit_is_its_law(law: Law) -> None:
    for found in fit(table(law)):
        made = eval(found.code, {**FAMILIES})
        at = [(0, worker, tick) for worker in range(3) for tick in range(20)]
        assert [made.draw(*one) for one in at] == pytest.approx([found.law.draw(*one) for one in at], rel=0.01)


def test_distance_and_criterion_are_those_of_the_fitted_law() -> None:
    x = table(lognormal(2.0, 0.5)).ravel()[:300]
    found = next(one for one in fit(x) if family(one) == "lognormal")
    law = stats.lognorm(np.log(x).std(), scale=math.exp(np.log(x).mean()))
    assert found.distance == pytest.approx(stats.kstest(x, law.cdf).statistic)
    assert found.aic == pytest.approx(4 - 2 * law.logpdf(x).sum())


@pytest.mark.parametrize(("enter", "leave"), [(0.01, 0.04), (0.1, 0.3)], ids=["lasting", "short"])
def test_spells_that_last_are_seen_with_their_rates(enter: float, leave: float) -> None:
    law = bursty(enter, leave, 11.0, base=2.0, jitter=0.1)
    first = fit(table(law))[0]
    assert family(first) == "bursty"
    found = numbers(first)
    assert found[:2] == pytest.approx([enter, leave], rel=0.25)  # few spells: their number varies
    assert found[2:] == pytest.approx([11.0, 2.0, 0.1], rel=0.03)


def test_rates_of_spells_are_those_of_half_rounds() -> None:
    # 0.1 + 0.3: a slow tick is followed by a slow one with 0.7, a slow round with 0.7 ** 2 + 0.3 * 0.1 = 0.52.
    law = bursty(0.1, 0.3, 11.0, jitter=0.1)
    many = np.array([[law.draw(0, worker, 2 * t) for worker in range(40)] for t in range(600)])
    found = numbers(fit(many)[0])
    assert found[:2] == pytest.approx([0.1, 0.3], rel=0.06)


def test_spells_are_not_seen_where_times_are_shuffled() -> None:
    times = table(bursty(0.01, 0.04, 11.0, jitter=0.1))
    shuffled = np.random.default_rng(0).permutation(times.ravel())
    assert family(fit(times)[0]) == "bursty"
    assert family(fit(shuffled.reshape(times.shape))[0]) == "bimodal"
    assert family(fit(times.ravel())[0]) == "bimodal"  # who is who is not known


def test_times_that_are_slow_anew_each_time_are_no_spells() -> None:
    for probability in (0.05, 0.3):
        assert family(fit(table(bimodal(probability, 10.0, jitter=0.1)))[0]) == "bimodal"


def test_two_speeds_without_any_jitter_are_found() -> None:
    first = fit(table(bimodal(0.1, 10.0, base=2.0)))[0]
    probability, slowdown, base, jitter = numbers(first)
    assert (probability, slowdown, base) == pytest.approx((0.1, 10.0, 2.0), rel=0.06)
    assert family(first) == "bimodal" and jitter <= 1e-6


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        ([1.0] * 7, "7 times are too few to fit a law to; at least 8 are needed."),
        ([0.0, *range(1, 10)], "A time of 0 cannot be fitted: times must be greater than 0."),
        ([2.5] * 20, "All times are 2.5: that is constant(2.5), there is nothing to fit."),
        ([math.nan, *range(1, 10)], "The trace has nan at row 0, column 0; times are at least 0."),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(times: list[float], sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{re.escape(sentence)}$"):
        fit(times)


def test_a_fitted_law_can_be_simulated_although_its_parameters_were_estimated_from_few() -> None:
    for found in fit([1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 9.0, 1.1, 1.0]):
        assert 0 < found.law.draw(0, 0, 0) < math.inf and 0 < found.distance < 1 and math.isfinite(found.aic)


# What is read.


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_found_in_a_file_too(tmp_path: Path, bad: float) -> None:
    (tmp_path / "times.csv").write_text(f"1,2\n3,{bad}\n")
    np.savez(tmp_path / "times.npz", times=[[1.0, 2.0], [3.0, bad]])
    with pytest.raises(InvalidSetting, match=rf"^The trace has {bad} at row 1, column 1; times are at least 0\.$"):
        trace(read_trace(tmp_path / "times.npz"))
    in_words = "has column 2 -1 in line 2" if bad < 0 else "lacks times: round 2, worker 1 has none"
    with pytest.raises(InvalidSetting, match=rf"^The trace times\.csv {in_words}"):
        trace(read_trace(tmp_path / "times.csv"))


@pytest.mark.parametrize("times", ["abc", [1.0, "fast"], [[1.0, 2.0], [3.0]], {"a": 1}, [None, object()]])
def test_what_is_no_table_of_numbers_is_refused_in_one_sentence(times: object) -> None:
    with pytest.raises(InvalidSetting, match=r"^A trace is numbers, of shape \(ticks, workers\)"):
        trace(times)  # type: ignore[arg-type]


def broken_files() -> dict[str, bytes]:
    whole, text, pickled, single = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(whole, times=np.arange(3000.0))
    np.savez(text, times=np.array(["fast", "slow"]))
    np.savez(pickled, times=np.array([1.0, None], dtype=object))
    np.save(single, np.ones(4))
    flipped = bytearray(whole.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    return {
        "empty": b"",
        "text": b"1,2,3\n4,5,6\n",
        "looks like a zip": b"PK\x03\x04 but is none",
        "cut off": whole.getvalue()[:200],
        "flipped": bytes(flipped),
        "one array": single.getvalue(),
        "objects": pickled.getvalue(),
    }


@pytest.mark.parametrize("content", broken_files().values(), ids=list(broken_files()))
def test_a_broken_npz_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "times.npz").write_bytes(content)
    with pytest.raises(InvalidSetting, match=r"^The trace times\.npz cannot be read as an \.npz file \(.*\)\.$"):
        read_trace(tmp_path / "times.npz")


@pytest.mark.parametrize("array", [np.array(["fast", "slow"]), np.array([1 + 2j]), np.array(["2026-01-01"], "M8[D]")])
def test_an_array_that_is_not_of_numbers_is_refused(tmp_path: Path, array: NDArray[np.generic]) -> None:
    np.savez(tmp_path / "times.npz", times=array)
    with pytest.raises(InvalidSetting, match=r"^The array times of times\.npz is not of numbers, but of .*\.$"):
        read_trace(tmp_path / "times.npz")


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_bytes("Gerät,2\n1,2\n".encode("latin-1"))
    with pytest.raises(InvalidSetting, match=r"^The trace times\.csv cannot be read as text"):
        read_trace(tmp_path / "times.csv")


def test_a_byte_order_mark_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "times.csv").write_bytes(b"\xef\xbb\xbf1,2\r\n3,4\r\n")
    assert read_trace(tmp_path / "times.csv").tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_one_column_of_a_trace_has_its_distribution() -> None:
    law = trace([3.0, 1.0, 1.0, 7.0])
    assert law.marginal is not None
    one = law.marginal(5)
    assert one.atoms == (1.0, 3.0, 7.0)
    at = np.array([0.5, 1.0, 2.0, 3.0, 6.9, 7.0])
    np.testing.assert_allclose(one.cdf(at), [0, 0.5, 0.5, 0.75, 0.75, 1.0])
    assert trace([[1.0, 2.0], [3.0, 4.0]]).marginal is None  # columns are walked down: nothing is drawn
