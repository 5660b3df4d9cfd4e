"""What fails at a record counts as a record without a gradient; penalties; what `train()` is shown; devices."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx
from torch import Tensor, nn
from torch.nn import functional as F

from fl_gradcode import GradientCoding, fractional_repetition, gradient_coding_mod
from fl_gradcode.errors import UnsuitableApp
from fl_gradcode.privacy import Asked, BudgetLedger, call_privately, private_training, write_keys
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import flat
from tests.privacy.private_app import settings

CODE = fractional_repetition(2, 1)
COUNT, BAD = 30, 7
MODES = ["hooks", "ghost"]
Loop = Callable[[Any, nn.Module, Tensor, Tensor], None]


def data(shard: int, bad: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shard)
    x = torch.randn(COUNT, 4, generator=generator)
    y = (x.sum(1) > 0).long()
    if bad:
        x[BAD, 0] = 1e4
    return x, y


def loop_with(each: Callable[[Tensor, Tensor], Tensor | None]) -> Loop:
    """The loop that users write; `each` gets a batch and its records, and returns the batch to train on, or None."""

    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
        criterion = dp.criterion(nn.CrossEntropyLoss())
        for batch in dp.batches():
            kept = each(batch, x[batch])
            if kept is None:
                break
            optimizer.zero_grad()
            criterion(dp.model(x[kept]), y[kept]).backward()
            optimizer.step()

    return loop


def raising(batch: Tensor, x: Tensor) -> Tensor:
    if bool((x > 1e3).any()):
        raise ValueError("a record of John Smith")
    return batch


def stopping(batch: Tensor, x: Tensor) -> Tensor | None:
    return None if bool((x > 1e3).any()) else batch


def exiting(batch: Tensor, x: Tensor) -> Tensor:
    if bool((x > 1e3).any()):
        sys.exit("a record of John Smith")
    return batch


def leaving_it_out(batch: Tensor, x: Tensor) -> Tensor:
    return batch[~(x > 1e3).any(1)]


plain_loop = loop_with(lambda batch, _: batch)


def counts_it_as_none(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The oracle: a gradient of zero for that record."""
    usual = (x <= 1e3).all(1)

    def loss(outputs: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels) * kept.float().mean()

    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
    criterion = dp.criterion(loss)
    for batch in dp.batches():
        optimizer.zero_grad()
        criterion(dp.model(x[batch].clamp(max=1e3)), y[batch], usual[batch]).backward()
        optimizer.step()


def run(
    loop: Loop,
    folder: Path,
    mode: Any = "hooks",
    *,
    bad: bool = True,
    rounds: int = 1,
    inner: Any = None,
    budget: float | None = None,
    **options: Any,
) -> tuple[Any, list[Any]]:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content: Any = message.content
        x, y = data(shard, bad)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        net.load_state_dict(content["arrays"].to_torch_state_dict())
        seen.append((message.metadata, context, dict(content)))
        with private_training(message, context, net, examples=COUNT) as dp:
            dp.content = content  # type: ignore[attr-defined]
            loop(dp, net, x, y)
        metrics = MetricRecord({"num-examples": COUNT})
        records: Any = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
        return Message(RecordDict(records), reply_to=message)

    seen: list[Any] = []
    if not folder.exists():
        write_keys(folder, [CODE.shards_of(worker) for worker in range(2)])
    values = {"sample_rate": 0.5, "steps": 3, "noise_multiplier": 1e-6, "grad_sample_mode": mode, **options}
    strategy = GradientCoding(inner or FedAvg(fraction_evaluate=0.0), CODE, privacy=settings(**values), run="r")
    torch.manual_seed(0)
    initial = ArrayRecord(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).state_dict())

    def node(worker: int) -> dict[str, Any]:
        own = {} if budget is None else {"max-epsilon": budget, "privacy-dir": str(folder / f"node-{worker}")}
        return {"partition-id": worker, "num-partitions": 2, **own}

    with InProcessGrid(app, num_nodes=2, run_config={"privacy-dir": str(folder)}, node_config=node) as grid:
        result = strategy.start(grid, initial, num_rounds=rounds)
    rows = [row["train"] for row in strategy.ledger.rows]
    return (flat(result.arrays) - flat(initial), seen), rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("each", [raising, stopping, exiting, leaving_it_out])
def test_a_record_at_which_the_loop_fails_counts_as_none(
    each: Any, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (expected, _), _ = run(counts_it_as_none, tmp_path / "keys", mode, sample_rate=1.0)
    forget(tmp_path / "keys")
    (moved, seen), (row,) = run(loop_with(each), tmp_path / "keys", mode, sample_rate=1.0)
    assert row["outcome"] == "exact" and not row["rejected"]
    assert abs(moved - expected).max() < 1e-4 * abs(expected).max()
    assert len(seen) > 4  # train() was called again
    assert "It is called again and gets records one by one" in caplog.text
    # It is one answer, and is charged once.
    for node in (0, 1):
        ledger = BudgetLedger(tmp_path / "keys" / f"node-{node}" / "spent")
        assert [len(ledger.entries(shard)) for shard in ledger.shards] == [1] * len(ledger.shards)


Step = Callable[[Any, nn.Module, Any, Tensor, Tensor, Any], object]


def stepping(each: Step) -> Loop:
    """A loop that does something else at the bad record; `each` gets dp, net, criterion, records, labels, optimizer."""

    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
        criterion = dp.criterion(nn.CrossEntropyLoss())
        for batch in dp.batches():
            optimizer.zero_grad()
            if bool((x[batch] > 1e3).any()):
                each(dp, net, criterion, x[batch], y[batch], optimizer)
            criterion(dp.model(x[batch]), y[batch]).backward()
            optimizer.step()

    return loop


#: What is refused wherever a loop does it; here it does so for one record alone.
MISUSES: dict[str, Step] = {
    "a loss that is none": lambda dp, net, c, x, y, o: c(dp.model(x), y).clamp(max=1.0).backward(),
    "a sum": lambda dp, net, c, x, y, o: dp.criterion(nn.CrossEntropyLoss(reduction="sum")),
    "a second backward pass": lambda dp, net, c, x, y, o: c(dp.model(x), y).backward(),
    "weights": lambda dp, net, c, x, y, o: next(net.parameters()).data.zero_(),
    "a buffer": lambda dp, net, c, x, y, o: net.register_buffer("seen", torch.ones(1)),
    "a penalty": lambda dp, net, c, x, y, o: dp.penalty(lambda: torch.zeros(())),
    "another optimizer": lambda dp, net, c, x, y, o: dp.optimizer(torch.optim.SGD(net.parameters(), lr=-1.0)),
    "Opacus' own words": lambda dp, net, c, x, y, o: _raise("Parameter tying is not supported with Ghost Clipping"),
}


def _raise(text: str) -> None:
    raise NotImplementedError(text)


@pytest.fixture(scope="module")
def counted_as_none(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Keys, and the update with them where the bad record has no gradient."""
    keys = tmp_path_factory.mktemp("none") / "keys"
    return keys, run(counts_it_as_none, keys, sample_rate=1.0)[0][0]


def forget(keys: Path) -> None:
    for node in (0, 1):
        shutil.rmtree(keys / f"node-{node}" / "spent")


@pytest.mark.parametrize(
    ("name", "budget"), [*((name, None) for name in MISUSES), ("a loss that is none", 1e30), ("a buffer", 1e30)]
)
def test_misuse_at_one_record_is_not_told_and_it_counts_as_none(
    name: str, budget: float | None, counted_as_none: tuple[Path, Any]
) -> None:
    keys, expected = counted_as_none
    forget(keys)
    (moved, _), (row,) = run(stepping(MISUSES[name]), keys, sample_rate=1.0, budget=budget)
    assert row["outcome"] == "exact" and not row["rejected"]
    assert abs(moved - expected).max() < 1e-4 * abs(expected).max()


@pytest.mark.parametrize("few", [True, False])
def test_misuse_at_all_records_is_told_where_nothing_is_protected(few: bool, tmp_path: Path) -> None:
    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer, criterion = dp.optimizer(torch.optim.SGD(net.parameters(), lr=0.5)), nn.CrossEntropyLoss()
        for batch in dp.batches():
            criterion(dp.model(x[batch]), y[batch]).clamp(max=1e9).backward()
            optimizer.step()

    rate = 0.05 if few else 1.0  # fewer records than are tried else
    with pytest.raises(UnsuitableApp, match=r"The loss of a step is neither one of criterion\(\)"):
        run(loop, tmp_path / "keys", bad=False, sample_rate=rate)
    (_, _), (row,) = run(loop, tmp_path / "others", bad=False, sample_rate=rate, budget=1e30)
    assert row["outcome"] == "exact" and not row["rejected"]


def test_misuse_of_a_batch_of_which_no_record_is_at_fault_is_told_where_nothing_is_protected(tmp_path: Path) -> None:
    """There is no second backward pass where a batch has one record."""

    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9))
        criterion = dp.criterion(nn.CrossEntropyLoss())
        for batch in dp.batches():
            optimizer.zero_grad()
            for _ in batch[:2]:
                criterion(dp.model(x[batch]), y[batch]).backward()
            optimizer.step()

    with pytest.raises(UnsuitableApp, match="A batch has several backward passes"):
        run(loop, tmp_path / "keys", bad=False)
    (expected, _), _ = run(plain_loop, tmp_path / "others", bad=False)
    forget(tmp_path / "others")
    (moved, _), (row,) = run(loop, tmp_path / "others", bad=False, budget=1e30)
    assert row["outcome"] == "exact"
    assert abs(moved - expected).max() < 1e-4 * abs(expected).max()


@pytest.mark.parametrize("budget", [None, 1e30])
def test_a_model_that_mixes_records_is_told_wherever_it_is_trained(budget: float | None, tmp_path: Path) -> None:
    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        net.register_forward_pre_hook(lambda _, inputs: (inputs[0] - inputs[0].mean(0),))
        plain_loop(dp, net, x, y)

    run(plain_loop, tmp_path / "others", bad=False)  # the same layers have been found fit
    with pytest.raises(UnsuitableApp, match="The model mixes records"):
        run(loop, tmp_path / "keys", bad=False, budget=budget)


@pytest.mark.parametrize("when", ["before its batches", "after its batches"])
@pytest.mark.parametrize("error", [MemoryError("device"), ConnectionResetError("share"), TimeoutError("database")])
def test_an_error_that_passes_costs_a_round_and_not_the_run(error: Exception, when: str, tmp_path: Path) -> None:
    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        first = dp.content["config"]["server-round"] == 1
        if first and when == "before its batches":
            raise error
        plain_loop(dp, net, x, y)
        if first:
            raise error

    _, rows = run(loop, tmp_path / "keys", bad=False, rounds=2)
    assert [row["outcome"] for row in rows] == ["skipped", "exact"]
    assert not any(str(error) in one["reason"] for one in rows[0]["rejected"])


def test_an_app_that_fails_at_every_record_is_told_where_nothing_is_protected(tmp_path: Path) -> None:
    def broken(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        dp.optimizer(torch.optim.SGD(net.parameters(), lr=0.5))
        for _ in dp.batches():
            raise KeyError("John Smith")

    _, (row,) = run(broken, tmp_path / "keys")
    assert row["outcome"] == "skipped"
    for one in row["rejected"]:
        assert "train() failed at every record that was tried" in one["reason"] and "John" not in one["reason"]


@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_holds_the_model_back_and_none_is_dropped(mode: str, tmp_path: Path) -> None:
    def loop(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
        mu = float(dp.content["config"]["proximal-mu"])
        start = [p.detach().clone() for p in net.parameters()]

        def proximal() -> Tensor:
            parts = [((p - s) ** 2).sum() for p, s in zip(net.parameters(), start, strict=True)]
            return mu / 2 * torch.stack(parts).sum()

        dp.penalty(proximal)
        plain_loop(dp, net, x, y)

    moved = {}
    for mu in (0.0, 1.5):
        inner = FedProx(fraction_evaluate=0.0, proximal_mu=mu)
        (update, _), rows = run(loop, tmp_path / f"keys {mu}", mode, bad=False, inner=inner, steps=20)
        assert [row["outcome"] for row in rows] == ["exact"]
        moved[mu] = float((update**2).sum() ** 0.5)
    assert moved[1.5] < 0.7 * moved[0.0]


def test_train_is_shown_nothing_that_its_noise_is_not_bound_to(tmp_path: Path) -> None:
    (_, seen), rows = run(plain_loop, tmp_path / "keys", bad=False)
    assert rows[0]["outcome"] == "exact"
    for metadata, context, records in seen:
        assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id, metadata.message_id) == (0, 0, 0, "")
        assert (context.run_id, context.node_id) == (0, 0) and not context.state
        assert "privacy-dir" not in context.run_config
        assert not any(name.startswith("fl-gradcode") for name in records)


def test_records_and_their_entries_come_in_the_order_of_names() -> None:
    """Messages of Flower's engines do not keep the order, and the noise of all holders has to be the same."""

    def train(message: Message, context: Context) -> Message:
        seen.append([(name, [*record]) for name, record in message.content.items()])
        return Message(RecordDict(), reply_to=message)

    seen: list[Any] = []
    asked = Asked(settings(), "r", 1, 0, 0)
    with inside_a_run():
        message = Message(RecordDict(), dst_node_id=1, message_type="train")
        for names in ("ab", "ba"):
            content: Any = {name: ConfigRecord(dict.fromkeys(names, 1)) for name in names}
            context = Context(1, 1, {}, RecordDict(), {})
            call_privately(train, message, context, asked, records=lambda content=content: RecordDict(content))  # type: ignore[misc]
    assert seen[0] == seen[1] == [("a", ["a", "b"]), ("b", ["a", "b"])]


def test_settings_that_the_loop_changes_stay_and_a_schedule_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def loop(change: bool, schedule: Any) -> Loop:
        def train(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
            inner = torch.optim.SGD(net.parameters(), lr=0.5)
            optimizer, criterion = dp.optimizer(inner, schedule=schedule), dp.criterion(nn.CrossEntropyLoss())
            for batch in dp.batches():
                if change:
                    inner.param_groups[0].update(lr=100.0, momentum=0.9)
                optimizer.zero_grad()
                criterion(dp.model(x[batch]), y[batch]).backward()
                optimizer.step()

        return train

    (plain, _), _ = run(loop(False, None), tmp_path / "one", bad=False, sample_rate=1.0)
    (changed, _), _ = run(loop(True, None), tmp_path / "two", bad=False, sample_rate=1.0)
    assert abs(plain - changed).max() < 1e-4 * abs(plain).max()
    assert "The loop changed a setting of the optimizer" in caplog.text
    (none, _), _ = run(loop(False, lambda step: 0.0), tmp_path / "three", bad=False, sample_rate=1.0)
    assert not none.any()


def test_holders_with_other_devices_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = iter(["cpu, torch 2; 1 threads", "cpu, torch 2; 1 threads", "H100, torch 2; 1 threads"])
    last = "H100, torch 2; 1 threads"
    monkeypatch.setattr("fl_gradcode.privacy.training._environment_of", lambda _: next(kinds, last))
    with pytest.raises(UnsuitableApp, match=r"Holders of shard \d train with different devices or versions: worker"):
        run(plain_loop, tmp_path / "keys", bad=False)
    monkeypatch.setattr("fl_gradcode.privacy.training._environment_of", lambda _: "cpu, torch 2; 4 threads")
    _, rows = run(plain_loop, tmp_path / "others", bad=False)
    assert rows[0]["outcome"] == "exact"
