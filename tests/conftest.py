"""Shared fixtures: a tiny app whose update is a known function of round and shard, and three codes."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray

from fl_gradcode import GradientCode, cyclic_repetition, fractional_repetition, gradient_coding_mod, uncoded
from fl_gradcode.strategy import report
from fl_gradcode.testing import InProcessGrid

_ENGINES = "tests/end_to_end/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests with engines in one worker process of pytest-xdist, one after the other, from the beginning.

    They start half a dozen processes each and compare seconds: two at once would measure each other. The other worker
    does the rest of the suite meanwhile. (`--dist loadgroup` is meant for this, and pytest-xdist 3.8 cannot group tests
    under pytest 9: it sets an attribute of test items that is no longer read.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class EnginesTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            # Files are handed out as they are collected; a test at a time would cost a question for each of thousands.
            return "engines" if nodeid.startswith(_ENGINES) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return EnginesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests with engines to the front: they take longest, and nothing else in their process can go beside."""
    items.sort(key=lambda item: not item.nodeid.startswith(_ENGINES))


def pytest_collection_finish() -> None:
    """Take what is there so far, such as thousands of test items, out of the garbage collector's sight.

    Flower collects garbage for each reply that it aggregates, which takes a third of a second in so large a process.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quiet_flower() -> Iterator[None]:
    """Flower logs every round; warnings and our own lines stay.

    Every test finds loggers as they are at first: programs that are called here, and are processes of their own
    elsewhere, direct the library's lines to Flower's logger or switch all warnings off.
    """
    flower, library = logging.getLogger("flwr"), logging.getLogger("fl_gradcode")
    levels, filters, parent = (flower.level, library.level), list(flower.filters), library.parent
    disabled = logging.root.manager.disable
    flower.setLevel(logging.ERROR)
    yield
    flower.setLevel(levels[0])
    library.setLevel(levels[1])
    flower.filters, library.parent = filters, parent
    logging.disable(disabled)


@pytest.fixture(autouse=True, scope="session")
def rows_claim_nothing_unseen() -> Iterator[None]:
    """Whatever the test: a row has a disagreement where two workers' copies were compared, and null where none were."""
    make = report.phase_row

    def checked(*args: Any, **kwargs: Any) -> Any:
        row = make(*args, **kwargs)
        assert (row.replica_disagreement is None) == (not row.compared)
        assert not row.compared or len({*row.answered}) > 1
        return row

    report.phase_row = checked
    yield
    report.phase_row = make


def update_of(server_round: int, shard: int, size: int) -> NDArray[np.float64]:
    """What training on `shard` adds in this round: known, so that tests can add up by hand."""
    return np.random.default_rng((server_round, shard)).standard_normal(size)


def toy_app(
    mods: Sequence[Any] = (gradient_coding_mod,),
    train_mods: Sequence[Any] = (),
    *,
    examples: Callable[[int], int] = lambda shard: shard + 1,
    **kwargs: Any,
) -> ClientApp:
    """An app whose model moves by `update_of`; shard j has j + 1 examples unless `examples` says otherwise."""
    app = ClientApp(mods=[*mods], **kwargs)

    @app.train(mods=[*train_mods])
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        server_round = int(content["config"]["server-round"])
        old = content["arrays"].to_numpy_ndarrays()
        moves = np.split(
            update_of(server_round, shard, sum(a.size for a in old)), np.cumsum([a.size for a in old])[:-1]
        )
        new = [(a + m.reshape(a.shape)).astype(np.float32) for a, m in zip(old, moves, strict=True)]
        metrics = MetricRecord({"num-examples": examples(shard), "loss": float(shard), "pair": [1.0, float(shard)]})
        return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": examples(shard), "accuracy": shard / 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def initial_arrays() -> ArrayRecord:
    return ArrayRecord([np.ones((3, 2), np.float32), np.zeros(5, np.float32)])


def flat(arrays: ArrayRecord) -> NDArray[np.float64]:
    return np.concatenate([a.ravel().astype(np.float64) for a in arrays.to_numpy_ndarrays()] or [np.zeros(0)])


def relative(actual: ArrayRecord, expected: ArrayRecord) -> float:
    a, b = flat(actual), flat(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def run_plain(app: ClientApp, n: int, strategy: Strategy | None = None, rounds: int = 3, **kwargs: Any) -> Any:
    """Plain Flower on n nodes: the oracle."""
    with InProcessGrid(app, n) as grid:
        return (strategy or FedAvg()).start(grid, kwargs.pop("arrays", initial_arrays()), num_rounds=rounds, **kwargs)


def all_codes(n: int, s: int) -> list[GradientCode]:
    return [uncoded(n), fractional_repetition(n, s), cyclic_repetition(n, s, rng=np.random.default_rng(1))]


@pytest.fixture(params=["uncoded", "fractional", "cyclic"])
def code(request: pytest.FixtureRequest) -> GradientCode:
    make: dict[str, Callable[[], GradientCode]] = {
        "uncoded": lambda: uncoded(6),
        "fractional": lambda: fractional_repetition(6, 2),
        "cyclic": lambda: cyclic_repetition(6, 2, rng=np.random.default_rng(1)),
    }
    return make[str(request.param)]()
