"""The ledger of spent privacy: what is charged, what is refused, and that nothing is ever lost."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fl_gradcode.errors import InvalidSetting, PrivacyRefused
from fl_gradcode.privacy import Spend, epsilon_of
from fl_gradcode.privacy.budget_ledger import BudgetLedger, Charge, Request
from fl_gradcode.testing import inside_a_run
from tests.privacy.direct import Node, linear, move, records

DELTA = 1e-5
SPEND = Spend(1.0, 0.2, 5)
FORK = multiprocessing.get_context("fork")  # a real process, without the seconds of importing torch


def ask(ledger: BudgetLedger, number: int, context: str = "", earlier: Iterable[int] = (), **settings: Any) -> Charge:
    request: dict[str, Any] = {
        key: settings.pop(key) for key in ("shard", "run", "spend", "repeatable") if key in settings
    }
    values: dict[str, Any] = {"shard": 0, "run": "r", "spend": SPEND, **request}
    made = Request(round=number, context=context or f"context of {number}", earlier=earlier, **values)
    return ledger.charge(made, delta=DELTA, accountant="rdp", **settings)


def cost(rounds: int, spend: Spend = SPEND) -> float:
    return epsilon_of([replace(spend, steps=spend.steps * rounds)], DELTA, accountant="rdp")


@pytest.fixture
def ledger(tmp_path: Path) -> BudgetLedger:
    return BudgetLedger(tmp_path / "spent")


def test_each_round_is_charged_once_and_a_repeated_request_is_free(ledger: BudgetLedger) -> None:
    for number in (1, 2, 3):
        first = ask(ledger, number)
        content = ledger.path_of(0).read_bytes()
        assert first == Charge(cost(number), cost(number), new=True)
        assert ask(ledger, number) == replace(first, new=False)
        assert ask(ledger, number, run_budget=1e-9, budget=1e-9) == replace(first, new=False)  # it costs nothing
        assert ledger.path_of(0).read_bytes() == content
    assert ledger.epsilon(0, DELTA, accountant="rdp") == cost(3)
    assert ask(ledger, 2).new is False  # of an earlier round too: it gets the answer that it got
    assert [one.round for one in ledger.entries(0)] == [1, 2, 3] and ledger.shards == [0]


def test_without_limits_epsilons_need_not_be_computed_and_charges_are_the_same(ledger: BudgetLedger) -> None:
    for number in (1, 2, 2):
        told = ask(ledger, number, wanted=False)
        assert math.isnan(told.run_epsilon) and math.isnan(told.total_epsilon)
    assert not told.new and ledger.epsilon(0, DELTA, accountant="rdp") == cost(2)
    with pytest.raises(PrivacyRefused, match="answered before"):
        ask(ledger, 2, "other weights", wanted=False)
    assert ask(ledger, 3, budget=100.0, wanted=False).total_epsilon == cost(3)


def test_another_request_for_an_answered_round_is_refused(ledger: BudgetLedger) -> None:
    ask(ledger, 1)
    ask(ledger, 2)
    content = ledger.path_of(0).read_bytes()
    for number, context in ((2, "other weights"), (1, "other weights")):
        with pytest.raises(PrivacyRefused, match=f"Shard 0, round {number}: this round was answered before"):
            ask(ledger, number, context)
    assert ledger.path_of(0).read_bytes() == content
    assert ask(ledger, 2, "other weights", shard=1).new  # other records
    assert ask(ledger, 2, "other weights", run="another").new  # charged on top


def test_rounds_do_not_go_backwards(ledger: BudgetLedger) -> None:
    ask(ledger, 4)
    with pytest.raises(PrivacyRefused, match="Shard 0, round 3: round 4 was answered before"):
        ask(ledger, 3)
    ask(ledger, 7, earlier=range(1, 7))
    with pytest.raises(PrivacyRefused, match="round 7 was answered before"):  # though it was charged, as missed
        ask(ledger, 5)
    assert sorted(one.round for one in ledger.entries(0)) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("spend", [Spend(1.1, 0.2, 5), Spend(1.0, 0.3, 5), Spend(1.0, 0.2, 4)])
def test_a_run_keeps_its_settings(ledger: BudgetLedger, spend: Spend) -> None:
    ask(ledger, 1)
    with pytest.raises(PrivacyRefused, match=r"5 steps at noise multiplier 1, sample rate 0\.2 a round so far, and"):
        ask(ledger, 2, spend=spend)
    assert ask(ledger, 2, spend=spend, run="another").total_epsilon > cost(1)


def test_over_budget_is_refused_before_anything_is_written(ledger: BudgetLedger) -> None:
    with pytest.raises(PrivacyRefused, match="above the budget of 0.1"):
        ask(ledger, 1, budget=0.1)
    assert not ledger.path_of(0).exists()
    ask(ledger, 1, run_budget=cost(2))
    ask(ledger, 2, run_budget=cost(2))
    content = ledger.path_of(0).read_bytes()
    with pytest.raises(PrivacyRefused, match=r"round 3: it would bring this run to epsilon .* \(delta 1e-05\), above"):
        ask(ledger, 3, run_budget=cost(2))
    with pytest.raises(PrivacyRefused, match="it would bring this run"):  # what was missed counts too
        ask(ledger, 5, earlier=[3, 4], run_budget=cost(3))
    with pytest.raises(PrivacyRefused, match="it would bring all runs"):
        ask(ledger, 1, run="another", run_budget=cost(1), budget=cost(2))
    assert ledger.path_of(0).read_bytes() == content
    assert ask(ledger, 1, run="another", run_budget=cost(1), budget=cost(3)) == Charge(cost(1), cost(3), new=True)


def test_epsilon_that_is_infinite_is_above_every_budget(ledger: BudgetLedger) -> None:
    with pytest.raises(PrivacyRefused, match="to epsilon inf"):
        ask(ledger, 1, spend=Spend(1e-300, 0.2, 1), budget=1e300)
    assert not ledger.path_of(0).exists()


def test_rounds_that_only_others_answered_are_charged(ledger: BudgetLedger) -> None:
    assert ask(ledger, 4, earlier=iter([1, 2, 3])).run_epsilon == cost(4)
    assert [(one.round, bool(one.context)) for one in ledger.entries(0)] == [
        (1, False),
        (2, False),
        (3, False),
        (4, True),
    ]
    assert ask(ledger, 6, earlier=[2, 4, 5, 6, 9]).run_epsilon == cost(6)  # neither twice nor before its time
    with pytest.raises(PrivacyRefused, match="more than 10000 rounds went by"):
        ask(ledger, 10**9, earlier=range(1, 10**9))
    assert ask(ledger, 7, earlier=range(1, 10**12)).run_epsilon == cost(7)


def test_holders_that_answer_different_rounds_end_with_equal_ledgers(tmp_path: Path) -> None:
    answers = {1: [0, 1], 2: [2], 3: [1], 4: [0, 2], 5: [0], 6: [0, 1, 2]}
    holders = [BudgetLedger(tmp_path / str(holder)) for holder in range(3)]
    for number, who in answers.items():
        for holder in who:
            told = ask(holders[holder], number, earlier=range(1, number))
            assert told.run_epsilon == cost(number)  # once a round, however many trained
    spent = [sorted((one.round, one.spend) for one in one.entries(0)) for one in holders]
    assert spent[0] == spent[1] == spent[2] == [(number, SPEND) for number in answers]


def test_without_repeatable_answers_each_one_is_charged(ledger: BudgetLedger) -> None:
    for count in (1, 2, 3):
        assert ask(ledger, 1, repeatable=False) == Charge(cost(count), cost(count), new=True)


def test_files_are_the_owners_alone(ledger: BudgetLedger) -> None:
    ask(ledger, 1)
    assert stat.S_IMODE(ledger.path_of(0).stat().st_mode) == 0o600
    assert stat.S_IMODE(ledger.folder.stat().st_mode) == 0o700


def train_until_killed(folder: Path, pipe: Any) -> None:
    with inside_a_run(), Node(folder).ask(linear(), round=3) as dp:
        pipe.send(dp.epsilon)
        signal.pause()  # the answer never leaves


def test_a_process_killed_before_it_answers_has_charged(tmp_path: Path) -> None:
    with inside_a_run():
        node, unharmed = Node(tmp_path / "node"), Node(tmp_path / "unharmed")
        for one in (node, unharmed):
            for number in (1, 2):
                one.update(linear(), round=number)
        here, there = FORK.Pipe()
        process = FORK.Process(target=train_until_killed, args=(node.folder, there))
        process.start()
        assert here.poll(60)
        epsilon = here.recv()
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        expected, spent = unharmed.update(linear(), round=3)
        assert node.ledger.read_bytes() == unharmed.ledger.read_bytes()
        assert epsilon == spent.epsilon
        # Asked again after the restart: the same answer, at no cost; then on as if nothing had happened.
        update, spent = node.update(linear(), round=3)
        assert update.equal(expected) and spent.epsilon == epsilon
        for one in (node, unharmed):
            _, spent = one.update(linear(), round=4, earlier=((1, 3),))
        assert node.ledger.read_bytes() == unharmed.ledger.read_bytes()
        total = BudgetLedger(node.folder / "spent").epsilon(0, DELTA, accountant="rdp")
        assert total == spent.epsilon == epsilon_of([Spend(1.0, 0.2, 12)], DELTA, accountant="rdp")


def test_nothing_is_written_when_training_is_refused(tmp_path: Path) -> None:
    with inside_a_run():
        node = Node(tmp_path / "node")
        node.update(linear())
        content = node.ledger.read_bytes()
        net = linear()
        with pytest.raises(PrivacyRefused, match="above the budget of 0.5"):
            node.update(net, round=2, node_config={"max-epsilon": 0.5})
        assert node.ledger.read_bytes() == content and not net.weight.any()
        x, y = records()
        with node.ask(net, round=2) as dp:  # and the model is as good as new
            assert len(move(dp, net, x, y)) == 3


def test_a_last_line_cut_anywhere_is_as_if_it_had_not_been_written(ledger: BudgetLedger) -> None:
    for number in (1, 2, 3):
        ask(ledger, number)
    path = ledger.path_of(0)
    whole = path.read_bytes()
    second, third = (len(line) for line in whole.splitlines(keepends=True)[1:])
    for size in range(len(whole) - third - second, len(whole)):
        path.write_bytes(whole[:size])
        # A line that lacks its newline alone is whole, and its charge counts.
        known = 1 + (size >= len(whole) - third - 1) + (size == len(whole) - 1)
        if known == 3:
            continue
        assert [one.round for one in ledger.entries(0)] == [1, 2, 3][:known]
        assert ask(ledger, known + 1).run_epsilon == cost(known + 1)
        lines = path.read_bytes()
        assert whole.startswith(lines) and lines.count(b"\n") == known + 1


@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_last_newline_forgets_nothing(ledger: BudgetLedger, times: int) -> None:
    for number in range(1, times + 1):
        ask(ledger, number)
    path = ledger.path_of(0)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(ledger.entries(0)) == times
    assert ask(ledger, times + 1).run_epsilon == cost(times + 1)
    assert [one.round for one in ledger.entries(0)] == [*range(1, times + 2)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("noise-multiplier", value) for value in ("NaN", "Infinity", "-1.0", "0", "true", '"1"', "null")),
        *(("sample-rate", value) for value in ("NaN", "-0.1", "1.5", "0")),
        *(("steps", value) for value in ("-3", "0", "1.5", "NaN", "true")),
        *(("round", value) for value in ("-1", "NaN", "1.0")),
    ],
)
def test_a_number_that_no_charge_has_is_refused_by_its_line(ledger: BudgetLedger, name: str, value: str) -> None:
    ask(ledger, 1)
    ask(ledger, 2)
    path = ledger.path_of(0)
    first, second = path.read_text().splitlines()
    damaged = json.loads(first)
    damaged[name] = "HERE"
    path.write_text(json.dumps(damaged).replace('"HERE"', value) + "\n" + second + "\n")
    before = path.read_bytes()
    with pytest.raises(InvalidSetting, match=r"^Line 1 of the ledger of spent privacy \S+ cannot be read"):
        ask(ledger, 3)
    assert path.read_bytes() == before


def test_a_ledger_that_others_may_change_is_refused(ledger: BudgetLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(ledger, 1)
    path = ledger.path_of(0)
    path.chmod(0o666)
    with pytest.raises(InvalidSetting, match=r"is accessible to other users \(mode 0666\): chmod 600"):
        ask(ledger, 2)
    path.chmod(0o600)
    ledger.folder.chmod(0o777)
    with pytest.raises(InvalidSetting, match=r"Other users can replace the files in .*: chmod 700"):
        ask(ledger, 2)
    ledger.folder.chmod(0o700)
    path.rename(ledger.folder / "elsewhere")
    path.symlink_to(ledger.folder / "elsewhere")
    with pytest.raises(InvalidSetting, match="is a symbolic link, whose target may change"):
        ask(ledger, 2)
    path.unlink()
    (ledger.folder / "elsewhere").rename(path)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid:
        with pytest.raises(InvalidSetting, match="belongs to another user"):
            ask(ledger, 2)
    monkeypatch.undo()
    assert ask(ledger, 2).run_epsilon == cost(2)


def test_a_torn_line_longer_than_the_next_leaves_nothing(ledger: BudgetLedger) -> None:
    ask(ledger, 1)
    whole = ledger.path_of(0).read_bytes()
    ledger.path_of(0).write_bytes(whole + b"{" * 5000)
    ask(ledger, 2)
    assert ledger.path_of(0).read_bytes().count(b"{") == 2
    assert [one.round for one in ledger.entries(0)] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"7", b"[]", b"{}", b"\xff\xfe", b'{"run": "r", "round": 2}', b"null", None],
    ids=["empty", "half", "number", "list", "no keys", "no text", "lacks keys", "null", "round a word"],
)
def test_a_damaged_line_is_refused_with_its_number_and_kept(ledger: BudgetLedger, line: bytes | None) -> None:
    for number in (1, 2, 3):
        ask(ledger, number)
    path = ledger.path_of(0)
    lines = path.read_bytes().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "round": "two"}).encode() if line is None else line
    damaged = b"\n".join(lines) + b"\n"
    path.write_bytes(damaged)
    for act in (lambda: ask(ledger, 4), lambda: ledger.entries(0), lambda: ledger.epsilon(0, DELTA)):
        with pytest.raises(InvalidSetting, match=r"Line 2 of the ledger .* cannot be read\. Restore the file"):
            act()
    assert path.read_bytes() == damaged


def charge_many(folder: Path, name: str, start: Any, admitted: Any) -> None:
    mine, count = BudgetLedger(folder), 0
    start.wait()
    for number in range(1, 41):
        try:
            ask(mine, number, f"{name}{number}", repeatable=False, run=name, spend=Spend(4.0, 0.01, 1), budget=BUDGET)
        except PrivacyRefused:
            break
        count += 1
    admitted.put(count)


ROOM = 50
BUDGET = cost(ROOM, Spend(4.0, 0.01, 1))


def test_processes_that_charge_at_once_lose_nothing_and_share_one_budget(tmp_path: Path) -> None:
    start, admitted = FORK.Barrier(3), FORK.Queue()
    processes = [FORK.Process(target=charge_many, args=(tmp_path, name, start, admitted)) for name in "abc"]
    for process in processes:
        process.start()
    counts = [admitted.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    ledger = BudgetLedger(tmp_path)
    entries = ledger.entries(0)
    assert sum(counts) == len(entries) == ROOM  # neither lost nor more than there was room for
    assert len({(one.run, one.round, one.context) for one in entries}) == ROOM
    assert ledger.epsilon(0, DELTA, accountant="rdp") == BUDGET


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSetting, match=r"^The folder for spent privacy \S+ cannot be written: [A-Z][a-z ]+\.$"):
        ask(BudgetLedger(tmp_path / "file"), 1)
    with pytest.raises(InvalidSetting, match=r"^The folder for spent privacy \S+ cannot be written: [A-Z][a-z ]+\.$"):
        ask(BudgetLedger(tmp_path / "file" / "below"), 1)
    (tmp_path / "spent" / "shard-0.jsonl").mkdir(parents=True)
    with pytest.raises(InvalidSetting, match=r"^\S+ is not a file: move it away, and restore the file\.$"):
        ask(BudgetLedger(tmp_path / "spent"), 1)
