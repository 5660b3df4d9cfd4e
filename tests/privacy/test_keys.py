"""Key files: whose they are, who may read them, and what is refused; their secrets are never told."""

from __future__ import annotations

import json
import logging
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_gradcode import cyclic_repetition
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.privacy.keys import KEYS_FILE, read_keys, rotate_keys, write_keys

CODE = cyclic_repetition(5, 2, rng=np.random.default_rng(0))
HELD = [CODE.shards_of(worker) for worker in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_keys(tmp_path / "keys", HELD)
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_each_node_gets_the_secrets_of_its_own_shards_and_of_no_others(folder: Path) -> None:
    nodes = [read_keys(folder / f"node-{worker}") for worker in range(5)]
    assert [node.worker for node in nodes] == [0, 1, 2, 3, 4] and {node.generation for node in nodes} == {1}
    assert [sorted(node.secrets) for node in nodes] == [sorted(held) for held in HELD]
    of_shard = {shard: {node.secrets[shard] for node in nodes if shard in node.secrets} for shard in range(5)}
    assert all(len(secrets) == 1 for secrets in of_shard.values())  # one for all holders of a shard
    assert len(set.union(*of_shard.values())) == 5  # and none for two shards
    for worker, node in enumerate(nodes):  # nor anywhere else in the file
        text = (folder / f"node-{worker}" / KEYS_FILE).read_text()
        assert all((next(iter(of_shard[shard])).hex() in text) == (shard in HELD[worker]) for shard in range(5)), node


def test_only_the_owner_may_read_the_files_and_the_folders(folder: Path) -> None:
    for worker in range(5):
        assert mode(folder / f"node-{worker}") == 0o700
        assert mode(folder / f"node-{worker}" / KEYS_FILE) == 0o600
    assert sorted(path.name for path in (folder / "node-0").iterdir()) == [KEYS_FILE]  # no draft is left


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666, 0o777])
def test_a_file_open_to_others_is_refused_with_the_command_that_mends_it(folder: Path, open_to: int) -> None:
    path = folder / "node-1" / KEYS_FILE
    path.chmod(open_to)
    with pytest.raises(InvalidSetting, match=f"is accessible to other users \\(mode 0{open_to:o}\\)") as caught:
        read_keys(path.parent)
    command = str(caught.value).partition("): ")[2]
    assert command.startswith("chmod 600 ")
    subprocess.run(shlex.split(command), check=True)
    assert read_keys(path.parent).worker == 1


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return apply


def first_secret(make: Callable[[str], Any]) -> Callable[[str], str]:
    def change(values: dict[str, Any]) -> None:
        shard = min(values["secrets"])
        values["secrets"][shard] = make(values["secrets"][shard])

    return changed(change)


DAMAGED: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "cannot be read"),
    "truncated": (lambda text: text[: len(text) // 2], "cannot be read"),
    "a list": (lambda text: "[1]", "is not a key file of fl-gradcode"),
    "a number": (lambda text: "7", "is not a key file of fl-gradcode"),
    "other format": (changed(lambda v: v.update(format="fl-gradcode keys 2")), "has format 'fl-gradcode keys 2'"),
    "no format": (changed(lambda v: v.pop("format")), "is not a key file of fl-gradcode"),
    "no secrets": (changed(lambda v: v.pop("secrets")), "is not a key file of fl-gradcode"),
    "no worker": (changed(lambda v: v.pop("worker")), "is not a key file of fl-gradcode"),
    "secrets a list": (changed(lambda v: v.update(secrets=[1])), "is not a key file of fl-gradcode"),
    "generation a word": (changed(lambda v: v.update(generation="new")), "is not a key file of fl-gradcode"),
    "short": (first_secret(lambda s: s[:-2]), "has 31 bytes instead of 32"),
    "long": (first_secret(lambda s: s + "ab"), "has 33 bytes instead of 32"),
    "no secret": (first_secret(lambda s: ""), "has 0 bytes instead of 32"),
    "half a byte": (first_secret(lambda s: s[:-1]), "is not a key file of fl-gradcode"),
    "not hex": (first_secret(lambda s: "xy" * 32), "is not a key file of fl-gradcode"),
    "not a text": (first_secret(lambda s: 5), "is not a key file of fl-gradcode"),
    "zeros": (first_secret(lambda s: "00" * 32), "is one byte repeated: anybody can guess it"),
    "constant": (first_secret(lambda s: "5a" * 32), "is one byte repeated: anybody can guess it"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_and_tells_no_secret(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = folder / "node-0" / KEYS_FILE
    secrets = [secret.hex() for secret in read_keys(path.parent).secrets.values()]
    damage, reason = DAMAGED[name]
    path.write_text(damage(path.read_text()))
    with pytest.raises(InvalidSetting, match=reason) as caught:
        read_keys(path.parent)
    assert str(path) in str(caught.value)
    told = f"{caught.value}{caught.value!r}{caplog.text}"
    assert not any(secret[i : i + 8] in told for secret in secrets for i in range(57))


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "node-0" / KEYS_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSetting, match="cannot be read: ValueError"):
        read_keys(folder / "node-0")


def test_a_missing_file_says_how_to_make_one(folder: Path) -> None:
    for place in (folder / "node-9", folder / "nowhere"):
        with pytest.raises(InvalidSetting, match="There is no key file .* fl-gradcode keys make"):
            read_keys(place)
    (folder / "node-0" / KEYS_FILE).unlink()
    (folder / "node-0" / KEYS_FILE).mkdir(mode=0o700)
    with pytest.raises(InvalidSetting, match="cannot be read: IsADirectoryError"):
        read_keys(folder / "node-0")


def test_a_shard_that_the_node_does_not_hold_has_no_secret(folder: Path) -> None:
    keys = read_keys(folder / "node-0")
    absent = next(shard for shard in range(5) if shard not in HELD[0])
    with pytest.raises(InvalidSetting, match=f"worker 0 has no secret of shard {absent}") as caught:
        keys.secret(absent)
    assert str(sorted(HELD[0])) in str(caught.value)
    told = f"{caught.value}{keys}{keys!r}"
    assert not any(secret.hex()[:8] in told or repr(secret)[2:10] in told for secret in keys.secrets.values())
    assert keys.secret(HELD[0][0]) == keys.secrets[HELD[0][0]]


def test_keys_are_never_overwritten(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.glob("*/*")}
    for held, generation in ((HELD, 1), (HELD[:1], 1), (HELD, 2)):
        with pytest.raises(InvalidSetting, match="already exists"):
            write_keys(folder, held, generation=generation)
    (folder / "node-0" / KEYS_FILE).unlink()  # the others' would no longer fit
    with pytest.raises(InvalidSetting, match="already exists"):
        write_keys(folder, HELD[:1])
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())


def test_rotation_makes_new_secrets_for_the_same_holders(folder: Path) -> None:
    generations = [[read_keys(folder / f"node-{worker}") for worker in range(5)]]
    for _ in range(2):
        rotate_keys(folder)
        generations.append([read_keys(folder / f"node-{worker}") for worker in range(5)])
    assert [{node.generation for node in nodes} for nodes in generations] == [{1}, {2}, {3}]
    assert all([sorted(node.secrets) for node in nodes] == [sorted(held) for held in HELD] for nodes in generations)
    every = [{secret for node in nodes for secret in node.secrets.values()} for nodes in generations]
    assert [len(one) for one in every] == [5, 5, 5] and len(set.union(*every)) == 15
    assert mode(folder / "node-3" / KEYS_FILE) == 0o600


def test_rotation_mends_one_that_was_broken_off(folder: Path) -> None:
    old = (folder / "node-4" / KEYS_FILE).read_bytes()
    rotate_keys(folder)
    (folder / "node-4" / KEYS_FILE).write_bytes(old)  # as if the power had gone before the last file
    rotate_keys(folder)
    nodes = [read_keys(folder / f"node-{worker}") for worker in range(5)]
    assert {node.generation for node in nodes} == {3}
    assert all(len({node.secrets[shard] for node in nodes if shard in node.secrets}) == 1 for shard in range(5))


def test_rotation_needs_all_nodes_keys(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="make keys first"):
        rotate_keys(tmp_path / "empty")
    (folder / "node-2" / KEYS_FILE).unlink()
    with pytest.raises(InvalidSetting, match=r"has keys of workers \[0, 1, 3, 4\]; rotating needs those of all"):
        rotate_keys(folder)
    assert read_keys(folder / "node-0").generation == 1


def test_rotation_refuses_folders_that_were_mixed_up(folder: Path) -> None:
    one, other = folder / "node-0", folder / "node-1"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    with pytest.raises(InvalidSetting, match="node-0.*is worker 1's"):
        rotate_keys(folder)
