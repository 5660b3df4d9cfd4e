"""The server's half of a private run: what has been asked of each shard, what that costs, and noise on decoded sums."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..codes import GradientCode, PrimeField
from ..errors import InvalidSetting
from ..runlog import PrivacyLine, RoundRow
from .accounting import Spend, composed, epsilon_of
from .budget_ledger import BudgetLedger, Request
from .settings import DPSGD, CentralNoise, IntegerNoise, Privacy, privacy_to_json

__all__ = ["Account", "CentralGaussian", "Releases", "RunAccount", "amplification"]

_log = logging.getLogger(__name__)
_SETS = 100  # of survivors that are tried
_LARGEST = 10**9  # of numbers of shards, rounds and draws

#: First and last round of each of several ranges, ascending and apart.
Ranges = tuple[tuple[int, int], ...]
#: Shard -> how many hold it, and the rounds in which they were asked before.
Releases = dict[int, tuple[int, Ranges]]


@dataclass(frozen=True)
class Account:
    """Rounds and draws of noise, shard by shard; a value.

    Attributes:
        holders: Shard -> the most holders that it has had.
        ranges: Shard -> the rounds in which its update was, or may have been, released.
        draws: Shard -> draws of noise after decoding: each is a release, also a second one of the same round.
        asked: The last round that was asked, and the digest of the request; "": it cannot be asked alike again.
    """

    holders: Mapping[int, int]
    ranges: Mapping[int, Ranges]
    draws: Mapping[int, int]
    asked: tuple[int, str] | None = None

    @classmethod
    def new(cls, holders: Mapping[int, int]) -> Self:
        """Returns the account of a run that has asked for nothing."""
        return cls(dict(holders), dict.fromkeys(holders, ()), dict.fromkeys(holders, 0))

    @property
    def state(self) -> dict[str, Any]:
        """The account as JSON can hold it; what `merged` takes."""
        return {
            "released": [[shard, [*map(list, ranges)]] for shard, ranges in self.ranges.items()],
            "draws": [*map(list, self.draws.items())],
            "holders": [*map(list, self.holders.items())],
            "asked": self.asked,
        }

    def merged(self, state: Mapping[str, Any]) -> Account:
        """Returns the account with what another one of the same run has, given as its `state`.

        Raises:
            InvalidSetting: The state is damaged, or of other shards.
        """
        try:
            return self._merged(state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
            raise InvalidSetting(
                "The privacy account beside the checkpoint, or in it, is damaged or of other shards: restore the "
                "file. Without it nobody knows what was asked."
            ) from None

    def _merged(self, state: Mapping[str, Any]) -> Account:
        account = self
        for shard, ranges in state["released"]:
            account = account.released([_whole(shard)], *((_whole(first), _whole(last)) for first, last in ranges))
        counts = {}
        for name in ("draws", "holders"):
            mine = dict(getattr(self, name))
            for shard, count in state.get(name, ()):
                mine[_whole(shard)] = max(mine[_whole(shard)], _whole(count))
            counts[name] = mine
        number, request = state.get("asked") or (0, "")
        newer = number and (self.asked is None or _whole(number) >= self.asked[0])
        return replace(account, **counts, asked=(_whole(number), str(request)) if newer else self.asked)

    def covers(self, state: Mapping[str, Any]) -> bool:
        """Whether it has all that another account, given as its `state`, has released and drawn."""
        whole = self.merged(state)
        return whole.ranges == self.ranges and whole.draws == self.draws

    def released(self, shards: Iterable[int], *ranges: tuple[int, int]) -> Account:
        """Returns the account with updates of these shards released in these rounds too.

        Args:
            shards: Which.
            *ranges: First and last round of each range.
        """
        more = {shard: _joined([*self.ranges[shard], *ranges]) for shard in shards}
        return replace(self, ranges={**self.ranges, **more})

    def drawn(self, shards: Iterable[int]) -> Account:
        """Returns the account with one more draw of noise for each of these shards."""
        return replace(self, draws={**self.draws, **{shard: self.draws[shard] + 1 for shard in shards}})

    def rounds(self, shard: int) -> int:
        """Returns how many releases that were, or draws of noise, whichever is more."""
        return max(self.draws[shard], sum(last - first + 1 for first, last in self.ranges[shard]))

    @property
    def last_round(self) -> int:
        """The last round in which any shard was asked; 0: none was."""
        return max((last for ranges in self.ranges.values() for _, last in ranges), default=0)


def _whole(value: Any) -> int:
    """Returns a whole number that a run can reach.

    Raises:
        ValueError: It is none.
    """
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(value)
    return value


def _joined(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Returns the same rounds in as few ranges as possible, ascending."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(one for one in ranges if one[0] <= one[1]):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


class CentralGaussian:
    """The Gaussian mechanism on a decoded sum of clipped updates.

    Args:
        privacy: What is promised.
        shards: How many shards the sum is over; public, so it is the sum's weight.
        rounding: By how much rounding to fixed point can change an entry of the sum for one shard more.
    """

    def __init__(self, privacy: CentralNoise, shards: int, rounding: float = 0.0) -> None:
        self.weight = float(shards)
        self._privacy, self._rounding = privacy, rounding

    def add_to(self, total: NDArray[np.floating], counters: Sequence[slice] = ()) -> NDArray[np.float64]:
        """Returns the sum with one Gaussian draw, shape (d,), keyed by the operating system's generator.

        Args:
            total: The sum of clipped updates.
            counters: Where whole numbers lie, which get no noise: they are set to zero, so that they stay as they were.
        """
        from .key_derivation import PRFStream

        sensitivity = self._privacy.clipping_norm + self._rounding * np.sqrt(total.size)
        noise = PRFStream(os.urandom(32)).normal(total.size)
        noisy = np.asarray(total + self._privacy.noise_multiplier * sensitivity * noise, np.float64)
        for entries in counters:
            noisy[entries] = 0
        return noisy


def amplification(code: GradientCode) -> tuple[float, float]:
    """By how much decoding multiplies the variance of noise that each holder draws for itself: least and most, over
    survivor sets of size n - s (at most 100 of them, drawn with a fixed seed).

    With shared noise it is 1, whoever answers.
    """
    rng = np.random.default_rng(0)
    sets = [rng.choice(code.n, code.n - code.s, replace=False).tolist() for _ in range(_SETS)]
    squares = [code.kappa(one) ** 2 for one in sets if code.decodable(one)] or [float("nan")]
    return min(squares), max(squares)


class RunAccount:
    """Accounts for one run.

    `releases` and `gaussian` only tell; `charge_request` and `charge_draw` spend. Whoever calls those keeps `state` on
    disk before anything leaves.

    Args:
        privacy: What is promised.
        code: Who holds which shards.
        run: Name of the run.
        send: How shards' updates are sent; only coded ones are amplified.
        rounding: By how much rounding can change an entry of a sum for one shard more; by default the code's.
    """

    def __init__(
        self, privacy: Privacy, code: GradientCode, run: str, *, send: str = "coded", rounding: float | None = None
    ) -> None:
        self.privacy, self.code, self.run, self._send, self._rounding = privacy, code, run, send, rounding
        self._account = Account.new({j: len(code.holders_of(j)) for j in range(code.k)})
        #: Digest of all that is asked besides the model, so far as the server knows it.
        self.request = ""
        self._lost = 0  # draws of rounds that a restart has lost, and that are drawn again
        folder = privacy.folder if isinstance(privacy, CentralNoise) else ""
        self._ledger = BudgetLedger(folder) if folder else None
        #: What earlier starts spent, of this run too, each different history once.
        self._before: set[tuple[Spend, ...]] = {()}
        if self._ledger is not None:
            self._before |= {composed(e.spend for e in self._ledger.entries(j)) for j in range(code.k)}
        #: Whether this object knows all of its run's rounds.
        self._knows_all = self._ledger is not None

    def follow(self, code: GradientCode) -> None:
        """The code is another one from now on; a shard's holders count as the most that it has had."""
        self.code = code
        holders = {j: max(count, len(code.holders_of(j))) for j, count in self._account.holders.items()}
        self._account = replace(self._account, holders=holders)

    @property
    def text(self) -> str:
        """What clients have to know of the promise, as JSON for the plan."""
        one = self.privacy
        return privacy_to_json(replace(one, folder="") if isinstance(one, CentralNoise) else one)

    def begin(self, num_rounds: int) -> None:
        """Say what the run is going to cost, before it starts.

        Raises:
            InvalidSetting: More than `max_epsilon`.
        """
        self._knows_all = True
        one, holders = self.privacy, max(self._account.holders.values())
        whole = self._epsilon(num_rounds + self._lost, holders)
        if whole > one.max_epsilon:
            fits = _most(num_rounds, lambda rounds: self._epsilon(rounds + self._lost, holders) <= one.max_epsilon)
            raise InvalidSetting(
                f"{num_rounds} rounds would spend epsilon {whole:.3g} (delta {one.delta:g}) on a {one.unit}, above "
                f"max_epsilon={one.max_epsilon:g}. Run {fits} rounds at most, or take more noise: "
                f"fl-gradcode privacy --epsilon {one.max_epsilon:g} says how much."
                if fits
                else f"One round alone would spend more than max_epsilon={one.max_epsilon:g} (delta {one.delta:g}): "
                f"take more noise; fl-gradcode privacy --epsilon {one.max_epsilon:g} says how much."
            )
        _log.info(
            "Privacy: %s; all %d rounds spend at most epsilon %.3g, delta %g, on a %s of a shard. Not covered: "
            "evaluation metrics, numbers of examples, timing.",
            self._told,
            num_rounds,
            whole,
            one.delta,
            one.unit,
        )
        if isinstance(one, DPSGD) and one.noise == "independent" and holders > 1:
            least, most = (1.0, 1.0) if self._send == "shards" else amplification(self.code)
            if self._send == "adaptive":
                least, most = min(1.0, least), max(1.0, most)
            shared = replace(one, noise="shared").epsilon(num_rounds, holders=holders)
            _log.warning(
                "INDEPENDENT NOISE: each of the up to %d holders of a shard releases its update with noise of its own. "
                "That spends epsilon %.3g, where shared noise spends %.3g; and decoding multiplies the noise's "
                "variance by %.2g to %.2g, where shared noise stays as it is.",
                holders,
                whole,
                shared,
                least,
                most,
            )

    def releases(self, server_round: int, shards: Sequence[int]) -> Releases:
        """Returns what the plan of a round says of its shards' holders and earlier releases; nothing is charged.

        Only noise in the clients needs it: elsewhere it is empty.
        """
        if not self.privacy.in_clients:
            return {}
        account = self._up_to(server_round)
        return {shard: (account.holders[shard], account.ranges[shard]) for shard in shards}

    def charge_request(self, server_round: int, shards: Sequence[int]) -> bool:
        """Charge for asking clients for noisy updates; returns whether that costs anything.

        A release counts from the moment it is asked for, whoever answers. Noise after decoding costs nothing yet.
        """
        if not self.privacy.in_clients:
            return False
        account = self._up_to(server_round).released(shards, (server_round, server_round))
        self._account, self._knows_all = replace(account, asked=(server_round, self.request)), True
        return True

    def gaussian(self, shards: int) -> CentralGaussian | None:
        """Returns what adds noise to a decoded sum over so many shards; None if the clients have added it."""
        if not isinstance(self.privacy, CentralNoise):
            return None
        rounding = self._rounding
        if rounding is None:
            rounding = self.code.numbers.rounding(1) if isinstance(self.code.numbers, PrimeField) else 0.0
        return CentralGaussian(self.privacy, shards, rounding)

    def charge_draw(self, server_round: int, shards: Sequence[int]) -> None:
        """Charge for one draw of noise on a sum over these shards, in the budget ledger too, before it is drawn.

        Raises:
            PrivacyRefused: It would exceed the budget.
        """
        account = self._up_to(server_round)
        for shard in shards if self._ledger is not None else ():
            assert self._ledger is not None
            spend = self.privacy.spend(1)
            request = Request(shard, self.run, server_round, "", spend, repeatable=False)
            most = self.privacy.max_epsilon
            self._ledger.charge(request, delta=self.privacy.delta, accountant=self.privacy.accountant, budget=most)
        self._account = account.drawn(shards).released(shards, (server_round, server_round))
        self._knows_all = True

    def line(self, told: tuple[float, float] | None, other_requests: Mapping[int, tuple[int, int]]) -> PrivacyLine:
        """Returns what a ledger row says of privacy: what was spent so far on the shard that it was most for.

        Args:
            told: Largest epsilon that clients reported, of this run and of all runs; None: none did.
            other_requests: Shard -> two workers that bound its key to different requests.
        """
        one, rounds, holders = self.privacy, self._account.rounds, self._account.holders
        shard = max(holders, key=lambda j: one.spend(rounds(j), holders=holders[j]).steps)
        epsilon = self._epsilon(rounds(shard), holders[shard])
        return PrivacyLine(
            unit=one.unit,
            noise=_name_of(one),
            noise_multiplier=one.noise_multiplier,
            clipping_norm=one.max_grad_norm if isinstance(one, DPSGD) else one.clipping_norm,
            sample_rate=one.sample_rate if isinstance(one, DPSGD) else None,
            steps=one.steps if isinstance(one, DPSGD) else None,
            delta=one.delta,
            accountant=one.accountant,
            epsilon=max(epsilon, told[0] if told else 0.0),
            epsilon_told=told[0] if told else None,
            epsilon_told_all_runs=told[1] if told else None,
            other_requests=dict(sorted(other_requests.items())),
        )

    def _epsilon(self, rounds: int, holders: int) -> float:
        """Of a shard after so many rounds, earlier runs included where they are recorded."""
        one, spend = self.privacy, self.privacy.spend(rounds, holders=holders)
        return max(epsilon_of([*before, spend], one.delta, accountant=one.accountant) for before in self._before)

    @property
    def state(self) -> dict[str, Any]:
        """What was asked and drawn so far, for a checkpoint."""
        return self._account.state

    def begin_anew(self, latest: dict[str, Any] | None) -> None:
        """No round is done.

        Args:
            latest: What `state` was last in a run of this name, if there was one.

        Raises:
            InvalidSetting: That run has asked for rounds: they would be asked again, and counted once.
        """
        earlier = self._account if latest is None else Account.new(self._account.holders).merged(latest)
        if latest is not None and earlier.last_round:
            raise InvalidSetting(
                f"Run {self.run!r} has already asked for rounds up to {earlier.last_round}, and its checkpoint is "
                "missing: if it started again, its rounds would be released twice but counted once. Restore the "
                "checkpoint, or give the run another name."
            )

    def resume(
        self,
        saved: dict[str, Any] | None,
        latest: dict[str, Any] | None,
        rounds: int,
        rows: Iterable[RoundRow] = (),
    ) -> int:
        """Go on with a run of which so many rounds are done; returns the number after which its rounds go on.

        That is greater than `rounds` if the next round was asked before and would be asked otherwise now: another
        answer to it would be a release that nobody counts, or with the same noise one without any. Its number is
        spent then, and not used again.

        Args:
            saved: What `state` was when those rounds were done; None: it is not known.
            latest: What `state` was last. None, or older than `saved`: it is not known, and all shards count as asked
                in all of these rounds and in the next.
            rounds: How many rounds are done; the one behind them may have been under way.
            rows: Of the run, as the ledger has them. If they go on behind both accounts, older files were put back:
                what was asked since then counts, and one round more.
        """
        account, shards = self._account, range(self.code.k)
        draws = dict(account.draws)
        if self._ledger is not None:  # this run's part is in the account
            entries = {shard: self._ledger.entries(shard) for shard in shards}
            self._before = {()} | {composed(e.spend for e in entries[j] if e.run != self.run) for j in shards}
            for shard in shards:
                drawn = sum(e.spend.steps for e in entries[shard] if e.run == self.run)
                draws[shard] = max(draws[shard], drawn)
        account = replace(account, draws=draws)
        if latest is not None:
            account = account.merged(latest)
        known = latest is not None and (saved is None or account.covers(saved))
        if saved is not None:
            account = account.merged(saved)
        seen, last = self._last_of(rows), account.last_round
        if seen > last or not known:
            under_way = max(seen, rounds) + 1
            account = account.released(shards, (1, under_way))
            if not self.privacy.in_clients:
                more = seen - last + 1 if seen > last else None
                draws = {j: max(n, rounds + 1, 0 if more is None else n + more) for j, n in account.draws.items()}
                account = replace(account, draws=draws)
            account = replace(account, asked=max(account.asked or (0, ""), (under_way, "")))
        self._account = account
        self._lost = max(0, max(account.draws.values()) - rounds)
        number, request = account.asked or (0, "")
        if not self.privacy.in_clients or number <= rounds:
            return rounds
        alike = number == rounds + 1 and self._repeatable and request and request == self.request
        return rounds if alike else number

    def _last_of(self, rows: Iterable[RoundRow]) -> int:
        """The last round that released something: being asked is enough, unless the noise comes after decoding."""
        asked = [(row.round, row.train) for row in rows if row.train is not None]
        if not self.privacy.in_clients:
            asked = [(number, phase) for number, phase in asked if phase.outcome != "skipped"]
        return max((number for number, _ in asked), default=0)

    @property
    def _repeatable(self) -> bool:
        """Whether the same request gets the same answer."""
        one = self.privacy
        return one.in_clients and not (isinstance(one, DPSGD) and one.noise == "independent")

    def _up_to(self, server_round: int) -> Account:
        """Returns the account as it stands before a round.

        In a run that goes on after a restart, and not by `start`, it is not known who was asked in the rounds before:
        all shards count as asked.
        """
        return self._account if self._knows_all else self._account.released(range(self.code.k), (1, server_round - 1))

    @property
    def _told(self) -> str:
        one = self.privacy
        if isinstance(one, DPSGD):
            return (
                f"DP-SGD with {one.noise} noise, multiplier {one.noise_multiplier:.4g}, gradients clipped to "
                f"{one.max_grad_norm:g}, sample rate {one.sample_rate:.4g}, {one.steps} steps a round"
            )
        where = "noise after decoding"
        if isinstance(one, IntegerNoise):
            where = "integer noise in each shard" if one.scope == "shard" else "integer noise in the sum under masks"
        return f"{where}, multiplier {one.noise_multiplier:.4g}, updates clipped to {one.clipping_norm:g}"


def _name_of(privacy: Privacy) -> str:
    """Returns the word of a ledger row for a kind of noise."""
    if isinstance(privacy, DPSGD):
        return privacy.noise
    if isinstance(privacy, CentralNoise):
        return "central"
    return "integer" if privacy.scope == "shard" else "integer-sum"


def _most(rounds: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `rounds` that fits, by bisection; 0 if none does."""
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
