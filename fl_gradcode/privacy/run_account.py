"""The server's half of a private run: what has been asked of each shard, what that costs, and noise on decoded sums."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codes import GradientCode, PrimeField
from ..errors import InvalidSetting
from .accounting import Spend, composed, epsilon_of
from .budget_ledger import Request, SpentLedger
from .settings import DPSGD, CentralNoise, Privacy, privacy_to_json

__all__ = ["Account", "CentralGaussian", "RunAccount", "amplification"]


class Account:
    """Rounds and draws of noise, shard by shard. It only grows.

    Args:
        holders: Shard -> how many hold it.
    """

    def __init__(self, holders: Mapping[int, int]) -> None:
        #: Shard -> the most holders that it has had.
        self.holders = dict(holders)
        #: Shard -> draws of noise after decoding: each is a release, also a second one of the same round.
        self.draws = dict.fromkeys(holders, 0)
        #: The last round that was asked, and the digest of the request; "": it cannot be asked alike again.
        self.asked: tuple[int, str] | None = None
        self._released: dict[int, list[tuple[int, int]]] = {shard: [] for shard in holders}

    @property
    def state(self) -> dict[str, Any]:
        """As JSON can hold it; what `merge` takes."""
        return {
            "released": [*self._released.items()],
            "draws": [*self.draws.items()],
            "holders": [*self.holders.items()],
            "asked": self.asked,
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what another account of the same run has."""
        for shard, ranges in state["released"]:
            self.release(int(shard), *((int(first), int(last)) for first, last in ranges))
        for mine, key in ((self.draws, "draws"), (self.holders, "holders")):
            for shard, count in state.get(key, ()):
                mine[int(shard)] = max(mine[int(shard)], int(count))
        number, request = state.get("asked") or (0, "")
        if number and (self.asked is None or number >= self.asked[0]):
            self.asked = (int(number), str(request))

    def covers(self, state: Mapping[str, Any]) -> bool:
        """Whether it has all that the other one has released and drawn."""
        whole = Account(self.holders)
        whole.merge(self.state)
        whole.merge(state)
        return whole._released == self._released and whole.draws == self.draws

    def release(self, shard: int, *ranges: tuple[int, int]) -> None:
        """The shard's update was, or may have been, released in these rounds: first and last of each range."""
        self._released[shard] = _joined([*self._released[shard], *ranges])

    def released(self, shard: int) -> tuple[tuple[int, int], ...]:
        """Ranges of rounds in which its update may have been released."""
        return tuple(self._released[shard])

    def rounds(self, shard: int) -> int:
        """How many releases that were, or draws of noise, whichever is more."""
        return max(self.draws[shard], sum(last - first + 1 for first, last in self._released[shard]))

    @property
    def last_round(self) -> int:
        """The last round in which any shard was asked; 0: none was."""
        return max((last for ranges in self._released.values() for _, last in ranges), default=0)


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rounds, in as few ranges as there can be, ascending."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(one for one in ranges if one[0] <= one[1]):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


_SETS = 100  # of survivors that are tried


class CentralGaussian:
    """One noisy sum.

    Args:
        privacy: Noise and bound.
        code: For what quantisation adds to the bound.
        shards: How many are summed: the public weight of the mean.
        charge: Called before noise is drawn.
    """

    def __init__(self, privacy: CentralNoise, code: GradientCode, shards: int, charge: Callable[[], None]) -> None:
        self.weight = float(shards)
        self._privacy, self._charge = privacy, charge
        self._rounding = code.numbers.rounding(1) if isinstance(code.numbers, PrimeField) else 0.0

    def noisy(self, total: NDArray[np.floating]) -> NDArray[np.float64]:
        """The decoded sum of clipped updates with one Gaussian draw, from a key of the operating system's generator."""
        from .key_derivation import KeyedStream

        self._charge()
        sensitivity = self._privacy.clipping_norm + self._rounding * np.sqrt(total.size)
        noise = KeyedStream(os.urandom(32)).normal(total.size)
        return np.asarray(total + self._privacy.noise_multiplier * sensitivity * noise, np.float64)


def amplification(code: GradientCode) -> tuple[float, float]:
    """By how much decoding multiplies the variance of noise that each holder draws for itself: least and most, over
    survivor sets of size n - s (at most 100 of them, drawn with a fixed seed).

    With shared noise it is 1, whoever answers.
    """
    rng = np.random.default_rng(0)
    sets = [rng.choice(code.n, code.n - code.s, replace=False).tolist() for _ in range(_SETS)]
    squares = [code.kappa(one) ** 2 for one in sets if code.decodable(one)] or [float("nan")]
    return min(squares), max(squares)


_log = logging.getLogger(__name__)


class RunAccount:
    """Accounts for one run.

    Args:
        privacy: What is promised.
        code: Who holds which shards.
        run: Name of the run.
        send: How shards' updates are sent; only coded ones are amplified.
    """

    def __init__(self, privacy: Privacy, code: GradientCode, run: str, *, send: str = "coded") -> None:
        self.privacy, self.code, self.run, self._send = privacy, code, run, send
        self._account = Account({j: len(code.holders_of(j)) for j in range(code.k)})
        #: Digest of all that is asked besides the model, so far as the server knows it.
        self.request = ""
        self._lost = 0  # draws of rounds that a restart has lost, and that are drawn again
        folder = privacy.folder if isinstance(privacy, CentralNoise) else ""
        self._ledger = SpentLedger(folder) if folder else None
        #: What earlier starts spent, of this run too, each different history once.
        self._before: set[tuple[Spend, ...]] = {()}
        if self._ledger is not None:
            self._before |= {composed(e.spend for e in self._ledger.entries(j)) for j in range(code.k)}
        #: Called with `state` whenever it has changed, before anything leaves.
        self.keep: Callable[[dict[str, Any]], None] = lambda state: None
        #: Whether this object knows all of its run's rounds.
        self._knows_all = self._ledger is not None

    def follow(self, code: GradientCode) -> None:
        """The code is another one from now on; a shard's holders count as the most that it has had."""
        self.code = code
        account = self._account
        account.holders = {j: max(count, len(code.holders_of(j))) for j, count in account.holders.items()}

    @property
    def text(self) -> str:
        """For the plan: what clients have to know."""
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

    def ask(self, server_round: int, shards: Sequence[int]) -> dict[int, tuple[int, tuple[tuple[int, int], ...]]]:
        """For the plan: each shard's holders, and when they were asked before. From now on this round counts."""
        if not isinstance(self.privacy, DPSGD):
            return {}
        self._goes_on(server_round)
        told = {}
        for shard in shards:
            told[shard] = (self._account.holders[shard], self._account.released(shard))
            self._account.release(shard, (server_round, server_round))
        self._account.asked = (server_round, self.request)
        self.keep(self.state)
        return told

    def release(self, server_round: int, shards: Sequence[int]) -> CentralGaussian | None:
        """What is to be done to the decoded sum before anybody sees it; None if the clients did all."""
        if not isinstance(self.privacy, CentralNoise):
            return None

        def charge() -> None:
            self._charge(server_round, shards)

        return CentralGaussian(self.privacy, self.code, len(shards), charge)

    def entry(self, told: tuple[float, float] | None, other_requests: Mapping[int, tuple[int, int]]) -> dict[str, Any]:
        """Returns what a ledger row says of privacy: what was spent so far on the shard that it was most for.

        Args:
            told: Largest epsilon that clients reported, of this run and of all runs; None: none did.
            other_requests: Shard -> two workers that bound its key to different requests.
        """
        one, rounds, holders = self.privacy, self._account.rounds, self._account.holders
        shard = max(holders, key=lambda j: one.spend(rounds(j), holders=holders[j]).steps)
        epsilon = self._epsilon(rounds(shard), holders[shard])
        return {
            "unit": one.unit,
            "noise": one.noise if isinstance(one, DPSGD) else "central",
            "noise-multiplier": one.noise_multiplier,
            "clipping-norm": one.max_grad_norm if isinstance(one, DPSGD) else one.clipping_norm,
            "sample-rate": one.sample_rate if isinstance(one, DPSGD) else None,
            "steps": one.steps if isinstance(one, DPSGD) else None,
            "delta": one.delta,
            "accountant": one.accountant,
            "epsilon": max(epsilon, told[0] if told else 0.0),
            "epsilon-told": told[0] if told else None,
            "epsilon-told-all-runs": told[1] if told else None,
            "other-requests": {str(j): [*pair] for j, pair in sorted(other_requests.items())},
        }

    def _epsilon(self, rounds: int, holders: int) -> float:
        """Of a shard after so many rounds, earlier runs included where they are recorded."""
        one, spend = self.privacy, self.privacy.spend(rounds, holders=holders)
        return max(epsilon_of([*before, spend], one.delta, accountant=one.accountant) for before in self._before)

    def _charge(self, server_round: int, shards: Sequence[int]) -> None:
        """On disk before the model leaves."""
        self._goes_on(server_round)
        for shard in shards:
            if self._ledger is not None:
                spend = self.privacy.spend(1)
                request = Request(shard, self.run, server_round, "", spend, repeatable=False)
                most = self.privacy.max_epsilon
                self._ledger.charge(request, delta=self.privacy.delta, accountant=self.privacy.accountant, budget=most)
            self._account.draws[shard] += 1
            self._account.release(shard, (server_round, server_round))
        self.keep(self.state)

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
        if latest is not None:
            earlier = Account(self._account.holders)
            earlier.merge(latest)
            if earlier.last_round:
                raise InvalidSetting(
                    f"Run {self.run!r} was asked for rounds up to {earlier.last_round} already, and its checkpoint is "
                    "not there: begun anew, its rounds would be released twice and counted once. Restore the "
                    "checkpoint, or give the run another name."
                )
        self.keep(self.state)

    def resume(
        self,
        saved: dict[str, Any] | None,
        latest: dict[str, Any] | None,
        rounds: int,
        rows: Iterable[Mapping[str, Any]] = (),
    ) -> int:
        """Take up a run of which so many rounds are done; returns the number after which its rounds go on.

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
        if self._ledger is not None:  # this run's part is in the account
            entries = {shard: self._ledger.entries(shard) for shard in shards}
            self._before = {()} | {composed(e.spend for e in entries[j] if e.run != self.run) for j in shards}
            for shard in shards:
                drawn = sum(e.spend.steps for e in entries[shard] if e.run == self.run)
                account.draws[shard] = max(account.draws[shard], drawn)
        if latest is not None:
            account.merge(latest)
        known = latest is not None and (saved is None or account.covers(saved))
        if saved is not None:
            account.merge(saved)
        seen, last = self._last_of(rows), account.last_round
        if seen > last or not known:
            under_way = max(seen, rounds) + 1
            for shard in shards:
                account.release(shard, (1, under_way))
                if not isinstance(self.privacy, DPSGD):
                    more = account.draws[shard] + seen - last + 1 if seen > last else 0
                    account.draws[shard] = max(account.draws[shard], rounds + 1, more)
            account.asked = max(account.asked or (0, ""), (under_way, ""))
        self.keep(self.state)
        self._lost = max(0, max(account.draws.values()) - rounds)
        number, request = account.asked or (0, "")
        if not isinstance(self.privacy, DPSGD) or number <= rounds:
            return rounds
        alike = number == rounds + 1 and self._repeatable and request and request == self.request
        return rounds if alike else number

    def _last_of(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """The last round that released something: being asked is enough, unless the noise comes after decoding."""
        asked = [(row.get("round", 0), row["train"]) for row in rows if row.get("train")]
        if not isinstance(self.privacy, DPSGD):
            asked = [(number, phase) for number, phase in asked if phase.get("outcome") != "skipped"]
        return max((int(number) for number, _ in asked), default=0)

    @property
    def _repeatable(self) -> bool:
        """Whether the same request gets the same answer."""
        return isinstance(self.privacy, DPSGD) and self.privacy.noise == "shared"

    def _goes_on(self, server_round: int) -> None:
        """A run that goes on after a restart, and not by `start`: who was asked in the rounds before is not known here,
        so all shards count as asked."""
        if not self._knows_all:
            for shard in range(self.code.k):
                self._account.release(shard, (1, server_round - 1))
        self._knows_all = True

    @property
    def _told(self) -> str:
        one = self.privacy
        if isinstance(one, DPSGD):
            return (
                f"DP-SGD with {one.noise} noise, multiplier {one.noise_multiplier:.4g}, gradients clipped to "
                f"{one.max_grad_norm:g}, sample rate {one.sample_rate:.4g}, {one.steps} steps a round"
            )
        return f"noise after decoding, multiplier {one.noise_multiplier:.4g}, updates clipped to {one.clipping_norm:g}"


def _most(rounds: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `rounds` that fits, by bisection; 0 if none does."""
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
