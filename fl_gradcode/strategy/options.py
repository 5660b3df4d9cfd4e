"""The settings of `GradientCoding`, and their checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flwr.app import ArrayRecord

from ..averaging import ModelAverage
from ..codes import GradientCode, PrimeField, locates_wrong_replies
from ..errors import InvalidSetting
from ..planning import LEARNED
from ..privacy import DPSGD, CentralNoise, IntegerNoise, Privacy
from ..staleness import FLOAT16, StalenessRule

if TYPE_CHECKING:
    from ..secagg import SecureAggregation

__all__ = ["Adaptive", "Approximation", "Coded", "Options", "Send", "Shards", "can_fill_in", "check_start", "send_of"]

_POLICIES = ("skip", "approximate", "raise")
_ON_DISAGREEMENT = ("warn", "skip", "raise")


@dataclass(frozen=True)
class Approximation:
    """Settings of the estimate that replaces the mean of an undecodable round.

        strategy = GradientCoding(FedAvg(), code, on_undecodable=Approximation(fill_in=True))

    Attributes:
        ridge: Weight of the replies' noise against the shards' coverage, see `GradientCode.least_squares_vector`. It
            helps with codes that have coefficients of both signs.
        fill_in: Replace a missing group (fractional repetition) or shard (`send="shards"`) by its last known update.
            The server then stores one vector of the model's size for each group or shard.
    """

    ridge: float = 0.0
    fill_in: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < float("inf"):
            raise InvalidSetting(f"ridge={self.ridge} must be a number of at least 0.")


@dataclass(frozen=True)
class Coded:
    """The mode in which each worker sends one coded vector a round, which needs the least upload.

        strategy = GradientCoding(FedAvg(), code, send=Coded(kappa_max=2))

    Attributes:
        kappa_max: Wait for further replies, up to the timeout, while decoding would amplify noise by more than this
            factor.
        give_up_after: Seconds after which a client gives up before its next shard and is free again; None for never.
    """

    kappa_max: float = float("inf")
    give_up_after: float | None = None

    def __post_init__(self) -> None:
        if not self.kappa_max > 0:
            raise InvalidSetting(f"kappa_max={self.kappa_max} must be greater than 0.")
        if self.give_up_after is not None and not self.give_up_after > 0:
            raise InvalidSetting(f"give_up_after={self.give_up_after} must be a number of seconds greater than 0.")

    def __str__(self) -> str:
        return "coded"


@dataclass(frozen=True)
class Shards:
    """The mode in which each message asks for one shard; it is best if computing takes most of the time.

    A free node gets the uncovered shard that it holds and that the fewest nodes are working on. The first copy of each
    shard counts.

    With `staleness`, a round may end before every shard has an update of this round: the last known update of a shard
    is used again, with its full weight, until it is `staleness` rounds old. No data are left out, but the model is not
    the exact one, and the ledger says so. The server then stores one update of the model's size for each shard.

        strategy = GradientCoding(FedAvg(), code, send=Shards(staleness=3))

    Attributes:
        patience: Start a second copy of a shard only when the first has taken this many times as long as the free node
            took for its last shard. With 2, equally fast nodes stay free for the next round. With 0, second copies
            start at once. With "learned", they start by the times that the run has learned of its workers: first of the
            shard whose copy is expected to take longest, and once that is 0.6 times what the free node takes.
        staleness: Largest age of an update that is used again, in rounds. 0 is exact.
        fresh: Least share of the shards that must have an update of this round, and least share of the weight, of
            which half is enough.
        grace: How long to wait on for further updates once there are enough, as a share of the round's time so far.
        store: Where the last updates are kept: "" for memory, "float16" for half of the memory, or the absolute path of
            a new file that is mapped into memory; see `UpdateMemory`.
        forced: Accept a strategy with which stale updates are known to oscillate: momentum, adaptive rates, a server
            learning rate other than 1.
    """

    patience: float | Literal["learned"] = 2.0
    staleness: int = 0
    fresh: float = 0.6
    grace: float = 0.03
    store: str = ""
    forced: bool = False

    def __post_init__(self) -> None:
        patience = -1 if isinstance(self.patience, str) else self.patience
        if self.patience != LEARNED and not 0 <= patience < float("inf"):
            raise InvalidSetting(f"patience={self.patience!r} must be a number of at least 0, or 'learned'.")
        if type(self.staleness) is not int or self.staleness < 0:
            raise InvalidSetting(f"staleness={self.staleness!r} must be a whole number of rounds, or 0 for none.")
        if not 0 < self.fresh <= 1:
            raise InvalidSetting(f"fresh={self.fresh} must be a share of the shards, above 0 and at most 1.")
        if not 0 <= self.grace < float("inf"):
            raise InvalidSetting(f"grace={self.grace} must be a share of the round's time, of at least 0.")
        if self.store and self.store != FLOAT16 and not os.path.isabs(self.store):
            raise InvalidSetting(f"store={self.store!r} must be 'float16', the absolute path of a file, or ''.")

    @property
    def rule(self) -> StalenessRule | None:
        """When a round may end with stale updates; None if it may not."""
        return StalenessRule(self.staleness, self.fresh, self.grace) if self.staleness else None

    def __str__(self) -> str:
        return "shards"


@dataclass(frozen=True)
class Adaptive:
    """The mode that changes between `Coded` and `Shards`, by replaying recent rounds every few rounds.

    It also chooses how many of a shard's holders compute it. A choice that turns out slower than the previous one is
    reverted. If only some holders compute a shard and all of them fail at once, the round is lost. This cannot happen
    with `on_undecodable="raise"`, where all holders take part.
    """

    def __str__(self) -> str:
        return "adaptive"


Send = Coded | Shards | Adaptive
_BY_WORD: dict[str, Send] = {"coded": Coded(), "shards": Shards(), "adaptive": Adaptive()}


def send_of(send: Send | str) -> Send:
    """Returns the mode for a value or for one of the words "coded", "shards" and "adaptive".

    Raises:
        InvalidSetting: `send` is neither.
    """
    if isinstance(send, Coded | Shards | Adaptive):
        return send
    if send not in _BY_WORD:
        raise InvalidSetting(
            f"send={send!r} must be one of {', '.join(_BY_WORD)}, or a Coded(...), Shards(...) or Adaptive()."
        )
    return _BY_WORD[send]


def can_fill_in(code: GradientCode, *, shardwise: bool) -> bool:
    """Returns whether replies hold updates of single groups or shards, which can fill in for missing ones later."""
    return shardwise or (code.groups is not None and code.m == 1)


@dataclass(frozen=True)
class Options:
    """The checked settings of one `GradientCoding`, whose docstring explains them.

    Raises:
        InvalidSetting: A setting is invalid. The message names the value and what would be right.
    """

    on_undecodable: Literal["skip", "approximate", "raise"] | Approximation = "skip"
    send: Send = Coded()
    sees: Literal["mean", "replies"] | None = None
    seed: int = 0
    node_timeout: float = 60.0
    give_up_rounds: int | None = 3
    verify: int = 3
    on_disagreement: Literal["warn", "skip", "raise"] = "warn"
    allow_fixed_data: bool = False
    privacy: Privacy | None = None
    digests: Mapping[int, str] | None = None
    votes: int = 0
    secure: SecureAggregation | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.on_undecodable, Approximation) and self.on_undecodable not in _POLICIES:
            known = ", ".join(_POLICIES)
            raise InvalidSetting(f"on_undecodable={self.on_undecodable!r} must be one of {known} or an Approximation.")
        if self.sees not in ("mean", "replies", None):
            raise InvalidSetting(f"sees={self.sees!r} must be 'mean' or 'replies'.")
        if self.sees == "replies" and self.only_mean:
            raise InvalidSetting(f"sees='replies' needs send='shards' or 'adaptive', and {self.only_mean}.")
        if not self.node_timeout > 0:
            raise InvalidSetting(f"node_timeout={self.node_timeout} must be a number of seconds greater than 0.")
        if self.give_up_rounds is not None and not self.give_up_rounds >= 1:
            raise InvalidSetting(f"give_up_rounds={self.give_up_rounds} must be at least 1, or None for never.")
        if type(self.verify) is not int or self.verify < 0:
            raise InvalidSetting(f"verify={self.verify!r} must be a number of rounds, or 0 for none.")
        if self.on_disagreement not in _ON_DISAGREEMENT:
            known = ", ".join(_ON_DISAGREEMENT)
            raise InvalidSetting(f"on_disagreement={self.on_disagreement!r} must be one of {known}.")
        if type(self.votes) is not int or self.votes < 0:
            raise InvalidSetting(f"votes={self.votes!r} must be a number of wrong replies, or 0 for none.")
        if self.votes and (self.approximation is not None or self.independent or isinstance(self.send, Adaptive)):
            what = (
                "on_undecodable='approximate' uses copies that nobody has confirmed"
                if self.approximation is not None
                else "independent noise makes all copies of a shard different"
                if self.independent
                else "send='adaptive' may send one copy"
            )
            raise InvalidSetting(f"votes={self.votes} counts equal copies, and {what}. Choose one.")
        if self.privacy is not None and not isinstance(self.privacy, DPSGD | CentralNoise | IntegerNoise):
            raise InvalidSetting(
                f"privacy={self.privacy!r}: pass a DPSGD(...), CentralNoise(...) or IntegerNoise(...)."
            )
        if isinstance(self.privacy, IntegerNoise) and self.secure is None:
            raise InvalidSetting(
                "privacy=IntegerNoise(...) is added under masks: pass secure=SecureAggregation(...) too, or take "
                "DPSGD(...)."
            )
        if self.average is not None:
            ModelAverage(self.average)  # checks it
        if self.secure is not None and (wrong := self._not_masked()):
            raise InvalidSetting(f"secure= {wrong}.")
        if self.staleness is not None and (wrong := self._not_stale()):
            raise InvalidSetting(f"Shards(staleness=...) {wrong}.")

    def _not_stale(self) -> str:
        """Returns what these settings have that stale updates do not combine with, or an empty string."""
        if self.approximation is not None:
            return "uses last updates already: choose on_undecodable='skip' or 'raise'"
        if self.votes:
            return "uses late updates that nobody has confirmed, and votes= counts equal copies: choose one"
        if self.secure is not None:
            return "needs single shards' updates, and secure= hides them: choose one"
        if isinstance(self.privacy, CentralNoise):
            return "adds updates of several rounds, and CentralNoise is scaled to those of one: take DPSGD(...)"
        return ""

    def _not_masked(self) -> str:
        """Returns what these settings have that masked replies do not combine with, or an empty string."""
        send = self.send
        assert self.secure is not None
        if isinstance(send, Adaptive):
            return f"has one way of sending, and send='adaptive' changes it: choose send={self.secure.send!r}"
        if isinstance(send, Coded) != (self.secure.send == "coded"):
            return (
                f"has a manifest for send={self.secure.send!r}, and send={str(send)!r} was chosen: choose the "
                f"manifest's, or make another with `fl-gradcode secure make --send {send}`"
            )
        if self.approximation is not None:
            return "decodes the exact sum or nothing: choose on_undecodable='skip' or 'raise'"
        if isinstance(send, Coded) and (send.give_up_after is not None or send.kappa_max != float("inf")):
            return "sends whole classes without rounding noise: leave give_up_after= and kappa_max= out"
        if wrong := self.secure.body.why_not_private(self.privacy):
            return wrong
        if self.on_disagreement != "warn":
            return "never uses copies that differ: leave on_disagreement= out"
        if self.digests is not None:
            return "has its own manifest, which commits to the data: leave manifest= out"
        return ""

    @property
    def only_mean(self) -> str:
        """Why there is no more than a mean for the wrapped strategy to see; empty if it may see each shard's reply."""
        if not self.shardwise:
            return f"send={str(self.send)!r} gives it one decoded mean"
        if self.staleness is not None:
            return "Shards(staleness=...) gives it a mean with updates of earlier rounds"
        if self.privacy is not None:
            return "privacy= protects only the mean"
        if self.secure is not None:
            return "secure= reveals only the mean"
        return "" if self.approximation is None else "on_undecodable='approximate' estimates a mean"

    @property
    def independent(self) -> bool:
        """Whether holders of a shard send different updates by design, because each draws noise of its own."""
        return isinstance(self.privacy, DPSGD) and self.privacy.noise == "independent"

    @property
    def staleness(self) -> StalenessRule | None:
        """When a round may end with stale updates; None if it may not."""
        return self.send.rule if isinstance(self.send, Shards) else None

    @property
    def shardwise(self) -> bool:
        """Whether a message may ask for one shard, whose update is sent without coding."""
        return not isinstance(self.send, Coded)

    def check_code(self, code: GradientCode) -> None:
        """Refuse a code that does not fit these settings.

        Raises:
            InvalidSetting: The code and a setting exclude each other. The message says what would be right.
        """
        send, field = str(self.send), isinstance(code.numbers, PrimeField)
        if self.shardwise and code.m > 1:
            raise InvalidSetting(
                f"send={send!r} sends whole updates, and this code divides them by m={code.m}. Use a code with m = 1."
            )
        if self.shardwise and field and self.secure is None:
            raise InvalidSetting(
                f"send={send!r} sends plain updates; a code over a prime field codes them. Choose one."
            )
        if isinstance(self.send, Adaptive) and (self.fills_in or not code.exact):
            what = "fill_in works in one mode only" if self.fills_in else f"a {code.name} code is not exact"
            raise InvalidSetting(
                f"send='adaptive' changes between two exact modes, and {what}. Choose send='coded' or 'shards'."
            )
        if not code.exact and not self.shardwise and self.approximation is None:
            raise InvalidSetting(
                f"A {code.name} code promises no exact sum: pass on_undecodable='approximate', or use another code."
            )
        if self.approximation is not None and field:
            raise InvalidSetting(
                "Over a prime field a sum is exact or unknown: on_undecodable='approximate' needs a code over the "
                "reals."
            )
        self._check_privacy(code)
        self._check_votes(code)
        if self.secure is not None:
            self.secure.check_code(code)
        if self.fills_in and not can_fill_in(code, shardwise=self.shardwise):
            raise InvalidSetting(
                f"fill_in needs to know single updates, and a {code.name} code mixes them. Use fractional_repetition "
                "with m = 1, or send='shards'."
            )

    def _check_privacy(self, code: GradientCode) -> None:
        if self.privacy is None:
            return
        central = isinstance(self.privacy, CentralNoise)
        if central and (self.approximation is not None or not code.exact):
            raise InvalidSetting(
                "CentralNoise is scaled to an exact sum; an estimate may hold a shard several times. Use an exact "
                "code, and on_undecodable='skip' or 'raise'."
            )
        if self.independent and isinstance(code.numbers, PrimeField):
            raise InvalidSetting(
                "Over a prime field holders of a shard must agree in every bit, and independent noise differs: take "
                "noise='shared', or a code over the reals."
            )

    def _check_votes(self, code: GradientCode) -> None:
        if not self.votes:
            return
        fewest = min(len(code.holders_of(j)) for j in range(code.k))
        needed = 2 * self.votes + code.m
        if self.shardwise or (code.groups is not None and code.m == 1):
            if fewest < needed:
                raise InvalidSetting(
                    f"votes={self.votes} needs {needed} holders of each shard, so that {self.votes + 1} of them agree "
                    f"whoever lies; a shard has {fewest}. Use s={2 * self.votes} or more."
                )
        elif not locates_wrong_replies(code):
            raise InvalidSetting(
                f"votes={self.votes} cannot tell whose reply is wrong under a {code.name} code, which mixes copies. "
                "Use fractional_repetition with m = 1, reed_solomon, or send='shards'."
            )
        elif code.s < 2 * self.votes:
            raise InvalidSetting(
                f"votes={self.votes} takes two of the code's s={code.s} stragglers for each wrong reply. Use "
                f"s={2 * self.votes} or more."
            )

    @property
    def approximation(self) -> Approximation | None:
        """Settings of the estimate for undecodable rounds; None if they are not estimated."""
        if isinstance(self.on_undecodable, Approximation):
            return self.on_undecodable
        return Approximation() if self.on_undecodable == "approximate" else None

    @property
    def fills_in(self) -> bool:
        """Whether the last known updates fill in for missing ones."""
        return self.approximation is not None and self.approximation.fill_in

    @property
    def policy(self) -> str:
        """The policy for undecodable rounds as a word: "skip", "approximate" or "raise"."""
        return "approximate" if isinstance(self.on_undecodable, Approximation) else self.on_undecodable


def check_start(initial_arrays: object, num_rounds: object, timeout: object) -> None:
    """Check what a run is started with.

    Raises:
        InvalidSetting: The model is no ArrayRecord, the number of rounds no whole number, or the timeout neither None
            nor a number of at least 0 (no clock passes NaN, so a phase would wait for ever).
    """
    if not isinstance(initial_arrays, ArrayRecord):
        raise InvalidSetting(
            f"initial_arrays is a {type(initial_arrays).__name__}: pass an ArrayRecord, such as "
            "ArrayRecord(model.state_dict()) or ArrayRecord(list_of_numpy_arrays)."
        )
    if isinstance(num_rounds, bool) or not hasattr(num_rounds, "__index__"):
        raise InvalidSetting(f"num_rounds={num_rounds!r}: pass a whole number, such as num_rounds=3.")
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (number and timeout >= 0):  # type: ignore[operator]
        raise InvalidSetting(f"timeout={timeout!r}: pass seconds of at least 0, or None to wait without a limit.")
