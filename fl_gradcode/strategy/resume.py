"""A run that goes on after its server was killed: what was done before, and what is kept after each round."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from .._seeding import global_states, set_global_states
from ..codes import GradientCode
from ..errors import InvalidSetting
from ..privacy import privacy_to_json
from ..runlog import Ledger
from .checkpoint import Checkpoint, Saved
from .options import Options
from .run import Run
from .strategy_state import StrategyState

__all__ = ["ResumableRun", "fingerprint_of", "request_of"]

_log = logging.getLogger(__name__)
_KINDS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
_TRAIN, _EVALUATE, _SERVER = _KINDS
_CODE, _PROMISE = "code", "privacy promise"

_Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def fingerprint_of(strategy: Strategy, code: GradientCode | None, k: int, options: Options) -> dict[str, Any]:
    """What a checkpoint and the run that takes it up must have in common; `code` is None if nodes decide it.

    With other noise the rounds that are done would be priced by what was not added to them.
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
    """What two codes differ in, unless they are the same up to rounding: kinds of processor differ in last bits."""
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
    """Digest of what a round's answers depend on besides the model, so far as the server knows it: the app (as its
    bundle's hash), the run config, the config of messages, the seed, the privacy promise."""
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


class ResumableRun:
    """Keeps a run in a checkpoint, and takes it up from there.

    Flower's loop counts rounds from 1: it runs the rest, and `done` is added to each number. Without a checkpoint
    nothing is kept, and `done` is 0. Use it as a context manager: it holds the checkpoint's lock.

    Args:
        checkpoint: Its file; None: the run is not kept.
        state: Of the wrapped strategy, as it was made; what it has changed is set again.
        made: See `fingerprint_of`.
        name: Of the run, as the user set it, if at all.

    Raises:
        InvalidSetting: The checkpoint is damaged, or is of another run.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, state: StrategyState, made: dict[str, Any], name: str | None
    ) -> None:
        self._checkpoint, self._state, self._made, self._name = checkpoint, state, made, name
        self._stack = ExitStack()
        self._saved: Saved | None = None
        self._metrics: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in _KINDS}
        self._run: Run | None = None
        self._central = False
        #: Rounds that are done.
        self.done = 0

    def __enter__(self) -> ResumableRun:
        """Read the checkpoint, if there is one."""
        if self._checkpoint is not None:
            self._stack.enter_context(self._checkpoint.locked())
            try:
                self._saved = self._checkpoint.load()
                self._check()
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of it."""
        self._stack.close()

    @property
    def name(self) -> str | None:
        """Of the run; None: it has none yet."""
        return self._saved.run if self._saved else self._name

    def finished(self, num_rounds: int, ledger: Ledger) -> Result | None:
        """The result, if all rounds are done: no node needs to be there for it, and nothing is written."""
        saved = self._saved
        if saved is None or saved.round < num_rounds:
            return None
        self.done, self._metrics = saved.round, saved.metrics
        self._state.restore(saved.strategy)
        ledger.rows = [row for row in ledger.rows_of(saved.run) if row.get("round", 0) <= saved.round]
        _log.info("All %d rounds of run %s are done: nothing is left to do.", saved.round, saved.run)
        return self.complete(Result(arrays=saved.arrays))

    def resume(self, run: Run, ledger: Ledger, initial: ArrayRecord, request: str) -> ArrayRecord:
        """Set everything as it was after the last round that is done; the arrays to go on from.

        Args:
            run: The run.
            ledger: Its rows behind that round are left out.
            initial: The model, if it begins.
            request: See `request_of`.

        Raises:
            InvalidSetting: The model has other arrays than the checkpoint's.
        """
        self._run = run
        checkpoint, privacy = self._checkpoint, run.opening.privacy
        if checkpoint is None:
            return initial
        if privacy is not None:
            privacy.keep = lambda account: checkpoint.save_privacy(run.name, account)
            privacy.request = request
        saved = self._saved
        if saved is None:
            if privacy is not None:
                privacy.begin_anew(checkpoint.load_privacy(run.name))
            self._save(initial)  # so that a run that is killed in its first round keeps its name
            return initial
        _check_arrays(saved.arrays, initial, checkpoint)
        self.done = saved.round
        self._metrics = saved.metrics
        self._state.restore(saved.strategy)
        rows = ledger.rows_of(run.name)
        run.resume(ledger.resume(run.name, saved.round))
        set_global_states(saved.randomness)
        if privacy is not None:
            self.done = privacy.resume(saved.privacy, checkpoint.load_privacy(run.name), saved.round, rows)
            if self.done > saved.round:
                self._tell_spent(saved.round + 1, self.done)
                self._save(saved.arrays, self.done)
        _log.info("Going on after round %d of run %s (checkpoint %s).", saved.round, run.name, checkpoint.path)
        return saved.arrays

    def _tell_spent(self, first: int, last: int) -> None:
        which, its = (
            (f"Round {first}", "its number") if first == last else (f"Rounds {first} to {last}", "their numbers")
        )
        _log.warning(
            "%s had been asked when the run ended, and would be asked otherwise now (another app or run config, noise "
            "that is drawn anew, or a lost account): the privacy counts as spent, the model stays as it is, and %s "
            "will not be used again.",
            which,
            its,
        )

    def evaluating(self, evaluate_fn: _Evaluate | None) -> _Evaluate | None:
        """The user's central evaluation, with the numbers that rounds have in the run; it is the last of a round."""
        if evaluate_fn is None:
            return None
        self._central = True

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0 and self.done:
                return None  # done when the run began
            number = server_round + self.done
            metrics = evaluate_fn(number, arrays)
            self._note(_SERVER, number, metrics)
            if number:
                self._save(arrays, number)
            return metrics

        return evaluate

    def trained(self, number: int, metrics: MetricRecord | None) -> None:
        """A round's training is over."""
        self._note(_TRAIN, number, metrics)

    def evaluated(self, number: int, metrics: MetricRecord | None, arrays: ArrayRecord) -> None:
        """A round's evaluation is over, and with it the round, unless there is a central evaluation."""
        self._note(_EVALUATE, number, metrics)
        if not self._central:
            self._save(arrays, number)

    def complete(self, result: Result) -> Result:
        """The result of all rounds, those before a restart included."""
        if self.done:
            for kind in _KINDS:
                numbered = {number: MetricRecord(values) for number, values in sorted(self._metrics[kind].items())}
                setattr(result, kind, numbered)
        return result

    def _check(self) -> None:
        saved = self._saved
        if saved is None or self._checkpoint is None:
            return
        where = f"The checkpoint {self._checkpoint.path} is of"
        if self._name is not None and saved.run != self._name:
            raise InvalidSetting(f"{where} run {saved.run!r}, and this is run {self._name!r}: name another file.")
        for what, value in self._made.items():
            same = _alike if what == _CODE else operator.eq
            if not same(saved.fingerprint.get(what), value):
                told = "" if what in (_CODE, _PROMISE) else f" ({saved.fingerprint.get(what)!r}, now {value!r})"
                raise InvalidSetting(
                    f"{where} a run with another {what}{told}. Go on with the same one, or name another file to begin "
                    "anew."
                )

    def _note(self, kind: str, number: int, metrics: MetricRecord | None) -> None:
        if metrics is not None and self._checkpoint is not None:
            self._metrics[kind][number] = dict(metrics.items())

    def _save(self, arrays: ArrayRecord, number: int = 0) -> None:
        if self._checkpoint is None or self._run is None:
            return
        privacy = self._run.opening.privacy
        self._checkpoint.save(
            Saved(
                self._run.name,
                number,
                arrays,
                self._made,
                self._state.changed(),
                global_states(),
                self._metrics,
                None if privacy is None else privacy.state,
            )
        )


def _check_arrays(saved: ArrayRecord, given: ArrayRecord, checkpoint: Checkpoint) -> None:
    """A round may change dtypes, never names and shapes."""
    shapes = [{name: tuple(array.shape) for name, array in record.items()} for record in (saved, given)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise InvalidSetting(
            f"The checkpoint {checkpoint.path} is of a run with another model: array {other[0]!r} differs. Go on with "
            "the same one, or name another file to begin anew."
        )
