"""One run of a wrapped strategy: what is kept from round to round, and how a phase is opened and closed."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..codes import GradientCode
from ..errors import InvalidSetting, RoundFailed
from ..grid import Arrival, EarlyStopGrid, nodes_of_a_phase, wait_for_nodes
from ..privacy import RunAccount
from . import report
from .adaptive import RoundMode, mode_chooser
from .app_checks import broken_promises, refuse_unsuitable
from .discovery import Holdings
from .dispatch import dispatch_of
from .options import Options
from .phase import Phase
from .plan_messages import MessageFactory, make_plan, time_to_live
from .replies import StaleUpdates
from .workers import WorkerRegistry
from .wrapped import ShardGrid, aggregate, arrays_key_of, common_content, has_custom_metrics

__all__ = ["Opening", "Run"]


@dataclass(frozen=True)
class Opening:
    """What stays the same over the phases of a run.

    Attributes:
        strategy: The wrapped one.
        options: As the user set them.
        k: Number of shards of the code.
        run: Name of the run.
        weight_key: The metric that holds the number of examples.
        registry: Who is who.
        timeout: Seconds of a phase.
        privacy: The run's account, if it promises any.
        digests: Shard -> SHA-256 of its data, where there is a manifest.
        is_open: Whether the code is made for what nodes hold.
    """

    strategy: Strategy
    options: Options
    k: int
    run: str
    weight_key: str
    registry: WorkerRegistry
    timeout: float | None
    privacy: RunAccount | None = None
    digests: Mapping[int, str] | None = None
    is_open: bool = False

    @classmethod
    def of(
        cls,
        strategy: Strategy,
        options: Options,
        code: GradientCode,
        run: str | None,
        registry: WorkerRegistry,
        timeout: float | None,
        *,
        is_open: bool = False,
    ) -> Opening:
        """For a run that begins; without a name it gets one, which no other run has."""
        run = run or uuid.uuid4().hex
        weight_key = str(getattr(strategy, "weighted_by_key", "num-examples"))
        privacy = RunAccount(options.privacy, code, run, send=options.send) if options.privacy else None
        return cls(
            strategy, options, code.k, run, weight_key, registry, timeout, privacy, options.digests, is_open=is_open
        )

    def begin(self, num_rounds: int) -> None:
        """Say what the run is going to cost.

        Raises:
            InvalidSetting: More privacy than it may.
        """
        if self.privacy is not None:
            self.privacy.begin(num_rounds)

    def phase(
        self, kind: str, server_round: int, drafts: Sequence[Message], way: RoundMode, *, slowest: float | None
    ) -> Phase:
        """A phase over the shards that were sampled; `slowest` is the longest that a reply has taken so far."""
        content = common_content(drafts)
        shards = sorted({message.metadata.dst_node_id for message in drafts})
        code = way.code.restrict(shards)
        arrays_key = arrays_key_of(self.strategy, content) if kind == "train" else ""
        plan = make_plan(
            code,
            shards,
            self.options,
            k=self.k,
            run=self.run,
            server_round=server_round,
            kind=kind,
            weight_key=self.weight_key,
            arrays_key=arrays_key,
            privacy=self.privacy if arrays_key else None,
            digests=self.digests,
            is_open=self.is_open,
        )
        before = content[arrays_key] if arrays_key else None
        assert before is None or isinstance(before, ArrayRecord)
        asking = MessageFactory(
            plan, content, message_type=drafts[0].metadata.message_type, ttl=time_to_live(self.timeout, slowest)
        )
        sending = dispatch_of(way, asking, code, shards, self.registry, kappa_max=self.options.kappa_max)
        phase = Phase(plan, shards, before, self.registry, sending, asking)
        if self.privacy is not None and arrays_key:
            phase.release_by = self.privacy.release(server_round, shards)
        return phase


_log = logging.getLogger(__name__)


class Run:
    """One run of a wrapped strategy.

    Args:
        strategy: The wrapped one.
        options: As the user set them.
        code: Who holds which shards.
        name: Of the run; made up if None.
        timeout: Seconds of a phase.
        registry: Who is who, as far as known.
        holdings: What nodes have told that they hold, if the code is made for that.
    """

    def __init__(
        self,
        strategy: Strategy,
        options: Options,
        code: GradientCode,
        name: str | None,
        timeout: float | None,
        registry: WorkerRegistry | None = None,
        holdings: Holdings | None = None,
    ) -> None:
        self.strategy, self.options, self.code, self.timeout = strategy, options, code, timeout
        self.registry = registry or WorkerRegistry()  # another run may meet other nodes, and other clients
        self._holdings, self._told_lacking = holdings, ""
        self.ways = mode_chooser(options, code)
        self.way: RoundMode | None = None
        is_open = holdings is not None
        self.opening = Opening.of(strategy, options, code, name, self.registry, timeout, is_open=is_open)
        self.name = self.opening.run
        #: The ledger row of the round that is under way.
        self.row: dict[str, Any] = {}
        self.phase: Phase | None = None
        self.memory = {"train": StaleUpdates(), "evaluate": StaleUpdates()} if options.fills_in else {}
        self._patience = 0.0
        self._drafts: list[Message] = []
        self._ever_decoded = self._resumed = False
        self._told: GradientCode | None = None  # whose holders the ledger has
        self._slowest: float | None = None  # seconds of a reply
        self._warned: set[str] = set()
        self._strangers: set[int] = set()  # nodes that were not known when the last round began

    def begin(self, grid: EarlyStopGrid, num_rounds: int) -> None:
        """Say what it is going to cost, and wait for the nodes.

        Raises:
            InvalidSetting: It costs more privacy than it may.
            RoundFailed: Too few or too many nodes.
        """
        grid.on_late = lambda node, label, reply: self.registry.learn_from(node, reply, run=self.name)
        self.opening.begin(num_rounds)
        settling = 0.0 if grid.source.fixed_nodes else self.options.node_timeout
        if self._holdings is None:
            wait_for_nodes(grid, len(self.code.active), self.code.s, settling, surplus=self._resumed)
        else:
            self._tell_lacking(self._holdings, None)
        self._patience = settling if self.timeout is None else min(settling, self.timeout)

    def resume(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take up a run after these rounds: how the next one is run is chosen by what they took."""
        for row in rows:
            self.ways.choose(complete=True)
            self.ways.learn(row)
            self._ever_decoded |= (row.get("train") or {}).get("outcome") in ("exact", "approximate")
        self._resumed = True

    def configure(
        self, kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The messages of a phase, one for each worker; none if the wrapped strategy has none."""
        if kind == "train":
            self._follow_holdings(grid)
        if kind == "train" or not self.row:
            self.row = report.new_row(self.name, grid, server_round, self.code, is_new=self.code is not self._told)
            self._told = self.code
            if self._resumed:
                self.row["resumed"], self._resumed = True, False
        self.phase = None
        configure = getattr(self.strategy, f"configure_{kind}")
        self._drafts = list(configure(server_round, arrays, config, ShardGrid(self.code.k, grid)))
        if not self._drafts:
            return []
        if has_custom_metrics(self.strategy, kind):
            self._warn_once(
                f"metrics {kind}",
                f"The custom {kind} metric aggregation is called on one decoded record, not on one for each client.",
            )
        if kind == "train" or self.way is None:
            self.way = self.ways.choose(complete=len(list(grid.get_node_ids())) >= len(self.code.active))
        self.phase = self.opening.phase(kind, server_round, self._drafts, self.way, slowest=self._slowest)
        self.row["way"] = self.way.entry
        nodes = nodes_of_a_phase(grid, len(self.code.active), self.code.s, self._patience, self._hopeless)
        self.registry.keep(nodes)
        if isinstance(grid, EarlyStopGrid):
            for node, worker in grid.source.known_workers().items():
                self.registry.learn(node, worker)
            grid.expect(self.phase)
        elif self.way.send == "shards":
            raise InvalidSetting(f"send={self.options.send!r} hands out work: run the strategy by its start().")
        return self.phase.messages(nodes)

    def aggregate(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the phase, and let the wrapped strategy aggregate the one decoded reply."""
        phase = self.phase
        if phase is None:
            return None, None
        if not phase.collected:  # somebody else's loop brings the replies of a plain grid
            for reply in replies:
                phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
        began = time.perf_counter()
        decoded = phase.decode(self.options.approximation, self.memory.get(phase.plan.kind))
        entry = report.phase_entry(phase, decoded, self.opening.privacy, decoding=time.perf_counter() - began)
        self.row[phase.plan.kind] = entry  # whatever is raised from here on, the row tells what happened
        taken = [self._slowest or 0.0, *(one.seconds for one in [*phase.wait.times, *phase.wait.owing])]
        self._slowest = max(taken) or None
        self.phase = None
        phase.release()
        refuse_unsuitable(phase.inbox, ever_decoded=self._ever_decoded)
        for key, text in broken_promises(phase.inbox):
            self._warn_once(key, text)
        if decoded is None:
            self._undecodable(phase, entry)
            return None, MetricRecord(report.figures(entry))
        self._ever_decoded = True
        began = time.perf_counter()
        arrays, metrics = aggregate(self.strategy, self._drafts[0], server_round, decoded)
        entry["seconds"]["aggregating"] = time.perf_counter() - began
        return arrays, MetricRecord({**(metrics or {}), **report.figures(entry)})

    def close_row(self) -> dict[str, Any]:
        """The row of the round that has ended; the next one is chosen by what it says."""
        row, self.row = self.row, {}
        row["ended-at"] = time.time()
        self.ways.learn(row)
        return row

    def _hopeless(self, nodes: list[int]) -> bool:
        """Whether these nodes, all that are there, cannot decode: whoever is gone may be one of them again."""
        assert self.phase is not None
        self.registry.keep(nodes)
        return self.phase.hopeless(nodes)

    def _follow_holdings(self, grid: Grid) -> None:
        """Make the code anew if other workers are there, or hold other shards, than it was made for."""
        holdings = self._holdings
        if holdings is None:
            return
        for worker, shards in self.registry.holdings.items():
            holdings.learn(worker, shards)
        worker_of = {node: self.registry.worker_of(node) for node in grid.get_node_ids()}
        unknown = {node for node, worker in worker_of.items() if worker is None}
        # Whoever was not known in the last round either has had its chance to say who it is.
        fresh, self._strangers = unknown - self._strangers, unknown
        there = [i for i in holdings.told if i in worker_of.values()]
        if fresh:  # any of them may be one of those that are gone, who keep their rows if the others can do without
            everybody = holdings.code()
            if everybody is not None and everybody.decodable([i for i in everybody.active if i in there]):
                there = [*holdings.told]
        code = holdings.code(there)
        if code is not None and (code.B.shape != self.code.B.shape or (code.B != self.code.B).any()):
            self.code = code
            self.ways = mode_chooser(self.options, code)
            if self.opening.privacy is not None:
                self.opening.privacy.follow(code)
            _log.info("The code is made anew for workers %s: %r.", [*code.active], code)
        self._tell_lacking(holdings, there)

    def _tell_lacking(self, holdings: Holdings, workers: list[int] | None) -> None:
        """Once for each state of affairs."""
        text = holdings.told_lacking(workers)
        if text and text != self._told_lacking:
            _log.warning("%s The code tolerates s=%d until then.", text, self.code.s)
        self._told_lacking = text

    def _undecodable(self, phase: Phase, entry: dict[str, Any]) -> None:
        why = report.why_undecodable(phase, entry)
        if self.options.policy == "raise":
            entry["outcome"] = "raised"
            raise RoundFailed(f"{why}.")
        _log.warning("%s. The round is skipped: the model stays as it is.", why)

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            _log.warning("%s", text)
