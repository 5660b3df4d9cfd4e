"""What a server may try that does not keep to its software: refused on the client, or charged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fl_gradcode import fractional_repetition, gradient_coding_mod
from fl_gradcode.privacy import (
    DPSGD,
    BudgetLedger,
    asks_for_privacy,
    in_config,
    private_training,
    read_keys,
    write_keys,
)
from fl_gradcode.privacy.settings import privacy_to_json
from fl_gradcode.protocol.records import Plan, Reply, Row
from fl_gradcode.testing import inside_a_run
from tests.mutations import state_of
from tests.privacy.private_app import initial, model, private_app, settings, shard_data

CODE = fractional_repetition(4, 1)


@pytest.fixture(autouse=True)
def inside() -> Iterator[None]:
    with inside_a_run():
        yield


def ask(
    folder: Path,
    app: ClientApp | None = None,
    privacy: DPSGD | None = None,
    *,
    kind: str = "train",
    node: dict[str, Any] | None = None,
    run_config: dict[str, Any] | None = None,
    holders: int = 2,
    earlier: Any = (),
    **changes: Any,
) -> Message:
    """Worker 0's reply to a plan of one's own for shard 0."""
    if not (folder / "node-0").exists():
        write_keys(folder, [CODE.shards_of(worker) for worker in range(CODE.n)])
    values: dict[str, Any] = {
        "run": "r",
        "seed": 0,
        "round": 1,
        "kind": kind,
        "n": 4,
        "k": 4,
        "weight_key": "num-examples",
        "arrays_key": "arrays",
        "rows": {0: Row((0,), ((1.0,),))},
        "privacy": privacy_to_json(privacy or settings()),
        "releases": {0: (holders, earlier)},
        **changes,
    }
    records = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
    message = Message(Plan(**values).add_to(records), dst_node_id=1, message_type="train")
    own = {"partition-id": 0, "num-partitions": 4, "privacy-dir": str(folder / "node-0"), **(node or {})}
    context = Context(1, 1, {k: v for k, v in own.items() if v is not None}, RecordDict(), run_config or {})
    return (app or private_app())(message, context)


def sent(reply: Message) -> ArrayRecord:
    record = reply.content["fl-gradcode.update"]
    assert isinstance(record, ArrayRecord)
    return record


def spent(reply: Message) -> tuple[int, str, float, float]:
    answer = Reply.find_in(reply.content)
    assert answer is not None
    return answer.spent[0]


def test_an_honest_plan_is_answered(tmp_path: Path) -> None:
    reply = ask(tmp_path)
    assert len(sent(reply)["arrays"].numpy()) == sum(p.numel() for p in model().parameters())
    assert spent(reply)[2] == pytest.approx(settings().epsilon(1))


@pytest.mark.parametrize("changes", [{"arrays_key": ""}, {"kind": "evaluate"}, {"kind": "evaluate", "arrays_key": ""}])
def test_a_plan_that_hides_that_it_trains_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does the server have this version"):
        ask(tmp_path, node={"max-epsilon": 3.0}, **changes)


def test_no_other_number_leaves_as_the_weight(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="'secret-loss' has to be the number of records"):
        ask(tmp_path, weight_key="secret-loss")


def test_the_server_cannot_name_an_empty_ledger_to_a_node_with_a_budget(tmp_path: Path) -> None:
    node = {"max-epsilon": 5.0, "privacy-dir": None}
    write_keys(tmp_path / "named", [CODE.shards_of(worker) for worker in range(CODE.n)])
    with pytest.raises(ValueError, match="has max-epsilon and no privacy-dir in its node config"):
        ask(tmp_path, node=node, run_config={"privacy-dir": str(tmp_path / "named")})


def test_a_larger_delta_does_not_buy_more_rounds(tmp_path: Path) -> None:
    loose = settings(delta=0.02)
    assert loose.epsilon(1) < 3.0 < settings().epsilon(1)
    with pytest.raises(RuntimeError, match=r"\(delta 1e-05\), above the budget of 3"):
        ask(tmp_path, privacy=loose, node={"max-epsilon": 3.0})
    assert spent(ask(tmp_path, privacy=loose, node={"max-epsilon": 3.0, "max-delta": 0.02}))[2] < 3.0


def test_the_number_of_holders_is_that_of_the_key_file(tmp_path: Path) -> None:
    distrustful = settings(honest_server=False)
    told = spent(ask(tmp_path, privacy=distrustful, holders=1))[2]
    assert told == pytest.approx(distrustful.epsilon(1, holders=2))
    assert read_keys(tmp_path / "node-0").holders_of(0) == 2


def test_a_node_may_distrust_a_server_that_says_it_is_honest(tmp_path: Path) -> None:
    told = spent(ask(tmp_path, node={"honest-server": False}, holders=1))[2]
    assert told == pytest.approx(settings(honest_server=False).epsilon(1, holders=2))
    with pytest.raises(ValueError, match="honest-server='no' in the node config must be true or false"):
        ask(tmp_path, node={"honest-server": "no"}, round=2)


def app_of(data: Any, manifest: str = "", dropout: float = 0.0, broken: str = "") -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if broken:
            raise KeyError(broken)
        assert context.node_config["partition-id"] == 0
        net = nn.Sequential(*model(), nn.Dropout(dropout))  # type: ignore[misc]
        x, y = data
        with private_training(message, context, net, examples=len(y), manifest=manifest) as dp:
            optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
            for batch in dp.batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(dp.model(x[batch]), y[batch]).backward()
                optimizer.step()
        metrics = MetricRecord({"num-examples": len(y), "secret-loss": 0.5})
        records: dict[str, Any] = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
        return Message(RecordDict(records), reply_to=message)

    return app


def test_the_digest_that_is_sent_tells_nobody_whether_a_guess_of_the_data_is_right(tmp_path: Path) -> None:
    told = spent(ask(tmp_path / "a", app_of(shard_data(0), manifest="Mallory:+")))[1]
    again = spent(ask(tmp_path / "a", app_of(shard_data(0), manifest="Mallory:+")))[1]
    guessed = spent(ask(tmp_path / "b", app_of(shard_data(0), manifest="Mallory:+")))[1]  # the same, with other keys
    assert told == again != guessed
    entry = BudgetLedger(tmp_path / "a" / "node-0" / "spent").entries(0)[0]
    assert entry.context != told


def test_a_retry_draws_the_same_dropout(tmp_path: Path) -> None:
    quiet = replace(settings(), noise_multiplier=1e-3)
    first, second = (sent(ask(tmp_path, app_of(shard_data(0), dropout=0.5), privacy=quiet)) for _ in range(2))
    assert first["arrays"].data == second["arrays"].data
    torch.manual_seed(5)  # nor does it depend on what the process drew before
    third = sent(ask(tmp_path, app_of(shard_data(0), dropout=0.5), privacy=quiet))
    assert first["arrays"].data == third["arrays"].data
    other = sent(ask(tmp_path / "others", app_of(shard_data(0), dropout=0.5), privacy=quiet))
    assert first["arrays"].data != other["arrays"].data


def test_a_shard_s_number_stands_for_the_same_records_under_a_budget(tmp_path: Path) -> None:
    node = {"max-epsilon": 100.0}
    ask(tmp_path, app_of(shard_data(0), manifest="one"), node=node)
    with pytest.raises(RuntimeError, match="Shard 0 has other data than the ledger's"):
        ask(tmp_path, app_of(shard_data(0), manifest="two"), node=node, round=2)
    ask(tmp_path, app_of(shard_data(0), manifest="one"), node=node, round=2)


def test_what_an_exception_says_stays_on_the_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(RuntimeError, match="train.. failed before it drew a batch") as caught,
    ):
        ask(tmp_path, app_of(shard_data(0), broken="John Smith"))
    assert "John" not in str(caught.value)
    causes: list[BaseException] = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert not any(isinstance(cause, KeyError) for cause in causes)
    assert "John" in caplog.text


def test_a_plain_strategy_s_message_is_held_to_the_same(tmp_path: Path) -> None:
    config = ConfigRecord({"server-round": 1, **in_config(settings(noise="independent"))})
    content = RecordDict({"arrays": initial(), "config": config})
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 4}, RecordDict(), {})

    def message() -> Message:
        return Message(content, dst_node_id=1, message_type="train")

    assert asks_for_privacy(message(), context)
    reply = private_app()(message(), context)
    (metrics,) = reply.content.metric_records.values()
    assert dict(metrics) == {"num-examples": 40}

    careless = ClientApp(mods=[gradient_coding_mod])

    @careless.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 40, "secret-loss": 0.5})
        return Message(RecordDict({"arrays": initial(), "metrics": metrics}), reply_to=message)

    with pytest.raises(RuntimeError, match="answered without the record of private_training"):
        careless(message(), context)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    ask(tmp_path)
    (tmp_path / "node-0").chmod(0o777)
    with pytest.raises(ValueError, match=r"Other users can replace the files in .* \(mode 0777\): chmod 700"):
        ask(tmp_path, round=2)


def test_the_server_names_no_folder_on_a_node_with_a_machine_of_its_own(tmp_path: Path) -> None:
    """Whatever lies there: what the node says is the same, and nothing is made."""
    write_keys(tmp_path / "there", [CODE.shards_of(worker) for worker in range(CODE.n)])
    (tmp_path / "file").write_text("x")
    ask(tmp_path)  # makes the keys of this file's node
    before, told = state_of(tmp_path), set()
    for name in ("there", "file", "missing", "missing/below", "/etc/passwd", "\x00", "relative"):
        named = str(tmp_path / name) if name != "relative" else name
        with pytest.raises(ValueError, match="a server does not choose where a node reads and writes") as error:
            ask(tmp_path, node={"privacy-dir": None}, run_config={"privacy-dir": named})
        told.add(str(error.value))
    assert len(told) == 1 and state_of(tmp_path) == before


def test_a_node_s_own_folder_is_used_whatever_the_run_config_says(tmp_path: Path) -> None:
    assert sent(ask(tmp_path, run_config={"privacy-dir": "/nowhere"}))
    assert not Path("/nowhere").exists()
