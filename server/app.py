"""The Flower ServerApp: reads the run-config, composes strategy, code and grid, and runs the rounds."""

from __future__ import annotations

import logging
import time

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from clients.data import Dataset, load_dataset
from clients.errors import AppConfigError
from clients.models import build_model
from clients.partition import partition_indices
from fl_gradcode import EarlyStopGrid, FlGradcodeError, VirtualGrid
from fl_gradcode.privacy import in_config
from server.compose import make_coding, make_latency, make_privacy, make_strategy
from server.evaluation import CentralEvaluation
from server.settings import Settings

__all__ = ["app"]

_log = logging.getLogger("flwr")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run-config describes."""
    _log.addFilter(_one_sentence)
    settings = Settings.read(context.run_config)
    n = settings.num_clients or _online(grid)
    dataset = load_dataset(settings.dataset, settings.data_dir, settings.train_examples, seed=settings.seed)
    model = build_model(settings.model, dataset, seed=settings.seed)
    _check_partitions(settings, dataset, n)
    if settings.drop_slowest >= n:
        raise AppConfigError(f"drop-slowest={settings.drop_slowest} of {n} clients leaves nobody; choose less.")

    inner = make_strategy(settings)
    strategy = inner
    if settings.code != "none":
        strategy = make_coding(settings, inner, n)  # type: ignore[assignment]
    elif settings.ledger or settings.checkpoint:
        what = "ledger" if settings.ledger else "checkpoint"
        raise AppConfigError(f"{what}= is written by a coded run; choose a code, or leave {what} empty.")
    train_config = None
    if settings.code == "none" and settings.dp != "none":
        privacy = make_privacy(settings)
        assert privacy is not None
        train_config = ConfigRecord(in_config(privacy))
    clock = time.monotonic
    if settings.latency != "none":
        grid = VirtualGrid(grid, make_latency(settings), seed=settings.seed)
        clock = grid.now
    if settings.drop_slowest:
        grid = EarlyStopGrid(grid, stop_after=n - settings.drop_slowest)
    start = clock()
    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=settings.num_server_rounds,
        timeout=settings.timeout,
        train_config=train_config,
        evaluate_fn=CentralEvaluation(
            dataset, settings.model, now=lambda: clock() - start, path=settings.results or None
        ),
    )


def _online(grid: Grid) -> int:
    nodes = len(list(grid.get_node_ids()))
    if nodes == 0:
        raise AppConfigError("No node is online yet. Set num-clients to the number that you are going to start.")
    return nodes


def _check_partitions(settings: Settings, dataset: Dataset, n: int) -> None:
    """Whatever would fail on every client fails here first, once and in one sentence."""
    partition_indices(
        dataset,
        n,
        partitioner=settings.partitioner,
        alpha=settings.alpha,
        seed=settings.seed,
        owners=settings.owners,
    )
    for key, value in (("local-epochs", settings.local_epochs), ("batch-size", settings.batch_size)):
        if value < 1:
            raise AppConfigError(f"{key}={value} must be at least 1.")
    if not settings.learning_rate > 0:
        raise AppConfigError(f"learning-rate={settings.learning_rate} must be greater than 0.")


def _one_sentence(record: logging.LogRecord) -> bool:
    """A mistake in the settings is told as one sentence, not as a stack trace of Flower's."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, AppConfigError | FlGradcodeError):
        record.msg, record.args, record.exc_info, record.exc_text = f"{error}", (), None, None
    return True
