"""`check_app` finds whatever makes an update depend on more than the message, the shard and the seeded generators."""

from __future__ import annotations

import datetime
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian

from fl_gradcode import gradient_coding_mod
from fl_gradcode.errors import InvalidSetting, UnsuitableApp
from fl_gradcode.testing import check_app

ARRAYS = ArrayRecord({"w": Array(np.zeros(6)), "b": Array(np.ones(2))})
DATA = np.random.default_rng(0).standard_normal((10, 6))
Train = Callable[[Message, Context], Any]
OWN_METRICS: Any = lambda replies, key: MetricRecord()  # noqa: E731


def app_of(update: Train, **more: Any) -> ClientApp:
    """An app whose model moves by what a function of message and context returns."""
    app = ClientApp(mods=more.pop("mods", [gradient_coding_mod]))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        record: Any = message.content["arrays"]
        arrays = dict(record)
        arrays["w"] = Array(arrays["w"].numpy() + update(message, context))
        records: dict[str, Any] = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 5})}
        return Message(RecordDict({**records, **more}), reply_to=message)

    return app


def mine(context: Context) -> Any:
    """The data of the partition."""
    return DATA[int(context.node_config["partition-id"])]


class Kept:
    """What a module of an app keeps from call to call."""

    def __init__(self) -> None:
        self.data: Any = None
        self.count = itertools.count()
        self.generator = np.random.default_rng(0)


def verdicts(app: Any, **more: Any) -> dict[str, str]:
    return {finding.key: finding.verdict for finding in check_app(app, arrays=ARRAYS, **more).findings}


def fails(app: Any) -> list[str]:
    return [key for key, verdict in verdicts(app).items() if verdict == "fails"]


# Apps that break the contract


def test_one_data_set_for_all() -> None:
    assert fails(app_of(lambda message, context: DATA[0])) == ["data"]


def test_data_by_another_key() -> None:
    assert fails(app_of(lambda message, context: DATA[len(str(context.node_config.get("data-path", "")))])) == ["data"]


def test_partition_id_that_is_read_and_not_used() -> None:
    assert fails(app_of(lambda message, context: DATA[0] * (int(context.node_config["partition-id"]) >= 0))) == ["data"]


def test_a_loader_that_is_kept_from_the_first_call() -> None:
    kept = Kept()

    def update(message: Message, context: Context) -> Any:
        kept.data = mine(context) if kept.data is None else kept.data
        return kept.data

    assert fails(app_of(update)) == ["data", "variables"]


def test_a_loader_that_is_kept_though_the_partition_is_read() -> None:
    kept = Kept()

    def update(message: Message, context: Context) -> Any:
        data = mine(context)
        kept.data = data if kept.data is None else kept.data
        return kept.data

    assert fails(app_of(update)) == ["variables"]


def test_a_counter_of_calls() -> None:
    kept = Kept()
    assert fails(app_of(lambda message, context: mine(context) / (1 + next(kept.count)))) == ["variables"]


def test_a_generator_that_is_made_at_import() -> None:
    kept = Kept()
    assert fails(app_of(lambda message, context: mine(context) + kept.generator.random())) == ["variables"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: np.random.default_rng().random(),
        lambda: random.SystemRandom().random(),
        lambda: uuid.uuid4().int % 1000,
    ],
    ids=["default_rng", "SystemRandom", "uuid4"],
)
def test_a_generator_without_a_seed(draw: Callable[[], float]) -> None:
    assert fails(app_of(lambda message, context: mine(context) + draw())) == ["generators"]


def budgeted() -> int:
    """Trains for a time, as apps do that have a budget."""
    began = time.monotonic()
    return next(step for step in itertools.count() if time.monotonic() > began + 0.01)


@pytest.mark.parametrize(
    "read",
    [
        lambda: time.time() % 1000,
        lambda: time.localtime().tm_hour + 24 * time.localtime().tm_yday,
        lambda: int(time.strftime("%Y%m%d%H")) % 1000,
        lambda: datetime.datetime.now().toordinal() % 1000,
        lambda: datetime.date.today().toordinal() % 1000,
        budgeted,
    ],
    ids=["time", "local hour", "strftime", "datetime", "date", "budget of time"],
)
def test_the_clock(read: Callable[[], float]) -> None:
    assert fails(app_of(lambda message, context: mine(context) + read())) == ["clock"]


def test_the_node() -> None:
    assert fails(app_of(lambda message, context: mine(context) * (1 + context.node_id % 7))) == ["node"]
    ids = app_of(lambda message, context: mine(context) + message.metadata.dst_node_id % 7)
    assert fails(ids) == ["node"]


def test_a_split_that_is_drawn_at_the_first_call() -> None:
    drawn: dict[int, Any] = {}

    def update(message: Message, context: Context) -> Any:
        shard = int(context.node_config["partition-id"])
        return mine(context) * drawn.setdefault(shard, np.random.random(6))  # noqa: NPY002

    report = check_app(app_of(update), arrays=ARRAYS)
    assert report.failed == ("variables",)
    assert "random split" in next(one.text for one in report.findings if one.key == "variables")


def test_the_model_of_the_round_before() -> None:
    before: dict[int, Any] = {}

    def in_a_variable(message: Message, context: Context) -> Any:
        content: Any = message.content
        w = content["arrays"]["w"].numpy()
        return mine(context) + w - before.setdefault(int(context.node_config["partition-id"]), w)

    def in_the_state(message: Message, context: Context) -> Any:
        content: Any = message.content
        w, kept = content["arrays"]["w"].numpy(), context.state.get("before")
        context.state["before"] = ArrayRecord({"w": Array(w)})
        known: Any = {"w": Array(w)} if kept is None else kept
        return mine(context) + w - known["w"].numpy()

    assert fails(app_of(in_a_variable)) == ["variables"]
    assert fails(app_of(in_the_state)) == ["state"]


@pytest.mark.parametrize("shared", [False, True], ids=["a file for each partition", "one file"])
def test_what_is_kept_in_a_file(tmp_path: Path, shared: bool) -> None:
    def update(message: Message, context: Context) -> Any:
        path = tmp_path / ("all" if shared else str(context.node_config["partition-id"]))
        count = int(path.read_text()) if path.exists() else 0
        path.write_text(str(count + 1))
        return mine(context) * (1 + count)

    assert fails(app_of(update)) == ["files"]


@pytest.mark.parametrize("how", ["replace", "relative", "torch", "split"])
def test_other_ways_to_keep_something_in_a_file(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)

    def update(message: Message, context: Context) -> Any:
        name = f"state-{context.node_config['partition-id']}"
        path = tmp_path / name
        if how == "split":
            if not path.exists():
                path.write_text(str(np.random.random()))  # noqa: NPY002
            return mine(context) * (1 + float(path.read_text()))
        if how == "torch":
            count = torch.load(path) if path.exists() else 0
            torch.save(count + 1, path)
        else:
            count = int(Path(name).read_text()) if path.exists() else 0
            written = tmp_path / ("new" if how == "replace" else name)
            written.write_text(str(count + 1))
            written.replace(path)
        return mine(context) * (1 + count)

    assert fails(app_of(update)) == ["files"]


def test_a_head_in_the_state() -> None:
    def update(message: Message, context: Context) -> Any:
        kept: Any = context.state.get("head")
        head = np.zeros(6) if kept is None else kept["h"].numpy()
        context.state["head"] = ArrayRecord({"h": Array(head + 1 + mine(context))})
        return mine(context) + head

    report = check_app(app_of(update), arrays=ARRAYS)
    assert report.failed == ("state",)
    assert "'head'" in next(finding.text for finding in report.findings if finding.key == "state")


def test_a_mod_that_stands_before_ours() -> None:
    def halving(message: Message, context: Context, call_next: Any) -> Message:
        return call_next(message, context)  # type: ignore[no-any-return]

    assert fails(app_of(lambda message, context: mine(context), mods=[halving, gradient_coding_mod])) == ["mods"]
    assert fails(app_of(lambda message, context: mine(context), mods=[gradient_coding_mod, halving])) == []


def test_an_app_that_raises() -> None:
    report = check_app(app_of(lambda message, context: mine(context)[99]), arrays=ARRAYS)
    assert report.failed == ("runs",) and "IndexError" in report.findings[0].text


def test_a_function_that_returns_nothing() -> None:
    app = ClientApp()
    app.train()(lambda message, context: None)  # type: ignore[arg-type, return-value]
    report = check_app(app, arrays=ARRAYS)
    assert report.failed == ("runs",) and "returned a NoneType, not a Message" in report.findings[0].text


def test_an_update_that_is_not_finite() -> None:
    assert fails(app_of(lambda message, context: mine(context) * np.inf)) == ["runs"]


# Apps that need one shard a message


def test_a_record_that_coded_vectors_cannot_carry() -> None:
    report = check_app(app_of(lambda message, context: mine(context), told=ConfigRecord({"a": 1})), arrays=ARRAYS)
    assert report.passed and report.send == "shards"
    assert 'send="shards"' in report.lines[0]


@pytest.mark.parametrize(
    ("strategy", "send"),
    [
        (FedAvg(), "coded"),
        (FedMedian(), "shards"),
        (FedAvg(train_metrics_aggr_fn=OWN_METRICS), "shards"),
    ],
    ids=["average", "median", "own metrics"],
)
def test_what_the_strategy_needs(strategy: Any, send: str) -> None:
    report = check_app(app_of(lambda message, context: mine(context)), arrays=ARRAYS, strategy=strategy)
    assert report.passed and report.send == send
    assert type(strategy).__name__ in report.lines[0]


# Apps that keep the contract


class Trainer:
    """A trainer with callbacks, which keeps what it does in itself."""

    def __init__(self, callbacks: Iterable[Callable[[int], None]]) -> None:
        self.callbacks, self.steps = callbacks, 0

    def fit(self, w: Any, data: Any) -> Any:
        for _ in range(3):
            self.steps += 1
            w = w + data / self.steps
            for callback in self.callbacks:
                callback(self.steps)
        return w


def with_trainer(message: Message, context: Context) -> Any:
    seen: list[int] = []
    return Trainer([seen.append]).fit(np.zeros(6), mine(context))


LOADED: dict[int, Any] = {}


def with_a_cache_by_partition(message: Message, context: Context) -> Any:
    shard = int(context.node_config["partition-id"])
    return LOADED.setdefault(shard, DATA[shard])


def with_a_counter_in_the_state(message: Message, context: Context) -> Any:
    seen: Any = context.state.get("seen")
    context.state["seen"] = MetricRecord({"n": 1 if seen is None else seen["n"] + 1})
    return mine(context)


WELL_BEHAVED: dict[str, Train] = {
    "global numpy generator": lambda message, context: mine(context) + np.random.random(6),  # noqa: NPY002
    "global python generator": lambda message, context: mine(context) + random.random(),
    "a generator seeded from the global one": lambda message, context: (
        mine(context) + np.random.default_rng(random.randrange(2**31)).random(6)
    ),
    "a generator seeded by the partition": lambda message, context: (
        mine(context) + np.random.default_rng(int(context.node_config["partition-id"])).random(6)
    ),
    "a schedule by the round": lambda message, context: mine(context) / message.content["config"]["server-round"],
    "a warm-up that begins with nothing": lambda message, context: (
        mine(context) * (message.content["config"]["server-round"] - 1)  # type: ignore[operator]
    ),
    "an empty partition": lambda message, context: mine(context) * (int(context.node_config["partition-id"]) > 1),
    "a trainer": with_trainer,
    "a cache by partition": with_a_cache_by_partition,
    "a counter in the state": with_a_counter_in_the_state,
}


@pytest.mark.parametrize("update", WELL_BEHAVED.values(), ids=WELL_BEHAVED)
def test_no_false_alarm(update: Train) -> None:
    assert fails(app_of(update)) == []


def test_no_false_alarm_for_a_log_file(tmp_path: Path) -> None:
    def update(message: Message, context: Context) -> Any:
        with (tmp_path / "log").open("a") as log:
            log.write(f"{time.time()} {context.node_config['partition-id']}\n")
        return mine(context)

    assert verdicts(app_of(update))["files"] == "note" and fails(app_of(update)) == []


def test_no_false_alarm_for_a_file_that_holds_what_was_computed(tmp_path: Path) -> None:
    def update(message: Message, context: Context) -> Any:
        path = tmp_path / f"{context.node_config['partition-id']}.npy"
        if not path.exists():
            np.save(path, mine(context))
        return np.load(path)

    assert verdicts(app_of(update))["files"] == "note" and fails(app_of(update)) == []


def torch_app(kind: str) -> ClientApp:
    """Small training loops with what apps in PyTorch use."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    app = ClientApp(mods=[gradient_coding_mod])

    def model_of(kind: str) -> Any:
        layers: dict[str, list[Any]] = {
            "batch norm": [nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)],
            "dropout": [nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 1)],
        }
        return nn.Sequential(*layers.get(kind, [nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)])).double()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = model_of(kind)
        record: Any = message.content["arrays"]
        model.load_state_dict(record.to_torch_state_dict(), strict=kind != "adapter")
        random = np.random.default_rng(int(context.node_config["partition-id"]))
        x, y = torch.tensor(random.standard_normal((16, 6))), torch.tensor(random.standard_normal((16, 1)))
        loader = DataLoader(TensorDataset(x, y), 4, shuffle=True, num_workers=1 if kind == "loader with workers" else 0)
        trained = [p for name, p in model.named_parameters() if kind != "adapter" or name.startswith("2")]
        optimizer = torch.optim.Adam(trained, 0.1)
        for xs, ys in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(xs), ys).backward()
            optimizer.step()
        state = {k: v for k, v in model.state_dict().items() if kind != "adapter" or k.startswith("2")}
        metrics = MetricRecord({"num-examples": 16, "seconds": time.perf_counter()})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    app.model = model_of(kind)  # type: ignore[attr-defined]
    torch.optim.Adam(app.model.parameters()).step()  # type: ignore[attr-defined]  # the first step imports a lot
    return app


@pytest.mark.parametrize("kind", ["plain", "batch norm", "dropout", "loader with workers", "adapter"])
def test_no_false_alarm_in_pytorch(kind: str) -> None:
    app: Any = torch_app(kind)
    state = {k: v for k, v in app.model.state_dict().items() if kind != "adapter" or k.startswith("2")}
    report = check_app(app, arrays=ArrayRecord(state))
    assert report.failed == ()


# What cannot be checked


def legacy(context: Context) -> Any:
    """A function of Flower's legacy interface."""


def test_what_cannot_be_checked_is_one_sentence(tmp_path: Path) -> None:
    app = app_of(lambda message, context: mine(context))
    with pytest.raises(InvalidSetting, match="pass arrays="):
        check_app(app)
    with pytest.raises(InvalidSetting, match="at least 2"):
        check_app(app, arrays=ARRAYS, partitions=1)
    with pytest.raises(InvalidSetting, match="contains no Flower app"):
        check_app(tmp_path)
    with pytest.raises(UnsuitableApp, match="client_fn"):
        check_app(ClientApp(client_fn=legacy), arrays=ARRAYS)
