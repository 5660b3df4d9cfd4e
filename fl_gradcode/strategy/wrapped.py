"""The interface to the wrapped strategy, and the checks of whether a strategy can be wrapped.

The wrapped strategy sees a grid whose nodes are the k shards. Its messages are never sent; only their content is used.
Later the strategy gets one ordinary reply for each sampled shard, or a single one that contains the decoded mean.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from .._flower_internals import mean_of_replies, reply_in_process
from ..errors import IncompatibleStrategy, InvalidSetting
from ..grid import ForwardingGrid
from ..protocol import difference_of_names, names_of, restore_types, view
from .options import Options, Shards
from .reply_groups import Decoded, Returned

__all__ = [
    "PRIVACY_WRAPPERS",
    "ShardGrid",
    "added_up",
    "aggregate",
    "arrays_key_of",
    "check_bounds",
    "check_full_participation",
    "check_staleness",
    "check_strategy",
    "check_what_it_sees",
    "common_content",
    "why_no_average",
]

_log = logging.getLogger(__name__)

#: Flower's strategies that make a weighted mean of the replies, and what they make of it depends on the mean alone.
_FED_OPT = flower.FedAdam.__mro__[1]  # the base of the adaptive ones
_AVERAGES = (
    flower.FedAvg,
    flower.FedAvgM,
    flower.FedAdagrad,
    flower.FedAdam,
    flower.FedYogi,
    flower.FedProx,
    _FED_OPT,
)
#: What they make of the metrics if the user passes no function.
_MEAN_OF_METRICS = flower.FedAvg().train_metrics_aggr_fn
#: A method of theirs that decides which replies are averaged.
_OF_EACH_REPLY = ("_check_and_log_replies",)
#: Flower's strategies that wrap another strategy to add differential privacy.
PRIVACY_WRAPPERS = (
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
)
#: Flower's strategies that stack the arrays of all replies.
_STACK = (flower.Krum, flower.MultiKrum, flower.Bulyan, flower.FedMedian, flower.FedTrimmedAvg, flower.QFedAvg)
#: Flower's strategies for which a mean is not enough, whatever the user says.
_NEED_REPLIES = (
    *_STACK,
    flower.FedXgbBagging,
    flower.FedXgbCyclic,
    *PRIVACY_WRAPPERS,
)

# A strategy that waits for more nodes than there are polls get_node_ids forever. Other strategies call it a few times.
_MAX_QUESTIONS = 20


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy that cannot be wrapped in any way.

    Raises:
        IncompatibleStrategy: The strategy cannot be wrapped. The message says what to do instead.
    """
    name = type(strategy).__name__
    if isinstance(strategy, type):
        raise IncompatibleStrategy(f"{strategy.__name__} is a class; pass an instance: {strategy.__name__}().")
    legacy = any(kind.__module__.startswith("flwr.server.strategy") for kind in type(strategy).__mro__)
    if not isinstance(strategy, Strategy):
        raise IncompatibleStrategy(
            f"{name} belongs to Flower's legacy interface (flwr.server.strategy). Use the one of "
            "flwr.serverapp.strategy, and call its start() in an @app.main()."
            if legacy
            else f"{name} is not a flwr.serverapp.strategy.Strategy; wrap one, such as FedAvg()."
        )
    if type(strategy).start is not Strategy.start:
        raise IncompatibleStrategy(
            f"{name} cannot be wrapped: it overrides start(), which the wrapper has to run itself. Move what it adds "
            "into a function and pass it as GradientCoding(..., on_round_end=)."
        )


def check_full_participation(strategy: Strategy, *, evaluation: bool) -> None:
    """Refuse a strategy that samples clients, whose shards secure aggregation could not leave out.

    Two sums that differ by a shard show that shard's update.

    Args:
        strategy: The wrapped strategy.
        evaluation: Whether nodes are asked to evaluate.

    Raises:
        InvalidSetting: It does.
    """
    wanted = {"fraction_train": (1.0,)} | ({"fraction_evaluate": (0.0, 1.0)} if evaluation else {})
    for name, fine in wanted.items():
        fraction = getattr(strategy, name, 1.0)
        if fraction not in fine:
            raise InvalidSetting(
                f"{name}={fraction} samples shards, and under secure= each sum has all of them: set it to 1.0."
            )


def check_staleness(strategy: Strategy, options: Options) -> None:
    """Refuse a strategy that does not go with stale updates, or warn if the user insists.

    With momentum or adaptive rates, training with stale updates oscillates: staleness acts as momentum of its own.

    Raises:
        IncompatibleStrategy: The message says what does not go together.
        InvalidSetting: It samples shards.
    """
    if options.staleness is None or not isinstance(options.send, Shards):
        return
    name, fraction = type(strategy).__name__, getattr(strategy, "fraction_train", 1.0)
    if fraction != 1.0:
        raise InvalidSetting(
            f"fraction_train={fraction} samples shards, and with Shards(staleness=...) all of them take part in each "
            "round: set it to 1.0."
        )
    if reason := why_no_average(strategy):
        raise IncompatibleStrategy(f"{name} {reason}, and Shards(staleness=...) needs a strategy that averages.")
    momentum, rate = getattr(strategy, "server_momentum", 0.0), getattr(strategy, "server_learning_rate", 1.0)
    what = (
        f"{name} adapts its rates"
        if isinstance(strategy, _FED_OPT)
        else f"{name} has momentum {momentum:g}"
        if momentum
        else f"{name} has a server learning rate of {rate:g}"
        if rate != 1.0
        else ""
    )
    if not what:
        return
    text = (
        f"{what}, with which training on stale updates oscillates (an accuracy of 75 to 80 % where exact rounds "
        "reached 84 %, docs/staleness.md)"
    )
    if not options.send.forced:
        raise IncompatibleStrategy(
            f"{text}. Use exact rounds, which is Shards(staleness=0), or FedAvg; Shards(forced=True) runs it all the "
            "same."
        )
    _log.warning("%s.", text)


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


def why_no_average(strategy: Strategy) -> str:
    """Returns what makes a strategy more than a weighted mean of the replies, or an empty string if it is one."""
    for method in ("aggregate_train", "aggregate_evaluate", *_OF_EACH_REPLY):
        if not hasattr(strategy, method):
            continue
        owner = next((kind for kind in type(strategy).__mro__ if method in vars(kind)), None)
        if owner not in _AVERAGES or method in vars(strategy):
            return f"aggregates replies by its own {method}()"
    for kind in ("train", "evaluate"):
        if getattr(strategy, f"{kind}_metrics_aggr_fn", _MEAN_OF_METRICS) is not _MEAN_OF_METRICS:
            return f"has a {kind}_metrics_aggr_fn of its own"
    return ""


def added_up(strategy: Strategy, kind: str) -> frozenset[str]:
    """Returns what a strategy adds up of several replies, so that it has to be alike in all of them; see `names_of`.

    Flower's strategies add up or stack arrays of one name, and the numbers of metrics. What a strategy of the user's
    does with its replies is not known: it may want lists of different lengths.
    """
    owner = next((its for its in type(strategy).__mro__ if f"aggregate_{kind}" in vars(its)), None)
    if owner not in (*_AVERAGES, *_STACK) or f"aggregate_{kind}" in vars(strategy):
        return frozenset()
    metrics = getattr(strategy, f"{kind}_metrics_aggr_fn", None) is _MEAN_OF_METRICS
    return frozenset({"arrays", "metrics"} if metrics else {"arrays"})


def check_what_it_sees(strategy: Strategy, options: Options) -> None:
    """Refuse a strategy that needs each reply if it would see a mean.

    Raises:
        IncompatibleStrategy: The message says what the strategy would see, and both ways out.
    """
    name = type(strategy).__name__
    needs = next((kind for kind in _NEED_REPLIES if isinstance(strategy, kind)), None)
    if isinstance(strategy, PRIVACY_WRAPPERS) and options.privacy is not None:
        raise IncompatibleStrategy(
            f"{name} adds privacy, and so does privacy=: wrap the strategy inside {name}, or leave privacy= out."
        )
    why = options.only_mean or ("sees='mean' gives it one decoded mean" if options.sees == "mean" else "")
    reason = why_no_average(strategy)
    if not why or not reason or (options.sees == "mean" and needs is None):
        return
    shards = "pass send='shards'" + (" without privacy=" if options.privacy is not None else "")
    shards += " and on_undecodable='skip' or 'raise'" if options.approximation is not None else ""
    mean = "" if needs else ", or sees='mean' if a mean is all it needs (it saves, logs or schedules)"
    raise IncompatibleStrategy(
        f"{name} {reason}, and {why}: {shards}, which gives it one reply for each shard as in plain Flower{mean}."
    )


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


def common_content(drafts: Sequence[Message], k: int) -> RecordDict:
    """Returns the content that all messages of the wrapped strategy share.

    Raises:
        IncompatibleStrategy: The contents or types differ between shards, but a worker trains several shards from one
            message; or a shard gets two messages, or is none of the k that the strategy sees.
    """
    first, kind = drafts[0].content, drafts[0].metadata.message_type
    times = Counter(draft.metadata.dst_node_id for draft in drafts)
    if not times.keys() <= {*range(k)}:
        stranger = next(node for node in times if not 0 <= node < k)
        raise IncompatibleStrategy(
            f"The wrapped strategy sends a message to node {stranger}, and sees the code's k={k} shards as its nodes: "
            f"choose among grid.get_node_ids(), which are 0 to {k - 1}."
        )
    if len(times) < len(drafts):
        twice, number = times.most_common(1)[0]
        raise IncompatibleStrategy(
            f"The wrapped strategy sends {number} messages to shard {twice}, and a round has one update of each shard: "
            "sample shards without replacement, or let its aggregation count a reply several times."
        )
    other = next((draft for draft in drafts if draft.metadata.message_type != kind), None)
    if other is not None:
        raise IncompatibleStrategy(
            f"The wrapped strategy sends a message of type {other.metadata.message_type!r} to shard "
            f"{other.metadata.dst_node_id}, and one of type {kind!r} to shard {drafts[0].metadata.dst_node_id}. A "
            "worker trains several shards from one message, so all must be of one type; let clients choose by "
            "server-round or partition-id instead."
        )
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


def arrays_key_of(strategy: Strategy, content: RecordDict, *, several: bool = False) -> str:
    """Returns the name of the ArrayRecord that training starts from.

    Args:
        strategy: The wrapped strategy.
        content: What it sends.
        several: Accept several ArrayRecords of which none is known to be meant, because no update is computed.

    Raises:
        IncompatibleStrategy: There is no ArrayRecord, or several and it is not clear which one is meant.
    """
    names = [key for key, record in content.items() if isinstance(record, ArrayRecord)]
    if len(names) == 1:
        return names[0]
    preferred = getattr(strategy, "arrayrecord_key", None)
    if preferred in names:
        return str(preferred)
    if several and names:
        return names[0]
    raise IncompatibleStrategy(
        f"The wrapped strategy sends {len(names)} ArrayRecords ({', '.join(names) or 'none'}); an update is the "
        "difference to exactly one."
    )


def _odd_one(contents: Mapping[int, RecordDict], weight_key: str) -> str:
    """Returns which shard's records look unlike most others', or an empty string if none or most do."""
    forms = {shard: names_of(content, weight_key, {"arrays", "metrics"}) for shard, content in contents.items()}
    usual, number = Counter(forms.values()).most_common(1)[0]
    odd = [shard for shard, form in forms.items() if form != usual]
    if not odd or 2 * number <= len(forms):
        return ""
    what = difference_of_names(forms[odd[0]], usual, "most others'")
    return f"the reply for shard {odd[0]} is unlike most: {what}"


def aggregate(
    strategy: Strategy,
    kind: str,
    drafts: Sequence[Message],
    server_round: int,
    decoded: Decoded | Returned,
    *,
    sees: Literal["mean", "replies"] | None = None,
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Returns what the wrapped strategy makes of the decoded mean, or of all sampled shards' records.

    Args:
        strategy: The wrapped strategy.
        kind: "train" or "evaluate".
        drafts: The messages that it wanted to send.
        server_round: The round.
        decoded: A mean, which it gets as one ordinary reply; or the records of each shard, which it gets as one reply
            for each of its messages, from the node that the message was for.
        sees: "replies" if it gets each shard's reply even if it only averages them, which is done for it otherwise.

    Whatever the strategy raises is raised. If one shard's records are unlike most others', a warning says whose.
    """
    if isinstance(decoded, Returned):
        asked = {draft.metadata.dst_node_id: draft for draft in drafts}  # in the order in which it asked
        contents = [decoded.contents[shard] for shard in asked]
        weight_key = getattr(strategy, "weighted_by_key", "")
        averages = sees != "replies" and not why_no_average(strategy)
        mean = mean_of_replies(contents, weight_key, kind, view) if averages else None
        if mean is not None:
            replies = [reply_in_process(mean, drafts[0])]
        else:
            replies = [reply_in_process(*one) for one in zip(contents, asked.values(), strict=True)]
        try:
            if kind == "evaluate":
                return None, strategy.aggregate_evaluate(server_round, replies)
            return strategy.aggregate_train(server_round, replies)
        except Exception as error:
            if odd := _odd_one(decoded.contents, weight_key):
                name = f"{type(strategy).__name__}.aggregate_{kind}()"
                _log.warning("Round %d: %s raised %s, and %s.", server_round, name, type(error).__name__, odd)
            raise
    arrays_name, metrics_name = decoded.names
    content = RecordDict({metrics_name: decoded.metrics})
    if decoded.arrays is None:
        return None, strategy.aggregate_evaluate(server_round, [Message(content, reply_to=drafts[0])])
    content[arrays_name] = decoded.arrays
    arrays, metrics = strategy.aggregate_train(server_round, [Message(content, reply_to=drafts[0])])
    return None if arrays is None else restore_types(decoded.layout, arrays), metrics
