"""Opening a phase: from the messages that the wrapped strategy drafted to what is asked, and how replies add up."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Strategy

from .asking import Asking, make_plan, time_to_live
from .gradient_code import GradientCode
from .inner import arrays_key_of, common_content
from .options import Options
from .phase import Phase
from .roster import Roster
from .run_privacy import RunPrivacy
from .shardwise import sending_of
from .ways import Way

__all__ = ["Opening"]


@dataclass(frozen=True)
class Opening:
    """What stays the same over the phases of a run.

    Attributes:
        strategy: The wrapped one.
        options: As the user set them.
        k: Number of shards of the code.
        run: Name of the run.
        weight_key: The metric that holds the number of examples.
        roster: Who is who.
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
    roster: Roster
    timeout: float | None
    privacy: RunPrivacy | None = None
    digests: Mapping[int, str] | None = None
    is_open: bool = False

    @classmethod
    def of(
        cls,
        strategy: Strategy,
        options: Options,
        code: GradientCode,
        run: str | None,
        roster: Roster,
        timeout: float | None,
        *,
        is_open: bool = False,
    ) -> Opening:
        """For a run that begins; without a name it gets one, which no other run has."""
        run = run or uuid.uuid4().hex
        weight_key = str(getattr(strategy, "weighted_by_key", "num-examples"))
        privacy = RunPrivacy(options.privacy, code, run, send=options.send) if options.privacy else None
        return cls(
            strategy, options, code.k, run, weight_key, roster, timeout, privacy, options.digests, is_open=is_open
        )

    def begin(self, num_rounds: int) -> None:
        """Say what the run is going to cost.

        Raises:
            InvalidSetting: More privacy than it may.
        """
        if self.privacy is not None:
            self.privacy.begin(num_rounds)

    def phase(
        self, kind: str, server_round: int, drafts: Sequence[Message], way: Way, *, slowest: float | None
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
        asking = Asking(
            plan, content, message_type=drafts[0].metadata.message_type, ttl=time_to_live(self.timeout, slowest)
        )
        sending = sending_of(way, asking, code, shards, self.roster, kappa_max=self.options.kappa_max)
        phase = Phase(plan, shards, before, self.roster, sending, asking)
        if self.privacy is not None and arrays_key:
            phase.release_by = self.privacy.release(server_round, shards)
        return phase
