"""EarlyStopGrid, a Flower grid that stops waiting once enough replies are in, and never overloads a slow node.

Flower's own `send_and_receive` waits for every reply, and a node works through all messages that it was ever sent,
oldest first. Here a *stop rule* is asked after each arrival. A node that still owes a reply is sent nothing. The newest
message for it is held back until the late reply arrives, and then sent at once if its round is still open.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from ..errors import InvalidSetting
from ..protocol import Rejection, computing_seconds, content_bytes, loads_of, rejection_of
from .arrivals import Arrival, ArrivalSource, ForwardingGrid
from .polling import PollingArrivals
from .stop_rule import CountRule, JobTime, Late, StopRule, Wait

__all__ = ["Debt", "EarlyStopGrid", "Waiting"]

_LOOK_SECONDS = 1.0  # seconds between two looks at which nodes are online


@dataclass
class Debt:
    """A reply that a node owes.

    A debt may last for several rounds. It refers to its phase by a mark and a label, because a reference to the phase
    itself would keep all of its replies in memory.
    """

    token: str
    phase_mark: object
    label: str
    sent: float
    loads: dict[int, int]
    lapses: float
    #: Whether the reply is wanted even if it comes after its phase.
    kept: bool = False
    #: Flower's text that says when the node last became active; None before the first look.
    active_since: str | None = None


class Waiting:
    """Runs one phase, from the first message to the end of the wait."""

    def __init__(
        self,
        source: ArrivalSource,
        debts: dict[int, Debt],
        rule: StopRule,
        timeout: float | None,
    ) -> None:
        self.source, self.debts, self.rule = source, debts, rule
        self.phase_mark = object()
        self.start = source.now()
        self.deadline = None if timeout is None else self.start + timeout
        # Flower cannot cancel a message. A node that never answers gets new messages after this many seconds.
        self.debt_lifetime = float("inf") if timeout is None else 3 * timeout
        self.wait = Wait()
        self.held: dict[int, list[Message]] = {}
        self.free: list[int] = []  # nodes that the rule may have a message for
        self.idle: dict[int, None] = {}  # nodes that the rule had no message for, in order
        self.mine: dict[int, None] = {}  # nodes that owe a reply to this phase, in order
        self.sizes: dict[int, tuple[object, int]] = {}  # of the arrays that messages have in common
        self.lapsing: list[tuple[float, int, str]] = []  # heap of (lapses, node, token) that `held` waits for
        self.unread: list[Arrival] = []
        self.woken: float | None = None
        self.lingered = False  # whether the time is up for which the rule wanted to wait on
        self.lost = True  # whether a reply was lost since the rule was last asked if the phase is hopeless
        self.met: set[int] = set()  # nodes that the rule was asked about
        self.failed: set[int] = set()  # nodes whose message to this phase ended in an error
        self.active_since: dict[int, str] = {}  # when each node last became active, as of the last look
        self.next_look = None if source.fixed_nodes else self.start

    def run(self, messages: Sequence[Message]) -> Wait:
        """Send the messages and wait until the phase ends; returns the record of the wait."""
        self._lapse()
        self.source.look_anew()
        self.free.clear()
        for message in messages:
            node = message.metadata.dst_node_id
            self.met.add(node)
            if node in self.held:  # a node gets its next message only when it has answered the first
                self.held[node].append(message)
                continue
            self.held[node] = [message]
            if node in self.debts:
                self.wait.held_back.append(node)
                self._wait_for_debt(node)
            else:
                self.free.append(node)
        ended = self._loop()
        if ended != "decoded":
            while not self.rule.decided and self._read(final=True):
                pass  # a bad reply may have a replica among the unread ones
        self.wait.ended = "decoded" if self.rule.decided else ended
        self.wait.seconds = self.source.now() - self.start
        self.wait.never_sent = list(self.held)
        now = self.source.now()
        self.wait.owing = [JobTime(node, debt.label, debt.loads, now - debt.sent) for node, debt in self.debts.items()]
        self.wait.unread = [arrival.node for arrival in self.unread]
        for arrival in self.unread:
            self.source.forget(arrival.token)
        mine, keeps = [self.debts[node] for node in self.mine], self.rule.keeps_late
        for debt in mine:
            debt.kept = keeps
        if keeps:
            self.wait.kept = [*self.mine]
        else:
            self.source.abandon([debt.token for debt in mine])
        return self.wait

    def _loop(self) -> str:
        while True:
            if self.rule.decided and not self._lingers():
                return "decoded"
            self._look()
            # Replies are read before work is handed out, since they may tell who a node is and what is left to do.
            while self.free and not (self.source.immediate and self.unread):
                self._hand_out()
            outstanding = bool(self.mine or self.held)
            if self.unread and self._read(final=not outstanding):
                self.lost |= self.rule.lost_any()
                continue
            if self.lost and self.rule.hopeless(self._coming()):
                return "hopeless"
            if not outstanding:
                return "answered"  # the rule did not want the unread replies
            self.lost = False
            arrival = self.source.next_arrival(self._next_deadline())
            if arrival is not None:
                self._arrived(arrival)
                # Arrivals at the same moment are taken first, so that work of their senders is not handed out again.
                while (also := self.source.next_arrival(self.source.now())) is not None:
                    self._arrived(also)
            elif self.deadline is not None and self.source.now() >= self.deadline:
                return "timed out"
            elif (wake := self._wake()) is not None and self.source.now() >= wake:
                self.woken = wake
                self._offer_idle(self.rule.awake(self.idle, self.source.now()))
            elif (until := self.rule.linger_until) is not None and not self.lingered and self.source.now() >= until:
                self.lingered = True
            elif self.next_look is not None and self.source.now() >= self.next_look:
                pass  # the look takes place at the beginning of the loop
            elif not self._lapse():
                return "timed out"  # nothing is outstanding any more, and there is no deadline to wait for

    def _lingers(self) -> bool:
        """Returns whether the rule has decided and still wants to wait on."""
        until = self.rule.linger_until
        return until is not None and not self.lingered and self.source.now() <= until

    def _coming(self) -> list[int]:
        """Returns the nodes whose reply to this phase may still come, or is not read yet."""
        return [*dict.fromkeys([*self.mine, *self.held, *(arrival.node for arrival in self.unread)])]

    def _wait_for_debt(self, node: int) -> None:
        """Note that a message is held back until the node's debt is paid or lapses."""
        debt = self.debts[node]
        heapq.heappush(self.lapsing, (debt.lapses, node, debt.token))

    def _next_lapse(self) -> float | None:
        """Returns when the next debt lapses that a held message waits for, or None."""
        while self.lapsing:
            lapses, node, token = self.lapsing[0]
            debt = self.debts.get(node)
            if node in self.held and debt is not None and debt.token == token:
                return lapses
            heapq.heappop(self.lapsing)
        return None

    def _next_deadline(self) -> float | None:
        lingering = None if self.lingered else self.rule.linger_until
        soonest = math.inf
        for moment in (self.deadline, self._wake(), lingering, self.next_look, self._next_lapse()):
            if moment is not None and moment < soonest:
                soonest = moment
        return None if soonest == math.inf else soonest

    def _wake(self) -> float | None:
        """Returns the time at which the rule wants to be asked again, or None if it has been asked since."""
        wake_at = self.rule.wake_at
        return None if wake_at == self.woken else wake_at

    def _look(self) -> None:
        """Give work to nodes that have connected since the phase began, and to nodes that were restarted.

        A restarted node has lost its work. Under authentication it keeps its id, so only the time since when it is
        active shows the restart. The same holds for a node whose message ended in an error, for example because the
        SuperLink had given up on the node.
        """
        if self.next_look is None or self.source.now() < self.next_look:
            return
        self.next_look = self.source.now() + _LOOK_SECONDS
        for node, since in self.source.listed().items():
            debt, before = self.debts.get(node), self.active_since.get(node, since)
            self.active_since[node] = since
            if debt is None and node in self.failed and since != before:
                self.failed.discard(node)
                self.met.discard(node)
                self.idle.pop(node, None)
                self.rule.restarted(node)
            if debt is not None and debt.active_since is None:
                debt.active_since = since
            elif debt is not None and debt.active_since != since:
                self.source.forget(self._settle(node).token)
                self.wait.restarted.append(node)
                if node not in self.held:
                    self.met.discard(node)
                    self.rule.restarted(node)
                else:
                    self.free.append(node)
            if node not in self.met:
                self.met.add(node)
                message = self.rule.join(node)
                if message is not None:
                    self.held[node] = [message]
                    self.wait.joined.append(node)
                    if node not in self.debts:
                        self.free.append(node)
                    else:
                        self._wait_for_debt(node)

    def _settle(self, node: int) -> Debt:
        """Returns the debt of a node, which has none from now on."""
        self.mine.pop(node, None)
        return self.debts.pop(node)

    def _arrived(self, arrival: Arrival) -> None:
        debt = self.debts.get(arrival.node)
        if debt is None or debt.token != arrival.token:
            return  # the debt has lapsed, and the node has been given other work since
        self._settle(arrival.node)
        reply = arrival.reply
        if not (arrival.failure or (reply is not None and reply.has_error())):
            computing = arrival.computing if reply is None else computing_seconds(reply)
            taken = JobTime(arrival.node, debt.label, debt.loads, arrival.at - debt.sent, computing)
            self.wait.times.append(taken)
        if debt.phase_mark is self.phase_mark:
            if arrival.failure or (reply is not None and reply.has_error()):
                self.failed.add(arrival.node)
            self.unread.append(arrival)
            self.rule.arrived(arrival)
        else:
            rejection = Rejection("no-reply", arrival.failure) if arrival.failure else None
            if reply is not None and reply.has_error():
                rejection = rejection_of(reply)
            late = Late(arrival.node, debt.label, rejection)
            if debt.kept and reply is None and rejection is None and self.rule.wants(late):
                reply = self.source.fetch([arrival])[0]
            self.wait.late.append(late)
            self.rule.arrived_late(late, reply)
            if self.rule.lost_any():  # it has told of others that count no more
                self.lost = True
                if self.rule.reopens():
                    self._offer_idle()
        self.free.append(arrival.node)

    def _hand_out(self) -> None:
        """Send each free node the message that the rule has for it, if any."""
        messages = []
        for node in dict.fromkeys(self.free):
            if node in self.debts:
                continue  # one message at a time
            message = self.rule.next_message(node, self._next_held(node), self.source.now())
            if message is None:
                self.idle[node] = None
            else:
                messages.append(message)
        self.free.clear()
        if messages:
            self._push(messages)

    def _next_held(self, node: int) -> Message | None:
        messages = self.held.get(node, [])
        first = messages.pop(0) if messages else None
        if not messages:
            self.held.pop(node, None)
        return first

    def _lapse(self) -> bool:
        """Give up on debts that are too old; returns whether there was one."""
        now = self.source.now()
        old = [
            node for node, debt in self.debts.items() if debt.lapses <= now and debt.phase_mark is not self.phase_mark
        ]
        for node in old:
            self.source.forget(self._settle(node).token)
            self.wait.lapsed.append(node)
            self.free.append(node)
        return bool(old)

    def _push(self, messages: list[Message]) -> None:
        now = self.source.now()
        for message, token in zip(messages, self.source.push(messages), strict=True):
            node = message.metadata.dst_node_id
            self.wait.asked.append(node)
            self.rule.sent(node)
            self.wait.bytes_down += content_bytes(message.content, self.sizes)
            if token is None:
                refused = Arrival("", node, now, failure="the SuperLink refused the message")
                self.rule.offer(refused, None, now - self.start)
                self._offer_idle()
                self.lost = True
            else:
                self.debts[node] = Debt(
                    token, self.phase_mark, self.rule.label, now, loads_of(message), now + self.debt_lifetime
                )
                self.mine[node] = None
                if node in self.held:
                    self._wait_for_debt(node)

    def _read(self, *, final: bool) -> bool:
        """Read the replies that the rule wants; returns whether there was one."""
        arrivals = self.unread if self.source.immediate else self.rule.choose(self.unread, final=final)
        if not arrivals:
            return False
        wanted = {arrival.token for arrival in arrivals}
        self.unread = [arrival for arrival in self.unread if arrival.token not in wanted]
        for arrival, reply in zip(arrivals, self.source.fetch(arrivals), strict=True):
            if reply is not None and reply.has_content():
                self.wait.bytes_up += content_bytes(reply.content)
            self.rule.offer(arrival, reply, arrival.at - self.start)
        # A reply may tell who a node is and which copies count, which changes the work that is left.
        if self.rule.reopens():
            self._offer_idle()
        return True

    def _offer_idle(self, nodes: Collection[int] | None = None) -> None:
        """Let the rule be asked once more for messages to idle nodes, to all by default."""
        if nodes is None:
            self.free.extend(self.idle)
            self.idle.clear()
        else:
            for node in nodes:
                if node in self.idle:
                    del self.idle[node]
                    self.free.append(node)


class EarlyStopGrid(ForwardingGrid):
    """A grid that stops waiting as soon as enough replies are in.

    `GradientCoding` makes one by itself. The grid can also be used with any other Flower strategy. With `stop_after=8`,
    a round ends at the eighth good reply, and slower nodes are dropped:

        FedAvg().start(EarlyStopGrid(grid, stop_after=8), arrays, num_rounds=10)

    Args:
        grid: The engine's grid, or a `VirtualGrid`.
        stop_after: Number of good replies after which a round ends; None waits for all replies. A `StopRule` announced
            through `expect` takes precedence.
        poll_interval: Seconds between two pulls for one message.
        clock: Function that returns the time in seconds; replaced in tests.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        stop_after: int | None = None,
        poll_interval: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(grid)
        if stop_after is not None and stop_after < 1:
            raise InvalidSetting(f"stop_after={stop_after}: a round needs at least 1 reply.")
        self.stop_after = stop_after
        self.source: ArrivalSource = (
            grid if isinstance(grid, ArrivalSource) else PollingArrivals(grid, poll_interval=poll_interval, clock=clock)
        )
        self._debts: dict[int, Debt] = {}
        self._announced: StopRule | None = None

    def expect(self, rule: StopRule) -> None:
        """Announce the rule by which the next `send_and_receive` stops."""
        self._announced = rule

    def owing(self) -> set[int]:
        """Returns the nodes that owe a reply, to which nothing is sent before it."""
        return {*self._debts}

    def close(self) -> None:
        """End the polling threads."""
        self.source.close()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait until the rule is decided or hopeless, or `timeout` seconds are over.

        Returns:
            The messages that the rule's `finish` returns, which for a plain strategy are the replies.
        """
        batch = list(messages)  # first, because a lazy configure_train() announces the rule only when it runs
        rule, self._announced = self._announced or CountRule(self.stop_after), None
        if not batch:
            return []
        waiting = Waiting(self.source, self._debts, rule, timeout)
        return rule.finish(waiting.run(batch))
