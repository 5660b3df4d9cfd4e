"""EarlyStopGrid: a Flower grid that stops waiting when enough is in, and never overloads a slow node.

Flower's own `send_and_receive` waits for every reply, and a node works off whatever it was ever sent, oldest
first. Here a *stop rule* is asked after each arrival, and a node that still owes a reply is sent nothing: the
newest message is held back until its late reply is in, then sent at once if that round is still open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from .arrivals import ArrivalSource, ForwardingGrid
from .errors import InvalidSetting
from .polling import PollingArrivals
from .stop import CountRule, StopRule
from .waiting import Debt, Waiting

__all__ = ["EarlyStopGrid"]


class EarlyStopGrid(ForwardingGrid):
    """A grid that stops waiting as soon as enough replies are in.

    `GradientCoding` makes one by itself. On its own it gives any Flower strategy the same waiting: with
    `stop_after=8` the round ends at the eighth good reply, and whoever is slower is dropped.

        FedAvg().start(EarlyStopGrid(grid, stop_after=8), arrays, num_rounds=10)

    Args:
        grid: The engine's grid, or a `VirtualGrid`.
        stop_after: Good replies after which a round ends; None waits for all of them. A `StopRule` announced
            through `expect` takes precedence.
        poll_interval: Seconds between two pulls for one message.
        clock: Seconds; for tests.
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
        #: Called with (node, label, reply or None) for each reply that came after its phase had ended.
        self.on_late: Callable[[int, str, Message | None], None] | None = None
        self._debts: dict[int, Debt] = {}
        self._announced: StopRule | None = None

    def expect(self, rule: StopRule) -> None:
        """The next `send_and_receive` stops by this rule."""
        self._announced = rule

    def close(self) -> None:
        """End the polling threads."""
        self.source.close()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, wait until the rule is decided, hopeless or `timeout` seconds are over, return the replies."""
        batch = list(messages)  # configure_train() may be lazy: it announces the rule when it runs
        rule, self._announced = self._announced or CountRule(self.stop_after), None
        if not batch:
            return []
        phase = Waiting(self.source, self._debts, rule, timeout, self.on_late)
        return rule.finish(phase.run(batch))
