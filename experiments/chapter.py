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

The idea of this project comes from the open book "Coded Computing" (CommIT), chapter 16, section 3. `make chapter`
(about a minute; `make chapter ARGS=--docs` rewrites this page) computes what that section states, and then what it
leaves out: a worker with s + 1 shards has s + 1 times the work, and each round of a run finds the workers as the last
one left them. In short: **the chapter's {gain:.2f}x for 64 GPUs holds where latency has nothing to do with the load.
Where it grows with the load, the same code is {loss:.2f} times slower than no code. Fractional repetition with s = 3
wins a single round and loses over a run; partial work wins both.**

n = {N} workers; means of {results.rounds:,} simulated rounds ({_few(results.rounds):,} for partial work). *Idle start*:
the round finds every worker idle, as all closed forms assume. *In a run*: nothing can be cancelled, and a worker that
was not needed joins the next round when it has finished. *Repetition* is fractional repetition; its round ends as soon
as each group has one reply. *Partial work* is the same placement, but one shard a message; a free worker begins a
second copy at once. No Monte Carlo mean on this page is more than {100 * results.furthest:.1f} % off its closed form.

## Expected time of a round against s

![Six panels, one a latency model: mean time of a round against s, for three schemes](images/chapter-rounds.png)

Filled markers are Monte Carlo means from an idle start, and the lines through them closed forms where there is one (not
for partial work, nor for repetition in the timeout model). A code that decodes from any n - s replies waits for the
(n - s)-th. The delays are exponential with a mean of 1 s, so that this takes H_n - H_s seconds on average; the load
multiplies it, or adds c seconds a shard. In the timeout model a Poisson number N of workers straggles,
{STRAGGLING * N:g} on average, and the round takes (1 - c) + c (s + 1) seconds, and D more if N > s; here c = {_FIXED:g}
and D = {_DELAY:g}.

Codes that decode from any n - s replies, seconds from an idle start: closed form (Monte Carlo); best s up to {TOP}.

{tables["codes"]}

Beside them, seconds of a round from an idle start / in a run. Without a code both are the same.

{tables["beside"]}

## Coded matrix-vector multiplication

![Speed-up over no code against k, for 10 and for 100 workers](images/chapter-products.png)

The matrix is cut into k blocks, which are coded into n; any k answers do. E[T] = (1/k) (1 + (H_n - H_(n-k)) / mu), in
units of what the whole product takes one worker without delay: with a small k there is little waiting and much work.
The best k is close to `best_fraction(mu)` n, its limit for many workers. For n = 10 and mu = 1 it is {ten.best}, with
{ten.seconds[ten.best - 1]:.3f} against {ten.seconds[-1]:.3f} uncoded. Two-fold repetition (n/2 blocks, each on two
workers) takes {ten.repetition:.3f}: it doubles everybody's work and saves too little waiting.

{tables["products"]}

## The ImageNet example

![Mean time of a round for each scheme, and the probability that a round decodes](images/chapter-example.png)

64 GPUs, s = 3, exponential delays. Without a code a round takes H_64 = {base:.3f} seconds, with one
H_64 - H_3 = {code:.3f}: {gain:.2f} times faster. Each GPU has four times the work, though. If its delay grows with it,
the round takes {slow:.2f} seconds, {loss:.2f} times slower. Fractional repetition takes H_16 = {sixteen:.2f} seconds
with the same load, but {frc.steady:.2f} in a run. Partial work takes {partial.steady:.2f} in a run, and
{patient.steady:.2f} with `Shards(patience=2)`. Where the load costs nothing, repetition is the fastest:
{free["repetition"].steady:.2f} in a run.

Seconds of a round, and how many times shorter than without a code:

{tables["example"]}

"5 % straggle, so s = 3" promises less than it seems. The mean is {STRAGGLING * N:g}, so more than 3 often straggle:
P(Bin(64, 0.05) <= 3) = {three:.3f}; s = 7 gives {seven:.3f}. Fractional repetition with groups of 4 decodes with
probability {groups:.4f}, because it needs one reply from each group instead of any n - s.

{tables["decodable"]}

## What to correct when citing the chapter

Tandon et al. do not build B from deterministic Reed-Solomon-like codes. They draw a random H with H 1 = 0
(arXiv [1612.03301](https://arxiv.org/abs/1612.03301)); deterministic Reed-Solomon codes are those of Halbawi et al.
(arXiv [1706.05436](https://arxiv.org/abs/1706.05436)), and cyclic MDS codes those of Raviv et al.
(arXiv [1707.03858](https://arxiv.org/abs/1707.03858)). Decoding needs no system of n - s equations: s are enough, and
fractional repetition needs none. The example's speed-up leaves out the work that the code adds, and its choice of s
leaves out how much the number of stragglers varies.
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
