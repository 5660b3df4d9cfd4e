"""Set-up by a dealer: the manifest is made from the shards' key files of today, and each node has its digest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_gradcode.codes import GradientCode, fractional_repetition, reed_solomon
from fl_gradcode.errors import InvalidSetting, NotCertified, SecureRefused
from fl_gradcode.privacy import read_keys, write_keys
from fl_gradcode.secagg import (
    DIGEST_FILE,
    MANIFEST_FILE,
    ManifestBody,
    check_data,
    class_keys,
    deal,
    decode,
    encode,
    holders_in,
    read_manifest,
    seeds_of,
)
from fl_gradcode.secagg.manifest import canonical, parsed
from tests.secagg.samples import REQUEST, body_of, results_for

FRC = fractional_repetition(8, 1)


def dealt(folder: Path, code: GradientCode) -> None:
    write_keys(folder, [code.shards_of(worker) for worker in range(code.n)])


@pytest.mark.parametrize("code", [FRC, reed_solomon(6, 1)], ids=str)
def test_each_node_masks_with_what_its_folder_has(tmp_path: Path, code: GradientCode) -> None:
    dealt(tmp_path, code)
    body = body_of(code)
    manifest = deal(tmp_path, body, data={j: f"digest-{j}" for j in range(code.k)})
    results, replies = results_for(body), []
    for worker in range(code.n):
        folder = tmp_path / f"node-{worker}"
        found = read_manifest(folder)
        assert found.digest == manifest.digest
        seeds = seeds_of(read_keys(folder), found.body.classes)
        check_data(found, seeds, {j: f"digest-{j}" for j in range(code.k)})
        ours = {j: results[j] for c in body.classes.sent_by(worker) for j in body.classes.members[c]}
        replies.append(encode(class_keys(found, worker, seeds), REQUEST, ours))
    (total,) = decode(manifest, replies[1:])
    assert total.weight == code.k


def test_other_data_than_the_manifest_s_are_refused(tmp_path: Path) -> None:
    dealt(tmp_path, FRC)
    manifest = deal(tmp_path, body_of(FRC), data={j: f"digest-{j}" for j in range(8)})
    seeds = seeds_of(read_keys(tmp_path / "node-0"), manifest.body.classes)
    with pytest.raises(SecureRefused, match="The data of class 0 are not those"):
        check_data(manifest, seeds, {0: "digest-0", 4: "another"})
    # Only holders can tell what was committed to.
    assert len({*manifest.commitments}) == 4
    assert "digest-0" not in (tmp_path / "node-0" / MANIFEST_FILE).read_text()


def test_a_manifest_from_elsewhere_must_have_the_pinned_digest(tmp_path: Path) -> None:
    for place in ("ours", "theirs"):
        dealt(tmp_path / place, FRC)
        deal(tmp_path / place, body_of(FRC))
    theirs = (tmp_path / "theirs" / "node-0" / MANIFEST_FILE).read_bytes()
    assert read_manifest(tmp_path / "ours" / "node-0").body.text == body_of(FRC).text
    with pytest.raises(SecureRefused, match="another one than this node has pinned"):
        read_manifest(tmp_path / "ours" / "node-0", theirs)
    (tmp_path / "ours" / "node-0" / DIGEST_FILE).chmod(0o666)
    with pytest.raises(InvalidSetting, match="accessible to other users"):
        read_manifest(tmp_path / "ours" / "node-0")
    (tmp_path / "ours" / "node-0" / DIGEST_FILE).chmod(0o600)
    (tmp_path / "ours" / "node-0" / DIGEST_FILE).write_text("00\n")
    with pytest.raises(InvalidSetting, match="has 1 bytes instead of 32"):
        read_manifest(tmp_path / "ours" / "node-0")
    (tmp_path / "ours" / "node-0" / DIGEST_FILE).unlink()
    with pytest.raises(InvalidSetting, match="no pinned manifest"):
        read_manifest(tmp_path / "ours" / "node-0")


def test_a_holder_that_the_manifest_leaves_out_is_noticed(tmp_path: Path) -> None:
    """A worker that has a class's secrets and is not named could collude without being counted."""
    held = [[*FRC.shards_of(worker)] for worker in range(8)]
    held[3] += [0, 4]  # worker 3 is given the secrets of class 0, too
    write_keys(tmp_path, held)
    for worker, told in ((0, "names 2 holders of class 0; by the key file there are 3"), (3, "worker 3 holds classes")):
        with pytest.raises(SecureRefused, match=told):
            seeds_of(read_keys(tmp_path / f"node-{worker}"), body_of(FRC).classes)
    with pytest.raises(SecureRefused):
        deal(tmp_path, body_of(FRC))
    # Named, it counts: two of its classes are gone where it colludes.
    named = body_of(FRC, holders=holders_in(tmp_path), colluders=1)
    assert named.classes.supports[3] == (0, 3)
    deal(tmp_path, named)


def test_a_dealer_refuses_a_graph_that_does_not_protect(tmp_path: Path) -> None:
    dealt(tmp_path, FRC)
    weak = ManifestBody.from_bytes(canonical({**parsed(body_of(FRC).text), "graph": ["path"]}))
    with pytest.raises(NotCertified):
        deal(tmp_path, weak)
    assert not list(tmp_path.glob(f"node-*/{MANIFEST_FILE}"))


def test_key_files_of_another_code_are_refused(tmp_path: Path) -> None:
    dealt(tmp_path, fractional_repetition(8, 3))
    with pytest.raises(SecureRefused):
        deal(tmp_path, body_of(FRC))
    with pytest.raises(InvalidSetting, match="the code has 6"):
        deal(tmp_path, body_of(reed_solomon(6, 1)))
    with pytest.raises(InvalidSetting, match="key files of all workers"):
        deal(tmp_path / "empty", body_of(FRC))


def test_the_manifest_has_no_secrets(tmp_path: Path) -> None:
    dealt(tmp_path, FRC)
    deal(tmp_path, body_of(FRC))
    public = (tmp_path / "node-0" / MANIFEST_FILE).read_text()
    for worker in range(8):
        for secret in json.loads((tmp_path / f"node-{worker}" / "keys.json").read_text())["secrets"].values():
            assert secret not in public
