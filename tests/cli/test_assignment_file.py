"""`place` and `keys make` read the file that says who holds what by one rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_gradcode.cli._assignment_file import read_assignment
from fl_gradcode.cli.app import app
from fl_gradcode.errors import InvalidSetting


def test_each_worker_keeps_its_shards_in_the_file_s_order(tmp_path: Path) -> None:
    (tmp_path / "who.json").write_text("[[2, 0], [], [1]]")
    assert read_assignment(tmp_path / "who.json") == [(2, 0), (), (1,)]


WRONG = {
    "no file": (None, "must hold, as JSON, for each worker the list of its shards"),
    "no JSON": ("[[0, 1]", "must hold, as JSON"),
    "no text": ("\udcff", "must hold, as JSON"),
    "too deep": ("[" * 100_000, "must hold, as JSON"),
    "no list": ("{}", "must hold, as JSON"),
    "no worker": ("[]", "must hold, as JSON"),
    "no lists": ("[0, 1]", "must hold, as JSON"),
    "a name": ('[["a"]]', "must hold, as JSON"),
    "a part": ("[[0.5]]", "must hold, as JSON"),
    "negative": ("[[-1]]", "must hold, as JSON"),
    "a truth": ("[[true]]", "must hold, as JSON"),
    "twice": ("[[0, 1], [2, 1, 2]]", "lists shard 2 more than once for worker 1; list it once."),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_file_is_refused_in_one_sentence_by_both_commands(case: str, tmp_path: Path) -> None:
    text, sentence = WRONG[case]
    path = tmp_path / "who.json"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidSetting, match=f"^{re.escape(str(path))} .*{re.escape(sentence)}"):
        read_assignment(path)
    source = tmp_path / "data"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / name).write_text(name)
    for command in (["place", source, tmp_path / "out"], ["keys", "make", tmp_path / "keys"]):
        done = CliRunner().invoke(app, [*map(str, command), "--assignment", str(path)])
        assert done.exit_code == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert sorted(one.name for one in tmp_path.iterdir() if one != path) == ["data"]
