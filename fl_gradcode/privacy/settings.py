"""Privacy settings of a run: `DPSGD` protects records against the server; the others protect whole shards."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from .._files import absolute_path
from .._text import printable
from ..errors import InvalidSetting
from .accounting import ACCOUNTANTS, Spend, epsilon_of, noise_multiplier_for

__all__ = ["DPSGD", "CentralNoise", "IntegerNoise", "Privacy", "privacy_from_json", "privacy_to_json"]

_MODES = ("hooks", "ghost")
_NOISES = ("shared", "independent")
_SCOPES = ("shard", "sum")
# Bounds of what a server may ask for. Gradients of networks have norms far inside those of `max_grad_norm`. Beyond, the
# clipping factor or the noise is no number that single precision holds: at 1e-6 a factor times a gradient of the least
# normal size is subnormal, and the noise of a step at both upper bounds, 1e10, is the largest next to which the sums
# still are exact. The accountant counts a noise multiplier above 1e4 as 1e4, and one below 1e-9 as none.
_NORMS = (1e-6, 1e6)
_MULTIPLIERS = (1e-9, 1e4)
_RATES = (1e-9, 1.0)
_MOST_STEPS = 100_000


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Differentially private SGD in each client: protects single records of a shard against the server.

    Attributes:
        noise_multiplier: Standard deviation of the noise, over `max_grad_norm`; from 1e-9 to 10,000.
        max_grad_norm: Bound of one record's gradient in a step, from 1e-6 to 1e6.
        sample_rate: Chance of each record to be in a step's batch, the same for all shards; from 1e-9 to 1.
        steps: Steps that a shard is trained a round, at most 100,000.
        noise: "shared": all holders of a shard add the same noise, from a key that the server never has; one release a
            round. "independent": each holder adds its own: r holders are r releases, and decoding amplifies the noise.
        delta: Probability that the bound on epsilon does not cover; below 1 over the number of records.
        max_epsilon: The run does not start if it would spend more.
        grad_sample_mode: Opacus' way to clip single records: "hooks", or "ghost", which wide linear layers gain by, and
            and in which every weight is used through its own layer, once a step.
        honest_server: Whether the server is trusted to send the same weights to all holders of a shard. If not, a round
            counts as a release by each of them.
        accountant: "prv", or the faster and looser "rdp".

    References:
        Abadi et al., "Deep learning with differential privacy", CCS 2016.
    """

    unit: ClassVar[str] = "record"
    #: Whether clients add the noise, so that a release counts when it is asked for.
    in_clients: ClassVar[bool] = True

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    noise: Literal["shared", "independent"] = "shared"
    delta: float = 1e-5
    max_epsilon: float = math.inf
    grad_sample_mode: Literal["hooks", "ghost"] = "hooks"
    honest_server: bool = True
    accountant: Literal["prv", "rdp"] = "prv"

    def __post_init__(self) -> None:
        _within("max_grad_norm", self.max_grad_norm, _NORMS)
        _within("sample_rate", self.sample_rate, _RATES)
        if _whole("steps", self.steps) > _MOST_STEPS:
            raise InvalidSetting(f"steps={self.steps} must be at most {_MOST_STEPS}.")
        _within("noise_multiplier", self.noise_multiplier, _MULTIPLIERS)
        _one_of("noise", self.noise, _NOISES)
        _one_of("grad_sample_mode", self.grad_sample_mode, _MODES)
        _truth("honest_server", self.honest_server)
        _check_common(self)

    @classmethod
    def for_epsilon(
        cls,
        epsilon: float,
        *,
        rounds: int,
        max_grad_norm: float,
        sample_rate: float,
        steps: int,
        holders: int = 1,
        noise: Literal["shared", "independent"] = "shared",
        delta: float = 1e-5,
        honest_server: bool = True,
        accountant: Literal["prv", "rdp"] = "prv",
        **others: Any,
    ) -> DPSGD:
        """Returns the setting with the least noise that spends at most `epsilon` in `rounds` rounds.

        Args:
            epsilon: Bound for the whole run; it becomes `max_epsilon`.
            rounds: Number of rounds.
            holders: Number of workers that hold a shard. With independent noise, or a server that is not trusted, each
                of them is a release of its own.
            **others: Further attributes.
        """
        fields: dict[str, Any] = {
            "max_grad_norm": max_grad_norm,
            "sample_rate": sample_rate,
            "steps": steps,
            "noise": noise,
            "delta": delta,
            "honest_server": honest_server,
            "accountant": accountant,
            "max_epsilon": epsilon,
            **others,
        }
        draft = cls(noise_multiplier=1.0, **fields)  # checks all else before the search
        total = _whole("rounds", rounds) * steps * draft.releases(holders)
        found = noise_multiplier_for(epsilon, delta, sample_rate=sample_rate, steps=total, accountant=accountant)
        return cls(noise_multiplier=found, **fields)

    def releases(self, holders: int) -> int:
        """Returns how often one round releases a shard's update, if it has so many holders."""
        return 1 if self.noise == "shared" and self.honest_server else max(1, holders)

    def spend(self, rounds: int, *, holders: int = 1) -> Spend:
        """Returns the noisy steps that so many rounds take on one shard."""
        return Spend(self.noise_multiplier, self.sample_rate, rounds * self.steps * self.releases(holders))

    def epsilon(self, rounds: int, *, holders: int = 1) -> float:
        """Returns epsilon, at `delta`, of one shard after so many rounds."""
        return epsilon_of([self.spend(rounds, holders=holders)], self.delta, accountant=self.accountant)


@dataclass(frozen=True, kw_only=True)
class CentralNoise:
    """Clip each shard's update, add noise once after decoding: protects whole shards against readers of the model.

    The server is trusted: it sees the replies in the clear. Every shard weighs the same. What Flower's
    `DifferentialPrivacyServerSideFixedClipping` does for clients, under coding.

    Attributes:
        noise_multiplier: Standard deviation of the noise on the sum, over `clipping_norm`.
        clipping_norm: Bound of the norm of one shard's update.
        delta: Probability that the bound on epsilon does not cover; below 1 over the number of shards.
        max_epsilon: The run does not start if it would spend more.
        accountant: "prv", or the faster and looser "rdp".
        folder: Absolute path of a folder on the server for the ledger of spent privacy, which then covers all runs on
            these shards; empty: each run by itself.

    References:
        McMahan et al., "Learning differentially private recurrent language models", ICLR 2018.
    """

    unit: ClassVar[str] = "shard"
    in_clients: ClassVar[bool] = False

    noise_multiplier: float
    clipping_norm: float
    delta: float = 1e-5
    max_epsilon: float = math.inf
    accountant: Literal["prv", "rdp"] = "prv"
    folder: str = ""

    def __post_init__(self) -> None:
        _positive("clipping_norm", self.clipping_norm)
        _check_common(self)
        if self.folder:
            absolute_path(self.folder, "folder")

    def spend(self, rounds: int, *, holders: int = 1) -> Spend:
        """Returns what so many rounds release of one shard: one Gaussian release each, whatever `holders` is."""
        return Spend(self.noise_multiplier, 1.0, rounds)

    def epsilon(self, rounds: int, *, holders: int = 1) -> float:
        """Returns epsilon, at `delta`, of one shard after so many rounds."""
        return epsilon_of([self.spend(rounds)], self.delta, accountant=self.accountant)


@dataclass(frozen=True, kw_only=True)
class IntegerNoise:
    """Discrete Gaussian noise on each shard's integers, under masks: protects whole shards against the server.

    It needs `secure=`, whose manifest pins noise, clipping norm and scope: `fl-gradcode secure make
    --noise-multiplier`. The holders of a shard clip its update, round it to integers, and all add the same noise. Every
    shard weighs the same, and nothing else of `train()` leaves: no metric, no count, and no failure.

    Attributes:
        noise_multiplier: Standard deviation of the noise, over the most that one shard can change in a sum (see
            `fl_gradcode.secagg.sensitivity`).
        clipping_norm: Bound of the norm of one shard's update.
        scope: "shard": each shard has the whole noise, and is private whether masks hold or not. "sum": the shards that
            no colluder holds have it together, so privacy rests on the masks.
        delta: Probability that the bound on epsilon does not cover; below 1 over the number of shards.
        max_epsilon: The run does not start if it would spend more.
        honest_server: Whether the server is trusted to send the same to all holders of a shard. If not, a round counts
            as a release by each of them.

    References:
        Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020.
        Kairouz, Liu, Steinke, "The distributed discrete Gaussian mechanism", ICML 2021: sums of such noise.
    """

    unit: ClassVar[str] = "shard"
    in_clients: ClassVar[bool] = True
    #: Renyi divergences of the discrete Gaussian are at most those of the continuous one, which the RDP accountant
    #: counts. For "prv", which follows the continuous law itself, nobody has shown that.
    accountant: ClassVar[Literal["rdp"]] = "rdp"

    noise_multiplier: float
    clipping_norm: float
    scope: Literal["shard", "sum"] = "shard"
    delta: float = 1e-5
    max_epsilon: float = math.inf
    honest_server: bool = True

    def __post_init__(self) -> None:
        _positive("clipping_norm", self.clipping_norm)
        _one_of("scope", self.scope, _SCOPES)
        _truth("honest_server", self.honest_server)
        _check_common(self)

    @classmethod
    def for_epsilon(
        cls,
        epsilon: float,
        *,
        rounds: int,
        clipping_norm: float,
        holders: int = 1,
        delta: float = 1e-5,
        honest_server: bool = True,
        **others: Any,
    ) -> IntegerNoise:
        """Returns the setting with the least noise that spends at most `epsilon` in `rounds` rounds.

        Args:
            epsilon: Bound for the whole run; it becomes `max_epsilon`.
            rounds: Number of rounds.
            clipping_norm: Bound of the norm of one shard's update.
            holders: Number of workers that hold a shard; each counts if the server is not trusted.
            delta, honest_server: See the attributes.
            **others: Further attributes.
        """
        fields: dict[str, Any] = {
            "clipping_norm": clipping_norm,
            "delta": delta,
            "honest_server": honest_server,
            "max_epsilon": epsilon,
            **others,
        }
        draft = cls(noise_multiplier=1.0, **fields)  # checks all else before the search
        total = _whole("rounds", rounds) * draft.releases(holders)
        found = noise_multiplier_for(epsilon, delta, sample_rate=1.0, steps=total, accountant=cls.accountant)
        return cls(noise_multiplier=found, **fields)

    def releases(self, holders: int) -> int:
        """Returns how often one round releases a shard's update, if it has so many holders."""
        return 1 if self.honest_server else max(1, holders)

    def spend(self, rounds: int, *, holders: int = 1) -> Spend:
        """Returns what so many rounds release of one shard: a Gaussian release for each that counts."""
        return Spend(self.noise_multiplier, 1.0, rounds * self.releases(holders))

    def epsilon(self, rounds: int, *, holders: int = 1) -> float:
        """Returns epsilon, at `delta`, of one shard after so many rounds."""
        return epsilon_of([self.spend(rounds, holders=holders)], self.delta, accountant=self.accountant)


Privacy = DPSGD | CentralNoise | IntegerNoise

_KINDS: dict[str, type[Privacy]] = {"dp-sgd": DPSGD, "central": CentralNoise, "integer": IntegerNoise}


def privacy_to_json(privacy: Privacy, *, promise_only: bool = False) -> str:
    """Returns settings as JSON text, the same text for equal settings.

    Args:
        privacy: The settings.
        promise_only: Leave out what does not change the noise: budget, accountant and folder.
    """
    kind = next(kind for kind, cls in _KINDS.items() if isinstance(privacy, cls))
    values = {"kind": kind, **asdict(privacy)}
    if promise_only:
        values = {key: value for key, value in values.items() if key not in ("max_epsilon", "accountant", "folder")}
    return json.dumps(values, sort_keys=True)


def privacy_from_json(text: str) -> Privacy:
    """Returns the settings that `privacy_to_json` wrote.

    Raises:
        InvalidSetting: The text is of something else.
    """
    try:
        values = json.loads(text)
        return _KINDS[values.pop("kind")](**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidSetting(
            f"Privacy settings that cannot be read ({printable(str(error))}): are both sides of one version?"
        ) from None


def _check_common(privacy: Privacy) -> None:
    """Check what all kinds of settings have in common."""
    _positive("noise_multiplier", privacy.noise_multiplier)
    _number("delta", privacy.delta)
    _number("max_epsilon", privacy.max_epsilon)
    if not 0 < privacy.delta < 1:
        raise InvalidSetting(f"delta={privacy.delta} must lie between 0 and 1, and below 1 over the number of records.")
    if not privacy.max_epsilon > 0:
        raise InvalidSetting(f"max_epsilon={privacy.max_epsilon} must be greater than 0.")
    _one_of("accountant", privacy.accountant, ACCOUNTANTS)


def _truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidSetting(f"{name}={value!r} must be True or False.")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidSetting(f"{name}={value!r} must be a number.")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidSetting(f"{name}={value!r} must be a finite number greater than 0.")


def _within(name: str, value: object, bounds: tuple[float, float]) -> None:
    _number(name, value)
    least, most = bounds
    if not least <= value <= most:  # type: ignore[operator]
        raise InvalidSetting(f"{name}={value!r} must be a number from {least:g} to {most:g}.")


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidSetting(f"{name}={value!r} must be a whole number of at least 1.")
    return value


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidSetting(f"{name}={value!r} must be one of {', '.join(known)}.")
