"""Plans into how many blocks to divide a coded product: the expected time for each k, and the best one.

    plan = plan_products(named("pareto"), n=20)
    print(plan.verdict, plan.best.python)

With a code, each of n workers computes 1/k of the whole product, and any k answers decode. A small k means little
waiting and much work, and k = n means no code. One unit of compute is the work of a worker without a code, 1/n of the
whole. The recommendation is based on a run of products. The time from an idle start is shown beside it, in closed form
if there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .._text import seconds_text
from ..codes import check_count
from ..errors import InvalidSetting
from ..latency import Latency, Law, Parts, scaled
from .closed_forms import idle_mean
from .schemes import Scheme, wait_for_all
from .simulation import idle_rounds, steady_rounds

__all__ = ["ProductLine", "ProductPlan", "plan_products", "product_seconds"]

#: Coding is recommended if it shortens products by at least this fraction.
_GAIN = 0.05
_MOST = 60  # largest number of values of k that are tried by default
_IDLE_RUNS = 10


@dataclass(frozen=True)
class ProductLine:
    """The expected times and costs for one value of k.

    Attributes:
        k: Number of answers that decode.
        idle: Expected seconds of a product for which every worker starts idle.
        closed_form: Whether `idle` is a closed form; otherwise it was simulated.
        steady: Mean seconds of a product over a run.
        error: Standard error of `steady` in seconds; NaN if it is not known.
        computed: Work of all workers for a product, whether needed or not, in units of the product; 1 without a code.
        python: Line of Python that makes the code.
    """

    k: int
    idle: float
    closed_form: bool
    steady: float
    error: float
    computed: float
    python: str


@dataclass(frozen=True)
class ProductPlan:
    """The comparison of all values of k, and the recommendation.

    Attributes:
        lines: One line for each k, ascending; the last is k = n, which means no code.
        best: The line to use; the last one if coding does not pay.
        verdict: One sentence, which starts with "do not code" if coding does not pay.
        n: Number of workers.
    """

    lines: tuple[ProductLine, ...]
    best: ProductLine
    verdict: str
    n: int

    def speedup(self, line: ProductLine) -> float:
        """Returns how many times faster the line's products are than uncoded ones."""
        return self.lines[-1].steady / line.steady if line.steady else float("nan")


def product_seconds(latency: Latency, n: int, k: int, *, megabytes: float = 0.0) -> float | None:
    """Returns the expected seconds until k of n idle workers have answered, or None if there is no closed form.

    Args:
        latency: Latency of a worker without a code; `compute` is for 1/n of the whole product.
        n: Number of workers.
        k: Number of answers that decode; each worker computes 1/k of the product.
        megabytes: Size of the product; each answer carries 1/k of it.
    """
    compute = latency.compute
    load = n / k
    charged = scaled(compute, [load] * n) if isinstance(compute, Law) else compute * load
    # A scheme charges transfer in both directions, so half the size of the answer is passed.
    return idle_mean(_any(n, k), replace(latency, compute=charged), model_megabytes=megabytes / (2 * k))


def plan_products(
    latency: Latency,
    n: int,
    *,
    megabytes: float = 0.0,
    ks: Iterable[int] | None = None,
    rounds: int = 48,
    populations: int = 32,
    seed: int = 0,
) -> ProductPlan:
    """Returns the plan that compares values of k for products on n workers.

    Args:
        latency: Latency of a worker without a code; see `product_seconds`.
        n: Number of workers, at least 2.
        megabytes: Size of the product.
        ks: Values of k to try besides n; by default all, or 60 of them.
        rounds: Number of products of each simulated run; see `make_plan`.
        populations: Number of runs; see `make_plan`.
        seed: Seed of the first population.

    Raises:
        InvalidSetting: An argument is out of range.
    """
    n = check_count(n, "n")
    if n < 2:
        raise InvalidSetting(f"n={n}: one worker has nobody to share a product with; planning needs at least 2.")
    if not 0 <= megabytes < float("inf"):
        raise InvalidSetting(f"megabytes={megabytes} must be a number of at least 0.")
    for name, value, least in (("rounds", rounds, 20), ("populations", populations, 1), ("seed", seed, 0)):
        if not value >= least or value % 1:
            raise InvalidSetting(f"{name}={value} must be a whole number of at least {least}.")
    wanted = np.unique(np.linspace(1, n, min(n, _MOST)).astype(int)).tolist() if ks is None else sorted({*ks, n})
    for k in wanted:
        if not 1 <= k <= n:
            raise InvalidSetting(f"k={k}: with n={n} workers it lies in 1..{n}.")
    draws = [latency.parts(seed=seed + number, n=n, rounds=rounds) for number in range(populations)]
    lines = tuple(_line(latency, n, k, megabytes, draws) for k in wanted)
    return ProductPlan(lines, *_recommend(lines), n)


def _line(latency: Latency, n: int, k: int, megabytes: float, draws: list[Parts]) -> ProductLine:
    scheme = _any(n, k)
    half = megabytes / (2 * k)
    charged = [Parts(parts.fixed, parts.compute * (n / k), parts.transfer) for parts in draws]
    runs = [steady_rounds(scheme, parts, model_megabytes=half) for parts in charged]
    means = [float(run.seconds[len(run.seconds) // 5 :].mean()) for run in runs]
    idle = closed = product_seconds(latency, n, k, megabytes=megabytes)
    if idle is None:
        few = charged[:_IDLE_RUNS]
        idle = float(np.mean([idle_rounds(scheme, parts, model_megabytes=half).seconds.mean() for parts in few]))
    known = len(means) > 1 and bool(np.isfinite(means).all())
    return ProductLine(
        k,
        idle,
        closed is not None,
        float(np.mean(means)),
        float(np.std(means, ddof=1) / np.sqrt(len(means))) if known else float("nan"),
        float(np.mean([run.messages for run in runs])) / k,
        _python(n, k),
    )


def _any(n: int, k: int) -> Scheme:
    """Returns the scheme of a round that ends with k of n replies, each of which takes one unit of work."""
    return replace(wait_for_all(n), name=f"k = {k}", enough=k, s=n - k)


def _python(n: int, k: int) -> str:
    """Returns the line of Python that makes the code: polynomial, with blocks as square as k allows, or MDS."""
    p = max(d for d in range(1, math.isqrt(k) + 1) if k % d == 0)
    if k == n:
        return f"code = uncoded_product({p}, {k // p})"
    return f"code = polynomial({n}, {p}, {k // p})" if p > 1 else f"code = mds_product({n}, {k})"


def _recommend(lines: tuple[ProductLine, ...]) -> tuple[ProductLine, str]:
    plain = lines[-1]
    fastest = min(lines, key=lambda line: (line.steady, -line.k))
    if not np.isfinite(fastest.steady):
        return plain, "do not code: fewer workers answer than any k that was compared needs."
    if fastest is plain or (np.isfinite(plain.steady) and fastest.steady > (1 - _GAIN) * plain.steady):
        gain = "" if fastest is plain else f" (k = {fastest.k} is {1 - fastest.steady / plain.steady:.1%} faster)"
        return plain, f"do not code: k = n = {plain.k} is best, {seconds_text(plain.steady)} a product{gain}."
    against = (
        f"{plain.steady / fastest.steady:.2f}x faster than uncoded ({seconds_text(plain.steady)})"
        if np.isfinite(plain.steady)
        else "where an uncoded one never ends"
    )
    return fastest, (
        f"code: any k = {fastest.k} of {plain.k} answers take {seconds_text(fastest.steady)} a product, {against}; "
        f"each worker has {plain.k / fastest.k:.2f} times as much to compute."
    )
