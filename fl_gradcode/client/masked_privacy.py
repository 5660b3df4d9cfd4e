"""Differential privacy in a masked reply: what a node checks, charges and leaves out before anything is masked.

With integer noise, the manifest has the noise, and the plan can only say the same. With noise in training, a shard's
update is private before it is masked. With noise on the server, it is only clipped. No metric of training leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict

from .._files import absolute_path
from ..errors import PrivacyRefused, SecureRefused
from ..privacy import (
    BUDGET,
    DPSGD,
    FOLDER,
    PRIVACY_KEYS,
    SHARDS_SPENT,
    Asked,
    BudgetLedger,
    CentralNoise,
    IntegerNoise,
    Privacy,
    Request,
    budget_of,
    call_privately,
    max_delta_of,
    privacy_from_json,
    refuse_other_unit,
    refuse_unprotected,
    trusts_server,
)
from ..protocol import PARTITION_ID, Plan
from ..secagg import ManifestBody
from .held_shards import SECAGG_DIR

__all__ = ["MaskedPrivacy"]

_Call = Callable[[Message, Context], Message]


class MaskedPrivacy:
    """The privacy of one masked reply.

    Args:
        plan: The plan.
        body: The body of the manifest that the node has pinned.
        message: The message.
        context: The node's context.
        colluders: The owner's number of colluders; None: the body's.

    Attributes:
        privacy: What the plan promises; None without privacy.
        node_config: What private training reads of the node config, and the app sees of it therefore.

    Raises:
        SecureRefused: The plan promises something else than the manifest has, or asks for what would leave without
            noise.
        PrivacyRefused: The node's owner has a budget, and the reply would have no noise.
    """

    def __init__(
        self, plan: Plan, body: ManifestBody, message: Message, context: Context, colluders: int | None
    ) -> None:
        self.privacy: Privacy | None = privacy_from_json(plan.privacy) if plan.privacy else None
        self.node_config: dict[str, Any] = {}
        self._plan, self._body, self._context = plan, body, context
        if plan.kind == "evaluate":
            if BUDGET in context.node_config:
                raise PrivacyRefused(f"This node has {BUDGET}, and an evaluation has no noise.")
            if self.privacy is not None:
                raise SecureRefused("The plan promises privacy for an evaluation, which has no noise.")
            return
        if wrong := body.why_not_private(self.privacy):
            raise SecureRefused(f"The plan's privacy is refused, since secure aggregation {wrong}.")
        if isinstance(self.privacy, IntegerNoise):
            pinned = body.noise(colluders=colluders or 0)
            assert pinned is not None
            # With more colluders than the body's, noise that covers a sum is less.
            self.privacy = replace(self.privacy, noise_multiplier=pinned.noise_multiplier)
        else:
            refuse_unprotected(message, context, self.privacy)
        if isinstance(self.privacy, DPSGD):
            self.node_config = {key: context.node_config[key] for key in PRIVACY_KEYS if key in context.node_config}

    @property
    def covers_failures(self) -> bool:
        """Whether a failed shard shows nowhere, because it counts as a zero update with noise."""
        return isinstance(self.privacy, IntegerNoise)

    def charge(self, folder: Path, request: bytes, pairs: Iterable[tuple[int, int]], data: Mapping[int, str]) -> None:
        """Charge a new request for integer noise to its shards, before anything is trained; the same one costs nothing.

        Private training charges by itself, and noise on the server costs nothing here.

        Args:
            folder: The node's folder of secure aggregation, where the ledger is if the owner names no `privacy-dir`.
            request: Digest R of the request.
            pairs: The (class, shard) pairs that it asks for.
            data: Shard -> SHA-256 of its data, as far as known.

        Raises:
            PrivacyRefused: It would exceed a budget.
            InvalidSetting: The ledger is damaged, or cannot be written.
        """
        if not isinstance(self.privacy, IntegerNoise):
            return
        owner, plan = self._context.node_config, self._plan
        root = absolute_path(str(owner[FOLDER]), FOLDER) if owner.get(FOLDER) else folder
        honest = self.privacy.honest_server and trusts_server(self._context)
        privacy, budget = replace(self.privacy, honest_server=honest), budget_of(self._context)
        for c, shard in pairs:
            if budget < float("inf"):
                refuse_other_unit(root, SHARDS_SPENT, shard)
            _, ranges = plan.releases.get(shard, (1, ()))
            earlier = (number for first, last in ranges for number in range(int(first), int(last) + 1))
            BudgetLedger(root / SHARDS_SPENT).charge(
                Request(
                    shard,
                    plan.run,
                    plan.round,
                    request.hex(),
                    privacy.spend(1, holders=len(self._body.classes.holders[c])),
                    earlier if honest else range(1, plan.round),
                    True,
                    data.get(shard, ""),
                ),
                delta=privacy.delta,
                accountant=privacy.accountant,
                run_budget=privacy.max_epsilon,
                budget=budget,
                budget_delta=min(privacy.delta, max_delta_of(self._context)),
                wanted=False,
            )

    def call(
        self, call_next: _Call, given: Callable[[], RecordDict], message: Message, context: Context, shard: int
    ) -> Message:
        """Returns the reply of the app's function to private training (`DPSGD`) of a shard.

        Args:
            call_next: The app's function.
            given: Seeds the generators, and makes the content of the message anew for each call.
            message: Of the type that the function is registered for.
            context: With the node config for the app.
            shard: The shard.

        Raises:
            FlGradcodeError: See `call_privately`. None of it depends on records.
        """
        plan, privacy = self._plan, self.privacy
        assert isinstance(privacy, DPSGD)
        holders, ranges = plan.releases.get(shard, (1, ()))
        reply_as = json.dumps([plan.arrays_key, plan.weight_key])
        worker: Any = self._context.node_config[PARTITION_ID]  # in a simulation, it names the folder of its keys
        asked = Asked(privacy, plan.run, plan.round, shard, worker, holders, ranges, plan.seed, reply_as)
        run_config = {key: value for key, value in self._context.run_config.items() if key != SECAGG_DIR}
        whole = Context(0, 0, context.node_config, RecordDict(), run_config)
        return call_privately(call_next, message, whole, asked, records=given, protects=True)

    def kept(self, metrics: MetricRecord) -> MetricRecord:
        """Returns what may leave of a shard's training metrics: all without privacy, else the public weight alone."""
        key = self._plan.weight_key
        if self.privacy is None:
            return metrics
        if isinstance(self.privacy, DPSGD):
            return MetricRecord({name: value for name, value in metrics.items() if name == key})
        assert isinstance(self.privacy, CentralNoise | IntegerNoise)
        return MetricRecord({key: 1})
