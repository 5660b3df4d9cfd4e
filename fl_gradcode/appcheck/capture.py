"""What an app's own ServerApp would send: runs it up to the first round, without nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from .._flower_internals import inside_a_run, is_legacy_server
from ..errors import UnsuitableApp
from ..strategy import GradientCoding, why_no_average

__all__ = ["Captured", "StrategyFacts", "capture", "facts_of"]

_BOUNDS = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")


@dataclass(frozen=True)
class StrategyFacts:
    """What matters of a strategy for coding.

    Attributes:
        name: Its class.
        why_no_average: Why a mean is not enough for it; empty if it is.
        wrapped: Whether it is wrapped in a `GradientCoding` already.
    """

    name: str
    why_no_average: str
    wrapped: bool = False


@dataclass(frozen=True)
class Captured:
    """What the server would send in round 1.

    Attributes:
        content: The records of the message.
        message_type: Its type.
        weight_key: The metric that holds the number of examples.
        strategy: What matters of the strategy.
    """

    content: RecordDict
    message_type: str
    weight_key: str
    strategy: StrategyFacts


class _Started(BaseException):
    """Ends a ServerApp when it starts a strategy; no `except Exception` of the app stops it."""


class _NoNodes(Grid):
    """A grid that says that nodes are there, and sends nothing."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self._nodes = nodes

    def set_run(self, run: object) -> None:
        """Do nothing."""

    @property
    def run(self) -> Any:
        """Stand-in for Flower's run."""
        return self

    run_id = 1

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Returns a new message."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the ids of the nodes."""
        return list(range(1, self._nodes + 1))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse to send messages."""
        raise UnsuitableApp("The ServerApp sends messages before it starts a strategy, and a check has no nodes.")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns nothing."""
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Refuse to send messages."""
        return self.push_messages(messages)  # type: ignore[return-value]


def facts_of(strategy: Strategy) -> StrategyFacts:
    """Returns what matters of a strategy, wrapped or not, for coding."""
    wrapped = isinstance(strategy, GradientCoding)
    inner = strategy.strategy if isinstance(strategy, GradientCoding) else strategy
    return StrategyFacts(type(inner).__name__, why_no_average(inner), wrapped)


def capture(server: Any, run_config: dict[str, Any], partitions: int) -> Captured:
    """Run a ServerApp until it starts its strategy; returns what it would send.

    Args:
        server: The ServerApp.
        run_config: Contents of `context.run_config`.
        partitions: Number of nodes.

    Raises:
        UnsuitableApp: It starts no strategy, or one of Flower's legacy interface.
    """
    if is_legacy_server(server):
        raise UnsuitableApp(
            "The ServerApp has a server_fn, Flower's legacy interface, with strategies from flwr.server.strategy. "
            "GradientCoding wraps those of flwr.serverapp.strategy: write an @app.main() that calls strategy.start()."
        )

    def started(strategy: Strategy, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("train_config") or (args[2] if len(args) > 2 else None) or ConfigRecord()
        inner = strategy.strategy if isinstance(strategy, GradientCoding) else strategy
        nested = [inner]  # Flower's privacy wrappers hold a strategy
        while isinstance(getattr(nested[-1], "strategy", None), Strategy):
            nested.append(nested[-1].strategy)  # type: ignore[attr-defined]
        bounds = [int(getattr(one, bound, 0) or 0) for one in nested for bound in _BOUNDS]
        most = max([partitions, *bounds])
        messages = list(inner.configure_train(1, initial_arrays, config, _NoNodes(most)))
        if not messages:
            raise UnsuitableApp("The strategy trains on no node in round 1.")
        weight_key = str(getattr(nested[-1], "weighted_by_key", "num-examples"))
        first = messages[0]
        found.append(Captured(first.content, first.metadata.message_type, weight_key, facts_of(strategy)))
        raise _Started

    if not callable(server) or hasattr(server, "_registered_funcs"):
        raise UnsuitableApp(f"The serverapp in pyproject.toml is a {type(server).__name__}, not a ServerApp.")
    found: list[Captured] = []
    kinds: tuple[Any, ...] = (Strategy, GradientCoding)
    starts = [kind.start for kind in kinds]
    for kind in kinds:
        kind.start = started
    try:
        with inside_a_run():
            server(_NoNodes(partitions), Context(1, 0, {}, RecordDict(), run_config))
    except BaseException:
        if not found:  # else the app had something to do with what start() did not return
            raise
    finally:
        for kind, its_own in zip(kinds, starts, strict=True):
            kind.start = its_own
    if not found:
        raise UnsuitableApp("The ServerApp ended without starting a strategy.")
    return found[0]
