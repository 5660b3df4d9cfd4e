"""Rows of many workers are short, and read back as they were."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fl_gradcode import GradientCoding, VirtualGrid, fractional_repetition
from fl_gradcode.codes import GradientCode
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.runlog import CodeLine, JobLine, Late, Ledger, PhaseRow, PhaseSeconds, Rejected, RoundRow
from fl_gradcode.runlog.compact import _numbers, _short_number, _text, expanded, shortened
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app


def rows_of(
    code: GradientCode, rounds: int = 3, tamper: Any = None, *, trains_only: bool = False, **options: Any
) -> tuple[list[RoundRow], Any]:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0 if trains_only else 1.0), code, **options)
    with InProcessGrid(toy_app(), code.n, tamper=tamper) as grid:
        strategy.start(VirtualGrid(grid, Latency(compute=lognormal(sigma=0.6))), initial_arrays(), num_rounds=rounds)
    return strategy.ledger.rounds, strategy


def _many(code: CodeLine, random: np.random.Generator, kind: str, number: int) -> PhaseRow:
    """A phase of a thousand workers, a tenth of whom were late with the last one."""
    order = random.permutation(code.n).tolist()
    late, used, unread = order[:100], order[100:500], order[500:950]
    seconds = random.lognormal(1.0, 0.6, code.n)
    timings = [JobLine(w, kind, number, 3, float(seconds[w]), float(seconds[w]) * 0.9) for w in used + unread]
    timings += [JobLine(w, "train", max(1, number - 1), 3, float(seconds[w]), None) for w in late]
    owing = tuple(JobLine(w, kind, number, 3, float(seconds[w]), None) for w in order[950:])
    return PhaseRow(
        outcome="exact",
        ended="decoded",
        workers=code.n,
        shards=tuple(range(code.k)),
        asked=tuple(order),
        answered=tuple(used),
        unread=tuple(unread),
        used=tuple(sorted(used)),
        stragglers=tuple(sorted(order[950:])),
        held_back=tuple(late),
        rejected=tuple(Rejected(w, str(10**18 + w), "error", 300 * "x") for w in order[:60]),
        late=tuple(Late(w, str(10**18 + w), "train 1") for w in late),
        decoding_error=0.0,
        coverage=(1.0,) * code.k,
        compared=tuple(range(0, code.k, 2)),
        timings=tuple(timings),
        owing=owing,
        bytes_down=10**9,
        bytes_up=10**9,
        seconds=PhaseSeconds(3.14159, 0.1),
    )


def test_a_row_of_a_thousand_workers_takes_at_most_40_kB_and_reads_back() -> None:
    code, random = CodeLine("fractional repetition", 1000, 1000, 2, 1), np.random.default_rng(0)
    row = RoundRow(
        run="r" * 32,
        flower_run_id=str(2**63),
        round=7,
        code=code,
        train=_many(code, random, "train", 7),
        evaluate=_many(code, random, "evaluate", 7),
    )
    line = json.dumps(row.to_json())
    print(f"{len(line):,} bytes")
    assert len(line) <= 40_000
    again = RoundRow.from_json(json.loads(line))
    for mine, its in zip(again.phases, row.phases, strict=True):
        for name in ("answered", "used", "stragglers", "compared", "coverage", "shards"):
            assert getattr(mine, name) == getattr(its, name), name
        assert sorted(mine.asked) == sorted(its.asked)  # type: ignore[type-var]
        assert mine.late_left_out == 90 and mine.late == its.late[:10] and mine.rejected_left_out == 50
        wanted = sorted(its.timings, key=lambda job: (job.kind, job.round, job.worker))
        for one, other in zip(mine.timings, wanted, strict=True):
            assert (one.worker, one.kind, one.round) == (other.worker, other.kind, other.round)
            assert one.seconds == pytest.approx(other.seconds, rel=5e-3) and one.shards == other.shards
            assert one.computing == (None if other.computing is None else pytest.approx(other.computing, rel=5e-3))


def test_rows_of_a_run_of_many_workers_are_short_and_read_back() -> None:
    rows, strategy = rows_of(fractional_repetition(240, 2), rounds=2)
    for row in rows:
        again = RoundRow.from_json(json.loads(json.dumps(row.to_json())))
        assert again.holders == row.holders and again.train is not None and row.train is not None
        assert again.train.answered == row.train.answered and len(again.train.timings) == len(row.train.timings)
        assert len(json.dumps(row.to_json())) < 16_000
    assert strategy.ledger.rows[0]["schema"] == 2


def test_numbers_of_seconds_are_short_and_read_back() -> None:
    values = [0.0, 0.1234, 1.235, 12.35, 1234.0, 98765.0, 1.5e-7, None]
    texts = [_short_number(value, 3) for value in values]
    assert texts == ["0", ".123", "1.24", "12.3", "1230", "98800", "1.5e-07", "?"]
    for text, value in zip(texts[:-1], values[:-1], strict=True):
        assert float(text) == pytest.approx(value, rel=5e-3)


def test_the_first_row_of_a_run_of_a_thousand_workers_takes_at_most_40_kB() -> None:
    # The longest row: nearly every shard is computed twice, so that its copies are compared.
    (row,), _ = rows_of(fractional_repetition(1000, 2), rounds=1, send="shards", trains_only=True)
    assert row.train is not None and len(row.train.timings) > 1500
    assert len(json.dumps({**row.to_json(), "holders": None})) <= 40_000


def test_small_rows_stay_as_they_were() -> None:
    rows, _ = rows_of(fractional_repetition(6, 2))
    assert all(row.to_json()["schema"] == 1 for row in rows)
    short = shortened(rows[0].to_json())
    assert short["schema"] == 2 and RoundRow.from_json(short).train is not None


def test_long_lists_of_failures_are_cut_and_counted() -> None:
    from flwr.app import Error

    def fail(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "x" * 5000), reply_to=message) if worker % 3 else reply

    rows, _ = rows_of(fractional_repetition(210, 2), rounds=1, tamper=fail)
    (row,) = rows
    assert row.train is not None and len(row.train.rejected) > 50
    values = row.to_json()
    assert len(values["train"]["rejected"]) == 10
    assert values["train"]["rejected-left-out"] == len(row.train.rejected) - 10
    assert RoundRow.from_json(values).train.rejected_left_out == len(row.train.rejected) - 10  # type: ignore[union-attr]


def test_a_ledger_with_a_file_keeps_a_window_in_memory(tmp_path: Any) -> None:
    rows, _ = rows_of(fractional_repetition(4, 1), rounds=1)
    ledger, alone = Ledger(tmp_path / "ledger.jsonl"), Ledger()
    for _ in range(1200):
        ledger.append(rows[0])
        alone.append(rows[0])
    assert 256 <= len(ledger.rounds) < 512 and len(alone.rounds) == 1200
    assert len(Ledger.read_rounds(tmp_path / "ledger.jsonl")) == 1200


@given(st.lists(st.one_of(st.none(), st.integers(0, 40))))
def test_whole_numbers_read_back_from_their_text(numbers: list[int | None]) -> None:
    assert _numbers(_text(numbers)) == numbers


@given(st.integers(0, 20), st.integers(1, 30))
def test_runs_read_back_from_their_text(first: int, count: int) -> None:
    numbers = [*range(first, first + count), 3, *range(5)]
    assert _numbers(_text(numbers)) == numbers and len(_text(numbers)) <= 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("asked", "0-99999999999"),
        ("asked", "1-x"),
        ("asked", "5-2"),
        ("timings", {"jobs": 2, "worker": "0", "seconds": [1.0]}),
        ("timings", {"jobs": 10**12, "worker": 1}),
        ("coverage", {"all": 1.0, "of": -1}),
        ("coverage", {"of": 3}),
        ("timings", {}),
    ],
)
def test_a_short_row_that_is_wrong_is_one_sentence(key: str, value: Any) -> None:
    rows, _ = rows_of(fractional_repetition(6, 2), rounds=1)
    short = shortened(rows[0].to_json())
    short["train"][key] = value
    with pytest.raises(InvalidSetting, match="This is not a ledger row"):
        RoundRow.from_json(short)


def test_what_is_not_finite_stays_unknown() -> None:
    rows, _ = rows_of(fractional_repetition(6, 2), rounds=1)
    values = rows[0].to_json()
    jobs = values["train"]["timings"]
    jobs[0]["seconds"] = None
    again = {job["worker"]: job["seconds"] for job in expanded(shortened(values))["train"]["timings"]}
    assert again[jobs[0]["worker"]] is None
    assert math.isclose(again[jobs[1]["worker"]], jobs[1]["seconds"], rel_tol=5e-3)
