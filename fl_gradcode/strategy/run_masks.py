"""The masks of a run under secure aggregation: whose keys they are, and the rehearsal before the first vectors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from ..errors import InvalidSetting, RoundFailed
from ..privacy import IntegerNoise, Privacy
from ..protocol import Plan, Rejection
from ..roster import WorkerRegistry, collect_tags, rehearse
from ..runlog import PhaseRow
from .options import Options
from .phase import Phase
from .replies import Rejected
from .reply_groups import MaskedReplies
from .resume import RunKeeper

if TYPE_CHECKING:
    from ..enrolment import Relay
    from ..secagg import Manifest

__all__ = ["SIMULATED", "RunMasks"]

_log = logging.getLogger(__name__)
SIMULATED = "Secure aggregation in a simulation protects nothing: all keys are on the server's machine."


class RunMasks:
    """Knows the manifest by which replies are masked; without secure aggregation, there is none.

    Args:
        options: Settings of the run.
        keeper: Saves the set-up of keys, if the run has a checkpoint.
        run: Name of the run.
        clock: Returns the time in nanoseconds, by which rehearsals are numbered: they rise from one start to the next.

    Attributes:
        manifest: The manifest of this round; None without secure aggregation, and before keys are set up.
    """

    def __init__(self, options: Options, keeper: RunKeeper, run: str, clock: Callable[[], int] = time.time_ns) -> None:
        self._secure, self._keeper, self._run = options.secure, keeper, run
        self._patience = options.node_timeout
        self.manifest: Manifest | None = None if options.secure is None else options.secure.manifest
        self._relay: Relay | None = None  # sets up keys, if no dealer has made them
        self._votes = options.votes
        self._rehearsed = b""  # digest of the manifest whose holders have compared what they compute
        self._passed = b""  # the same, and it stays when they are to compare again
        self._clock = clock
        self._tags: dict[int, str] = {}  # worker -> its tags in the last phase that was decoded
        self._tagged = ""  # which phase that was

    @property
    def digest(self) -> str:
        """Digest of the manifest, as hexadecimal; empty if there is none."""
        return "" if self.manifest is None else self.manifest.digest.hex()

    def begin(self, claim: Callable[[int, int, int], Rejection | None]) -> None:
        """Prepare the set-up of keys, if no dealer has made them.

        Args:
            claim: Called with a node, its worker and a round; takes note of who the node is, or refuses.
        """
        if self._secure is not None and self._secure.manifest is None:
            from ..enrolment import Relay  # plain rounds need no keys

            save = partial(self._keeper.save_enrolment, self._run)
            saved = self._keeper.load_enrolment(self._run)
            self._relay = Relay(self._secure.body, self._run, claim, save, saved)

    def follow(self, grid: Grid, server_round: int, timeout: float | None) -> None:
        """Set up keys if there are none, or if workers have come for whom there are none."""
        if self._relay is not None:
            self.manifest = self._relay.follow(grid, server_round, self._patience, timeout)

    def check(self) -> None:
        """Check that there are keys if replies are to be masked.

        Raises:
            InvalidSetting: There are none.
        """
        if self._secure is not None and self.manifest is None:
            raise InvalidSetting("secure= with a body sets up keys first: run the strategy by its start().")

    def same_request(self, request: str, privacy: Privacy | None) -> str:
        """Returns the digest of what a run asks, or "" if a resumed run may ask the same round otherwise.

        Keys that nodes draw may be others after a restart, and integer noise with them, which is a further release.
        """
        drawn = self._secure is not None and self._secure.manifest is None
        return "" if drawn and isinstance(privacy, IntegerNoise) else request

    def check_model(self, model: ArrayRecord | None) -> None:
        """Check that the model has the arrays that the manifest says train() returns.

        Otherwise all shards would fail, and with integer noise nobody would learn of it.

        Raises:
            InvalidSetting: An array is missing or has another shape.
        """
        if self._secure is None or model is None:
            return
        for name, _, shape in self._secure.body.arrays:
            there = model.get(name)
            if there is None or tuple(there.shape) != shape:
                has = "no such array" if there is None else f"one that has shape {tuple(there.shape)}"
                raise InvalidSetting(
                    f"The manifest says that train() returns an array {name!r} of shape {shape}, and the model has "
                    f"{has}. Make a manifest with the layout of this model."
                )

    @property
    def evaluates(self) -> bool:
        """Whether nodes answer evaluations, which they do unmasked or as the body says."""
        return self._secure is None or bool(self._secure.body.evaluation)

    def rehearse(
        self, phase: Phase, nodes: Sequence[int], registry: WorkerRegistry, grid: Grid, timeout: float | None
    ) -> None:
        """Let the holders of each class compare what they compute, before any of them sends a vector.

        They do so again after a round that was lost while nodes refused: they were away before, or differed once.

        Raises:
            RoundFailed: They differ, or too few of them answer. The message names them. If they have passed before,
                this is a warning, and the round is lost too.
        """
        manifest = self.manifest
        if manifest is None or not manifest.body.rehearsal or self._rehearsed == manifest.digest:
            return
        factory = phase.factory
        try:
            rehearse(
                replace(phase.plan, number=self._clock() // 1000, tags={}, tagged=""),
                manifest.body.classes,
                lambda plan, arrays: factory.for_plan(plan, with_arrays=arrays).messages(nodes, registry, plan.rows),
                registry,
                grid,
                timeout,
                votes=self._votes,
            )
        except RoundFailed as error:
            if self._passed != manifest.digest:
                raise
            _log.warning("%s", error)
            return
        self._rehearsed = self._passed = manifest.digest

    def compare_first(self, phase: Phase, nodes: Sequence[int], grid: Grid, timeout: float | None) -> Sequence[int]:
        """Collect the tags of what nodes compute, so that the phase's messages show them and ask for the vectors.

        Nothing is done unless the manifest says agree="always". If too few tags come, the nodes refuse.

        Returns:
            The nodes to ask for vectors: all that have not refused to compute.
        """
        manifest = self.manifest
        if manifest is None or not manifest.body.always:
            return nodes
        plan, factory, registry = phase.plan, phase.factory, phase.registry
        messages = factory.messages(nodes, registry, plan.rows)
        found = collect_tags(plan, manifest.body.classes, messages, registry, grid, timeout)
        phase.replies.rejected += [Rejected(*one) for one in found.rejections]
        phase.compared = found.wait
        shown = replace(plan, tags=found.tags, tagged=f"{plan.label} {found.request}")
        phase.factory = factory.for_plan(shown, with_arrays=False)
        refused = {node for node, _, _ in found.rejections}
        return [node for node in nodes if node not in refused] or nodes

    @property
    def state(self) -> dict[str, Any] | None:
        """The tags of the last phase, for a checkpoint; None if there are none."""
        return {"tagged": self._tagged, "tags": {str(w): one for w, one in self._tags.items()}} if self._tags else None

    def resume(self, state: dict[str, Any] | None) -> None:
        """Restore the tags of the last phase, which would otherwise be shown to nobody.

        Raises:
            InvalidSetting: They are damaged.
        """
        if state is None or self._secure is None:
            return
        with self._keeper.reading("tags of masks"):
            tags = {int(worker): one for worker, one in state["tags"].items()}
            if not all(isinstance(one, str) for one in (state["tagged"], *tags.values())):
                raise TypeError("they are no texts")
            self._tags, self._tagged = tags, state["tagged"]

    def with_tags(self, plan: Plan) -> Plan:
        """Returns a plan that shows the holders of each class the tags of the last phase."""
        return replace(plan, tags=self._tags, tagged=self._tagged) if self._tags else plan

    def learn_from(self, phase: Phase, *, decoded: bool) -> None:
        """Keep the tags of a phase, which the next plan shows to the holders.

        With votes, those of a phase that was not decoded are left out: a wrong reply and a right one may be all there
        is of a class, and both senders would stop.
        """
        if not decoded and any(one.rejection.kind == "secure-refused" for one in phase.replies.rejected):
            self._rehearsed = b""
        best = phase.replies.best
        compared = self.manifest is not None and self.manifest.body.rehearsal and (decoded or not self._votes)
        if compared and isinstance(best, MaskedReplies):
            from ..secagg import tags_by_place

            self._tags = {worker: tags_by_place(mine) for worker, mine in best.tags.items() if mine}
            self._tagged = f"{phase.plan.label} {best.key}"

    def marked(self, entry: PhaseRow) -> PhaseRow:
        """Returns a phase's row with how the keys were set up."""
        return entry if self._relay is None else self._relay.marked(entry)
