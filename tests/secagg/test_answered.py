"""A node's ledger of answered requests: one request a round, and the same bytes for the same request."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fl_gradcode.errors import InvalidSetting, SecureRefused
from fl_gradcode.secagg import AnsweredRequests
from fl_gradcode.secagg import answered as module

R = [bytes([number]) * 32 for number in range(20)]


def test_the_same_request_gets_the_same_bytes_and_is_never_computed_again(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path / "secagg")
    assert node.reply_to("run", "train", 1, R[1]) is None
    assert node.keep("run", "train", 1, R[1], b"first") == b"first"
    again = AnsweredRequests(tmp_path / "secagg")  # another process
    assert again.reply_to("run", "train", 1, R[1]) == b"first"
    assert again.keep("run", "train", 1, R[1], b"computed once more") == b"first"
    assert [(one.round, one.request) for one in again.rows()] == [(1, R[1].hex())]


def test_another_request_of_an_answered_round_is_refused(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path)
    node.keep("run", "train", 4, R[1], b"reply")
    for ask in (
        lambda: node.reply_to("run", "train", 4, R[2]),
        lambda: node.keep("run", "train", 4, R[2], b"second"),
    ):
        with pytest.raises(SecureRefused, match=r"Another request for round 4 \(train\)"):
            ask()
    assert node.reply_to("run", "train", 4, R[1]) == b"reply"
    # The kind is one of the things that set rounds apart.
    assert node.reply_to("run", "evaluate", 4, R[2]) is None
    assert node.reply_to("other", "train", 4, R[2]) is None


def test_rounds_do_not_go_backwards(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path)
    node.keep("run", "train", 5, R[5], b"five")
    with pytest.raises(SecureRefused, match="a later round than round 4"):
        node.reply_to("run", "train", 4, R[4])
    assert node.reply_to("run", "evaluate", 4, R[4]) is None
    assert node.reply_to("other", "train", 1, R[4]) is None


def test_only_the_last_replies_are_kept_and_a_row_without_bytes_is_refused(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path)
    node.keep("run", "train", 1, R[1], b"one")
    node.keep("run", "evaluate", 1, R[2], b"evaluated")
    node.keep("run", "train", 2, R[3], b"two")
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == [f"reply-{one.hex()}.bin" for one in (R[2], R[3])]
    with pytest.raises(SecureRefused, match="no longer kept, and is not computed again"):
        node.reply_to("run", "train", 1, R[1])
    assert node.reply_to("run", "evaluate", 1, R[2]) == b"evaluated"
    for number in range(4, 10):  # old runs go
        node.keep(f"run-{number}", "train", 1, R[number], b"x")
    assert len(list(tmp_path.glob("*.bin"))) == 4


def test_the_owner_s_limit_counts_over_all_runs(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path, most=2)
    node.keep("a", "train", 1, R[1], b"1")
    node.keep("b", "train", 1, R[2], b"2")
    with pytest.raises(SecureRefused, match="has answered 2 requests"):
        node.reply_to("c", "train", 1, R[3])
    assert node.reply_to("b", "train", 1, R[2]) == b"2"  # a retry costs nothing


def test_the_shards_of_a_round_are_one_request_with_replies_of_their_own(tmp_path: Path) -> None:
    requests = AnsweredRequests(tmp_path, most=2)
    for number in range(3):
        assert requests.keep("run", "train", 1, bytes(32), bytes([number]), number) == bytes([number])
        assert requests.reply_to("run", "train", 1, bytes(32), number) == bytes([number])
    assert requests.reply_to("run", "train", 1, bytes(32), 3) is None
    assert requests.reply_to("run", "train", 2, bytes(32), 0) is None  # the second request, after three replies
    requests.keep("run", "train", 2, bytes([1]) * 32, b"x", 0)
    with pytest.raises(SecureRefused, match="as many as its owner allows"):
        requests.reply_to("run", "train", 3, bytes(32), 0)
    with pytest.raises(SecureRefused, match="Another request for round 2"):
        requests.reply_to("run", "train", 2, bytes(32), 1)
    with pytest.raises(SecureRefused, match="no longer kept"):  # only those of the last round are
        requests.reply_to("run", "train", 1, bytes(32), 1)
    assert sorted(path.name for path in tmp_path.glob("reply-*.bin")) == [f"reply-{'01' * 32}-0.bin"]


def test_the_bytes_are_on_disk_before_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = AnsweredRequests(tmp_path)

    def power_cut(self: AnsweredRequests, row: object, end: int) -> None:
        assert (tmp_path / f"reply-{R[1].hex()}.bin").read_bytes() == b"reply"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnsweredRequests, "_append", power_cut)
        with pytest.raises(KeyboardInterrupt):
            node.keep("run", "train", 1, R[1], b"reply")
    # Nothing had left, so the request is new, and its reply may be another one.
    assert node.reply_to("run", "train", 1, R[1]) is None
    assert node.keep("run", "train", 1, R[1], b"other") == b"other"


def test_a_row_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path)
    node.keep("run", "train", 1, R[1], b"1")
    path = tmp_path / module._LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"run": "run", "kind": "train", "rou')
    assert node.reply_to("run", "train", 2, R[2]) is None
    node.keep("run", "train", 2, R[2], b"2")
    assert [one.round for one in node.rows()] == [1, 2]
    path.write_bytes(whole + b"damaged\n")
    with pytest.raises(InvalidSetting, match="Line 2 of the ledger"):
        node.reply_to("run", "train", 3, R[3])


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_are_the_owner_s_alone(tmp_path: Path) -> None:
    node = AnsweredRequests(tmp_path / "secagg")
    node.keep("run", "train", 1, R[1], b"reply")
    assert (tmp_path / "secagg").stat().st_mode & 0o077 == 0
    for path in (tmp_path / "secagg" / module._LEDGER, tmp_path / "secagg" / f"reply-{R[1].hex()}.bin"):
        assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "secagg" / module._LEDGER).chmod(0o644)
    with pytest.raises(InvalidSetting, match="accessible to other users"):
        node.reply_to("run", "train", 2, R[2])


def test_two_processes_that_answer_at_once_send_one_reply(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom fl_gradcode.secagg import AnsweredRequests\n"
        "node = AnsweredRequests(sys.argv[1])\nsys.stdin.read()\n"
        "print(node.keep('run', 'train', 1, bytes(32), sys.argv[2].encode()).decode())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for one in started:
        assert one.stdin is not None
        one.stdin.close()
    sent = {one.stdout.read().strip() for one in started if one.stdout is not None}
    for one in started:
        assert one.wait() == 0
        if one.stdout is not None:
            one.stdout.close()
    assert len(sent) == 1 and sent <= {"a", "b"}


def test_a_ledger_that_was_lost_or_came_back_from_a_backup_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "node" / "answered"
    node = AnsweredRequests(folder)
    node.keep("run", "train", 1, R[1], b"1")
    backup = shutil.copytree(folder, tmp_path / "backup")
    for number in range(2, 60):
        node.keep("run", "train", number, R[number % 20], b"2")
    now = shutil.copytree(folder, tmp_path / "now")
    other = AnsweredRequests(tmp_path / "other" / "answered")
    for number in range(1, 61):
        other.keep("ran", "train", number, R[number % 20], b"2")
    for instead in (None, backup, tmp_path / "other" / "answered"):
        shutil.rmtree(folder)
        if instead is not None:
            shutil.copytree(instead, folder)
        for ask in (
            lambda: node.reply_to("run", "train", 61, R[1]),
            lambda: node.keep("run", "train", 61, R[1], b"x"),
            lambda: node.rows(),
        ):
            with pytest.raises(InvalidSetting, match="lacks requests that this node has answered"):
                ask()
    shutil.rmtree(folder)
    shutil.copytree(now, folder)
    assert node.reply_to("run", "train", 60, R[3]) is None
    node._head.write_text("[")
    with pytest.raises(InvalidSetting, match="cannot be read"):
        node.reply_to("run", "train", 60, R[3])


def test_a_ledger_that_is_ahead_of_its_head_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = AnsweredRequests(tmp_path / "answered")
    node.keep("run", "train", 1, R[1], b"1")
    head = node._head.read_bytes()
    node.keep("run", "train", 2, R[2], b"2")
    node._head.write_bytes(head)  # as a power cut between the two leaves it
    assert node.reply_to("run", "train", 2, R[2]) == b"2"
    with pytest.raises(SecureRefused, match="Another request"):
        node.reply_to("run", "train", 2, R[3])
    node._head.unlink()  # as an earlier version leaves it
    node.keep("run", "train", 3, R[3], b"3")
    assert node._head.exists()
