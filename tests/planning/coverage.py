"""How often intervals of short traces cover the mean of a long one: python -m tests.planning.coverage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_gradcode.latency import Latency, Law, Parts, bimodal, bursty, lognormal
from fl_gradcode.planning import repetition, wait_for_all
from fl_gradcode.planning.simulation import coded_rounds
from fl_gradcode.planning.uncertainty import block_length, interval_of, resampled_means

N, LONG, SETTLE = 6, 8_000, 20
LAWS: dict[str, Law] = {
    "lognormal": lognormal(1.0, 0.5),
    "bimodal": bimodal(0.05, 10.0, jitter=0.1),
    "bursty": bursty(0.02, 0.2, 10.0, jitter=0.1),
}


def coverage(name: str, *, rounds: int, traces: int) -> dict[str, float]:
    """The share of traces whose interval holds the truth, for both times and how much faster one is than the other."""
    whole = Latency(0.2, 0.8, slowdown=LAWS[name]).parts(seed=1, n=N, rounds=LONG)
    truth = _seconds(whole, np.arange(LONG))[:, SETTLE:].mean(axis=1)
    rng = np.random.default_rng(1)
    hits = np.zeros(3)
    for _ in range(traces):
        rows = int(rng.integers(LONG - rounds)) + np.arange(rounds)
        seconds = _seconds(whole, np.concatenate([rows[:SETTLE], rows]))[:, SETTLE:]
        mean = seconds.mean(axis=1)
        ratio = seconds[0] / mean[0] - seconds[1] / mean[1]
        length = max(map(block_length, (*seconds, ratio)))
        drawn = resampled_means(seconds, length, rng)
        for at, (estimate, values, true) in enumerate(
            [
                (mean[0], drawn[0], truth[0]),
                (mean[1], drawn[1], truth[1]),
                (mean[0] / mean[1], drawn[0] / drawn[1], truth[0] / truth[1]),
            ]
        ):
            low, high = interval_of(float(estimate), values, rounds / length)
            hits[at] += low <= true <= high
    return dict(zip(("waiting", "coded", "gain"), (hits / traces).tolist(), strict=True))


def _seconds(parts: Parts, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    some = Parts(parts.fixed[rows], parts.compute[rows], parts.transfer[rows])
    schemes = (wait_for_all(N), repetition(N, 1))
    return np.stack(
        [coded_rounds(one, some.seconds(one.loads.astype(np.float64), 0.0)[None])[0].seconds for one in schemes]
    )


if __name__ == "__main__":
    for law, length in (("lognormal", 60), ("bimodal", 100), ("bursty", 200)):
        print(law, length, coverage(law, rounds=length, traces=200), flush=True)
