"""GradientCoding: a Flower strategy around a Flower strategy, which waits for decodable instead of for everyone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from .._flower_internals import isolate_flower_random
from ..codes import GradientCode
from ..errors import InvalidSetting
from ..grid import EarlyStopGrid
from ..placement import Manifest
from ..privacy import Privacy
from ..runlog import Ledger
from .app_checks import refuse_wrappers
from .checkpoint import Checkpoint
from .discovery import Discovered, Holdings, discover
from .options import Approximation, Options
from .resume import ResumableRun, fingerprint_of, request_of
from .run import Run
from .strategy_state import StrategyState
from .workers import WorkerRegistry
from .wrapped import check_bounds, check_strategy

__all__ = ["GradientCoding"]

_log = logging.getLogger(__name__)


class GradientCoding(Strategy):
    """Run a Flower strategy so that stragglers neither delay a round nor lose their data.

    Every shard of the training data lies on a few clients; each client answers with one coded update over its
    shards; the round ends as soon as the replies that are in determine the update of *all* shards. The wrapped
    strategy sees one reply: the exact weighted mean, as if everybody had answered in time.

        strategy = GradientCoding(FedAvg(), fractional_repetition(n=12, s=2))
        result = strategy.start(grid, initial_arrays, num_rounds=10)

    The clients add `gradient_coding_mod`. To the wrapped strategy the k shards are its nodes:
    `fraction_train=0.5` samples half the shards, and the code still protects them.

    Args:
        strategy: An averaging strategy: FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad, FedProx or one of your own.
        code: Who holds which shards; worker i is the node whose client reports `partition-id` i. Or `Discovered`: the
            code is made for what nodes report to hold.
        send: "coded": one coded vector a worker and round, least upload. "shards": one shard a message; a free node
            gets the uncovered shard that fewest are working on, the first copy wins. Best where compute dominates.
            "adaptive": chosen anew every few rounds from what the last ones took, by replaying them; so is how much of
            what is stored is computed. A choice that turns out slower than what it replaced is taken back. Where fewer
            holders compute a shard than store it, losing them all at once costs a round (never with "raise").
        patience: With "shards": begin a second copy only when the first has taken so many times as long as the free
            node took for its last shard; 2 by default, which keeps nodes free for the next round where all are alike;
            0: at once.
        on_undecodable: When a round ends undecodable, at the timeout or as soon as it is hopeless: "skip" leaves
            the model as it is, "approximate" (or an `Approximation`) uses the least-squares estimate and reports
            its error and coverage, "raise" ends the run.
        kappa_max: Wait for further replies, up to the timeout, while decoding amplifies noise more than this.
        seed: What the holders of a shard derive their common random seeds from.
        ledger: A `Ledger`, or the absolute path of a file for one JSON line a round.
        node_timeout: Seconds to wait for n nodes before the first round; it starts without if n - s are there.
        give_up_after: Seconds after which a client stops between two shards and is free again; None: never.
        allow_fixed_data: Accept an app that does not choose its data by `partition-id`.
        on_round_end: Called with (round, current arrays, ledger row) after each round; a second time for a round that
            was lost in a kill right after it.
        checkpoint: Absolute path of a file that the run is kept in after each round. If it is there already, `start`
            goes on where it ended: same run name, next round, same model, state of the wrapped strategy, ledger and
            account of privacy (docs/deployment.md).
        run: Name of the run, which plans, keys and the ledger carry; made up at each start if None.
        manifest: Of the shards, as `fl-gradcode place` wrote it (path or value): nodes refuse to train on other data.
        privacy: `DPSGD` or `CentralNoise`: what the run promises (`fl_gradcode.privacy`, docs/privacy.md).

    Raises:
        IncompatibleStrategy: A strategy that cannot work on one decoded reply, with what to do instead.

    References:
        Tandon, Lei, Dimakis, Karampatziakis, "Gradient coding: avoiding stragglers in distributed learning", 2017.
    """

    def __init__(
        self,
        strategy: Strategy,
        code: GradientCode | Discovered,
        *,
        send: Literal["coded", "shards", "adaptive"] = "coded",
        patience: float | None = None,
        on_undecodable: Literal["skip", "approximate", "raise"] | Approximation = "skip",
        kappa_max: float = float("inf"),
        seed: int = 0,
        ledger: Ledger | str | os.PathLike[str] | None = None,
        node_timeout: float = 60.0,
        give_up_after: float | None = None,
        allow_fixed_data: bool = False,
        on_round_end: Callable[[int, ArrayRecord, dict[str, Any]], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        run: str | None = None,
        privacy: Privacy | None = None,
        manifest: Manifest | str | os.PathLike[str] | None = None,
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
            send=send,
            patience=patience,
            kappa_max=kappa_max,
            seed=int(seed),
            node_timeout=node_timeout,
            give_up_after=give_up_after,
            allow_fixed_data=allow_fixed_data,
            privacy=privacy,
            digests=None if manifest is None else Manifest.for_all_shards(manifest, code.k).digests,
        )
        self.strategy = strategy
        self._wish = code if isinstance(code, Discovered) else None
        self._code = None if isinstance(code, Discovered) else code
        if self._code is not None:
            self.options.check(self._code)
        elif send == "adaptive":
            raise InvalidSetting(
                "send='adaptive' chooses among ways to send for one fixed code; with Discovered choose 'coded' or "
                "'shards'."
            )
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.on_round_end = on_round_end
        self._k = code.k
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint)
        self._state = StrategyState(strategy, warn=checkpoint is not None)
        self._name = run
        self._going = self._continuation()
        self._arrays = ArrayRecord()
        self._run = None if self._code is None else Run(strategy, self.options, self._code, run, None)

    @property
    def code(self) -> GradientCode:
        """The code; under `Discovered` that of the last round.

        Raises:
            InvalidSetting: Nodes have not told yet what they hold.
        """
        return self._here.code

    @property
    def run(self) -> str:
        """Name of the run."""
        kept = self._going.name if self._run is None else None
        return kept or self._here.name

    @property
    def _here(self) -> Run:
        if self._run is None:
            raise InvalidSetting("With Discovered the code is known once start() has asked the nodes what they hold.")
        return self._run

    def summary(self) -> None:
        """Log the code, then the wrapped strategy's own summary."""
        _log.info("\t├──> Gradient coding: %r", self._wish if self._run is None else self._run.code)
        _log.info("\t│\t├── Dispatch: %s", self.options.send)
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

        `Result.arrays` is the last model even if rounds were skipped; the result's metrics carry figures of the
        code under `fl-gradcode.`.

        Raises:
            RoundFailed: Too few or too many nodes; or an undecodable round under `on_undecodable="raise"`.
            UnsuitableApp: The clients lack the mod, or do not choose their data by `partition-id`.
        """
        waiting = grid if isinstance(grid, EarlyStopGrid) else EarlyStopGrid(grid)
        isolate_flower_random()
        with self._continuation() as going:
            self._going = going
            if (finished := going.finished(num_rounds, self.ledger)) is not None:
                self._arrays = finished.arrays
                if self._code is not None:
                    self._run = self._new_run(going, waiting, timeout)
                return finished
            run = self._run = self._new_run(going, waiting, timeout)
            request = request_of(grid, self.options, train_config)
            self._arrays = going.resume(run, self.ledger, initial_arrays, request)
            left = num_rounds - going.done
            if left < 1 <= going.done:  # the last number is spent
                return going.complete(Result(arrays=self._arrays))
            run.begin(waiting, num_rounds)
            limit: Any = timeout  # Flower's grids take None for "no limit"
            rest = (train_config, evaluate_config, going.evaluating(evaluate_fn))
            try:
                result = super().start(waiting, self._arrays, left, limit, *rest)
            except BaseException as error:
                if run.row:
                    run.row["ended-by"] = f"{type(error).__name__}: {error}"
                    self._close_row()
                raise
            finally:
                if waiting is not grid:
                    waiting.close()
            result.arrays = result.arrays or self._arrays
            return going.complete(result)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's training messages, one plan for each worker."""
        refuse_wrappers()
        self._arrays = arrays
        return self._here.configure("train", server_round + self._going.done, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's evaluation messages, one plan for each worker."""
        return self._here.configure("evaluate", server_round + self._going.done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode, and let the wrapped strategy aggregate the one decoded reply."""
        number = server_round + self._going.done
        arrays, metrics = self._here.aggregate(number, replies)
        if arrays is not None:
            self._arrays = arrays
        self._going.trained(number, metrics)
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Decode the metrics, and let the wrapped strategy aggregate the one decoded reply."""
        number = server_round + self._going.done
        _, metrics = self._here.aggregate(number, replies)
        row = self._close_row()
        if self.on_round_end is not None:
            self.on_round_end(number, self._arrays, row)
        self._going.evaluated(number, metrics, self._arrays)
        return metrics

    def _new_run(self, going: ResumableRun, grid: EarlyStopGrid, timeout: float | None) -> Run:
        if self._wish is None:
            return Run(self.strategy, self.options, self.code, going.name, timeout)
        registry, holdings = WorkerRegistry(), Holdings(self._wish, self.options.digests)
        discover(grid, holdings, registry, self.options.node_timeout)
        code = holdings.code()
        assert code is not None
        self.options.check(code)
        return Run(self.strategy, self.options, code, going.name, timeout, registry, holdings)

    def _continuation(self) -> ResumableRun:
        made = fingerprint_of(self.strategy, self._code, self._k, self.options)
        return ResumableRun(self._checkpoint, self._state, made, self._name)

    def _close_row(self) -> dict[str, Any]:
        row = self._here.close_row()
        self.ledger.append(row)
        return row
