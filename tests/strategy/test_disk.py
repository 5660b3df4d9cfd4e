"""What a run keeps on disk: links stay links, a full disk and locks that do not work are one sentence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fl_gradcode import Ledger
from fl_gradcode.checkpoints.checkpoint import Checkpoint
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.privacy import Spend
from fl_gradcode.privacy.budget_ledger import BudgetLedger, Request
from fl_gradcode.runlog.rows import RoundRow
from tests.strategy.test_resume import Killed, rounds_of, start


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_links_stay_and_lead_to_what_is_kept(tmp_path: Path) -> None:
    """On a small system disk they lead to the large one."""
    large = tmp_path / "large"
    large.mkdir()
    (tmp_path / "run.ckpt").symlink_to(large / "kept.ckpt")
    (tmp_path / "ledger.jsonl").symlink_to(large / "kept.jsonl")
    with pytest.raises(Killed):
        start(tmp_path, killed_in=2)
    start(tmp_path, rounds=3)
    assert (tmp_path / "run.ckpt").is_symlink() and (tmp_path / "ledger.jsonl").is_symlink()
    assert {"kept.ckpt", "kept.jsonl"} <= {path.name for path in large.iterdir()}
    assert rounds_of(tmp_path) == [1, 2, 3]


def test_a_ledger_without_room_ends_the_run_with_a_sentence_and_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ledger.append
    left = [2]

    def append(self: Ledger, row: RoundRow) -> dict[str, Any]:
        left[0] -= 1
        if left[0] < 0:
            with monkeypatch.context() as patch:
                patch.setattr("fl_gradcode.runlog.ledger.os.fsync", full)
                real(self, row)
        return real(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", append)
        with pytest.raises(InvalidSetting, match=r"The ledger .* cannot be written: No space left on device\."):
            start(tmp_path)
    start(tmp_path)
    assert rounds_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_an_account_without_room_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "run.ckpt")
    checkpoint.save_privacy("r", {"released": []})
    monkeypatch.setattr("fl_gradcode.checkpoints.checkpoint.os.fsync", full)
    with pytest.raises(InvalidSetting, match="No space left on device. Without it, no messages are sent"):
        checkpoint.save_privacy("r", {"released": [1]})
    assert checkpoint.load_privacy("r") == {"released": []}


def test_a_file_system_without_locks_is_told_and_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unable(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fl_gradcode._files.fcntl.flock", unable)
    with caplog.at_level(logging.WARNING):
        start(tmp_path, rounds=1)
    assert "cannot be locked (No locks available): make sure that no second run uses it" in caplog.text
    assert json.loads((tmp_path / "ledger.jsonl").read_text())["round"] == 1


def test_a_ledger_of_spent_privacy_that_cannot_be_locked_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fl_gradcode._files.fcntl.flock", unable)
    request = Request(0, "r", 1, "", Spend(1.0, 0.1, 3))
    with pytest.raises(InvalidSetting, match=r"cannot be locked \(No locks available\): it must be on a file system"):
        BudgetLedger(tmp_path).charge(request, delta=1e-5)
    assert not BudgetLedger(tmp_path).path_of(0).exists()
