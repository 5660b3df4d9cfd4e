"""Which k a product is planned with: closed forms, the very times of a virtual grid, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from typer.testing import CliRunner

import fl_gradcode.matmul as codes
from fl_gradcode import VirtualGrid
from fl_gradcode.cli.app import app
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, Parts, constant, exponential, lognormal, pareto, scaled, shifted_exponential
from fl_gradcode.latency.populations import named
from fl_gradcode.matmul import CodedMatrix, coded_matmul_worker, mds_product, polynomial
from fl_gradcode.planning.closed_forms import best_fraction, coded_matvec_seconds, harmonic
from fl_gradcode.planning.product_planner import plan_products, product_seconds
from fl_gradcode.planning.schemes import drop_slowest
from fl_gradcode.planning.simulation import idle_rounds
from fl_gradcode.testing import InProcessGrid


def command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--matmul"], env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, result.stderr


# Completion time: (H_n - H_{n-k}) / mu


@pytest.mark.parametrize(("n", "k"), [(10, 7), (20, 16), (20, 11), (50, 50)])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_simulated_products_take_the_closed_form_within_1_percent(n: int, k: int, mu: float) -> None:
    expected = (harmonic(n) - harmonic(n - k)) / mu
    latency = Latency(fixed=exponential(1 / mu))
    assert product_seconds(latency, n, k) == pytest.approx(expected, rel=1e-6)
    drawn = np.random.default_rng(0).exponential(1 / mu, (60_000, n))  # the law's own draws cost 30 us each
    parts = Parts(drawn, np.zeros_like(drawn), np.zeros_like(drawn))
    assert idle_rounds(drop_slowest(n, n - k), parts).mean == pytest.approx(expected, rel=0.01)


def test_products_on_a_virtual_grid_take_the_very_times_of_the_simulation() -> None:
    # Path by path: the same draws, through real messages; then both are means of the same law.
    latency = Latency(fixed=exponential(0.5))
    worker = ClientApp()
    worker.query("matmul")(coded_matmul_worker)
    A, B = np.ones((4, 3)), np.ones(3)
    with InProcessGrid(worker, 6) as grid:
        for seed in range(40):
            matrix = CodedMatrix(VirtualGrid(grid, latency, seed=seed), A, mds_product(6, 4), timeout=None)
            matrix.multiply(B)
            drawn = latency.parts(seed=seed, n=6, rounds=1)
            (expected,) = idle_rounds(drop_slowest(6, 2), drawn).seconds
            assert matrix.reports[0].waiting == pytest.approx(expected, rel=1e-12)


def test_a_run_of_products_takes_the_very_times_of_the_simulation() -> None:
    latency = Latency(fixed=0.2, compute=0.8, slowdown=pareto(1.5, 0.5))
    worker = ClientApp()
    worker.query("matmul")(coded_matmul_worker)
    with InProcessGrid(worker, 6) as grid:
        matrix = CodedMatrix(VirtualGrid(grid, latency, seed=3), np.ones((4, 3)), polynomial(6, 2, 2), timeout=None)
        for _ in range(40):
            matrix.multiply(np.ones((3, 2)))
        told = np.mean([report.waiting for report in matrix.reports][8:])
    plan = plan_products(latency, 6, ks=[4], rounds=40, populations=1, seed=3)
    assert plan.lines[0].steady == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("n", [10, 40])
def test_the_best_k_of_the_shifted_exponential_is_the_closed_form_s(mu: float, n: int) -> None:
    # An n-th of the work takes 1/n plus an exponential of mean 1 / (n mu).
    latency = Latency(compute=shifted_exponential(1 / n, 1 / (n * mu)))
    seconds = {k: product_seconds(latency, n, k) for k in range(1, n + 1)}
    for k, one in seconds.items():
        assert one == pytest.approx(coded_matvec_seconds(n, k, mu=mu), rel=1e-6)
    best = min(seconds, key=lambda k: seconds[k] or 0.0)
    assert best == min(range(1, n + 1), key=lambda k: coded_matvec_seconds(n, k, mu=mu))
    assert abs(best - best_fraction(mu) * n) <= max(1.0, 0.03 * n)


def test_the_reference_s_figures_for_10_workers() -> None:
    assert min(range(1, 11), key=lambda k: coded_matvec_seconds(10, k, mu=1)) == 7
    assert plan_products(Latency(compute=shifted_exponential(0.1, 0.1)), 10, populations=4).lines[6].idle == (
        pytest.approx(0.299, abs=5e-4)
    )


@pytest.mark.parametrize("law", [constant(1.0), lognormal(1.0, 0.02)], ids=["constant", "nearly"])
def test_the_best_k_is_n_when_the_tail_is_light(law: Any) -> None:
    plan = plan_products(Latency(compute=law), 12, populations=4)
    assert plan.best is plan.lines[-1] and plan.best.k == 12
    assert plan.verdict.startswith("do not code: k = n = 12 is best")
    assert min(plan.lines, key=lambda line: line.idle).k == 12


def test_a_gain_of_less_than_5_percent_is_not_worth_a_code() -> None:
    plan = plan_products(Latency(fixed=0.2, compute=0.8, slowdown=lognormal(1.0, 0.2)), 12, ks=[11], populations=4)
    assert 1.0 < plan.speedup(plan.lines[0]) < 1.05
    assert plan.best.k == 12 and "(k = 11 is 2.6% faster)" in plan.verdict


def test_a_heavy_tail_is_coded() -> None:
    plan = plan_products(named("pareto"), 20, populations=8)
    assert plan.best.k < 20 and plan.speedup(plan.best) > 2
    assert {line.k: plan.speedup(line) for line in plan.lines}[16] > 2
    assert all(line.closed_form for line in plan.lines)


def test_a_slow_link_makes_more_and_smaller_answers_worth_waiting_for() -> None:
    slow = Latency(compute=0.1, fixed=exponential(0.1), transfer=1.0)
    assert product_seconds(slow, 8, 4, megabytes=8.0) == pytest.approx(
        (product_seconds(slow, 8, 4) or 0.0) + 2.0, rel=1e-6
    )  # a quarter of 8 MB
    assert plan_products(slow, 8, megabytes=8.0, populations=2).best.k > plan_products(slow, 8, populations=2).best.k


def test_workers_that_never_answer_leave_no_product_without_a_code() -> None:
    plan = plan_products(Latency(compute=scaled(constant(1.0), {3: float("inf")})), 4, populations=2)
    assert plan.best.k == 3 and "never ends" in plan.verdict


def test_bad_settings_get_one_sentence() -> None:
    for n, options, message in (
        (1, {}, "needs at least 2"),
        (4, {"ks": [5]}, "k=5: with n=4 workers it lies in 1..4"),
        (4, {"megabytes": -1.0}, "megabytes=-1.0"),
        (4, {"rounds": 3}, "rounds=3"),
    ):
        with pytest.raises(InvalidSetting, match=message):
            plan_products(named("none"), n, **options)


# The command


def test_the_command_says_the_same_as_the_function_and_its_line_makes_the_code() -> None:
    code, out, err = command("pareto", "-n", "12", "--json")
    assert code == 0, err
    told = json.loads(out)
    made = plan_products(named("pareto"), 12)
    assert told["verdict"] == made.verdict and told["best-k"] == made.best.k
    assert [one["seconds-over-a-run"] for one in told["lines"]] == pytest.approx([x.steady for x in made.lines])
    for one in told["lines"]:
        names: dict[str, Any] = {}
        exec(one["python"], {name: getattr(codes, name) for name in codes.__all__}, names)
        assert (names["code"].k, names["code"].n) == (one["k"], 12)


def test_the_table_fits_eighty_columns_and_shows_the_best_k(tmp_path: Path) -> None:
    code, out, _ = command("shifted-exponential", "-n", "40", "--figure", str(tmp_path / "k.svg"))
    assert code == 0 and "…" not in out
    assert max(len(line) for line in out.splitlines() if "Figure:" not in line) <= 80
    assert "Code: any k = " in out and "code = " in out
    assert (tmp_path / "k.svg").stat().st_size > 5_000
    assert "Do not code: k = n = 12" in command("none", "-n", "12")[1]


def test_what_is_about_rounds_is_refused() -> None:
    code, _, err = command("none", "-n", "4", "--s", "1")
    assert code == 2 and "--s applies to rounds" in err
