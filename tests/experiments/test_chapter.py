"""The source chapter's results: golden numbers against independent formulas, simulations against closed forms."""

from __future__ import annotations

from fractions import Fraction
from math import comb, factorial
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from experiments.chapter import CHARGED, IGNORED, MODELS, Matvec, Model, compare, decodable, main, matvec
from experiments.chapter_figures import wrapped
from fl_gradcode.latency import Parts
from fl_gradcode.planning.closed_forms import best_fraction, idle_mean
from fl_gradcode.planning.schemes import any_code, repetition
from fl_gradcode.planning.simulation import idle_rounds

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {one.name: one for one in MODELS}
ROUNDS = 20_000


def harmonic(n: int) -> Fraction:
    return sum((Fraction(1, i) for i in range(1, n + 1)), Fraction(0))


def poisson(mean: float, upto: int) -> float:
    """P(N <= upto)."""
    return float(np.exp(-mean)) * sum(mean**i / factorial(i) for i in range(upto + 1))


def some_group_gone(lost: int) -> float:
    """P(some of 16 groups of 4 has no reply), `lost` of 64 workers straggling, any of them: inclusion and exclusion."""
    terms = [(-1) ** (j + 1) * comb(16, j) * comb(64 - 4 * j, lost - 4 * j) for j in range(1, lost // 4 + 1)]
    return float(Fraction(sum(terms), comb(64, lost)))


@pytest.mark.parametrize(
    ("model", "s", "seconds"),
    [
        (IGNORED, 0, 4.744),
        (IGNORED, 3, 2.911),
        (CHARGED, 3, 11.642),
        ("0.1 (s + 1) + Exp(1)", 10, 2.915),
        ("0.3 (s + 1) + Exp(1)", 3, 4.111),
        ("1.0 (s + 1) + Exp(1)", 1, 5.744),
    ],
)
def test_expected_rounds_of_any_n_minus_s_codes_are_differences_of_harmonic_numbers(
    model: str, s: int, seconds: float
) -> None:
    difference = harmonic(64) - harmonic(s)
    shift = 0.0 if model in (IGNORED, CHARGED) else float(model.split()[0]) * (s + 1)
    by_fractions = shift + float(difference * (s + 1 if model == CHARGED else 1))
    assert BY_NAME[model].closed(s) == pytest.approx(by_fractions, rel=1e-12)
    assert by_fractions == pytest.approx(seconds, abs=5e-4)


def test_the_timeout_model_pays_the_delay_when_more_than_s_straggle() -> None:
    for s in range(11):
        expected = 0.7 + 0.3 * (s + 1) + 10 * (1 - poisson(3.2, s))
        assert BY_NAME["timeout model"].closed(s) == pytest.approx(expected)


def test_the_example_is_faster_only_where_the_load_is_free() -> None:
    base = float(harmonic(64))
    assert base / BY_NAME[IGNORED].closed(3) == pytest.approx(1.63, abs=5e-3)
    assert BY_NAME[CHARGED].closed(3) / base == pytest.approx(2.45, abs=5e-3)
    assert idle_mean(repetition(64, 3), BY_NAME[CHARGED].latency) == pytest.approx(float(harmonic(16)), rel=1e-6)
    assert float(harmonic(16)) == pytest.approx(3.38, abs=5e-3)


def test_five_percent_straggle_is_more_than_three_in_many_rounds() -> None:
    binomial = [sum(comb(64, i) * 0.05**i * 0.95 ** (64 - i) for i in range(s + 1)) for s in (3, 7)]
    assert [decodable(s, groups=False) for s in (3, 7)] == pytest.approx(binomial)
    assert binomial == pytest.approx([0.601, 0.986], abs=5e-4)
    by_number = stats.binom.pmf(np.arange(65), 64, 0.05) @ [1 - some_group_gone(lost) for lost in range(65)]
    assert decodable(3, groups=True) == pytest.approx(by_number)
    assert f"{by_number:.4f}" == "0.9999"


def drawn(model: Model, rounds: int) -> Parts:
    """The model's draws, by NumPy."""
    rng = np.random.default_rng(7)
    nothing = np.zeros((rounds, 64))
    if model.name == "timeout model":
        ranks = rng.random((rounds, 64)).argsort(axis=1).argsort(axis=1)
        # Stratified: plain draws would need ten times as many rounds to be within 1 % for certain.
        number = stats.poisson.ppf((np.arange(rounds) + rng.random(rounds)) / rounds, 3.2)
        return Parts(nothing + np.where(ranks < number[:, None], 10.7, 0.7), np.full_like(nothing, 0.3), nothing)
    delays = rng.standard_exponential((rounds, 64))
    if model.name == CHARGED:
        return Parts(nothing, delays, nothing)
    return Parts(delays, np.full_like(nothing, 0.0 if model.name == IGNORED else float(model.name.split()[0])), nothing)


@pytest.mark.parametrize("model", MODELS, ids=lambda one: one.name)
def test_simulated_rounds_take_the_expected_time(model: Model) -> None:
    parts = drawn(model, ROUNDS)
    for s in (0, 3, 7):
        assert idle_rounds(any_code(64, s), parts).seconds.mean() == pytest.approx(model.closed(s), rel=0.01)
    expected = idle_mean(repetition(64, 3), model.latency)
    if expected is None:  # workers are not independent in the timeout model
        assert model.name == "timeout model"
        gone = sum(stats.poisson.pmf(lost, 3.2) * some_group_gone(lost) for lost in range(65))
        expected = 1.9 + 10 * float(gone)
    assert idle_rounds(repetition(64, 3), parts).seconds.mean() == pytest.approx(expected, rel=0.01)


def test_over_a_run_repetition_loses_what_it_wins_in_a_round_and_partial_work_does_not() -> None:
    times = compare(BY_NAME[CHARGED], drawn(BY_NAME[CHARGED], 4000))
    assert times["repetition", 3].steady == pytest.approx(5.1, rel=0.02)
    assert 2.2 <= times["partial work", 3].steady <= 2.6
    assert 2.2 <= times["partial work, patience 2", 3].steady <= 2.6
    assert times["partial work", 3].steady < float(harmonic(64)) < times["repetition", 3].steady


@pytest.mark.parametrize(
    ("n", "mu", "uncoded", "best", "seconds"),
    [(10, 1.0, 0.393, 7, 0.299), (10, 0.5, 0.686, 6, 0.449), (10, 10.0, 0.129, 10, 0.129)],
)
def test_coded_products_are_fastest_where_the_chapter_says(
    n: int, mu: float, uncoded: float, best: int, seconds: float
) -> None:
    one = product(n, mu)
    assert (one.seconds[-1], one.best, one.seconds[best - 1]) == pytest.approx((uncoded, best, seconds), abs=5e-4)


@pytest.mark.parametrize(("n", "mu"), [(10, 0.5), (10, 1.0), (100, 1.0), (100, 10.0)])
def test_coded_products_take_the_expected_time(n: int, mu: float) -> None:
    one = product(n, mu)
    exact = [float((1 + (harmonic(n) - harmonic(n - k)) / Fraction(mu)) / k) for k in range(1, n + 1)]
    assert one.seconds == pytest.approx(exact)
    assert one.simulated == pytest.approx(exact, rel=0.01)
    pairs = np.random.default_rng(3).standard_exponential((ROUNDS, n // 2, 2)).min(axis=2).max(axis=1)
    assert one.repetition == pytest.approx(2 / n * (1 + pairs.mean() / mu), rel=0.01)


def test_two_fold_repetition_loses_to_no_code() -> None:
    assert product(10, 1.0).repetition == pytest.approx(float(Fraction(1, 5) * (1 + harmonic(5) / 2)))
    assert f"{product(10, 1.0).repetition:.3f}" == "0.428"


@pytest.mark.parametrize("mu", [0.5, 1.0, 10.0])
def test_the_best_k_approaches_the_limit_by_lambert(mu: float) -> None:
    limit = 1 + 1 / special.lambertw(-np.exp(-mu - 1), k=-1).real
    assert best_fraction(mu) == pytest.approx(limit)
    assert product(1000, mu, rounds=10).best / 1000 == pytest.approx(limit, abs=0.005)


def product(n: int, mu: float, *, rounds: int = ROUNDS) -> Matvec:
    return matvec(n, mu, rounds, np.random.default_rng(5))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chapter")
    assert main(["--rounds", "200", "--out", str(folder / "out"), "--docs", str(folder / "docs")]) == 0
    return folder


GOLDEN = (
    *("4.744", "2.911", "1.63 times faster", "11.64 seconds", "2.45 times slower", "H_16 = 3.38", "0.601", "0.986"),
    *("0.9999", "0.393", "0.299", "0.428", "0.686", "0.449"),
)


def missing(page: str) -> list[str]:
    return [number for number in GOLDEN if number not in " ".join(page.split())]


@pytest.mark.parametrize("folder", ["out", "docs"])
def test_the_page_and_its_figures_are_written(written: Path, folder: str) -> None:
    page = (written / folder / "chapter.md").read_text()
    assert missing(page) == []
    assert page == (written / "out" / "chapter.md").read_text()
    for name in ("rounds", "products", "example"):
        assert f"(images/chapter-{name}.png)" in page
        figure = (written / folder / "images" / f"chapter-{name}.png").read_bytes()
        assert figure.startswith(b"\x89PNG") and len(figure) > 20_000


def test_the_page_in_the_docs_is_one_that_the_command_wrote(written: Path) -> None:
    published, anew = ((folder / "chapter.md").read_text() for folder in (ROOT / "docs", written / "out"))
    assert missing(published) == []
    assert headings(published) == headings(anew)
    # Means of other rounds differ; what is no mean does not.
    assert published.split("## What to correct")[1] == anew.split("## What to correct")[1]
    assert table(published, "decodes")[-4:] == table(anew, "decodes")[-4:]


def headings(page: str) -> list[str]:
    return [line for line in page.splitlines() if line[:1] in ("#", "!")]


def table(page: str, before: str) -> list[str]:
    return [line for line in page.split(before)[-1].splitlines() if line.startswith("|")]


def test_a_wrapped_paragraph_does_not_turn_into_a_list() -> None:
    lines = wrapped("a " * 58 + "s + 1 - 2 and so on " + "b " * 40).splitlines()
    assert len(lines) > 1 and all(len(line) <= 120 and line[0] in "asb" for line in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rounds", "5"], "--rounds 5 must be at least 200"),
        (["--seed", "-1"], "--seed -1 at least 0"),
        (["--rounds", "many"], "invalid int value: 'many'"),
        (["--out", __file__], "test_chapter.py is a file; name a folder."),
    ],
)
def test_bad_arguments_get_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
