"""What nodes say of the data that they hold, and refuse to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Discovered, GradientCoding, VirtualGrid, fractional_repetition
from fl_gradcode.client.held_shards import refuse_other_shards, told_by
from fl_gradcode.errors import RoundFailed, ShardMismatch, UnsuitableApp
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.placement.manifest import SHARDS_FILE, WITHHELD, Manifest, Shard
from fl_gradcode.placement.shard_files import hash_shard
from fl_gradcode.protocol.records import Plan, Row
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app
from tests.roster.test_discovery import config_of


def test_an_assigned_code_does_not_ask_what_nodes_hold() -> None:
    seen: list[Any] = []

    def look(worker: int, message: Message, reply: Message) -> Message:
        seen.append(str(reply.content["fl-gradcode.reply"]["json"]))
        return reply

    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1))
    with InProcessGrid(toy_app(), 4, node_config=config_of(dict.fromkeys(range(4), "0,1,2,3")), tamper=look) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    assert seen and all('"holds": []' in text for text in seen)


def test_a_node_that_does_not_hold_what_an_assigned_code_asks_for_is_told_what_to_do() -> None:
    held = {0: "0,2", 1: "1,3", 2: "0", 3: "1,3"}
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1))
    with InProcessGrid(toy_app(), 4, node_config=config_of(held)) as inner:
        grid = VirtualGrid(inner, Latency(compute=scaled(lognormal(), {0: 50.0})))
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (one,) = strategy.ledger.rows[0]["train"]["rejected"]
    assert (
        one["worker"] == 2
        and "was asked for shard 2, but it holds shard 0: copy to it the folder node-2" in one["reason"]
    )
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


def test_a_manifest_binds_nodes_that_say_only_numbers() -> None:
    code = fractional_repetition(4, 1)
    held = {i: ",".join(map(str, code.shards_of(i))) for i in range(4)}
    manifest = Manifest(4, tuple(Shard(j, f"shard-{j}", None, 1, f"{j:064x}") for j in range(4)))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, manifest=manifest)
    refused = pytest.raises(UnsuitableApp, match="reports only numbers by shards: start it with --node-config")
    with InProcessGrid(toy_app(), 4, node_config=config_of(held)) as grid, refused:
        strategy.start(grid, initial_arrays(), num_rounds=1)


def test_shards_that_do_not_count_are_named_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    held = dict.fromkeys(range(3), "0,1,7")
    manifest = Manifest(2, tuple(Shard(j, f"shard-{j}", None, 1, f"{j:064x}") for j in range(2)))
    for digests, told in (
        (None, "other holders'. The same applies to workers 1 and 2."),
        (manifest, "(use shards-dir)"),
    ):
        caplog.clear()
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), Discovered(k=2, s=1), manifest=digests)
        with InProcessGrid(toy_app(), 3, node_config=config_of(held)) as grid:
            if digests is None:
                strategy.start(grid, initial_arrays(), num_rounds=1)
            else:
                with pytest.raises(RoundFailed, match="No node holds shards 0 and 1"):
                    strategy.start(grid, initial_arrays(), num_rounds=1)
        assert "Worker 0's shards" in caplog.text and told in caplog.text


@pytest.mark.parametrize("private", ["privacy-dir", "max-epsilon"])
def test_a_node_with_privacy_tells_nobody_whether_its_data_were_guessed_right(private: str, tmp_path: Path) -> None:
    """Whoever knows all records but one could try which digest is right."""
    (tmp_path / "shard-0").write_bytes(b"secret")
    right = Shard(0, "shard-0", None, *hash_shard(tmp_path / "shard-0"))
    Manifest(1, (right,), 0).write(tmp_path / SHARDS_FILE)
    config: dict[str, Any] = {"shards-dir": str(tmp_path)}
    assert told_by(config) == ((0, right.sha256),)
    config[private] = 1.0
    assert told_by(config) == ((0, WITHHELD),)
    for digest in (right.sha256, "0" * 64, ""):
        plan = Plan("r", 0, 1, "train", 1, 1, "num-examples", "arrays", {0: Row((0,), ((1.0,),))}, digests={0: digest})
        refuse_other_shards(plan, 0, config)
    (tmp_path / "shard-0").write_bytes(b"sacred")  # its own manifest still counts
    with pytest.raises(ShardMismatch, match="is not what the manifest says"):
        refuse_other_shards(plan, 0, config)
