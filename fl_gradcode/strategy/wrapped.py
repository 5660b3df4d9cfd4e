"""The interface to the wrapped strategy, and the checks of whether a strategy can be wrapped.

The wrapped strategy sees a grid whose nodes are the k shards. Its messages are never sent; only their content is used.
Later the strategy gets one ordinary reply, which contains the decoded mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from ..errors import IncompatibleStrategy
from ..grid import ForwardingGrid
from ..protocol import restore_types
from .replies import Decoded

__all__ = [
    "PRIVACY_WRAPPERS",
    "ShardGrid",
    "aggregate",
    "arrays_key_of",
    "check_bounds",
    "check_strategy",
    "common_content",
    "has_custom_metrics",
]

_COMPARES = (
    "compares the clients' replies with each other, and under coding there is one decoded reply. Wrap an averaging "
    "strategy (FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad, FedProx)"
)
_PRIVACY = (
    "clips and noises single replies, and a coded reply is a sum over shards. Wrap the strategy inside it, and pass "
    "GradientCoding(..., privacy=CentralNoise(...)) for the same under coding, or privacy=DPSGD(...) for noise in the "
    "clients"
)
#: Flower's strategies that wrap another strategy to add differential privacy.
PRIVACY_WRAPPERS = (
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
)
_REFUSED: dict[type[Strategy], str] = {
    **dict.fromkeys(
        (
            flower.Krum,
            flower.MultiKrum,
            flower.Bulyan,
            flower.FedMedian,
            flower.FedTrimmedAvg,
            flower.QFedAvg,
        ),
        _COMPARES,
    ),
    **dict.fromkeys(
        (flower.FedXgbBagging, flower.FedXgbCyclic),
        "combines trees, and coding adds vectors. Run it without coding",
    ),
    **dict.fromkeys(PRIVACY_WRAPPERS, _PRIVACY),
}

# A strategy that waits for more nodes than there are polls get_node_ids forever. Other strategies call it a few times.
_MAX_QUESTIONS = 20


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy that cannot work on one decoded reply.

    Raises:
        IncompatibleStrategy: The strategy cannot be wrapped. The message says what to do instead.
    """
    name = type(strategy).__name__
    if isinstance(strategy, type):
        raise IncompatibleStrategy(f"{strategy.__name__} is a class; pass an instance: {strategy.__name__}().")
    if not isinstance(strategy, Strategy):
        raise IncompatibleStrategy(f"{name} is not a flwr.serverapp.strategy.Strategy; wrap one, such as FedAvg().")
    for kind, reason in _REFUSED.items():
        if isinstance(strategy, kind):
            of = "" if type(strategy) is kind else f" (a {kind.__name__})"
            raise IncompatibleStrategy(f"{name}{of} cannot be wrapped: it {reason}.")
    if type(strategy).start is not Strategy.start:
        raise IncompatibleStrategy(
            f"{name} cannot be wrapped: it overrides start(), which the wrapper has to run itself. Move what it adds "
            "into a function and pass it as GradientCoding(..., on_round_end=)."
        )


def check_bounds(strategy: Strategy, k: int) -> None:
    """Refuse a strategy that requires more than k nodes, for which Flower would wait forever.

    Raises:
        IncompatibleStrategy: A bound is larger than k. The message names it.
    """
    for bound in ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"):
        value = getattr(strategy, bound, 0)
        if isinstance(value, int) and value > k:
            raise IncompatibleStrategy(
                f"{type(strategy).__name__}({bound}={value}) asks for {value} nodes; the wrapped strategy sees the "
                f"code's k={k} shards as its nodes. Lower it to at most {k}, or use a code with more shards."
            )


def has_custom_metrics(strategy: Strategy, kind: str) -> bool:
    """Returns whether the user passed a custom metric aggregation to FedAvg or a strategy like it."""
    function = getattr(strategy, f"{kind}_metrics_aggr_fn", None)
    return function is not None and getattr(function, "__name__", "") != "aggregate_metricrecords"


class ShardGrid(ForwardingGrid):
    """The grid that the wrapped strategy sees: its k nodes are the shards, and it refuses to send messages."""

    def __init__(self, k: int, grid: Grid) -> None:
        super().__init__(grid)
        self._k = k
        self._questions = 0

    def get_node_ids(self) -> Iterable[int]:
        """Returns the k shard ids as node ids.

        Raises:
            IncompatibleStrategy: The strategy keeps asking, which means that it waits for more than k nodes.
        """
        self._questions += 1
        if self._questions > _MAX_QUESTIONS:
            raise IncompatibleStrategy(
                f"The wrapped strategy keeps waiting for more nodes than the k={self._k} shards that it sees. Lower "
                "its bounds, or use a code with more shards."
            )
        return list(range(self._k))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse to send messages."""
        raise IncompatibleStrategy(
            "The wrapped strategy tried to send messages by itself. Under GradientCoding the wrapper sends; return "
            "them from configure_train() and configure_evaluate()."
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse to fetch messages."""
        return self.push_messages([])  # type: ignore[return-value]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Refuse to send messages."""
        return list(self.push_messages(messages))  # type: ignore[arg-type]


def common_content(drafts: Sequence[Message]) -> RecordDict:
    """Returns the content that all messages of the wrapped strategy share.

    Raises:
        IncompatibleStrategy: The contents differ between shards, but a worker trains several shards from one message.
    """
    first = drafts[0].content
    for draft in drafts[1:]:
        same = draft.content is first or (
            draft.content.keys() == first.keys() and all(draft.content[key] == first[key] for key in first)
        )
        if not same:
            raise IncompatibleStrategy(
                f"The wrapped strategy sends other content to shard {draft.metadata.dst_node_id} than to shard "
                f"{drafts[0].metadata.dst_node_id}. A worker trains several shards from one message, so all must get "
                "the same; let clients choose by server-round or partition-id instead."
            )
    return first


def arrays_key_of(strategy: Strategy, content: RecordDict) -> str:
    """Returns the name of the ArrayRecord that training starts from.

    Raises:
        IncompatibleStrategy: There is no ArrayRecord, or several and it is not clear which one is meant.
    """
    names = [key for key, record in content.items() if isinstance(record, ArrayRecord)]
    if len(names) == 1:
        return names[0]
    preferred = getattr(strategy, "arrayrecord_key", None)
    if preferred in names:
        return str(preferred)
    raise IncompatibleStrategy(
        f"The wrapped strategy sends {len(names)} ArrayRecords ({', '.join(names) or 'none'}); an update is the "
        "difference to exactly one."
    )


def aggregate(
    strategy: Strategy, draft: Message, server_round: int, decoded: Decoded
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Returns what the wrapped strategy makes of the decoded mean, given to it as one ordinary reply to `draft`."""
    arrays_name, metrics_name = decoded.names
    content = RecordDict({metrics_name: decoded.metrics})
    if decoded.arrays is None:
        return None, strategy.aggregate_evaluate(server_round, [Message(content, reply_to=draft)])
    content[arrays_name] = decoded.arrays
    arrays, metrics = strategy.aggregate_train(server_round, [Message(content, reply_to=draft)])
    return None if arrays is None else restore_types(decoded.layout, arrays), metrics
