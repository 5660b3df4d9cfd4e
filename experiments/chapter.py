"""What chapter 16, section 3 of the open book "Coded Computing" (CommIT) states, recomputed; then what changes when the
load and a whole run are charged.

`make chapter` prints tables and writes them, with figures, as a page into out/chapter; with `--docs` also into docs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy import stats

from experiments import chapter_figures
from experiments.chapter_figures import sheets, wrapped
from fl_gradcode.latency import Latency, Law, Parts, exponential, poisson_stragglers
from fl_gradcode.planning import (
    Scheme,
    any_code,
    coded_matvec_seconds,
    exponential_seconds,
    harmonic,
    idle_mean,
    idle_rounds,
    partial_work,
    repetition,
    steady_rounds,
)

__all__ = ["MODELS", "Matvec", "Model", "Results", "Times", "compare", "decodable", "draw", "main", "matvec", "page"]

ROOT = Path(__file__).resolve().parents[1]
N = 64
TOP = 10
TOLERANCES = range(TOP + 1)
#: s + 1 divides 64, so that fractional repetition has no more load than it needs.
REPLICATED = (0, 1, 3, 7)
STRAGGLING = 0.05
_FIXED, _DELAY = 0.3, 10.0  # c and D of the timeout model
_PARTIAL = 10  # partial work is an event loop: so many times fewer rounds


@dataclass(frozen=True)
class Model:
    """How long a job of s + 1 shards takes, and the expected round of a code that needs any n - s replies."""

    name: str
    latency: Latency
    closed: Callable[[int], float]


def _delays(name: str, c: float = 0.0, *, charged: bool = False) -> Model:
    delay = exponential(1.0)
    latency = Latency(compute=delay) if charged else Latency(fixed=delay, compute=c)

    def closed(s: int) -> float:
        return exponential_seconds(N, N - s, mean=s + 1.0 if charged else 1.0, shift=c * (s + 1))

    return Model(name, latency, closed)


def _timeout(s: int) -> float:
    return float((1 - _FIXED) + _FIXED * (s + 1) + _DELAY * stats.poisson.sf(s, STRAGGLING * N))


_STRAGGLERS = poisson_stragglers(N, STRAGGLING * N, 1 + _DELAY / (1 - _FIXED), base=1 - _FIXED)
IGNORED, CHARGED = "Exp(1), load ignored", "(s + 1) x Exp(1)"
MODELS = (
    _delays(IGNORED),
    _delays(CHARGED, charged=True),
    *(_delays(f"{c:.1f} (s + 1) + Exp(1)", c) for c in (0.1, 0.3, 1.0)),
    Model("timeout model", Latency(fixed=_STRAGGLERS, compute=_FIXED), _timeout),
)


@dataclass(frozen=True)
class Times:
    """Mean seconds of a round: expected from an idle start (None: no closed form), the same simulated, and in a run."""

    closed: float | None
    idle: float
    steady: float


@dataclass(frozen=True)
class Matvec:
    """An MDS-coded product on n workers: expected seconds from any k answers, k = 1..n, and the same simulated."""

    n: int
    mu: float
    seconds: NDArray[np.float64]
    simulated: NDArray[np.float64]
    repetition: float

    @property
    def best(self) -> int:
        """The best k."""
        return int(np.argmin(self.seconds)) + 1


def draw(models: Sequence[Model], rounds: int, seed: int) -> dict[str, Parts]:
    """Drawn times for each model; models with one law in common meet the same slow moments."""
    tables: dict[str, NDArray[np.float64]] = {}

    def table(law: Law | float) -> NDArray[np.float64]:
        if not isinstance(law, Law):
            return np.full((rounds, N), law)
        if law.name not in tables:
            tables[law.name] = Latency(fixed=law).parts(seed=seed, n=N, rounds=rounds).fixed
        return tables[law.name]

    nothing = np.zeros((rounds, N))
    return {one.name: Parts(table(one.latency.fixed), table(one.latency.compute), nothing) for one in models}


def compare(model: Model, parts: Parts) -> dict[tuple[str, int], Times]:
    """(scheme, s) -> times; the first scheme with s = 0 is no code."""
    result = {}
    for s in TOLERANCES:
        result["any n - s", s] = Times(model.closed(s), *_simulate(any_code(N, s), parts))
        if s in REPLICATED:
            scheme = repetition(N, s)
            result["repetition", s] = Times(idle_mean(scheme, model.latency), *_simulate(scheme, parts))
            result["partial work", s] = Times(None, *_simulate(partial_work(N, s, patience=0.0), parts))
    result["partial work, patience 2", 3] = Times(None, *_simulate(partial_work(N, 3, patience=2.0), parts))
    return result


def _simulate(scheme: Scheme, parts: Parts) -> tuple[float, float]:
    if scheme.shardwise:
        few = _few(len(parts.fixed))
        parts = Parts(parts.fixed[:few], parts.compute[:few], parts.transfer[:few])
    return float(idle_rounds(scheme, parts).seconds.mean()), steady_rounds(scheme, parts).mean


def _few(rounds: int) -> int:
    return max(rounds // _PARTIAL, 100)


def matvec(n: int, mu: float, rounds: int, rng: np.random.Generator) -> Matvec:
    """Each of n workers has a k-th of the work, which takes it 1/k plus an exponential of mean 1 / (k mu)."""
    k = np.arange(1, n + 1)
    slowest = np.sort(rng.standard_exponential((rounds, n)), axis=1).mean(axis=0)  # of the k fastest
    half = n // 2
    return Matvec(
        n,
        mu,
        np.array([coded_matvec_seconds(n, int(one), mu=mu) for one in k]),
        (1 + slowest / mu) / k,
        # Each of n/2 parts on two workers: the slowest part's faster worker.
        exponential_seconds(half, half, mean=1 / (2 * half * mu), shift=1 / half),
    )


def decodable(s: int, *, groups: bool) -> float:
    """P(a round decodes) where each of 64 workers straggles with 5 %; `groups`: of s + 1 workers, one reply each."""
    return float((1 - STRAGGLING ** (s + 1)) ** (N // (s + 1)) if groups else stats.binom.cdf(s, N, STRAGGLING))


@dataclass(frozen=True)
class Results:
    """Everything that the page says."""

    rounds: int
    curves: Mapping[str, Mapping[tuple[str, int], Times]]
    products: Sequence[Matvec]

    @property
    def furthest(self) -> float:
        """How far any simulated mean of an idle start lies from its closed form, relative."""
        times = [one for curve in self.curves.values() for one in curve.values()]
        pairs = [(one.idle, one.closed) for one in times if one.closed is not None]
        pairs += [(a, b) for one in self.products for a, b in zip(one.simulated, one.seconds, strict=True)]
        return float(max(abs(a / b - 1) for a, b in pairs))


def page(results: Results) -> str:
    """The page in Markdown; its figures lie in images/."""
    tables = {sheet.name: sheet.markdown() for sheet in sheets(results.curves, results.products, decodable)}
    at_3 = [{scheme: one for (scheme, s), one in curve.items() if s == 3} for curve in results.curves.values()]
    free, charged = at_3[:2]  # IGNORED and CHARGED
    base, sixteen = harmonic(N), harmonic(N // 4)
    code, slow = (curve["any n - s"].closed or 0.0 for curve in (free, charged))
    gain, loss = base / code, slow / base
    frc, partial, patient = (charged[key] for key in ("repetition", "partial work", "partial work, patience 2"))
    ten = next(one for one in results.products if (one.n, one.mu) == (10, 1))
    three, seven, groups = decodable(3, groups=False), decodable(7, groups=False), decodable(3, groups=True)
    text = f"""# The source chapter, recomputed

The idea of this project comes from the open book "Coded Computing" (CommIT), chapter 16, section 3. This page
recomputes the numbers of that section. It then adds two effects that the section leaves out: a worker with s + 1 shards
has s + 1 times the work, and in a run each round starts with the workers as the previous round left them.

**In short: the chapter's speed-up of {gain:.2f} for 64 GPUs holds if latency does not depend on the load. If latency
grows with the load, the same code is {loss:.2f} times slower than no code. Fractional repetition with s = 3 is then
faster than no code in a single round, but slower over a run. Partial work is faster in both.**

`make chapter` makes the tables and figures in about a minute, and `make chapter ARGS=--docs` rewrites this page.
There are n = {N} workers. Each number is the mean of {results.rounds:,} simulated rounds ({_few(results.rounds):,} for
partial work), and no such mean is more than {100 * results.furthest:.1f} % off its closed form. These terms are used:

| term | meaning |
| --- | --- |
| idle start | Every worker is idle when the round begins. All closed forms assume this. |
| in a run | Work cannot be cancelled. A worker that was not needed joins the next round when it has finished. |
| repetition | Fractional repetition. A round ends as soon as each group has sent one reply. |
| partial work | The same placement, but each message asks for one shard. An idle worker starts a second copy at once. |

## Expected round time against s

![Six panels, one for each latency model: mean time of a round against s, for three schemes](images/chapter-rounds.png)

Filled markers are means of the simulation with an idle start. The lines through them are closed forms, which partial
work does not have, nor repetition in the timeout model. A code that decodes from any n - s replies waits for the
(n - s)-th one. With exponential delays of mean 1 s, this takes H_n - H_s seconds on average, where H is the harmonic
number. The load either multiplies this time or adds c seconds per shard. In the timeout model, a Poisson number N of
workers straggles, {STRAGGLING * N:g} on average. The round takes (1 - c) + c (s + 1) seconds, and D more if N > s. Here
c = {_FIXED:g} and D = {_DELAY:g}.

The first table is for codes that decode from any n - s replies. It has the seconds of a round with an idle start, from
the closed form and (in brackets) from the simulation. The best s is searched up to {TOP}.

{tables["codes"]}

The second table compares the schemes. Each cell has the seconds of a round with an idle start / in a run. Without a
code both are the same.

{tables["beside"]}

## Coded matrix-vector multiplication

![Speed-up over no code against k, for 10 and for 100 workers](images/chapter-products.png)

The matrix is cut into k blocks, which are coded into n blocks, and any k answers suffice. The expected time is
E[T] = (1/k) (1 + (H_n - H_(n-k)) / mu). The unit is the time that one worker takes for the whole product without delay,
and mu is the rate of the exponential delay in this unit. A small k means little waiting and much work. The best k is
close to `best_fraction(mu)` n, which is its limit for many workers. For n = 10 and mu = 1 the best k is {ten.best},
with a time of {ten.seconds[ten.best - 1]:.3f}, compared with {ten.seconds[-1]:.3f} without a code. Two-fold repetition
(n/2 blocks, each on two workers) takes {ten.repetition:.3f}, because it doubles everybody's work and saves too little
waiting.

{tables["products"]}

## The ImageNet example

![Mean time of a round for each scheme, and the probability that a round decodes](images/chapter-example.png)

The example has 64 GPUs, s = 3 and exponential delays. A round takes H_64 = {base:.3f} seconds without a code and
H_64 - H_3 = {code:.3f} seconds with one, which is {gain:.2f} times faster. But each GPU has four times the work. If its
delay grows with the work, the round takes {slow:.2f} seconds, which is {loss:.2f} times slower than without a code.
Fractional repetition takes H_16 = {sixteen:.2f} seconds with the same load, but {frc.steady:.2f} seconds in a run.
Partial work takes {partial.steady:.2f} seconds in a run, and {patient.steady:.2f} with `Shards(patience=2)`. If the
load costs nothing, repetition is the fastest, with {free["repetition"].steady:.2f} seconds in a run.

The table has the seconds of a round, and the gain over no code:

{tables["example"]}

"5 % straggle, so s = 3" promises less than it seems. On average {STRAGGLING * N:g} of 64 workers straggle, so it is
often more than 3. The probability of at most 3 stragglers, P(Bin(64, 0.05) <= 3), is {three:.3f}, and of at most 7 it
is {seven:.3f}. Fractional repetition with groups of 4 decodes with probability {groups:.4f}, because it needs only one
reply from each group. The table has the probability that a round decodes:

{tables["decodable"]}

## What to correct when citing the chapter

* **Construction.** Tandon et al. do not build B from deterministic Reed-Solomon-like codes. They draw a random H with H
1 = 0 (arXiv [1612.03301](https://arxiv.org/abs/1612.03301)). Deterministic Reed-Solomon codes are due to Halbawi et al.
(arXiv [1706.05436](https://arxiv.org/abs/1706.05436)), and cyclic MDS codes to Raviv et al. (arXiv
[1707.03858](https://arxiv.org/abs/1707.03858)).

* **Decoding.** It does not take a system of n - s equations. A system of s equations is enough, and fractional
repetition needs none.

* **The example.** Its speed-up leaves out the work that the code adds. Its choice of s leaves out how much the number
of stragglers varies.
"""
    return "\n\n".join(map(wrapped, text.split("\n\n")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; write the page and its figures."""
    parser = argparse.ArgumentParser(prog="make chapter", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000, help="simulated for each point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "chapter", help="folder (default: out/chapter)")
    parser.add_argument(
        "--docs", type=Path, nargs="?", const=ROOT / "docs", help="copy the page into docs/ too, or here"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 200 or options.seed < 0:
        parser.error(f"--rounds {options.rounds} must be at least 200, and --seed {options.seed} at least 0.")
    for folder in (options.out, options.docs):
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"{folder} is a file; name a folder.")
    drawn = draw(MODELS, options.rounds, options.seed)
    progress = track(MODELS, "Simulating", console=Console(stderr=True), transient=True)
    curves = {one.name: compare(one, drawn[one.name]) for one in progress}
    rng = np.random.default_rng(options.seed)
    products = [matvec(n, mu, options.rounds, rng) for n in (10, 100) for mu in (0.5, 1.0, 10.0)]
    console = Console(width=120)
    for sheet in sheets(curves, products, decodable):
        console.print(sheet.rich())
    for folder in filter(None, (options.out, options.docs)):
        images = folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        chapter_figures.rounds(curves, images / "chapter-rounds.png")
        chapter_figures.products(products, images / "chapter-products.png")
        chapter_figures.example(curves, decodable, images / "chapter-example.png")
        (folder / "chapter.md").write_text(page(Results(options.rounds, curves, products)), encoding="utf-8")
        console.print(f"Page and figures: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
