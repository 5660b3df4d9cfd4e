"""Differential privacy of masked sums: how much integer noise a shard takes, and what a manifest promises by it.

A shard's integers are those of its clipped update, each entry rounded up or down by a dither that its holders share. So
with the shard or without, a sum differs by a vector of length `sensitivity`. The noise is a discrete Gaussian, whose
Renyi divergences are at most the continuous one's.

References:
    Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020, theorem 4.
    Kairouz, Liu, Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure aggregation",
    ICML 2021: sums of discrete Gaussians. Their conditional rounding is not used; its gain over the sure bound is small
    where the clipping norm is many units long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ..errors import InvalidSetting
from ..masking import Quantiser
from ..privacy import DPSGD, CentralNoise, IntegerNoise, Privacy, is_statistic
from .classes import ShardClasses

__all__ = ["check_noise", "counted_shards", "noisy_quantiser", "promised", "sensitivity", "why_not_private"]

#: Least noise of a shard whose noise is a part of the sum's, in integer units. A sum of such numbers then differs from
#: a discrete Gaussian by less than 10 k e^-88.
_LEAST_PART = 3.0
_MOST_HEADROOM = 16
_SAME = 1e-9  # relative difference of two noise multipliers that are the same but for rounding


def sensitivity(quantiser: Quantiser, size: int) -> float:
    """Returns the most by which one shard changes a sum, as a Euclidean norm in integer units.

    It is `C 2^f + sqrt(d)`: the clipped update, and less than one unit of rounding in each entry. (An entry is rounded
    by 1 - 2^-17 units at most, which leaves room for the norm's own rounding.)

    Args:
        quantiser: The quantiser, which clips the norm to C.
        size: Number d of entries.
    """
    return quantiser.bound * 2.0**quantiser.fraction_bits + math.sqrt(size)


def counted_shards(classes: ShardClasses, colluders: int) -> int:
    """Returns how many shards' noise is surely unknown to the server and so many colluders, at least 0.

    Whoever is given a class's seed knows the noise of its shards. Overlaps of what colluders hold are not looked for,
    so there may be more.
    """
    held = [sum(len(classes.members[c]) for c in one) for one in {*classes.supports}]
    return max(0, classes.k - sum(sorted(held, reverse=True)[:colluders]))


def noisy_quantiser(
    privacy: IntegerNoise, classes: ShardClasses, size: int, *, headroom: int, colluders: int
) -> Quantiser:
    """Returns the quantiser for some noise, with as many bits of headroom as noise and range test need.

    Args:
        privacy: The noise.
        classes: The classes of shards.
        size: Number of entries of an update.
        headroom: Fewest bits of headroom.
        colluders: Number of workers that may collude with the server.

    Raises:
        InvalidSetting: The noise does not fit the ring, or no shard's noise is unknown to the colluders.
    """
    counted = 1
    if privacy.scope == "sum":
        counted = counted_shards(classes, colluders)
        if not counted:
            raise InvalidSetting(f"{colluders} colluding workers may hold all {classes.k} shards and know all noise.")
    for bits in range(headroom, _MOST_HEADROOM + 1):
        plain = Quantiser(classes.ring, classes.k, privacy.clipping_norm, "norm", bits)
        sigma = privacy.noise_multiplier * sensitivity(plain, size) / math.sqrt(counted)
        last = bits == _MOST_HEADROOM
        try:
            made = replace(plain, noise=sigma)
        except InvalidSetting:
            if last:
                raise
            continue
        if (
            last or 2 * made.limit(made.k) <= made.ring.half
        ):  # a random entry fails the range test at least half the time
            return made
    raise InvalidSetting(f"headroom={headroom!r} must be a whole number of bits in 1..{_MOST_HEADROOM}.")


def promised(quantiser: Quantiser, classes: ShardClasses, size: int, scope: str, colluders: int) -> IntegerNoise | None:
    """Returns what integer noise a manifest has, for so many colluders; None if it has none.

    Raises:
        InvalidSetting: No noise is left that the colluders do not know.
    """
    if not quantiser.noise:
        return None
    counted = 1 if scope == "shard" else counted_shards(classes, colluders)
    if not counted:
        raise InvalidSetting(f"{colluders} colluding workers may hold all {classes.k} shards and know all noise.")
    return IntegerNoise(
        noise_multiplier=quantiser.noise * math.sqrt(counted) / sensitivity(quantiser, size),
        clipping_norm=quantiser.bound,
        scope=scope,  # type: ignore[arg-type]
    )


def check_noise(
    quantiser: Quantiser,
    classes: ShardClasses,
    scope: str,
    *,
    metrics: bool,
    rehearsal: bool,
    cohorts: int,
) -> None:
    """Check what a manifest's body with integer noise must have.

    Args:
        quantiser: Its quantiser.
        classes: Its classes.
        scope: "shard" or "sum".
        metrics: Whether it has metrics of training or evaluation.
        rehearsal: Whether holders compare what they compute.
        cohorts: Number of separate sums.

    Raises:
        InvalidSetting: Something is missing, or must not be there.
    """
    if quantiser.clip != "norm":
        raise InvalidSetting("integer noise needs clip='norm', since a shard's share in a sum is bounded by its norm.")
    if metrics:
        raise InvalidSetting("with integer noise no metric leaves a node, of training or evaluation: leave them out.")
    if scope == "sum" and not rehearsal:
        raise InvalidSetting(
            "noise with scope='sum' rests on equal integers of all holders of a shard, and needs a rehearsal or "
            "agree='always': holders that differ show their difference with a part of the noise alone."
        )
    if scope == "sum" and cohorts != 1:
        raise InvalidSetting(f"noise with scope='sum' is counted for one sum, and there are {cohorts} cohorts.")
    if scope == "sum" and quantiser.noise < _LEAST_PART:
        raise InvalidSetting(
            f"noise={quantiser.noise:.3g} units a shard must be at least {_LEAST_PART:g} with scope='sum': take more "
            "noise, or less headroom."
        )


def why_not_private(
    privacy: Privacy | None,
    pinned: IntegerNoise | None,
    quantiser: Quantiser,
    classes: ShardClasses,
    *,
    arrays: Iterable[str],
    metrics: bool,
    evaluation: bool,
) -> str:
    """Returns why a manifest does not go with a privacy setting, as the end of a sentence; empty if it does.

    Args:
        privacy: The setting.
        pinned: The integer noise that the manifest has.
        quantiser: Its quantiser.
        classes: Its classes.
        arrays: Names of its arrays.
        metrics, evaluation: Whether it has metrics of training, and of evaluation.
    """
    if isinstance(privacy, IntegerNoise) and pinned is None:
        return (
            "has a manifest without integer noise: make one with `fl-gradcode secure make --noise-multiplier "
            f"{privacy.noise_multiplier:g} --clipping-norm {privacy.clipping_norm:g}`"
        )
    if pinned is not None and not isinstance(privacy, IntegerNoise):
        return (
            "has a manifest with integer noise, which is counted by privacy=IntegerNoise(noise_multiplier="
            f"{pinned.noise_multiplier:.6g}, clipping_norm={pinned.clipping_norm:g}, scope={pinned.scope!r}): say that"
        )
    if privacy is None:
        return ""
    if isinstance(privacy, DPSGD) and privacy.noise == "independent":
        return (
            "uses that copies of a shard are equal, and independent noise makes them differ, so that their difference "
            "would show noise in clear: say noise='shared'"
        )
    if metrics or (evaluation and privacy.in_clients):
        what = "metrics of training" if metrics else "an evaluation"
        return f"has a manifest with {what}, which would leave without noise: leave it out of the layout"
    statistics = None if isinstance(privacy, DPSGD) else next(filter(is_statistic, arrays), None)
    if statistics is not None:
        return f"would spoil the running statistics {statistics!r} by noise: take GroupNorm, or return no statistics"
    if isinstance(privacy, IntegerNoise):
        assert pinned is not None
        close = math.isclose(privacy.noise_multiplier, pinned.noise_multiplier, rel_tol=_SAME)
        if not close or (privacy.clipping_norm, privacy.scope) != (pinned.clipping_norm, pinned.scope):
            return (
                f"has a manifest with noise_multiplier={pinned.noise_multiplier:.6g}, clipping_norm="
                f"{pinned.clipping_norm:g} and scope={pinned.scope!r}, and privacy= says {privacy.noise_multiplier:.6g}"
                f", {privacy.clipping_norm:g} and {privacy.scope!r}: say the manifest's, or make another"
            )
    if isinstance(privacy, CentralNoise):
        clipped = quantiser.clip == "norm" and quantiser.bound == privacy.clipping_norm
        if not clipped or quantiser.largest_weight != 1:
            return (
                "clips as its manifest says, which CentralNoise needs to be by its own norm, with weight 1: make one "
                f"with `fl-gradcode secure make --clip norm --bound {privacy.clipping_norm:g} --largest-weight 1`"
            )
    return ""
