"""What a user may set on `GradientCoding`, checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..codes import GradientCode, PrimeField
from ..errors import InvalidSetting
from ..privacy import DPSGD, CentralNoise, Privacy
from .replies import can_fill_in

__all__ = ["Approximation", "Options"]

_POLICIES = ("skip", "approximate", "raise")
_SENDING = ("coded", "shards", "adaptive")


@dataclass(frozen=True)
class Approximation:
    """How to estimate the mean of a round that cannot be decoded: `GradientCoding(...,
    on_undecodable=Approximation())`.

    Attributes:
        ridge: Weight of the replies' noise against the shards' coverage, see `GradientCode.least_squares_vector`; of
            use for codes with coefficients of both signs.
        fill_in: Put the last known update of a missing group (fractional repetition) or shard (`send="shards"`) in its
            place. Costs the server one vector of the model's size for each of them.
    """

    ridge: float = 0.0
    fill_in: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < float("inf"):
            raise InvalidSetting(f"ridge={self.ridge} must be a number of at least 0.")


@dataclass(frozen=True)
class Options:
    """The checked settings of one `GradientCoding`; its docstring explains them."""

    on_undecodable: Literal["skip", "approximate", "raise"] | Approximation = "skip"
    send: Literal["coded", "shards", "adaptive"] = "coded"
    patience: float | None = None
    kappa_max: float = float("inf")
    seed: int = 0
    node_timeout: float = 60.0
    give_up_after: float | None = None
    allow_fixed_data: bool = False
    privacy: Privacy | None = None
    digests: Mapping[int, str] | None = None

    def check(self, code: GradientCode) -> None:
        """Refuse what makes no sense, alone or with this code.

        Raises:
            InvalidSetting: With the value, and what would be right.
        """
        if not isinstance(self.on_undecodable, Approximation) and self.on_undecodable not in _POLICIES:
            known = ", ".join(_POLICIES)
            raise InvalidSetting(f"on_undecodable={self.on_undecodable!r} must be one of {known} or an Approximation.")
        if self.send not in _SENDING:
            raise InvalidSetting(f"send={self.send!r} must be one of {', '.join(_SENDING)}.")
        for name, seconds in (("node_timeout", self.node_timeout), ("give_up_after", self.give_up_after)):
            if seconds is not None and not seconds > 0:
                raise InvalidSetting(f"{name}={seconds} must be a number of seconds greater than 0.")
        if not 0 <= self.waiting < float("inf"):
            raise InvalidSetting(f"patience={self.patience} must be a number of at least 0.")
        if self.patience is not None and self.send != "shards":
            raise InvalidSetting(f"patience={self.patience} is about second copies of a shard: it needs send='shards'.")
        shardwise = self.send in ("shards", "adaptive")
        if shardwise and (self.give_up_after is not None or self.kappa_max != float("inf")):
            raise InvalidSetting(
                f"give_up_after and kappa_max are about coded vectors: with send={self.send!r} a message may be one "
                "shard, where nothing is amplified. Leave them out."
            )
        if not self.kappa_max > 0:
            raise InvalidSetting(f"kappa_max={self.kappa_max} must be greater than 0.")
        if shardwise and code.m > 1:
            raise InvalidSetting(
                f"send={self.send!r} sends whole updates, and this code divides them by m={code.m}. Take a code with "
                "m = 1."
            )
        if shardwise and isinstance(code.numbers, PrimeField):
            raise InvalidSetting(
                f"send={self.send!r} sends plain updates; a code over a prime field codes them. Choose one."
            )
        if self.send == "adaptive" and (self.fills_in or not code.exact):
            what = "fill_in remembers what was sent one way" if self.fills_in else f"a {code.name} code is not exact"
            raise InvalidSetting(
                f"send='adaptive' changes between two exact ways to send: {what}. Choose one of the two."
            )
        if not code.exact and not shardwise and self.approximation is None:
            raise InvalidSetting(
                f"A {code.name} code promises no exact sum: say on_undecodable='approximate', or take another code."
            )
        if self.approximation is not None and isinstance(code.numbers, PrimeField):
            raise InvalidSetting(
                "Over a prime field a sum is exact or unknown: on_undecodable='approximate' needs a code over the "
                "reals."
            )
        self._check_privacy(code)
        if self.fills_in and not can_fill_in(code, shardwise=shardwise):
            raise InvalidSetting(
                f"fill_in needs to know single updates, and a {code.name} code mixes them. Take fractional_repetition "
                "with m = 1, or send='shards'."
            )

    def _check_privacy(self, code: GradientCode) -> None:
        if self.privacy is None:
            return
        if not isinstance(self.privacy, DPSGD | CentralNoise):
            raise InvalidSetting(f"privacy={self.privacy!r}: pass a DPSGD(...) or a CentralNoise(...).")
        central = isinstance(self.privacy, CentralNoise)
        if central and (self.approximation is not None or not code.exact):
            raise InvalidSetting(
                "CentralNoise is scaled to an exact sum; an estimate may hold a shard several times. Take an exact "
                "code, and on_undecodable='skip' or 'raise'."
            )
        independent = isinstance(self.privacy, DPSGD) and self.privacy.noise == "independent"
        if independent and isinstance(code.numbers, PrimeField):
            raise InvalidSetting(
                "Over a prime field holders of a shard must agree in every bit, and independent noise differs: take "
                "noise='shared', or a code over the reals."
            )

    @property
    def waiting(self) -> float:
        """The patience that holds: 2 unless said otherwise, at which second copies cost next to nothing."""
        return 2.0 if self.patience is None else self.patience

    @property
    def approximation(self) -> Approximation | None:
        """How to estimate, if at all."""
        if isinstance(self.on_undecodable, Approximation):
            return self.on_undecodable
        return Approximation() if self.on_undecodable == "approximate" else None

    @property
    def fills_in(self) -> bool:
        """Whether missing updates are taken from an earlier round."""
        return self.approximation is not None and self.approximation.fill_in

    @property
    def policy(self) -> str:
        """For people."""
        return "approximate" if isinstance(self.on_undecodable, Approximation) else self.on_undecodable
