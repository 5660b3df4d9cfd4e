"""How sure measured rounds make a plan: rounds are resampled in blocks, and parts of a trace are compared.

Rounds that follow each other are alike, since slow periods last and a late job delays the next rounds. So blocks of
rounds are drawn, with a length that is chosen from the autocorrelation of the rounds.

References:
    Politis and Romano, "A circular block-resampling procedure for stationary data", 1992; Politis and White, "Automatic
    block-length selection for the dependent bootstrap", Econometric Reviews 23, 2004, corrected by Patton et al., 2009.
    Meketon and Schmeiser, "Overlapping batch means: something for nothing?", 1984, for the degrees of freedom.
    Percentiles are those of logarithms of means, spread as by Student's t.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["LEVEL", "block_length", "interval_of", "resampled_means"]

#: Probability with which an interval is meant to cover.
LEVEL = 0.9
_REPEATS = 500

Array = NDArray[np.float64]


def block_length(seconds: Array) -> int:
    """Returns the number of rounds of a block, between 1 and a quarter of the rounds.

    Args:
        seconds: Seconds of each round, shape (rounds,).
    """
    rounds = len(seconds)
    x = seconds - seconds.mean()
    variance = float(x @ x) / rounds
    if rounds < 8 or not math.isfinite(variance) or variance <= 1e-24 * float(np.square(seconds).mean()):
        return 1
    most = min(rounds // 2, math.ceil(math.sqrt(rounds)) + 10)
    lags = np.array([float(x[: rounds - lag] @ x[lag:]) / rounds for lag in range(most + 1)])
    bound = 2 * math.sqrt(math.log10(rounds) / rounds)
    quiet = max(5, math.ceil(math.sqrt(math.log10(rounds))))
    small = np.abs(lags[1:] / variance) < bound
    last = next((lag for lag in range(most) if small[lag : lag + quiet].all()), most)
    width = min(2 * max(last, 1), most)
    scaled = np.arange(1, width + 1) / width
    window = np.where(scaled <= 0.5, 1.0, 2 * (1 - scaled))
    spectrum = lags[0] + 2 * float(window @ lags[1 : width + 1])
    slope = 2 * float(window @ (np.arange(1, width + 1) * lags[1 : width + 1]))
    if spectrum <= 0:  # rounds make up for each other
        return min(width, rounds // 4)
    length = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * rounds ** (1 / 3)
    return int(min(max(1, round(length)), rounds // 4))


def resampled_means(seconds: Array, length: int, rng: np.random.Generator) -> Array:
    """Returns the mean seconds of resampled runs, shape (schemes, repeats).

    Args:
        seconds: Seconds of each round, shape (schemes, rounds). Schemes are resampled together.
        length: Rounds of a block.
        rng: Draws the blocks.
    """
    rounds = seconds.shape[1]
    around = np.concatenate([np.zeros((len(seconds), 1)), np.cumsum(np.tile(seconds, 2), axis=1)], axis=1)
    sums = around[:, length : length + rounds] - around[:, :rounds]
    blocks = -(-rounds // length)
    counts = np.stack([np.bincount(rng.integers(rounds, size=blocks), minlength=rounds) for _ in range(_REPEATS)])
    return np.asarray(sums @ counts.T / (blocks * length))


def interval_of(estimate: float, drawn: Array, blocks: float) -> tuple[float, float]:
    """Returns the ends of an interval around an estimate that is above 0.

    Args:
        estimate: The estimate from all rounds.
        drawn: The same from each resampled run, shape (repeats,).
        blocks: Number of blocks that the rounds hold.
    """
    tail = (1 - LEVEL) / 2
    apart_blocks = max(1.0, blocks - 1)
    # Blocks overlap, which leaves half as many degrees of freedom again as blocks side by side would.
    freedom = 1.5 * apart_blocks
    wider = float(stats.t.ppf(1 - tail, freedom) / stats.norm.ppf(1 - tail))
    wider *= math.sqrt((apart_blocks + 1) / apart_blocks)
    apart = np.log(np.maximum(drawn, 1e-300)) - math.log(estimate)
    low, high = np.quantile(apart, [tail, 1 - tail])
    return estimate * math.exp(wider * min(0.0, low)), estimate * math.exp(wider * max(0.0, min(high, 700 / wider)))
