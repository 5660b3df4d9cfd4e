"""One run of a wrapped strategy: its state from round to round, and the opening and closing of its phases."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from .._text import numbered
from ..averaging import ModelAverage
from ..checkpoints import Saved
from ..codes import GradientCode, PrimeField
from ..copies import Comparisons, not_compared, shards_of_several
from ..errors import InvalidSetting, RoundFailed
from ..grid import SETTLED, Arrival, EarlyStopGrid, nodes_of_a_phase, wait_for_nodes
from ..privacy import RunAccount
from ..protocol import view
from ..roster import Holdings, WorkerRegistry
from ..runlog import PhaseRow, RoundRow
from ..staleness import FLOAT16, UpdateMemory
from . import report
from .app_checks import broken_promises, odd_ones_out, refuse_unsuitable
from .layouts import AgreedLayouts
from .mode_choice import mode_chooser
from .options import Coded, Options, Shards
from .phase import Phase, Scrutiny
from .plan_messages import MessageFactory, make_plan, time_to_live
from .reply_groups import Noise, StaleUpdates
from .resume import RunKeeper
from .round_mode import ModeChooser, RoundMode
from .run_masks import SIMULATED, RunMasks
from .stale_phase import LateUpdates, StalePhase
from .stop_rules import open_phase
from .wrapped import ShardGrid, added_up, aggregate, arrays_key_of, common_content, why_no_average

__all__ = ["Run"]

_log = logging.getLogger(__name__)
_LATER = 2  # rounds after which a run that could not compare says so, since copies may still come late

Kind = Literal["train", "evaluate"]


class Run:
    """One run of a wrapped strategy.

    Args:
        strategy: The wrapped strategy.
        options: Settings of the run.
        code: The code, which says which worker holds which shards.
        keeper: Saves the run to disk, if it has a checkpoint.
        name: Name of the run; generated if None.
        timeout: Timeout of a phase in seconds; None for no limit.
        registry: Which node is which worker, as far as known.
        holdings: Shards that the nodes have reported, if the code is built for them; else None.

    Attributes:
        code: The code; with `Discovered`, it changes between rounds.
        done: Number of rounds that were done when the run began or was resumed.
        registry: Which node is which worker, as known between two phases.
        row: Ledger row of the current round; None between rounds.
        phase: The current phase; None between phases.
        late_updates: Has the last updates, with bounded staleness; else None.
        average: Average of the models; None if the run keeps none.
    """

    def __init__(
        self,
        strategy: Strategy,
        options: Options,
        code: GradientCode,
        keeper: RunKeeper,
        *,
        name: str | None,
        timeout: float | None,
        registry: WorkerRegistry | None = None,
        holdings: Holdings | None = None,
    ) -> None:
        self.strategy, self.options, self.code, self.keeper, self.timeout = strategy, options, code, keeper, timeout
        self.name = name or uuid.uuid4().hex
        self.done = 0
        self.registry = registry or WorkerRegistry()  # not shared between runs, which may have other nodes and clients
        self.account: RunAccount | None = None
        if options.privacy is not None:
            rounding = None if options.secure is None else options.secure.rounding
            self.account = RunAccount(options.privacy, code, self.name, send=str(options.send), rounding=rounding)
        self.modes = self._mode_chooser(code)
        self.mode: RoundMode | None = None
        self.row: RoundRow | None = None
        self.phase: Phase | None = None
        #: Kind of phase -> last updates of single groups or shards; empty unless they fill in for missing ones.
        self.stale_updates = {"train": StaleUpdates(), "evaluate": StaleUpdates()} if options.fills_in else {}
        rule = options.staleness
        store = options.send.store if isinstance(options.send, Shards) else ""
        self.late_updates = None if rule is None else LateUpdates(UpdateMemory(code.k, store), rule)
        self._told_memory = False
        self.average = None if options.average is None else ModelAverage(options.average)
        self._holdings, self._told_lacking = holdings, ""
        self._drafts: list[Message] = []
        self._outage_timeout = 0.0  # seconds that a phase waits for nodes while too few are connected
        self._comparisons = Comparisons(options.verify, insists=options.on_disagreement == "skip")
        self._trained: set[int] = set()  # shards of which there should be copies that agree
        self._rounds_trained = 0
        self._replicas: tuple[GradientCode, bool] | None = None  # a code, and whether several workers compute a shard
        self._agreed = AgreedLayouts()
        self._ever_decoded = self._resumed = False
        self._without_model = 0  # rounds in succession
        self._told: GradientCode | None = None  # the code whose holders the ledger lists
        self._slowest: float | None = None  # largest latency of a reply, in seconds
        self._warned: set[str] = set()
        self._masks = RunMasks(options, keeper, self.name)
        self._strangers: set[int] = set()  # nodes that were not known when the last round began

    def _mode_chooser(self, code: GradientCode) -> ModeChooser:
        """Returns the chooser of modes; a strategy that needs each reply never gets coded vectors."""
        coded = self.options.sees == "mean" or (self.options.sees is None and not why_no_average(self.strategy))
        return mode_chooser(self.options, code, coded=coded)

    def _has_replicas(self, code: GradientCode) -> bool:
        """Returns whether several workers compute some shard."""
        if self._replicas is None or self._replicas[0] is not code:
            holders = np.count_nonzero(code.B if code.m == 1 else code.B.any(axis=2), axis=0)
            self._replicas = code, bool(holders.max(initial=0) > 1)
        return self._replicas[1]

    @property
    def _tolerance(self) -> int:
        """Number of nodes that may be missing."""
        return max(0, self.code.s - 2 * max(0, self.options.votes - len(self.registry.silenced)))

    # Beginning and resuming

    def begin_anew(self, arrays: ArrayRecord, request: str) -> None:
        """Save a run that has no completed round, so that a kill in its first round does not lose its name.

        Args:
            arrays: The initial model.
            request: Digest of what the answers depend on; see `request_of`.

        Raises:
            InvalidSetting: A run of this name was begun before, and its checkpoint is lost.
        """
        if self.account is not None and self.keeper.keeps:
            self.account.request = self._masks.same_request(request, self.account.privacy)
            self.account.begin_anew(self.keeper.load_account(self.name))
            self.keeper.save_account(self.name, self.account.state)
        self.keep(arrays, 0)

    def resume(self, saved: Saved, rows: Iterable[RoundRow], request: str) -> None:
        """Resume a saved run.

        Args:
            saved: The run after its last completed round.
            rows: All ledger rows of the run. The mode of the next round is chosen by the durations of the completed
                rounds. Later rows say what has been asked since.
            request: Digest of what the answers depend on; see `request_of`.
        """
        self.done, self._resumed = saved.round, True
        self.restore_average(saved)
        self._masks.resume(saved.tags)
        if self.late_updates is not None and saved.memory is not None:
            with self.keeper.reading("last updates"):
                self.late_updates.memory.restore(saved.memory)
        rows = list(rows)
        for row in rows:
            if row.round <= saved.round:
                self.modes.choose(complete=True)
                self.modes.learn(row)
                self._comparisons.resume([] if row.train is None else [row.train])
                self._ever_decoded |= row.train is not None and row.train.outcome in ("exact", "approximate", "stale")
        if self.account is not None:
            self.account.request = self._masks.same_request(request, self.account.privacy)
            latest = self.keeper.load_account(self.name)
            self.done = self.account.resume(saved.privacy, latest, saved.round, rows)
            self.keeper.save_account(self.name, self.account.state)
            if self.done > saved.round:
                self._tell_spent(saved.round + 1, self.done)
                self.keep(saved.arrays, self.done)

    def keep(self, arrays: ArrayRecord, number: int) -> None:
        """Save the run as it is after a round.

        Args:
            arrays: The model after the round.
            number: Number of the round.
        """
        memory = None if self.late_updates is None else self.late_updates.memory.state()
        average = None if self.average is None else self.average.state()
        account = None if self.account is None else self.account.state
        tags = self._masks.state
        self.keeper.save(self.name, number, arrays, account, memory=memory, average=average, tags=tags)

    def restore_average(self, saved: Saved) -> None:
        """Restore the average of the models, if the run keeps one.

        Raises:
            InvalidSetting: It is damaged.
        """
        if self.average is not None and saved.average is not None:
            with self.keeper.reading("average"):
                self.average.restore(saved.average, saved.arrays)

    def begin(self, grid: EarlyStopGrid, num_rounds: int) -> None:
        """Check and log the privacy cost of the run, and wait for the nodes.

        Raises:
            InvalidSetting: The run would exceed its privacy budget.
            RoundFailed: Too few or too many nodes are connected.
        """
        if self.account is not None:
            self.account.begin(num_rounds)
        source = grid.source
        if self.options.secure is not None and source.fixed_nodes:
            self._warn_once("simulated", SIMULATED)
        self._masks.begin(lambda *who: self.registry.claim(*who))
        if self._holdings is None:
            wait_for_nodes(
                grid,
                len(self.code.active),
                self._tolerance,
                self.options.node_timeout if source.late_nodes else 0.0,
                settled=SETTLED if source.fixed_nodes else math.inf,
                surplus=not source.fixed_nodes,
            )
        else:
            self._tell_lacking(self._holdings, None)
        settling = 0.0 if source.fixed_nodes else self.options.node_timeout
        self._outage_timeout = settling if self.timeout is None else min(settling, self.timeout)

    # A phase

    def configure(
        self, kind: Kind, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Returns the messages of a phase, one for each worker, or none if the wrapped strategy sends none."""
        if kind == "train":
            self._follow_holdings(grid)
        if kind == "train" or self.row is None:
            self._open_row(server_round, grid)
        if kind == "train":
            self._masks.follow(grid, server_round, self.timeout)
        self.phase = None
        self._masks.check()
        if kind == "evaluate" and not self._masks.evaluates:
            return []  # nodes answer nothing unmasked, and the manifest has training alone
        configure = getattr(self.strategy, f"configure_{kind}")
        self._drafts = list(configure(server_round, arrays, config, ShardGrid(self.code.k, grid)))
        if not self._drafts:
            return []
        if kind == "train" or self.mode is None:
            self.mode = self.modes.choose(complete=len(list(grid.get_node_ids())) >= len(self.code.active))
        assert self.row is not None
        self.row = replace(self.row, way=self.mode.line)

        # The phase is a value: making it with its plan changes nothing.
        phase = self._new_phase(kind, server_round, self.mode)
        nodes = self._nodes_for(phase, grid)
        self.phase = phase
        # The order matters: the request is charged, the charge is written to disk, and only then messages are sent.
        account = self.account if phase.plan.privacy else None
        if account is not None and account.charge_request(server_round, phase.shards):
            self.keeper.save_account(self.name, account.state)
        if kind == "train":
            self._masks.rehearse(phase, nodes, phase.registry, grid, self.timeout)
        nodes = [*self._masks.compare_first(phase, nodes, grid, self.timeout)]
        if isinstance(grid, EarlyStopGrid):
            grid.expect(phase)
        elif self.mode.send == "shards":
            raise InvalidSetting(f"send={str(self.options.send)!r} hands out work: run the strategy by its start().")
        return phase.messages(nodes)

    def _new_phase(self, kind: Kind, server_round: int, mode: RoundMode) -> Phase:
        """Returns a phase over the shards that the wrapped strategy sampled."""
        drafts, options = self._drafts, self.options
        content = common_content(drafts, self.code.k)
        shards = sorted({message.metadata.dst_node_id for message in drafts})
        code = mode.code.restrict(shards)
        as_returned = mode.send == "shards" and options.sees != "mean" and not options.only_mean
        arrays_key = arrays_key_of(self.strategy, content, several=as_returned) if kind == "train" else ""
        account = self.account if arrays_key else None
        mixes = mode.send == "coded" and (code.groups is None or code.m > 1)
        by_code = options.votes > 0 and mixes  # then the code itself says which replies are wrong
        secure = options.secure
        if secure is not None and len(shards) != self.code.k:
            raise InvalidSetting(
                f"The wrapped strategy samples {len(shards)} of {self.code.k} shards, and under secure= each sum has "
                "all of them."
            )
        compares = self._has_replicas(mode.code) and not options.independent and not by_code and secure is None
        plan = make_plan(
            code,
            shards,
            options,
            k=self.code.k,
            run=self.name,
            server_round=server_round,
            kind=kind,
            weight_key=str(getattr(self.strategy, "weighted_by_key", "num-examples")),  # it may change it
            arrays_key=arrays_key,
            privacy=account.text if account else "",
            releases=account.releases(server_round, shards) if account else None,
            is_open=self._holdings is not None,
            as_returned=as_returned,
            figures=mixes and compares and (bool(arrays_key) or isinstance(code.numbers, PrimeField)),
            secure=self._masks.digest,
        )
        plan = self._masks.with_tags(plan)
        before = content[arrays_key] if arrays_key else None
        assert before is None or isinstance(before, ArrayRecord)
        self._masks.check_model(before)
        ttl = time_to_live(self.timeout, self._slowest)
        factory = MessageFactory(plan, content, message_type=drafts[0].metadata.message_type, ttl=ttl)
        masks, adds_up = self._masks.manifest, added_up(self.strategy, kind)
        scrutiny = Scrutiny(self._comparisons, compares, self._agreed, options.votes, masks, adds_up)
        registry, late_updates = self.registry.copy(), self.late_updates
        if late_updates is not None and kind == "train":
            self._tell_memory(late_updates.memory, before)
            return StalePhase(factory, shards, before, registry, scrutiny, mode=mode, late_updates=late_updates)
        kappa_max = options.send.kappa_max if isinstance(options.send, Coded) else float("inf")
        phase = open_phase(mode, factory, code, shards, before, registry, scrutiny, kappa_max=kappa_max)
        phase.late_updates = late_updates
        return phase

    def _tell_memory(self, memory: UpdateMemory, before: ArrayRecord | None) -> None:
        """Log once how much the last updates of all shards take."""
        if before is not None and not self._told_memory:
            self._told_memory = True
            values = [view(array) for array in before.values()]
            size = sum(value.size for value in values)
            itemsize = max((4, *(value.dtype.itemsize for value in values if value.dtype.kind == "f")))
            megabytes = memory.bytes_for(size, itemsize) / 1e6
            _log.info(
                "The last updates of %d shards take up to %.1f MB, in %s.",
                memory.k,
                megabytes,
                "memory" if memory.store in ("", FLOAT16) else memory.store,
            )

    def _nodes_for(self, phase: Phase, grid: Grid) -> list[int]:
        """Returns the nodes to ask, after waiting while too few of them are connected."""

        def hopeless(nodes: list[int]) -> bool:
            # `nodes` are all that are connected. A worker whose node is gone may have come back as one of them.
            phase.registry.keep(nodes)
            return phase.hopeless([node for node in nodes if node not in phase.registry.quarantined])

        nodes = nodes_of_a_phase(grid, len(self.code.active), self._tolerance, self._outage_timeout, hopeless)
        phase.registry.keep(nodes)
        if isinstance(grid, EarlyStopGrid):
            phase.registry.learn_from_engine(grid.source.known_workers())
        return [node for node in nodes if node not in phase.registry.quarantined]

    def aggregate(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the arrays and metrics that the wrapped strategy makes of the decoded reply, or of all replies."""
        phase, self.phase = self.phase, None
        if phase is None:
            return None, None
        if not phase.collected:  # another loop drives the strategy, on a grid without stop rules
            for reply in replies:
                phase.offer(Arrival("", reply.metadata.src_node_id, 0.0), reply, 0.0)
        kind = phase.plan.kind
        began = time.perf_counter()
        with np.errstate(all="ignore"):  # the server's app may have set it to raise
            phase.settle()
        self.registry = phase.registry  # the phase has updated its copy
        apart, decoded = self._apart(phase), None
        if not apart or self.options.on_disagreement == "warn":
            stale_updates = self.stale_updates.get(kind)
            with np.errstate(all="ignore"):
                decoded = phase.decode(self.options.approximation, stale_updates, self._noise(server_round, phase))
        entry = report.phase_row(phase, decoded, self.account, decoding=time.perf_counter() - began)
        entry = self._masks.marked(entry)
        self._note(kind, entry)  # noted before anything below can raise, so that the row tells what happened
        waits = [phase.wait] if phase.compared is None else [phase.compared, phase.wait]
        taken = [self._slowest or 0.0, *(job.seconds for wait in waits for job in [*wait.times, *wait.owing])]
        self._slowest = max(taken) or None
        refuse_unsuitable(phase.replies, ever_decoded=self._ever_decoded)
        for key, text in broken_promises(phase.replies):
            self._warn_once(key, text)
        if phase.replies.simulated:
            self._warn_once("simulated", SIMULATED)
        for worker in odd_ones_out(phase.replies):
            node = self.registry.node_of(worker)
            if node is not None:
                self.registry.quarantine(node, "it computes with another device or version than most")
        self._tell_quarantined()
        self._verified(phase)
        phase.copies.close(used=decoded is not None, owing=phase.owing)
        self._masks.learn_from(phase, decoded=decoded is not None)
        if decoded is None:
            self._undecodable(phase, entry, apart or report.why_undecodable(phase, entry))
            return None, MetricRecord(report.figures(entry))
        self._ever_decoded = True
        if kind == "train":
            self._without_model = 0
        del phase  # its replies are large, and the wrapped strategy needs room
        began = time.perf_counter()
        arrays, metrics = aggregate(self.strategy, kind, self._drafts, server_round, decoded, sees=self.options.sees)
        seconds = replace(entry.seconds, aggregating=time.perf_counter() - began)
        self._note(kind, replace(entry, seconds=seconds, model=arrays is not None if kind == "train" else None))
        if kind == "train" and arrays is None:
            self._warn_once(
                "no model",
                f"Round {server_round} was decoded, and {type(self.strategy).__name__} returned no arrays for it: the "
                "model stays as it is.",
            )
        return arrays, MetricRecord({**(metrics or {}), **report.figures(entry)})

    def _apart(self, phase: Phase) -> str:
        """Returns what holders disagree about if the round must not count for it, else an empty string.

        Raises:
            RoundFailed: Holders disagree, and the run is to end then.
        """
        policy, replies = self.options.on_disagreement, phase.replies
        training = phase.plan.kind == "train"  # metrics of evaluations may differ, as times do
        if training and phase.left_out:
            first, *_ = phase.copies.disagreements.values()
            self._warn_once("apart", first.sentences(stateful=replies.stateful, alike=phase.copies.alike))
        now = phase.copies.left_by(phase.left_out) if training else []
        late = phase.late_disagreements
        if not now and not late:
            return ""
        first = (now or late)[0]
        text = first.sentences(stateful=replies.stateful, alike=phase.copies.alike)
        more = {shard for one in now for shard in one.shards} - {*first.shards}
        if more:
            text += f" So do the holders of {numbered('shard', sorted(more), 11)}."
        if policy == "raise":
            self._note(
                phase.plan.kind, replace(report.phase_row(phase, None, self.account, decoding=0), outcome="raised")
            )
            raise RoundFailed(text)
        if policy == "warn" or not now:
            used = "" if now or not first.used else f" Round {first.round} has used one of the two."
            self._warn_once("apart" if now else "apart late", text + used)
            return ""
        return text.removesuffix(".")

    def _verified(self, phase: Phase) -> None:
        """Take over which copies a phase of training compared, and say so if too few could be."""
        if phase.plan.kind != "train":
            return
        compared = self._comparisons
        compared.close(phase.copies, most=phase.most_verifying, waited=phase.verifying)
        if phase.scrutiny.compares and phase.decided:
            self._trained |= shards_of_several(phase.plan)
        self._rounds_trained += 1
        if compared.over and self._rounds_trained >= self.options.verify + _LATER:
            self.tell_unverified()

    def tell_unverified(self) -> None:
        """Warn of shards whose holders were not compared so far, unless the run was not asked to compare them."""
        left = self._trained - self._comparisons.compared
        if left and self.options.verify:
            self._warn_once("not compared", not_compared(left, self._rounds_trained))

    def _noise(self, server_round: int, phase: Phase) -> Noise | None:
        """Returns the noise to add after decoding, or None if the clients add the noise or there is none."""
        account, shards = self.account, phase.shards
        gaussian = account.gaussian(len(shards)) if account is not None and phase.plan.privacy else None
        if account is None or gaussian is None:
            return None

        def add_to(total: NDArray[Any], counters: Sequence[slice]) -> NDArray[np.float64]:
            # The order matters: the draw is charged, the charge is written to disk, and only then noise is drawn.
            account.charge_draw(server_round, shards)
            self.keeper.save_account(self.name, account.state)
            return gaussian.add_to(total, counters)

        return Noise(gaussian.weight, add_to)

    # The ledger row

    def _open_row(self, server_round: int, grid: Grid) -> None:
        is_new = self.code is not self._told
        self.row = report.new_row(self.name, grid, server_round, self.code, is_new=is_new, resumed=self._resumed)
        self._told, self._resumed = self.code, False

    def _note(self, kind: str, entry: PhaseRow) -> None:
        assert self.row is not None
        self.row = replace(self.row, train=entry) if kind == "train" else replace(self.row, evaluate=entry)

    def close_row(self, ended_by: str | None = None) -> RoundRow:
        """Returns the ledger row of the round that has ended, after the mode chooser has learnt from it."""
        assert self.row is not None
        row, self.row = replace(self.row, ended_at=time.time(), ended_by=ended_by), None
        self.modes.learn(row)
        return row

    def _undecodable(self, phase: Phase, entry: PhaseRow, why: str) -> None:
        if self.options.policy == "raise":
            self._note(phase.plan.kind, replace(entry, outcome="raised"))
            raise RoundFailed(f"{why}.")
        if phase.plan.kind == "evaluate":
            _log.warning("%s. The evaluation is skipped.", why)
            return
        self._without_model += 1
        most = self.options.give_up_rounds
        if most is not None and self._without_model >= most:
            self._note("train", replace(entry, outcome="raised"))
            times = "No round" if most == 1 else f"None of the last {most} rounds"
            without = "" if self.options.approximation else ", pass on_undecodable='approximate' to go on without them"
            raise RoundFailed(
                f"{times} made a model, and the next would hardly differ, so the run ends here. {why}. Bring the "
                f"missing shards back{without}, or pass give_up_rounds= to wait longer."
            )
        _log.warning("%s. The round is skipped: the model stays as it is.", why)

    # A code that follows the nodes' holdings

    def _follow_holdings(self, grid: Grid) -> None:
        """Rebuild the code if the connected workers or their shards differ from those it was built for."""
        holdings = self._holdings
        if holdings is None:
            return
        worker_of = {node: self.registry.worker_of(node) for node in grid.get_node_ids()}
        holdings.follow(
            {
                worker: self.registry.holdings[node]
                for node, worker in worker_of.items()
                if worker is not None and node in self.registry.holdings
            }
        )
        for text in holdings.changes():
            _log.warning("%s", text)
        unknown = {node for node, worker in worker_of.items() if worker is None}
        # A node that was unknown in the last round too has had its chance to report its worker number.
        fresh, self._strangers = unknown - self._strangers, unknown
        there = [i for i in holdings.told if i in worker_of.values()]
        if fresh:  # a fresh node may be a worker that has gone; absent workers keep their rows if the rest can decode
            everybody = holdings.code()
            if everybody is not None and everybody.decodable([i for i in everybody.active if i in there]):
                there = [*holdings.told]
        code = holdings.code(there)
        if code is not None and not self._fits(code):
            code = None
        if code is not None and (code.B.shape != self.code.B.shape or (code.B != self.code.B).any()):
            self.code = code
            self.modes = self._mode_chooser(code)
            if self.account is not None:
                self.account.follow(code)
            _log.info("The code has been rebuilt for workers %s: %r.", [*code.active], code)
        self._tell_lacking(holdings, there)

    def _fits(self, code: GradientCode) -> bool:
        """Returns whether the settings of the run fit a code that was built again; warns once if not."""
        try:
            self.options.check_code(code)
        except InvalidSetting as error:
            self._warn_once(f"code {error}", f"The code is not built again for the nodes that are there: {error}")
            return False
        return True

    def _tell_lacking(self, holdings: Holdings, workers: list[int] | None) -> None:
        """Warn of shards that lack holders, unless the last warning was the same."""
        text = holdings.told_lacking(workers)
        if text and text != self._told_lacking:
            _log.warning("%s The code tolerates s=%d until then.", text, self.code.s)
        self._told_lacking = text

    def _tell_spent(self, first: int, last: int) -> None:
        which, its = (
            (f"Round {first}", "its number") if first == last else (f"Rounds {first} to {last}", "their numbers")
        )
        _log.warning(
            "%s had already been asked for when the run ended, and asking again would be a different request (another "
            "app or run config, noise that is drawn again, or a lost account): the privacy counts as spent, the model "
            "stays as it is, and %s will not be used again.",
            which,
            its,
        )

    def _tell_quarantined(self) -> None:
        """Warn of nodes that are left out from now on, once each."""
        for node, why in self.registry.quarantined.items():
            worker = self.registry.named(node)
            who = f"Node {node}" if worker is None else f"Worker {worker} (node {node})"
            self._warn_once(f"quarantined {node}", f"{who} is left out from now on: {why}.")

    def _warn_once(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            _log.warning("%s", text)
