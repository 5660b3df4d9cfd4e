"""GradientCoding, a Flower strategy that wraps another one and waits until the round is decodable, not for all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from .._flower_internals import isolate_flower_random
from .._logging import speak_through_flower
from .._seeding import set_global_states
from .._versions import warn_of_newer_flower
from ..averaging import ModelAverage
from ..checkpoints import Checkpoint, Saved, StrategyState
from ..codes import GradientCode
from ..errors import InvalidSetting
from ..grid import EarlyStopGrid
from ..placement import Manifest
from ..privacy import Privacy
from ..roster import Discovered, Holdings, WorkerRegistry, discover
from ..runlog import Ledger
from .app_checks import refuse_wrappers
from .options import Adaptive, Approximation, Coded, Options, Shards, check_start, send_of
from .resume import ResumedRounds, RunKeeper, fingerprint_of, request_of
from .run import Run
from .wrapped import check_bounds, check_full_participation, check_staleness, check_strategy, check_what_it_sees

if TYPE_CHECKING:
    from ..secagg import SecureAggregation

__all__ = ["GradientCoding"]

_log = logging.getLogger(__name__)


class GradientCoding(Strategy):
    """Runs a Flower strategy so that stragglers neither delay a round nor lose their data.

    Every shard of the training data is stored on several clients. Each client answers with one coded update over its
    shards. A round ends as soon as the received replies determine the update of *all* shards. The wrapped strategy
    sees one reply, the exact weighted mean, as if every client had answered in time; with `send="shards"` a strategy
    that does more than average sees one reply for each shard, as in plain Flower.

        strategy = GradientCoding(FedAvg(), fractional_repetition(n=12, s=2))
        result = strategy.start(grid, initial_arrays, num_rounds=10)

    The clients add `gradient_coding_mod`. The wrapped strategy sees the k shards as its nodes, so `fraction_train=0.5`
    samples half the shards, and the code still protects them.

    Args:
        strategy: With `send="shards"`, any Flower strategy. With coded vectors, one that averages: FedAvg, FedAvgM,
            FedAdam, FedYogi, FedAdagrad, FedProx, or a subclass that leaves their aggregation and metrics as they are.
        code: The code, which says which worker holds which shards. Worker i is the node whose client reports
            `partition-id` i. Pass `Discovered` to have a code built for the shards that the nodes report to hold.
        send: What a message asks for, as a value or a word. `Coded(...)` or "coded" asks each worker for one coded
            vector a round, which needs the least upload. `Shards(...)` or "shards" asks for one shard a message, which
            is best if computing takes most of the time. `Adaptive()` or "adaptive" takes the mode that was faster over
            recent rounds.
        sees: What the wrapped strategy gets in a round with one shard a message: "replies", as in plain Flower, one for
            each sampled shard, or "mean", one reply with their decoded mean. By default a strategy of Flower that only
            averages gets one reply of which it makes the same model, bit for bit, in less time, and any other gets the
            replies where possible. With coded vectors it gets the mean. `sees="mean"` there says that a strategy with
            an aggregation of its own needs no more than that, because it only saves, logs or schedules.
        on_undecodable: What to do if a round ends undecodable, at the timeout or as soon as it is hopeless. "skip"
            leaves the model as it is. "approximate" (or an `Approximation`) uses the least-squares estimate and reports
            its error and coverage. "raise" ends the run.
        seed: Seed from which the holders of a shard derive their common random numbers.
        ledger: A `Ledger`, or the absolute path of a file that gets one JSON line a round.
        node_timeout: Seconds to wait for n nodes before the first round, which then starts if n - s are connected.
        give_up_rounds: End the run after so many rounds in succession without a model, since the next would hardly
            differ; None for never.
        verify: At most so many rounds at the start of the run wait on, after they could be decoded, until each shard
            has been seen from two holders; 0 for none. In all, they wait on for at most as long as one round takes.
            Copies that come in anyway are always compared.
        on_disagreement: What to do if two holders of a shard send different updates. "warn" says so once, "skip"
            leaves the model as it is in that round, "raise" ends the run. Where the other holders of its shards agree,
            a worker that differs is left out by name instead, and not heard again in this run.
        votes: Number of wrong replies, e, that may be among the holders of each shard. With fractional repetition
            (m = 1) or one shard a message, a copy counts once e + 1 holders have sent it, which needs 2e + 1 holders.
            With `reed_solomon`, the code's checks locate the wrong replies. Of the code's s stragglers, s - 2e are
            left. Without votes, whoever answers first for a shard decides on its update.
        allow_fixed_data: Accept an app that does not choose its data by `partition-id`.
        on_round_end: Called with (round, current arrays, ledger row) after each round. What it changes in the record of
            arrays does not reach the model. It is called again for a round
            that is repeated because the server was killed right after it.
        checkpoint: Absolute path of a file that stores the run after each round. If the file exists, `start` resumes
            from it with the same run name, model, state of the wrapped strategy, ledger and privacy account
            (docs/deployment.md).
        run: Name of the run, used in plans, keys and the ledger; generated at each start if None.
        manifest: Manifest of the shards that `fl-gradcode place` wrote, as a path or value. Nodes refuse to train on
            data that differ from it.
        privacy: The privacy promise of the run, a `DPSGD`, a `CentralNoise`, or under masks an `IntegerNoise`
            (`fl_gradcode.privacy`, docs/privacy.md).
        average: Share of the newest model in an exponential average of the run's models, such as 0.25; None for no
            average. The average is what is evaluated, by the clients and by `evaluate_fn`, and what `Result.arrays`
            holds. Training goes on from the raw model, which `arrays` has, and which `on_round_end` gets.
        secure: Masks all replies, so that the server learns the sum over all shards alone: a `SecureAggregation`
            (`fl_gradcode.secagg`, docs/secure-aggregation.md). Nodes then evaluate only if its manifest covers that;
            `evaluate_fn` of `start` always works.

    Raises:
        IncompatibleStrategy: The strategy cannot be wrapped, or needs more than one decoded mean. The message says what
            to do instead.
        InvalidSetting: A setting is invalid, or does not fit the code.

    References:
        Tandon, Lei, Dimakis, Karampatziakis, "Gradient coding: avoiding stragglers in distributed learning", 2017.
    """

    def __init__(
        self,
        strategy: Strategy,
        code: GradientCode | Discovered,
        *,
        send: Literal["coded", "shards", "adaptive"] | Coded | Shards | Adaptive = "coded",
        sees: Literal["mean", "replies"] | None = None,
        on_undecodable: Literal["skip", "approximate", "raise"] | Approximation = "skip",
        seed: int = 0,
        ledger: Ledger | str | os.PathLike[str] | None = None,
        node_timeout: float = 60.0,
        give_up_rounds: int | None = 3,
        verify: int = 3,
        on_disagreement: Literal["warn", "skip", "raise"] = "warn",
        votes: int = 0,
        allow_fixed_data: bool = False,
        on_round_end: Callable[[int, ArrayRecord, dict[str, Any]], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        run: str | None = None,
        privacy: Privacy | None = None,
        manifest: Manifest | str | os.PathLike[str] | None = None,
        secure: SecureAggregation | None = None,
        average: float | None = None,
    ) -> None:
        check_strategy(strategy)
        if not isinstance(code, GradientCode | Discovered):
            raise InvalidSetting(
                f"code={type(code).__name__}: pass a GradientCode, such as fractional_repetition(n, s), or "
                "Discovered(k)."
            )
        check_bounds(strategy, code.k)
        self.options = Options(
            on_undecodable=on_undecodable,
            send=send_of(send),
            sees=sees,
            seed=int(seed),
            node_timeout=node_timeout,
            give_up_rounds=give_up_rounds,
            verify=verify,
            on_disagreement=on_disagreement,
            votes=votes,
            allow_fixed_data=allow_fixed_data,
            privacy=privacy,
            digests=None if manifest is None else Manifest.for_all_shards(manifest, code.k).digests,
            secure=secure,
            average=average,
        )
        if secure is not None:
            check_full_participation(strategy, evaluation=bool(secure.body.evaluation))
            if isinstance(code, Discovered):
                raise InvalidSetting("secure= needs the manifest's code, and Discovered builds one for each round.")
        check_what_it_sees(strategy, self.options)
        check_staleness(strategy, self.options)
        if self.options.staleness is not None and isinstance(code, Discovered):
            raise InvalidSetting("Shards(staleness=...) needs a fixed code: Discovered may give a shard other data.")
        if isinstance(code, GradientCode):
            self.options.check_code(code)
        elif isinstance(self.options.send, Adaptive):
            raise InvalidSetting(
                "send='adaptive' needs a fixed code to choose its modes; with Discovered, choose 'coded' or 'shards'."
            )
        self.strategy = strategy
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.on_round_end = on_round_end
        self._asked_code = code
        self._name = run
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint)
        self._state = StrategyState(strategy, warn=checkpoint is not None)
        self._arrays = ArrayRecord()
        self._central = False  # whether each round ends with a central evaluation
        self._run: Run | None = None
        self._in_start = False

    if not TYPE_CHECKING:  # else a misspelt name would pass every type check

        def __getattr__(self, name: str) -> Any:
            """Returns an attribute of the wrapped strategy, for one that the wrapper does not have."""
            if name.startswith("__") or "strategy" not in vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self.strategy, name)

    @property
    def code(self) -> GradientCode:
        """The code; with `Discovered`, the code of the last round.

        Raises:
            InvalidSetting: The nodes have not reported their shards yet.
        """
        if self._run is not None:
            return self._run.code
        if isinstance(self._asked_code, Discovered):
            raise InvalidSetting("With Discovered, the code is known once start() has asked the nodes what they hold.")
        return self._asked_code

    @property
    def run(self) -> str:
        """Name of the run.

        Raises:
            InvalidSetting: The run has no name yet, because `start` generates it.
        """
        name = self._name if self._run is None else self._run.name
        if name is None:
            raise InvalidSetting("The run gets its name at start(); pass GradientCoding(..., run=) to name it.")
        return name

    @property
    def arrays(self) -> ArrayRecord:
        """The model after the last round, from which training continues; never an average."""
        return self._arrays

    @property
    def averaged(self) -> ArrayRecord:
        """The average of the models so far, if the run keeps one (`average=`), else the model itself."""
        average = None if self._run is None or self._run.average is None else self._run.average.arrays
        return self._arrays if average is None else average

    def summary(self) -> None:
        """Log the code, then the wrapped strategy's own summary."""
        _log.info("\t├──> Gradient coding: %r", self._asked_code if self._run is None else self._run.code)
        _log.info("\t│\t├── Sending: %s", self.options.send)
        _log.info("\t│\t└── Undecodable rounds: %s", self.options.policy)
        _log.info("\t├──> Wrapped strategy: %s", type(self.strategy).__name__)
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds, as `Strategy.start` does, through an `EarlyStopGrid`.

        `Result.arrays` is the last model even if rounds were skipped. The result's metrics include figures of the code,
        whose names start with `fl-gradcode.`.

        Raises:
            RoundFailed: Too few or too many nodes are connected, a round was undecodable under
                `on_undecodable="raise"`, `give_up_rounds` rounds in succession made no model, or holders of a shard
                disagreed under `on_disagreement="raise"`.
            UnsuitableApp: The clients lack the mod, or do not choose their data by `partition-id`.
            InvalidSetting: The model is no ArrayRecord, or the number of rounds or the timeout is none.
        """
        check_start(initial_arrays, num_rounds, timeout)
        early_stop = grid if isinstance(grid, EarlyStopGrid) else EarlyStopGrid(grid)
        isolate_flower_random()
        speak_through_flower()
        warn_of_newer_flower()
        keeper = self._new_keeper()
        with keeper.locked():
            saved = keeper.saved
            if saved is not None and saved.round >= num_rounds:
                return self._finished(saved, keeper, timeout)
            run = self._run = self._new_run(keeper, timeout, early_stop)
            self._begin_or_resume(run, initial_arrays, request_of(grid, self.options, train_config))
            if num_rounds <= run.done:  # resuming may use up the last round number
                return keeper.complete(Result(arrays=self.averaged), run.done)
            run.begin(early_stop, num_rounds)
            rounds = ResumedRounds(self, run.done)
            self._central = evaluate_fn is not None
            evaluate = rounds.evaluating(None if evaluate_fn is None else self._kept(evaluate_fn))
            limit: Any = timeout  # Any, since Flower's type excludes None, which its grids take for "no limit"
            rest = (num_rounds - run.done, limit, train_config, evaluate_config, evaluate)
            self._in_start = True  # no wrapper can stand between Flower's loop and this strategy
            try:
                result = (
                    rounds.start(early_stop, self._arrays, *rest)
                    if run.done
                    else super().start(early_stop, self._arrays, *rest)
                )
            except BaseException as error:
                if run.row is not None:
                    self._close_row(f"{type(error).__name__}: {error}")
                raise
            finally:
                self._in_start = False
                if early_stop is not grid:
                    early_stop.close()
            run.tell_unverified()
            result.arrays = self.averaged if self.options.average else result.arrays or self._arrays
            return keeper.complete(result, run.done)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the wrapped strategy's training messages, one plan for each worker."""
        if not self._in_start:
            refuse_wrappers()
        self._arrays = arrays
        return self._current_run().configure("train", server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the wrapped strategy's evaluation messages, one plan for each worker."""
        run = self._current_run()
        shown = arrays if run.average is None else run.average.arrays or arrays
        return run.configure("evaluate", server_round, shown, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the arrays and metrics that the wrapped strategy makes of what was decoded."""
        run = self._current_run()
        arrays, metrics = run.aggregate(server_round, replies)
        if arrays is not None:
            self._arrays = arrays
            if run.average is not None:
                run.average.add(arrays)
        run.keeper.note("train_metrics_clientapp", server_round, metrics)
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the metrics that the wrapped strategy makes of what was decoded."""
        run = self._current_run()
        _, metrics = run.aggregate(server_round, replies)
        row = self._close_row()
        if self.on_round_end is not None:
            self.on_round_end(server_round, ArrayRecord(dict(self._arrays)), row)
        run.keeper.note("evaluate_metrics_clientapp", server_round, metrics)
        if not self._central:
            run.keep(self._arrays, server_round)
        return metrics

    def _kept(
        self, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None]
    ) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """Returns a central evaluation that also saves the run, because it is the last step of a round."""

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            run = self._current_run()
            metrics = evaluate_fn(server_round, self.averaged if server_round and run.average else arrays)
            run.keeper.note("evaluate_metrics_serverapp", server_round, metrics)
            if server_round:
                run.keep(arrays, server_round)
            return metrics

        return evaluate

    def _new_keeper(self) -> RunKeeper:
        code = self._asked_code
        fixed = None if isinstance(code, Discovered) else code
        fingerprint = fingerprint_of(self.strategy, fixed, code.k, self.options)
        return RunKeeper(self._checkpoint, self._state, fingerprint, self._name)

    def _new_run(self, keeper: RunKeeper, timeout: float | None, grid: EarlyStopGrid | None) -> Run:
        """Returns a run; with `Discovered`, its code is built for the shards that the grid's nodes report to hold."""
        code, registry, holdings = self._asked_code, WorkerRegistry(), None
        if isinstance(code, Discovered):
            if grid is None:
                raise InvalidSetting("With Discovered run the strategy by its start(), which asks the nodes first.")
            holdings = Holdings(code, self.options.digests)
            discover(grid, holdings, registry, self.options.node_timeout)
            built = holdings.code()
            assert built is not None
            self.options.check_code(built)
            code = built
        return Run(
            self.strategy,
            self.options,
            code,
            keeper,
            name=keeper.name,
            timeout=timeout,
            registry=registry,
            holdings=holdings,
        )

    def _current_run(self) -> Run:
        """Returns the run, which is made here if another loop calls the strategy without its `start`."""
        if self._run is None:
            self._run = self._new_run(self._new_keeper(), None, None)
        return self._run

    def _begin_or_resume(self, run: Run, initial: ArrayRecord, request: str) -> None:
        """Begin a new run or restore the saved one; afterwards `_arrays` is the model to continue from."""
        saved = run.keeper.saved
        if saved is None:
            self._arrays = initial
            run.begin_anew(initial, request)
            return
        run.keeper.check_arrays(initial)
        run.keeper.restore(saved)
        rows = self.ledger.rows_of(run.name)
        self.ledger.resume(run.name, saved.round)
        self.ledger.tell_lost(run.name, run.keeper.rounds)
        set_global_states(saved.randomness)
        self._arrays = saved.arrays
        run.resume(saved, rows, request)
        _log.info("Resuming after round %d of run %s (checkpoint %s).", saved.round, run.name, run.keeper.path)

    def _finished(self, saved: Saved, keeper: RunKeeper, timeout: float | None) -> Result:
        """Returns the result of a run whose rounds are all done, without nodes and without writing anything."""
        keeper.restore(saved)
        self._arrays = saved.arrays
        self.ledger.recall(saved.run, saved.round)
        if not isinstance(self._asked_code, Discovered):
            self._run = self._new_run(keeper, timeout, None)
            self._run.done = saved.round
            self._run.restore_average(saved)
        else:
            self._name = saved.run
            if self.options.average is not None and saved.average is not None:
                average = ModelAverage(self.options.average)
                with keeper.reading("average"):
                    average.restore(saved.average, saved.arrays)
                return keeper.complete(Result(arrays=average.arrays or saved.arrays), saved.round)
        _log.info("All %d rounds of run %s are done: nothing is left to do.", saved.round, saved.run)
        return keeper.complete(Result(arrays=self.averaged), saved.round)

    def _close_row(self, ended_by: str | None = None) -> dict[str, Any]:
        row = self._current_run().close_row(ended_by)
        return self.ledger.append(row)
