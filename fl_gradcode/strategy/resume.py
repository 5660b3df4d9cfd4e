"""Saves a run after each round, and resumes it after its server was killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from .._seeding import global_states
from ..checkpoints import KINDS, Checkpoint, MetricsKind, Saved, StrategyState
from ..codes import GradientCode
from ..errors import InvalidSetting
from ..privacy import privacy_to_json
from .options import Options

__all__ = ["ResumedRounds", "RunKeeper", "fingerprint_of", "request_of"]

_CODE, _PROMISE, _MASKS = "code", "privacy promise", "secure manifest"

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def fingerprint_of(strategy: Strategy, code: GradientCode | None, k: int, options: Options) -> dict[str, Any]:
    """Returns the settings that must be the same in a checkpoint and in the run that resumes it.

    The privacy promise is part of them, because the completed rounds are priced by the noise that was added to them.
    `code` is None if it is built for the shards that nodes report.
    """
    privacy = None if options.privacy is None else privacy_to_json(options.privacy, promise_only=True)
    return {
        "strategy": type(strategy).__name__,
        _CODE: None if code is None else _sketch(code),
        "shards": k,
        "seed": options.seed,
        _PROMISE: privacy,
        _MASKS: None if options.secure is None else (options.secure.manifest or options.secure.body).digest.hex(),
    }


def _sketch(code: GradientCode) -> list[Any]:
    """Returns a description of a code that differs between codes, but not by more than rounding between processors."""
    B = code.B.reshape(len(code.B), -1).astype(np.float64, copy=False)
    support = hashlib.sha256(np.packbits(B != 0).tobytes()).hexdigest()
    columns = np.cos(np.outer(np.arange(1, B.shape[1] + 1), [0.7, 1.9, 3.1]))
    scale = max(float(B.max(initial=0.0)), -float(B.min(initial=0.0))) or 1.0
    return [[*code.B.shape], code.s, code.B.dtype.str, support, B @ columns / scale]


def _alike(kept: Any, now: Any) -> bool:
    """Returns whether two sketches describe the same code, up to rounding."""
    if kept is None or now is None:
        return kept is now
    try:
        return [*kept[:-1]] == now[:-1] and np.allclose(kept[-1], now[-1], rtol=0, atol=1e-6)
    except (TypeError, ValueError, IndexError, KeyError):  # the file may hold anything
        return False


def _equal(kept: Any, now: Any) -> bool:
    return type(kept) is type(now) and json.dumps(kept, default=repr) == json.dumps(now, default=repr)


def request_of(grid: Grid, options: Options, train_config: ConfigRecord | None) -> str:
    """Returns a digest of everything besides the model that a round's answers depend on, as far as the server knows.

    It covers the app (by the hash of its bundle), the run config, the message config, the seed and the privacy promise.
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
    """Saves a run in a checkpoint after each round, and restores it; without a checkpoint, it saves nothing.

    Args:
        checkpoint: Checkpoint of the run; None if the run is not saved.
        state: State of the wrapped strategy since it was made.
        fingerprint: Settings that must not change when the run is resumed; see `fingerprint_of`.
        name: Name of the run that the user set, or None.

    Attributes:
        saved: The run as read from the checkpoint inside `locked`; None if nothing was saved yet.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, state: StrategyState, fingerprint: dict[str, Any], name: str | None
    ) -> None:
        self._checkpoint, self._state, self._fingerprint, self._name = checkpoint, state, fingerprint, name
        self._metrics: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.saved: Saved | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the checkpoint, and read it.

        Raises:
            InvalidSetting: The checkpoint is damaged, in use, or belongs to another run.
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
        """Path of the checkpoint's file; None without a checkpoint."""
        return None if self._checkpoint is None else self._checkpoint.path

    @property
    def rounds(self) -> set[int]:
        """The rounds that the run has metrics of, whose rows were written before."""
        return {number for rounds in self._metrics.values() for number in rounds if number}

    @property
    def name(self) -> str | None:
        """Name of the run; None if it has none yet."""
        return self.saved.run if self.saved else self._name

    def restore(self, saved: Saved) -> None:
        """Restore the state of the wrapped strategy and the metrics of the result."""
        self._state.restore(saved.strategy)
        self._metrics = saved.metrics

    def check_arrays(self, initial: ArrayRecord) -> None:
        """Refuse a model whose arrays differ from the checkpoint's in name or shape.

        Raises:
            InvalidSetting: An array is missing, new, or has another shape.
        """
        if self.saved is not None and self._checkpoint is not None:
            _check_arrays(self.saved.arrays, initial, self._checkpoint)

    def note(self, kind: MetricsKind, number: int, metrics: MetricRecord | None) -> None:
        """Remember the metrics of a round for the result."""
        if metrics is not None and self._checkpoint is not None:
            self._metrics[kind][number] = dict(metrics.items())

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Tell errors about a part of the checkpoint in a sentence.

        Raises:
            InvalidSetting: The part is damaged.
        """
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            assert self._checkpoint is not None
            raise InvalidSetting(
                f"The checkpoint {self._checkpoint.path} is damaged ({what}: {error}). Restore the file, or remove it "
                "to start over."
            ) from error

    def save(
        self,
        run: str,
        number: int,
        arrays: ArrayRecord,
        account: dict[str, Any] | None,
        *,
        memory: dict[str, Any] | None = None,
        average: dict[str, Any] | None = None,
        tags: dict[str, Any] | None = None,
    ) -> None:
        """Save the run as it is after a round.

        Args:
            run: Name of the run.
            number: Number of the round.
            arrays: The model after the round.
            account: State of the privacy account; None without a privacy promise.
            memory: Last updates of the shards; None without bounded staleness.
            average: State of the models' average; None without one.
            tags: Tags of the last round, see `Saved`.
        """
        if self._checkpoint is not None:
            kept = (self._fingerprint, self._state.changed(), global_states(), self._metrics)
            self._checkpoint.save(Saved(run, number, arrays, *kept, account, memory, average, tags))

    def save_account(self, run: str, account: dict[str, Any]) -> None:
        """Write the state of the privacy account to disk; called during rounds as well as between them."""
        if self._checkpoint is not None:
            self._checkpoint.save_privacy(run, account)

    def load_account(self, run: str) -> dict[str, Any] | None:
        """Returns the state of the run's privacy account that was saved last, or None if there is none."""
        return None if self._checkpoint is None else self._checkpoint.load_privacy(run)

    def save_enrolment(self, run: str, enrolment: dict[str, Any]) -> None:
        """Write the set-up of a masked run to disk, before anything is asked under its keys."""
        if self._checkpoint is not None:
            self._checkpoint.save_enrolment(run, enrolment)

    def load_enrolment(self, run: str) -> dict[str, Any] | None:
        """Returns the run's last set-up, or None if there is none."""
        return None if self._checkpoint is None else self._checkpoint.load_enrolment(run)

    def complete(self, result: Result, done: int) -> Result:
        """Returns the result with the metrics of all rounds.

        Args:
            result: Result of the rounds since `start` was called.
            done: Number of rounds that were done before.
        """
        if done:
            for kind in KINDS:
                numbered = {number: MetricRecord(values) for number, values in sorted(self._metrics[kind].items())}
                setattr(result, kind, numbered)
        return result

    def _check(self) -> None:
        saved = self.saved
        if saved is None or self._checkpoint is None:
            return
        if not saved.randomness or {*saved.metrics} != {*KINDS}:
            raise InvalidSetting(
                f"The checkpoint {self._checkpoint.path} is damaged: it lacks the states of generators, or metrics. "
                "Restore the file, or remove it to start over."
            )
        where = f"The checkpoint {self._checkpoint.path} is of"
        if self._name is not None and saved.run != self._name:
            raise InvalidSetting(f"{where} run {saved.run!r}, and this is run {self._name!r}: name another file.")
        for what, value in self._fingerprint.items():
            kept = saved.fingerprint.get(what)
            if not (_alike(kept, value) if what == _CODE else _equal(kept, value)):
                told = "" if what in (_CODE, _PROMISE) else f" ({repr(kept)[:100]}, now {value!r})"
                raise InvalidSetting(
                    f"{where} a run with another {what}{told}. Continue with the same one, or name another file to "
                    "start over."
                )


class ResumedRounds(Strategy):
    """Adapts a resumed strategy to Flower's loop, which always counts rounds from 1.

    This class is the only place that converts the loop's round numbers into the run's.

    Args:
        strategy: The strategy, which takes the run's round numbers.
        done: Number of rounds that are already done.
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
        """Returns the arrays and metrics that the strategy makes of the replies."""
        return self._strategy.aggregate_train(server_round + self._done, replies)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the metrics that the strategy makes of the replies."""
        return self._strategy.aggregate_evaluate(server_round + self._done, replies)

    def evaluating(self, evaluate_fn: Evaluate | None) -> Evaluate | None:
        """Returns the central evaluation with the run's round numbers; it skips the evaluation before the first."""
        if evaluate_fn is None or not self._done:
            return evaluate_fn
        return lambda server_round, arrays: evaluate_fn(server_round + self._done, arrays) if server_round else None


def _check_arrays(saved: ArrayRecord, given: ArrayRecord, checkpoint: Checkpoint) -> None:
    """Refuse a model whose names or shapes differ from the saved ones; dtypes may differ."""
    shapes = [{name: tuple(array.shape) for name, array in record.items()} for record in (saved, given)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise InvalidSetting(
            f"The checkpoint {checkpoint.path} is of a run with another model: array {other[0]!r} differs. Go on with "
            "the same one, or name another file to start over."
        )
