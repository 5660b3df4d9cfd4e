"""Virtual time: a grid that wraps another one and computes from a latency law when each reply would have arrived.

Nothing sleeps. A pushed message gets its arrival time at once and is put on an event heap. The clock jumps from arrival
to arrival. Replies are computed only when they are read, as one batch on the wrapped grid. A reply that arrives too
late to be read costs virtual time but no computation.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from ..errors import UnsuitableApp
from ..latency import Latency
from ..protocol import (
    Cost,
    Reply,
    content_bytes,
    is_evaluation,
    load_of,
    plan_bytes,
    probe_content,
    rejection_of,
    reply_part,
    round_of,
)
from .arrivals import Arrival, ArrivalSource, ForwardingGrid

__all__ = ["Job", "VirtualGrid"]


@dataclass(frozen=True)
class Job:
    """The work that one message causes on a node; times are in virtual seconds.

    Attributes:
        worker: Worker that the node is.
        round: The server round, or the number of the worker's job if the message does not name a round.
        evaluating: Whether the message asks for evaluation.
        shards: Number of shards that the message asks for; may be a fraction.
        sent: Time at which the message was sent.
        began: Time at which the work began, which is later than `sent` if the node was busy.
        finished: Time at which the reply arrives.
        computing: Seconds that the node spends on its shards.
        megabytes_down: Payload of the message, in megabytes.
        megabytes_up: Payload of the reply, in megabytes.
    """

    worker: int
    round: int
    evaluating: bool
    shards: float
    sent: float
    began: float
    finished: float
    computing: float
    megabytes_down: float
    megabytes_up: float


@dataclass
class _Pending:
    node: int
    job: Job
    message: Message | None
    must_run: bool
    abandoned: bool = False


class VirtualGrid(ForwardingGrid, ArrivalSource):
    """A Flower grid on a virtual clock, on which every strategy, plain or coded, runs unchanged.

        grid = VirtualGrid(grid, Latency(compute=lognormal(1.0, 0.3)))
        FedAvg().start(grid, arrays, num_rounds=10)
        print(grid.now(), "virtual seconds")

    A node works through its messages one by one, in the order sent, as Flower's nodes do. Evaluating a shard takes
    `latency.evaluation` times as long as training it. The transfer time of a training message covers the message and a
    reply of the same size, or 1/m of it under a code that divides updates. An evaluation is charged for the message
    only. A coded product is charged for its work, in units of an n-th of the product, and for the size of its answer.
    An infinite latency loses the message: no reply arrives, and the node is free for the next message at once.

    Args:
        grid: The grid that computes replies, such as the simulation's grid or `fl_gradcode.testing.InProcessGrid`.
        latency: Law of the job times. Draws depend on (seed, worker, server round) alone, so that all strategies meet
            the same slow moments.
        seed: Seed of the latencies.
        workers: Node -> worker (partition-id). By default the grid is asked. If it does not know, the nodes are asked
            once, which takes no virtual time and needs `gradient_coding_mod` on the clients.
        real_timeout: Real seconds to wait for one batch on the wrapped grid.
        keep_jobs: Number of jobs that are remembered at least.
    """

    immediate = False
    fixed_nodes = True

    def __init__(
        self,
        grid: Grid,
        latency: Latency,
        *,
        seed: int = 0,
        workers: Mapping[int, int] | None = None,
        real_timeout: float = 3600.0,
        keep_jobs: int = 1_000_000,
    ) -> None:
        super().__init__(grid)
        self.late_nodes = bool(getattr(grid, "late_nodes", True))
        self.latency = latency
        self.seed = seed
        self._workers = dict(workers or {})
        self._real_timeout = real_timeout
        self._keep_jobs = keep_jobs
        self._now = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, str]] = []
        #: The jobs of all messages, in the order sent, whether or not their replies were needed; the last `keep_jobs`.
        self.jobs: list[Job] = []
        self._jobs: dict[str, _Pending] = {}
        self._busy_until: dict[int, float] = {}
        self._sent: dict[tuple[int, bool], int] = {}

    def now(self) -> float:
        """Returns the virtual seconds since the grid was made."""
        return self._now

    def known_workers(self) -> dict[int, int]:
        """Returns node -> worker of all online nodes.

        Raises:
            UnsuitableApp: A node does not report which worker it is.
        """
        unknown = [node for node in self.get_node_ids() if node not in self._workers]
        if unknown:
            knows = getattr(self.inner, "known_workers", None)
            self._workers.update(knows() if knows is not None else self._probe(unknown))
        return dict(self._workers)

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """Draw the arrival time of each message; returns a token for each."""
        tokens: list[str | None] = []
        if any(message.metadata.dst_node_id not in self._workers for message in messages):
            self.known_workers()
        for message in messages:
            node = message.metadata.dst_node_id
            number = next(self._order)
            token = f"virtual-{number}"
            start = max(self._now, self._busy_until.get(node, 0.0))
            job = self._job(message, self._workers.get(node, 0), start)
            finish = job.finished
            if finish != float("inf"):
                self._busy_until[node] = finish
            self.jobs.append(job)
            if len(self.jobs) >= 2 * self._keep_jobs:
                del self.jobs[: -self._keep_jobs]
            self._jobs[token] = _Pending(node, job, message, _must_run(message))
            heapq.heappush(self._heap, (finish, number, token))
            tokens.append(token)
        return tokens

    def next_arrival(self, deadline: float | None) -> Arrival | None:
        """Move the clock to the next arrival and return it, or to the deadline if that is earlier and return None."""
        limit = float("inf") if deadline is None else deadline
        while self._heap and self._heap[0][0] <= limit and self._heap[0][0] != float("inf"):
            finish, _, token = heapq.heappop(self._heap)
            if token not in self._jobs:
                continue  # forgotten
            self._now = max(self._now, finish)
            pending = self._jobs[token]
            if pending.abandoned:  # the reply will not be fetched
                self.forget(token)
            return Arrival(token, pending.node, self._now, computing=pending.job.computing)
        if limit != float("inf"):
            self._now = max(self._now, limit)
        return None

    def fetch(self, arrivals: Sequence[Arrival]) -> list[Message | None]:
        """Compute the replies of these arrivals as one batch, and return them."""
        messages = [self._jobs.pop(arrival.token).message for arrival in arrivals]
        batch = [message for message in messages if message is not None]
        by_id = {}
        if batch:
            for reply in self.inner.send_and_receive(batch, timeout=self._real_timeout):
                by_id[reply.metadata.reply_to_message_id] = reply
        # Both of Flower's grids write the id into the message when they push it.
        return [by_id.get(m.metadata.message_id) if m is not None else None for m in messages]

    def abandon(self, tokens: Iterable[str]) -> None:
        """Declare that these replies will not be read; they are never computed, and their messages are freed."""
        for token in tokens:
            if token in self._jobs:
                pending = self._jobs[token]
                pending.abandoned = True
                if not pending.must_run:
                    pending.message = None

    def forget(self, token: str) -> None:
        """Drop the arrival; a message that must run is still carried out if its arrival time has passed."""
        pending = self._jobs.get(token)
        message = None if pending is None or pending.job.finished > self._now else pending.message
        if message is not None and pending is not None and pending.must_run:
            self.fetch([Arrival(token, message.metadata.dst_node_id, self._now)])
        self._jobs.pop(token, None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Wait for all replies, for at most `timeout` virtual seconds; returns the replies in order of arrival."""
        tokens = {token for token in self.push(list(messages)) if token is not None}
        deadline = None if timeout is None else self._now + timeout
        arrivals = []
        while tokens and (arrival := self.next_arrival(deadline)) is not None:
            if arrival.token in tokens:
                tokens.remove(arrival.token)
                arrivals.append(arrival)
            else:
                self._jobs.pop(arrival.token, None)
        self.abandon(tokens)
        return [reply for reply in self.fetch(arrivals) if reply is not None]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns ids for `pull_messages`."""
        return [token for token in self.push(list(messages)) if token is not None]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that have arrived.

        If none has, the clock jumps to the first one, because nothing else moves it.
        """
        wanted = [token for token in dict.fromkeys(message_ids) if token in self._jobs]
        if not wanted:
            return []
        first = min(map(self._finish, wanted))
        if first == float("inf"):
            return []
        self._now = max(self._now, first)
        due = sorted((t for t in wanted if self._finish(t) <= self._now), key=self._finish)
        replies = self.fetch([Arrival(t, self._jobs[t].node, self._finish(t)) for t in due])
        return [reply for reply in replies if reply is not None]

    def shards_of(self, message: Message, worker: int) -> float:
        """Returns the training work that `message` asks for, in shards; override it for an app that does less."""
        cost = Cost.find_in(message.content)
        return load_of(message, worker) if cost is None else cost.work

    def _finish(self, token: str) -> float:
        return self._jobs[token].job.finished

    def _job(self, message: Message, worker: int, start: float) -> Job:
        evaluating = is_evaluation(message)
        # For a strategy that does not send the round, the worker's first job of a kind counts as round 1.
        count = self._sent[worker, evaluating] = self._sent.get((worker, evaluating), 0) + 1
        server_round = round_of(message)
        number = count if server_round is None else server_round
        tick = 2 * number + evaluating
        down = content_bytes(message.content) / 1e6
        cost = Cost.find_in(message.content)
        up = 0.0 if evaluating else (down - plan_bytes(message.content) / 1e6) * reply_part(message, worker)
        if cost is not None:
            up = cost.answer_bytes / 1e6
        shards = self.shards_of(message, worker)
        draw = {"seed": self.seed, "worker": worker, "tick": tick}
        seconds = self.latency.seconds(**draw, shards=shards, megabytes=down + up, evaluating=evaluating)
        computing = self.latency.computing(**draw, shards=shards, evaluating=evaluating)
        return Job(worker, number, evaluating, shards, self._now, start, start + seconds, computing, down, up)

    def _probe(self, nodes: list[int]) -> dict[int, int]:
        messages = [Message(probe_content(), dst_node_id=node, message_type="train") for node in nodes]
        workers: dict[int, int] = {}
        replies = list(self.inner.send_and_receive(messages, timeout=self._real_timeout))
        for reply in replies:
            answer = Reply.find_in(reply.content) if reply.has_content() else None
            if answer is not None:
                workers[reply.metadata.src_node_id] = answer.worker
        errors = [rejection_of(reply).reason for reply in replies if reply.has_error()]
        silent = [node for node in nodes if node not in workers]
        if silent:
            raise UnsuitableApp(
                f"{len(silent)} of {len(nodes)} nodes did not say which worker they are, and virtual time needs to "
                "know who is slow. Add gradient_coding_mod to the ClientApp (it leaves plain strategies alone), or "
                f"pass VirtualGrid(..., workers=).{' The first error: ' + errors[0] if errors else ''}"
            )
        return workers


def _must_run(message: Message) -> bool:
    cost = Cost.find_in(message.content)
    return cost is not None and cost.must_run
