"""What the rounds so far recommend, and what ledgers of real runs say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, Shards, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode.cli.plan_source import read_source
from fl_gradcode.codes import bernoulli
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.planning.planner import make_plan
from fl_gradcode.runlog.advice import LEAST, advise
from fl_gradcode.runlog.reader import RunRows
from fl_gradcode.runlog.status import as_json, status_of
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app
from tests.runlog.ledger_rows import CODE, notices, read, row, typed, worker


def ledger_of(path: Path, rounds: int, *, send: Any = "coded", s: int = 2, slow: float = 10.0, **options: Any) -> Path:
    latency = Latency(fixed=0.2, compute=0.8, slowdown=scaled(lognormal(1.0, 0.3), {0: slow, 1: slow}))
    with InProcessGrid(toy_app(), 9, tamper=options.pop("tamper", None)) as inner:
        code = options.pop("code", fractional_repetition(9, s))
        options = {"give_up_rounds": None, **options}
        strategy = GradientCoding(FedAvg(), code, send=send, ledger=path, **options)
        strategy.start(VirtualGrid(inner, latency, seed=5), initial_arrays(), rounds, timeout=1e6)
    return path


def run_of(path: Path) -> RunRows:
    (run,) = read(path).runs.values()
    return run


def test_advice_is_what_plan_says_of_the_same_ledger(tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "ledger.jsonl", 20)
    advice = advise(run_of(path).recent)
    plan = make_plan(read_source(str(path)).latency, 9)
    assert advice.verdict == plan.verdict and advice.python == plan.recommended.scheme.python
    assert advice.own is False and advice.own_seconds is not None and advice.rounds == 20


def test_a_run_that_does_what_is_recommended_is_told_so(tmp_path: Path) -> None:
    first = advise(run_of(ledger_of(tmp_path / "first.jsonl", 30, send=Shards(patience="learned"), s=3)).recent)
    assert first.own is True, first
    assert first.own_seconds is not None and f"takes {first.own_seconds:.3g} s" in first.verdict
    patient = advise(run_of(ledger_of(tmp_path / "patient.jsonl", 30, send="shards", s=3)).recent)
    assert patient.own is False and patient.own_seconds is not None  # the planner knows it, and something faster


def test_too_few_rounds_say_how_many_are_needed() -> None:
    rows = typed([row(i) for i in range(1, LEAST)])
    advice = advise(rows)
    assert advice.verdict == "no recommendation yet: 4 of the last rounds left job times, 5 are needed."
    assert not advice.python
    assert advise([*rows, *typed([row(LEAST)])]).python


def test_advice_is_made_of_the_rounds_since_the_code_had_this_many_workers() -> None:
    smaller = {**CODE, "n": 5, "k": 5}
    rows = [*(row(i) for i in range(1, 9)), *(row(i, code=smaller, seconds=[1.0] * 5) for i in range(9, 15))]
    assert advise(typed(rows)).rounds == 6


def test_rows_without_times_or_a_single_worker_get_no_advice() -> None:
    assert "0 of the last rounds" in advise(typed([row(1, seconds=[None] * 6)])).verdict
    assert "at least 2 workers" in advise(typed([row(1, code={**CODE, "n": 1})])).verdict
    assert not advise(typed([{**row(1), "train": None}])).python


def test_who_does_not_answer_any_more_is_planned_for() -> None:
    rows = typed([row(i) for i in range(1, 20)])
    assert advise(rows).verdict.startswith("do not code: ")
    told = advise(rows, gone=[3])
    assert told.verdict.startswith("if worker 3 never answers again: code: ") and "GradientCoding(" in told.python


def test_no_advice_for_a_code_of_workers_that_are_not_all_there() -> None:
    rows = typed([row(i) for i in range(1, 20)])
    told = advise(rows, holders=[[0, 1], [2, 4], [5, 0]])
    assert (
        told.verdict == "no recommendation: worker 3 holds no shards now, and a plan is for n=6 that do."
        and not told.python
    )
    assert advise(rows, holders=[[0, 1], [2, 3], [4, 5]]).python


def test_an_approximate_code_says_so_in_its_ledger(tmp_path: Path) -> None:
    path = ledger_of(
        tmp_path / "ledger.jsonl",
        2,
        code=bernoulli(9, 3, rng=np.random.default_rng(0)),
        slow=1.0,
        on_undecodable="approximate",
    )
    assert all(json.loads(line)["code"]["exact"] is False for line in path.read_text().splitlines())
    assert "exact" not in json.loads(ledger_of(tmp_path / "other.jsonl", 1).read_text())["code"]


def test_advice_for_a_thousand_workers_simulates_little() -> None:
    rng = np.random.default_rng(0)
    code = {**CODE, "n": 1000, "k": 1000}
    rows = typed([row(i, code=code, seconds=rng.lognormal(0, 0.3, 1000).tolist()) for i in range(1, 7)])
    advice = advise(rows)
    assert advice.rounds == 6 and advice.python


# Ledgers of real runs


def failing(worker_number: int) -> Callable[[int, Message, Message], Message]:
    def tamper(number: int, message: Message, reply: Message) -> Message:
        return (
            Message(Error(2, "Traceback\nOSError: disk [full]"), reply_to=message) if number == worker_number else reply
        )

    return tamper


@pytest.mark.parametrize("send", ["coded", "shards", "adaptive"])
def test_a_real_run_names_who_is_slow_and_who_fails(send: str, tmp_path: Path) -> None:
    path = ledger_of(tmp_path / "ledger.jsonl", 24, send=send, tamper=failing(4))
    told = status_of(run_of(path))
    assert told.outcomes == {"exact": 24} and told.virtual
    assert {0, 1} <= {one.worker for one in told.workers if one.mark == "always slow"}
    assert "OSError: disk [full]" in worker(told, 4).reasons[0].reason
    json.dumps(as_json(told, 10), allow_nan=False)


def test_a_real_run_that_cannot_decode_any_more_says_why(tmp_path: Path) -> None:
    def tamper(number: int, message: Message, reply: Message) -> Message:
        gone = number in (0, 3, 6) and message.metadata.message_type == "train"
        return Message(Error(2, "ValueError: gone"), reply_to=message) if gone and tamper_from[0] else reply

    tamper_from = [False]
    path = tmp_path / "ledger.jsonl"
    ledger_of(path, 4, slow=1.0, run="one")
    tamper_from[0] = True
    ledger_of(tmp_path / "other.jsonl", 4, slow=1.0, tamper=tamper)
    rows = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    for number, one in enumerate(rows, 5):
        one.update({"run": "one", "round": number})
    with path.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)
    told = status_of(run_of(path))
    assert told.outcomes == {"exact": 4, "skipped": 4}
    assert "shards 0, 3 and 6 (held by workers 0, 3 and 6" in notices(told)["undecoded"]


def test_a_cyclic_code_has_its_holders_named(tmp_path: Path) -> None:
    code = cyclic_repetition(9, 1, rng=np.random.default_rng(0))
    path = ledger_of(
        tmp_path / "ledger.jsonl", 3, code=code, slow=1.0, on_undecodable="approximate",
        tamper=lambda number, message, reply: failing(number)(number, message, reply) if number in (3, 4) else reply,
    )  # fmt: skip
    assert "shard 4 (held by workers 3 and 4)" in notices(status_of(run_of(path)))["undecoded"]
