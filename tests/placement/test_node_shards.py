"""What an app's `train()` calls to find its shard, and what is counted in it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_gradcode.client.mod import RecordingConfig
from fl_gradcode.errors import InvalidSetting, ShardMismatch
from fl_gradcode.placement.manifest import Manifest
from fl_gradcode.placement.node_shards import shard_path, verify_folder
from fl_gradcode.placement.splitting import count_examples
from tests.placement.calling import placed, refused


def test_the_shard_of_a_node_is_chosen_by_partition_id(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 2)
    config = RecordingConfig({"shards-dir": str(tmp_path / "out" / "node-0"), "partition-id": 5})
    assert shard_path(config).name == "s10"
    assert config.was_read


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shards-dir": None}, "does not say where its shards lie: start its SuperNode with --node-config"),
        ({"shards-dir": "out/node-0"}, "shards-dir='out/node-0' is a relative path"),
        ({"partition-id": None}, "partition-id in the node config is None"),
        ({"partition-id": True}, "partition-id in the node config is True"),
        ({"shards-dir": "/nowhere"}, "/nowhere cannot be read"),
    ],
)
def test_a_node_config_that_cannot_be_used_is_told(
    change: dict[str, Any], told: str, source: Path, tmp_path: Path
) -> None:
    placed(source, tmp_path / "out", "-n", 2)
    config = {"shards-dir": str(tmp_path / "out" / "node-0"), "partition-id": 0, **change}
    with pytest.raises(InvalidSetting, match=told):
        shard_path({key: value for key, value in config.items() if value is not None})


def test_a_shard_that_the_node_does_not_hold_is_told(source: Path, tmp_path: Path) -> None:
    placed(source, tmp_path / "out", "-n", 3, "--code", "assignment")
    node = tmp_path / "out" / "node-0"
    absent = next(j for j in range(6) if j not in Manifest.read(node).digests)
    with pytest.raises(ShardMismatch, match=f"shard {absent} is not listed"):
        shard_path({"shards-dir": str(node), "partition-id": absent})


def test_examples_are_counted_where_the_form_is_known(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((7, 2)), y=np.zeros(7), classes=np.array(10))
    np.savez(tmp_path / "b.npz", x=np.zeros(7), y=np.zeros(6))
    np.savez(tmp_path / "c.npz", x=np.array([{}, {}]))
    np.save(tmp_path / "d.npy", np.zeros((5, 1)))
    (tmp_path / "e.csv").write_text('x,y\n1,"a\nb"\n\n2,c\n')
    (tmp_path / "f.csv").write_text("1,2\n3,4\n")
    (tmp_path / "g.jsonl").write_text("{}\n\n{}\n")
    (tmp_path / "h.parquet").write_text("?")
    (tmp_path / "i.npz").write_text("no zip")
    (tmp_path / "j.csv").write_bytes(b"x\n\xff\n")
    counts = {path.name[0]: count_examples(path) for path in sorted(tmp_path.iterdir())}
    assert counts == {"a": 7, "b": None, "c": 2, "d": 5, "e": 2, "f": 2, "g": 2, "h": None, "i": None, "j": None}


def test_into_a_folder_with_keys_the_manifest_comes_first_and_tells_what_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "out" / "node-0"
    placed(source, tmp_path / "out", "-n", 2)
    (node / "keys.json").write_text("secret")
    moved, real = [], os.replace

    def full(path: Any, target: Any) -> None:
        if Path(target).parent == node:
            moved.append(Path(target).name)
            if len(moved) == 4:
                raise OSError(28, "No space left on device")
        real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert "No space left" in refused(source, tmp_path / "out", "-n", 2, "--force")
    told = {one.name: one.kind for one in verify_folder(node)}
    assert len(moved) == 4 and Counter(told.values()) == {"right": 2, "missing": 4}
    assert not (tmp_path / "out" / "manifest.json").exists()
    placed(source, tmp_path / "out", "-n", 2, "--force")
    assert {one.kind for one in verify_folder(node)} == {"right"} and (node / "keys.json").read_text() == "secret"
