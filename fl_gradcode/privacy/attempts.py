"""Calls `train()` so that whether and how it fails tells nothing of records.

If something fails while a batch is out, `train()` is called again and gets the records of its batches one by one. A
record at which it fails counts as one without a gradient in that step, as one does whose gradient is not finite. So
each record still moves the sum by the clipping norm at most, and there is an answer. That holds for misuse of the
library too, since a loop may misuse it for some records alone. What a trial on synthetic records finds is told.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Context, Message, RecordDict

from .._flower_internals import message_of_nobody
from ..errors import FlGradcodeError, PrivacyRefused, TrainingFailed
from .budget_ledger import Charge
from .records import BUDGET, FOLDER, Asked, common_folder, giving

if TYPE_CHECKING:
    from torch import Tensor

    from .step_guards import Misuse

__all__ = ["Attempts", "Session", "call_privately", "current_attempts"]

_log = logging.getLogger(__name__)

#: Records that are tried where nothing is protected. If all of them fail, the app is broken, and its author is told.
_TRIED = 8


@dataclass
class Session:
    """One answer in the making: what stays when `train()` is called again for it.

    Attributes:
        digest: What the request is, in hex.
        charge: What it cost.
        secret: What its keys are derived from.
        start: Makes the sources of noise and of batches, each from its beginning.
        noise, sampling: The sources.
        careful: Whether batches are handed out record by record.
        drawn: Whether a batch was handed out.
        complete: Whether all steps were taken.
        reached: Number of batches that were drawn when they were handed out whole.
        misuse: What was misused while a whole batch was out; None if nothing was.
        step: Number of steps that were taken; only kept in careful sessions, as all that follows.
        chosen: Records of the batch that is under way; None between batches.
        tried: Those that had their turn.
        parts: Sum of their clipped gradients, for each parameter; None for no record so far.
        weights: The parameters after the last step.
        inner: State of the inner optimizer after the last step.
        in_flight: The record that is out.
        good, failed: Numbers of records that had their turn, and of those that failed.
        spoilt: Whether one failed in the batch that is under way.
    """

    digest: str
    charge: Charge
    secret: bytes
    start: Callable[[], tuple[Any, Any]]
    noise: Any = None
    sampling: Any = None
    careful: bool = False
    drawn: bool = False
    complete: bool = False
    reached: int = 0
    misuse: Misuse | None = None
    step: int = 0
    chosen: list[int] | None = None
    tried: set[int] = field(default_factory=set)
    parts: list[Tensor] | None = None
    weights: list[Tensor] = field(default_factory=list)
    inner: dict[str, Any] = field(default_factory=dict)
    in_flight: int | None = None
    good: int = 0
    failed: int = 0
    spoilt: bool = False

    def __post_init__(self) -> None:
        self.noise, self.sampling = self.start()

    def restart(self) -> None:
        """Begin anew, record by record."""
        self.noise.close()
        self.noise, self.sampling = self.start()
        self.careful, self.drawn, self.in_flight = True, False, None

    def had_its_turn(self, parts: list[Tensor]) -> None:
        """Note that the record that was out has been added to the sums."""
        assert self.in_flight is not None
        self.tried.add(self.in_flight)
        self.parts, self.in_flight = parts, None
        self.good += 1

    def fail_record(self) -> None:
        """Note that the record that was out failed, and counts as one without a gradient."""
        assert self.in_flight is not None
        self.tried.add(self.in_flight)
        self.in_flight = None
        self.failed += 1
        self.spoilt = True

    def step_taken(self, weights: list[Tensor], inner: dict[str, Any]) -> None:
        """Note that a batch had its step."""
        self.step += 1
        if self.spoilt and self.step == self.reached:
            self.misuse = None  # its records were at fault, or some of them
        self.chosen, self.parts, self.tried, self.spoilt = None, None, set(), False
        self.weights, self.inner = weights, copy.deepcopy(inner)

    @property
    def misused_as_a_whole(self) -> bool:
        """Whether the batch with a misuse has had its step, and none of its records alone was at fault."""
        return self.misuse is not None and self.step >= self.reached


class Attempts:
    """The calls of `train()` for one shard and round.

    Args:
        protects: Whether the node's owner set limits of his own. If not, a server could as well ask without noise.

    Attributes:
        session: The answer in the making; None before private training began.
    """

    def __init__(self, *, protects: bool) -> None:
        self._protects = protects
        self._last: BaseException | None = None  # what failed at a record
        self.session: Session | None = None

    def failed(self, error: BaseException) -> None:
        """Decide what follows when `train()` has raised: returns if it is to be called again.

        Raises:
            FlGradcodeError: What the server is told.
        """
        from .model_checks import misuse_in  # imports Opacus, which was imported if training began
        from .step_guards import Misuse, Unfit

        session, told = self.session, misuse_in(error)
        if session is None or not session.drawn:
            if isinstance(error, FlGradcodeError):
                raise error
            _log.error("train() raised; the server is told of the structure of models alone", exc_info=error)
            raise (Misuse(told) if told else TrainingFailed(_failed("before it drew a batch"))) from None
        if session.complete:
            _log.error("train() raised after its private training", exc_info=error)
            raise TrainingFailed(_failed("after its private training")) from None
        if isinstance(error, Unfit):
            raise error
        misuse = error if isinstance(error, Misuse) else Misuse(told) if told else None
        if not session.careful:
            _log.error(
                "train() failed. It is called again and gets records one by one; a record at which it fails counts as "
                "one without a gradient, since the server must not learn of it.",
                exc_info=error,
            )
            session.misuse = misuse
            session.restart()
            return
        if session.in_flight is None:
            if misuse is not None and not self._protects:
                raise misuse from None
            raise TrainingFailed(_failed("between its batches")) from None
        session.fail_record()
        if not self._protects and not session.good and session.failed >= _TRIED:
            if misuse is not None or isinstance(error, PrivacyRefused):
                raise misuse or error from None
            raise TrainingFailed(_failed("at every record that was tried")) from None
        self._last = misuse or error

    def answered(self) -> None:
        """Decide whether the server gets the answer of `train()`.

        Raises:
            FlGradcodeError: Nothing is protected here, and no record alone was at fault at a misuse, or `train()`
                failed at all records.
        """
        session = self.session
        if session is None or not session.careful or self._protects:
            return
        if session.misused_as_a_whole:
            assert session.misuse is not None
            raise session.misuse
        if session.failed and not session.good:
            if isinstance(self._last, PrivacyRefused):
                raise self._last
            raise TrainingFailed(_failed("at every record that was tried"))


def _failed(when: str) -> str:
    return f"train() failed {when}; what it raised stays in the node's log, since training is private"


_current: ContextVar[Attempts | None] = ContextVar("fl-gradcode attempts", default=None)


def current_attempts() -> Attempts | None:
    """Returns the calls that this one belongs to; None if `train()` was not called by the mod."""
    return _current.get()


@contextmanager
def _being(attempts: Attempts) -> Iterator[None]:
    token = _current.set(attempts)
    try:
        yield
    finally:
        _current.reset(token)


def call_privately(
    call: Callable[[Message, Context], Message],
    message: Message,
    context: Context,
    asked: Asked,
    *,
    records: Callable[[], RecordDict],
    protects: bool = False,
) -> Message:
    """Returns the reply of the app's function under private training.

    The function is handed nothing that its noise is not bound to: neither message nor context say which node, run or
    message this is, `context.state` is empty, and the run config lacks the folder of keys.

    Args:
        call: The app's function.
        message: Of the type that the function is registered for.
        context: Holds the node config and the run config.
        asked: What the training is asked to promise.
        records: Makes the content of the message anew for each call.
        protects: Whether to tell nothing that may depend on records, also without limits of the node's owner.

    Raises:
        FlGradcodeError: What was refused before a record was used or by a trial on synthetic records, or a failure
            outside of private training, without its text. Where nothing is protected, a misuse that is none of single
            records.
    """
    asked = replace(asked, folder=common_folder(context))
    config = {key: value for key, value in sorted(context.run_config.items()) if key != FOLDER}
    attempts = Attempts(protects=protects or BUDGET in context.node_config)
    while True:
        given = message_of_nobody(_in_order(records()), message.metadata.message_type)
        try:
            with _being(attempts), giving(asked):
                reply = call(given, Context(0, 0, context.node_config, RecordDict(), dict(config)))
        except KeyboardInterrupt:  # the node's owner
            raise
        except BaseException as error:  # whatever an app raises: sys.exit() at a record would end the node otherwise
            attempts.failed(error)
            continue
        finally:
            if attempts.session is not None:
                attempts.session.noise.close()
        if reply.has_error():
            raise TrainingFailed(_failed("and answered with an error"))
        attempts.answered()
        return reply


def _in_order(content: RecordDict) -> RecordDict:
    """Returns records, and the entries of all but arrays, in the order of their names.

    Flower's messages do not keep it, so holders of a shard would be handed different ones.
    """
    ordered: dict[str, Any] = {}
    for name, record in sorted(content.items()):
        kind: Any = type(record)
        ordered[name] = record if isinstance(record, ArrayRecord) else kind(dict(sorted(record.items())))
    return RecordDict(ordered)
