"""What fails at a record counts as a record without a gradient; penalties; what `train()` is shown; devices."""

from __future__ import annotations

import shutil
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
    with InProcessGrid(app, num_nodes=2, run_config={"privacy-dir": str(folder)}) as grid:
        result = strategy.start(grid, initial, num_rounds=1)
    rows = [row["train"] for row in strategy.ledger.rows]
    return (flat(result.arrays) - flat(initial), seen), rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("each", [raising, stopping, leaving_it_out])
def test_a_record_at_which_the_loop_fails_counts_as_none(
    each: Any, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (expected, _), _ = run(counts_it_as_none, tmp_path / "keys", mode, sample_rate=1.0)
    for node in (0, 1):
        shutil.rmtree(tmp_path / "keys" / f"node-{node}" / "spent")
    (moved, seen), (row,) = run(loop_with(each), tmp_path / "keys", mode, sample_rate=1.0)
    assert row["outcome"] == "exact" and not row["rejected"]
    assert abs(moved - expected).max() < 1e-4 * abs(expected).max()
    assert len(seen) > 4  # train() was called again
    assert "It is called again and gets records one by one" in caplog.text
    # It is one answer, and is charged once.
    for node in (0, 1):
        ledger = BudgetLedger(tmp_path / "keys" / f"node-{node}" / "spent")
        assert [len(ledger.entries(shard)) for shard in ledger.shards] == [1] * len(ledger.shards)


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
