"""A run that goes on after its server was killed: what is kept after each round, and taken up from there."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from .._seeding import global_states
from ..codes import GradientCode
from ..errors import InvalidSetting
from ..privacy import privacy_to_json
from .checkpoint import Checkpoint, Saved
from .options import Options
from .strategy_state import StrategyState

__all__ = ["ResumedRounds", "RunKeeper", "fingerprint_of", "request_of"]

#: Names of the metrics in Flower's `Result`.
MetricsKind = Literal["train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"]
_KINDS: tuple[MetricsKind, ...] = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
_CODE, _PROMISE = "code", "privacy promise"

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def fingerprint_of(strategy: Strategy, code: GradientCode | None, k: int, options: Options) -> dict[str, Any]:
    """Returns what a checkpoint and the run that goes on from it must have in common.

    With other noise the rounds that are done would be priced by what was not added to them. `code` is None if nodes
    decide it.
    """
    privacy = None if options.privacy is None else privacy_to_json(options.privacy, promise_only=True)
    return {
        "strategy": type(strategy).__name__,
        _CODE: None if code is None else _sketch(code),
        "shards": k,
        "seed": options.seed,
        _PROMISE: privacy,
    }


def _sketch(code: GradientCode) -> list[Any]:
    """Returns what two codes differ in, unless they are equal up to rounding: processors differ in last bits."""
    B = code.B.reshape(len(code.B), -1).astype(np.float64)
    support = hashlib.sha256(np.packbits(B != 0).tobytes()).hexdigest()
    columns = np.cos(np.outer(np.arange(1, B.shape[1] + 1), [0.7, 1.9, 3.1]))
    scale = float(np.abs(B).max(initial=0.0)) or 1.0
    return [[*code.B.shape], code.s, code.B.dtype.str, support, B @ columns / scale]


def _alike(kept: Any, now: Any) -> bool:
    """Whether two codes are the same."""
    if kept is None or now is None:
        return kept is now
    return [*kept[:-1]] == now[:-1] and np.allclose(kept[-1], now[-1], rtol=0, atol=1e-6)


def request_of(grid: Grid, options: Options, train_config: ConfigRecord | None) -> str:
    """Returns a digest of what a round's answers depend on besides the model, so far as the server knows it.

    That is the app (as its bundle's hash), the run config, the config of messages, the seed and the privacy promise.
    """
    run = grid.run
    known = {
        "app": getattr(run, "fab_hash", ""),
        "run-config": sorted(
            (key, repr(value)) for key, value in (getattr(run, "override_config", None) or {}).items()
        ),
        "message-config": sorted((key, repr(value)) for key, value in (train_config or {}).items()),
        "seed": options.seed,
        "privacy": None if options.privacy is None else privacy_to_json(options.privacy, promise_only=True),
    }
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


class RunKeeper:
    """Keeps a run in a checkpoint after each round, and reads it from there. Without a checkpoint it keeps nothing.

    Args:
        checkpoint: The run's file; None: the run is not kept.
        state: Of the wrapped strategy, as it was made; what it has changed is kept and set again.
        fingerprint: See `fingerprint_of`.
        name: Of the run, as the user set it, if at all.

    Attributes:
        saved: The run as the checkpoint has it, while this is locked; None: nothing yet.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, state: StrategyState, fingerprint: dict[str, Any], name: str | None
    ) -> None:
        self._checkpoint, self._state, self._fingerprint, self._name = checkpoint, state, fingerprint, name
        self._metrics: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in _KINDS}
        self.saved: Saved | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Read the checkpoint, and keep any other run from it.

        Raises:
            InvalidSetting: The checkpoint is damaged, in use, or of another run.
        """
        with ExitStack() as stack:
            if self._checkpoint is not None:
                stack.enter_context(self._checkpoint.locked())
                self.saved = self._checkpoint.load()
                self._check()
            yield

    @property
    def keeps(self) -> bool:
        """Whether there is a checkpoint."""
        return self._checkpoint is not None

    @property
    def path(self) -> Path | None:
        """The checkpoint's file, if there is one."""
        return None if self._checkpoint is None else self._checkpoint.path

    @property
    def name(self) -> str | None:
        """Name of the run; None: it has none yet."""
        return self.saved.run if self.saved else self._name

    def restore(self, saved: Saved) -> None:
        """Set what is kept outside of the run: the wrapped strategy's state, the metrics of the result."""
        self._state.restore(saved.strategy)
        self._metrics = saved.metrics

    def check_arrays(self, initial: ArrayRecord) -> None:
        """Refuse a model that is not the checkpoint's.

        Raises:
            InvalidSetting: It has other arrays.
        """
        if self.saved is not None and self._checkpoint is not None:
            _check_arrays(self.saved.arrays, initial, self._checkpoint)

    def note(self, kind: MetricsKind, number: int, metrics: MetricRecord | None) -> None:
        """Remember metrics of a round for the result."""
        if metrics is not None and self._checkpoint is not None:
            self._metrics[kind][number] = dict(metrics.items())

    def save(self, run: str, number: int, arrays: ArrayRecord, account: dict[str, Any] | None) -> None:
        """Keep the run as it is after a round.

        Args:
            run: Its name.
            number: Of the round.
            arrays: The model.
            account: State of the privacy account; None: it promises nothing.
        """
        if self._checkpoint is not None:
            state, metrics = self._state.changed(), self._metrics
            self._checkpoint.save(
                Saved(run, number, arrays, self._fingerprint, state, global_states(), metrics, account)
            )

    def save_account(self, run: str, account: dict[str, Any]) -> None:
        """Put the state of the privacy account on disk, between two rounds and in them."""
        if self._checkpoint is not None:
            self._checkpoint.save_privacy(run, account)

    def load_account(self, run: str) -> dict[str, Any] | None:
        """Returns the state of the run's privacy account as last saved; None: it is not known."""
        return None if self._checkpoint is None else self._checkpoint.load_privacy(run)

    def complete(self, result: Result, done: int) -> Result:
        """Returns the result of all rounds.

        Args:
            result: Of the rounds since the start.
            done: Rounds that were done before it.
        """
        if done:
            for kind in _KINDS:
                numbered = {number: MetricRecord(values) for number, values in sorted(self._metrics[kind].items())}
                setattr(result, kind, numbered)
        return result

    def _check(self) -> None:
        saved = self.saved
        if saved is None or self._checkpoint is None:
            return
        where = f"The checkpoint {self._checkpoint.path} is of"
        if self._name is not None and saved.run != self._name:
            raise InvalidSetting(f"{where} run {saved.run!r}, and this is run {self._name!r}: name another file.")
        for what, value in self._fingerprint.items():
            same = _alike if what == _CODE else operator.eq
            if not same(saved.fingerprint.get(what), value):
                told = "" if what in (_CODE, _PROMISE) else f" ({saved.fingerprint.get(what)!r}, now {value!r})"
                raise InvalidSetting(
                    f"{where} a run with another {what}{told}. Go on with the same one, or name another file to begin "
                    "anew."
                )


class ResumedRounds(Strategy):
    """Shows a strategy to Flower's loop, which counts rounds from 1, while rounds of the run are done already.

    Here alone the numbers of Flower's loop become those of the run.

    Args:
        strategy: The strategy, which counts as the run does.
        done: Rounds that are done.
    """

    def __init__(self, strategy: Strategy, done: int) -> None:
        self._strategy, self._done = strategy, done

    def summary(self) -> None:
        """Log the strategy's own summary."""
        self._strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the strategy's messages for the round of the run."""
        return self._strategy.configure_train(server_round + self._done, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the strategy's messages for the round of the run."""
        return self._strategy.configure_evaluate(server_round + self._done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns what the strategy makes of the replies."""
        return self._strategy.aggregate_train(server_round + self._done, replies)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns what the strategy makes of the replies."""
        return self._strategy.aggregate_evaluate(server_round + self._done, replies)

    def evaluating(self, evaluate_fn: Evaluate | None) -> Evaluate | None:
        """Returns the central evaluation with the rounds of the run; not again before the first."""
        if evaluate_fn is None or not self._done:
            return evaluate_fn
        return lambda server_round, arrays: evaluate_fn(server_round + self._done, arrays) if server_round else None


def _check_arrays(saved: ArrayRecord, given: ArrayRecord, checkpoint: Checkpoint) -> None:
    """A round may change dtypes, never names and shapes."""
    shapes = [{name: tuple(array.shape) for name, array in record.items()} for record in (saved, given)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise InvalidSetting(
            f"The checkpoint {checkpoint.path} is of a run with another model: array {other[0]!r} differs. Go on with "
            "the same one, or name another file to begin anew."
        )
