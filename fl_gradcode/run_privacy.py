"""The server's side of a run's privacy: what is asked, what it has cost so far, and the noise of `CentralNoise`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .accounting import Spend, composed, epsilon_of
from .errors import InvalidSetting
from .gradient_code import GradientCode
from .inbox import Inbox
from .privacy_settings import DPSGD, CentralNoise, Privacy, privacy_to_json
from .release import CentralRelease, amplification
from .spending import Request, SpentLedger

__all__ = ["RunPrivacy"]

_log = logging.getLogger(__name__)


class RunPrivacy:
    """Accounts for one run.

    Args:
        privacy: What is promised.
        code: Who holds which shards.
        run: Name of the run.
        send: How shards' updates are sent; only coded ones are amplified.
    """

    def __init__(self, privacy: Privacy, code: GradientCode, run: str, *, send: str = "coded") -> None:
        self.privacy, self.code, self.run, self._send = privacy, code, run, send
        self._holders = {j: len(code.holders_of(j)) for j in range(code.k)}
        #: Shard -> ranges of rounds in which its update was, or may have been, released.
        self._released: dict[int, list[list[int]]] = {j: [] for j in range(code.k)}
        #: Shard -> draws of noise after decoding: each is a release, also a second one of the same round.
        self._draws = dict.fromkeys(range(code.k), 0)
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
        self._holders = {j: max(count, len(code.holders_of(j))) for j, count in self._holders.items()}

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
        one, holders = self.privacy, max(self._holders.values())
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
            told[shard] = (self._holders[shard], tuple((first, last) for first, last in self._released[shard]))
            self._count(shard, server_round)
        self.keep(self.state)
        return told

    def release(self, server_round: int, shards: Sequence[int]) -> CentralRelease | None:
        """What is to be done to the decoded sum before anybody sees it; None if the clients did all."""
        if not isinstance(self.privacy, CentralNoise):
            return None

        def charge() -> None:
            self._charge(server_round, shards)

        return CentralRelease(self.privacy, self.code, len(shards), charge)

    def entry(self, inbox: Inbox) -> dict[str, Any]:
        """For the ledger: what was spent so far on the shard that it was most for."""
        one = self.privacy
        shard = max(self._holders, key=lambda j: one.spend(self._rounds(j), holders=self._holders[j]).steps)
        epsilon = self._epsilon(self._rounds(shard), self._holders[shard])
        told = inbox.spent
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
            "other-requests": {str(j): [*pair] for j, pair in sorted(inbox.other_requests.items())},
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
            self._draws[shard] += 1
            self._count(shard, server_round)
        self.keep(self.state)

    @property
    def state(self) -> dict[str, Any]:
        """What was asked and drawn so far, for a checkpoint."""
        return {"released": [*self._released.items()], "draws": [*self._draws.items()]}

    def take_up(self, state: dict[str, Any] | None, rounds: int) -> None:
        """Take up a run of which so many rounds are done.

        Args:
            state: What `state` was last; None: it is not known, and all shards count as asked in all of these rounds.
            rounds: How many rounds are done; the one behind them may have been under way.
        """
        if self._ledger is not None:  # this run's part is in the state, or is counted whole
            self._before = {()} | {
                composed(e.spend for e in self._ledger.entries(j) if e.run != self.run) for j in range(self.code.k)
            }
        for shard, ranges in state["released"] if state else [(j, [[1, rounds + 1]]) for j in range(self.code.k)]:
            self._released[int(shard)] = [[int(first), int(last)] for first, last in ranges]
        if state:
            self._draws.update({int(shard): int(count) for shard, count in state["draws"]})
        elif not isinstance(self.privacy, DPSGD):
            self._draws = dict.fromkeys(self._draws, rounds + 1)
        self._lost = max(0, max(self._draws.values()) - rounds)

    def _goes_on(self, server_round: int) -> None:
        """A run that goes on after a restart, and not by `start`: who was asked in the rounds before is not known here,
        so all shards count as asked."""
        if not self._knows_all and server_round > 1:
            for ranges in self._released.values():
                ranges.append([1, server_round - 1])
        self._knows_all = True

    def _count(self, shard: int, server_round: int) -> None:
        ranges = self._released[shard]
        if ranges and ranges[-1][0] <= server_round <= ranges[-1][1] + 1:
            ranges[-1][1] = max(ranges[-1][1], server_round)
        else:
            ranges.append([server_round, server_round])

    def _rounds(self, shard: int) -> int:
        return max(self._draws[shard], self._asked_rounds(shard))

    def _asked_rounds(self, shard: int) -> int:
        return sum(last - first + 1 for first, last in self._released[shard])

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
