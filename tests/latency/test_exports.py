"""Tables as people export them: read right, or refused in one sentence that names what is wrong."""

from __future__ import annotations

import gc
import gzip
import math
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import DEFAULT_SHARE, Jobs, job_tables, read_measured, read_trace, split_of

ROUNDS, WORKERS = 12, 5


def times_of(path: Path) -> NDArray[np.float64]:
    """The table that a file stands for, in seconds: NaN where a worker has no time."""
    found = read_measured(path)
    jobs = found.jobs
    rounds = np.unique(jobs.round, return_inverse=True)[1]
    table = np.full((rounds.max() + 1, jobs.n), np.nan)
    table[rounds, jobs.worker] = jobs.seconds * (found.unit or 1.0)
    return table


def refusal(path: Path) -> str:
    with pytest.raises(InvalidSetting) as error:
        read_measured(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def mutated(seed: int, folder: Path) -> tuple[Path, NDArray[np.float64], tuple[str, ...]]:
    """An export in a random form, with the times and the workers' names that it stands for."""
    rng = np.random.default_rng(seed)

    def one_in(odds: int) -> bool:
        return bool(rng.integers(odds) == 0)

    times = np.round(rng.lognormal(0, 0.5, (ROUNDS, WORKERS)) + 0.05, 4)
    separator = str(rng.choice([",", ",", ";", "\t", "|"]))
    comma = separator != "," and one_in(2)
    unit = str(rng.choice(["", "", "_ms", "_s"]))
    scale = 1000.0 if unit == "_ms" else 1.0
    gaps = one_in(3)
    if gaps:
        times[rng.integers(1, ROUNDS - 1), rng.integers(WORKERS)] = np.nan
    empty = str(rng.choice(["", "NaN", "NA", "null", "0"]))

    def cell(value: float) -> str:
        text = empty if math.isnan(value) else repr(round(float(value) * scale, 4))
        return text.replace(".", ",") if comma else text

    kind = int(rng.integers(4))
    names = [
        [f"w{i}" for i in range(WORKERS)],
        [str(i) for i in range(WORKERS)],
        ["alice", "bob", "carol", "dave", "erin"],
        [str(5546683385701009206 + i) for i in range(WORKERS)],
    ][kind]
    lines: list[list[str]] = []
    if one_in(2):  # a table of rounds
        index = str(rng.choice(["", "none", "Round", "timestamp", "Unnamed: 0", "Date"]))
        heads = [*names] if kind else [f"{name}{unit}" for name in names]
        scale = scale if not kind else 1.0
        lines = [heads if index == "none" else [index, *heads]]
        for t, row in enumerate(times):
            first = {"timestamp": str(1764500000 + 60 * t), "Date": f"2026-11-30 10:{t:02}:00"}.get(index, str(t))
            lines.append([*([] if index == "none" else [first]), *map(cell, row)])
        named = tuple(heads)
    else:
        worker = str(rng.choice(["worker", "Client", "node_id", "cid", "Partition-ID"]))
        seconds = str(rng.choice(["duration", "Latency", "elapsed"])) + unit if unit else "Seconds"
        lines = [[worker, str(rng.choice(["round", "Server_Round"])), seconds, "status"]]
        lines += [[names[i], str(t), cell(x), "ok"] for t, row in enumerate(times) for i, x in enumerate(row)]
        named = tuple(names)
    text = "\n".join(separator.join(line) for line in lines) + "\n"
    if one_in(3):
        text = "# written by a script\n\n" + text
    if one_in(4):
        text = text.replace("\n", "\r\n")
    content = text.encode("utf-8-sig" if one_in(3) else "utf-8")
    ending = str(rng.choice([".csv", ".CSV"]))
    if one_in(4):
        content, ending = gzip.compress(content), ".csv.gz"
    path = folder / f"export{seed}{ending}"
    path.write_bytes(content)
    return path, times, named


@pytest.mark.parametrize("seed", range(60))
def test_an_export_in_any_form_is_the_same_table(seed: int, tmp_path: Path) -> None:
    path, times, names = mutated(seed, tmp_path)
    found = times_of(path)
    np.testing.assert_allclose(found, times, rtol=1e-3, atol=1e-4)
    assert read_measured(path).workers == names


RIGHT = {
    "names in numbers": "0,1,2\n1.5,2.5,3.5\n4.5,5.5,6.5\n",
    "an index without a head": "0,1.5,2.5,3.5\n1,4.5,5.5,6.5\n",
    "NumPy's header": "# a,b,c\n1.5,2.5,3.5\n4.5,5.5,6.5\n",
    "spaces": "1.5 2.5 3.5\n4.5 5.5 6.5\n",
    "Excel says the separator": "sep=;\na;b;c\n1,5;2,5;3,5\n4,5;5,5;6,5\n",
    "quoted decimal commas": 'a,b,c\n"1,5","2,5","3,5"\n"4,5","5,5","6,5"\n',
    "a separator at each end": "a,b,c\n1.5,2.5,3.5,\n4.5,5.5,6.5,\n",
    "training among evaluations": "worker,round,seconds,phase\n0,1,1.5,train\n0,1,9,evaluate\n"
    "1,1,2.5,train\n2,1,3.5,train\n0,2,4.5,train\n1,2,5.5,train\n2,2,6.5,train\n2,2,9,evaluate\n",
}


@pytest.mark.parametrize("name", RIGHT)
def test_other_forms_are_read_right(name: str, tmp_path: Path) -> None:
    found = times_of(write(tmp_path / "t.csv", RIGHT[name]))
    assert found.tolist() == [[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]]


def growing(head: str) -> str:
    return head + "\n" + "".join(f"{t * 1.5 + 0.1 * t * t},1.{t},1.{7 * t % 10}\n" for t in range(1, 11))


WRONG = {
    "a clock": (growing("w0,w1,w2"), "column 'w0', which only grows (1.6, 3.4, ... 25)"),
    "when jobs ended": (
        "worker,seconds\n" + "".join(f"{i % 2},{1764500000 + i}\n" for i in range(12)),
        "a date in seconds since 1970",
    ),
    "seconds that add up": (
        "worker,seconds\n" + "".join(f"{i % 2},{i + 0.5}\n" for i in range(12)),
        "only grows (0.5, 1.5, ... 11.5)",
    ),
    "two columns of seconds": ("worker,duration_s,duration_ms\n0,1,2\n1,2,3\n", "each of which may be the seconds"),
    "a metric beside workers": ("w0,w1,w2,energy\n1,2,3,7\n2,1,3,8\n", "a column 'energy' beside w0"),
    "the same worker twice": ("a,a,b\n1,2,3\n2,3,1\n", "two columns called 'a'"),
    "thousands": ("a;b\n1.234,5;2,5\n2,5;3,5\n", "write numbers without thousands separators"),
    "commas and points": ("a;b\n1,5;2.5\n2,5;3,5\n", "decimals have commas or points, not both"),
    "decimals cut in two": ("1,03\n1,05\n", "the end of a decimal"),
    "ids that lost digits": ("worker,seconds\n5.54668e18,1\n5.54669e18,2\n", "Numbers with exponents have lost digits"),
    "computing above seconds": (
        "worker,seconds,computing\n0,1,2\n1,2,1\n",
        "computing 2 in line 2, above its seconds 1",
    ),
    "a negative time": ("worker;seconds\n0;-1\n1;2\n", "has seconds -1 in line 2; it must be at least 0"),
    "a log": (
        "INFO :      [ROUND 1/3]\nINFO :      aggregate_train: Received 5 results\n"
        "INFO : Run finished 3 round(s) in 6.0s\n",
        "It says 2 s a round. Run with GradientCoding(strategy, uncoded(n), ledger=path)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_misread_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    text, sentence = WRONG[name]
    assert sentence in refusal(write(tmp_path / "t.csv", text))


def test_a_summary_of_all_workers_is_no_worker(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[*row, max(row)] for row in np.round(rng.lognormal(0, 0.5, (20, 6)), 3).tolist()]
    path = write(tmp_path / "t.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
    found = read_measured(path)
    assert found.jobs.n == 6 and "no worker: column 7" in found.notes[0]


def test_jobs_without_a_time_are_counted(tmp_path: Path) -> None:
    text = "worker,round,seconds\n0,1,1\n1,1,\n0,2,0\n1,2,1\n0,3,1\n1,3,NaN\n"
    found = read_measured(write(tmp_path / "t.csv", text))
    assert "2 of 6 jobs have no time: they never came back" in found.notes
    assert "1 time of 0 s is taken as failed (worker 0)" in found.notes
    with pytest.raises(InvalidSetting, match="lacks times: round 1, worker 1 has none"):
        read_trace(tmp_path / "t.csv")


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1.5,2.5\n" * 50)[:-20])
    assert "is not a complete gzip file" in refusal(path)


# The split


def jobs(share: float, noise: float, seed: int = 0, loads: tuple[int, ...] = (1, 4)) -> Jobs:
    rng = np.random.default_rng(seed)
    rounds, worker = (x.ravel() for x in np.meshgrid(np.arange(60), np.arange(6), indexing="ij"))
    shards = np.array(loads, dtype=np.float64)[rounds % len(loads)]
    level = np.exp(rng.normal(0, 0.5, 6))[worker]
    seconds = level * (1 - share + share * shards) * rng.lognormal(0, noise, len(rounds))
    return Jobs(6, rounds, worker, shards, seconds, np.full(len(rounds), np.nan))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_the_split_is_fitted_to_jobs_of_several_loads(share: float) -> None:
    exact = split_of(jobs(share, 0.0))
    assert exact.origin == "fitted" and exact.share == pytest.approx(share, abs=1e-9)
    noisy = split_of(jobs(share, 0.3))
    assert noisy.interval is not None
    assert noisy.interval[0] <= share + 0.02 and noisy.interval[1] >= share - 0.02
    assert abs(noisy.share - share) < 0.15


def test_workers_have_splits_of_their_own_where_there_is_enough() -> None:
    one, other = jobs(0.2, 0.0), jobs(0.9, 0.0)
    mixed = Jobs(
        6, one.round, one.worker, one.shards, np.where(one.worker < 3, one.seconds, other.seconds), one.computing
    )
    shares = dict(split_of(mixed).workers)
    assert [round(shares[i], 2) for i in range(6)] == [0.2] * 3 + [0.9] * 3


def test_what_clients_measured_goes_before_what_is_said_or_fitted() -> None:
    known = jobs(0.5, 0.0)
    measured = Jobs(6, known.round, known.worker, known.shards, known.seconds, 0.25 * known.seconds)
    assert split_of(measured, given=0.9).origin == "measured"
    assert split_of(known, given=0.9).share == 0.9
    assert split_of(jobs(0.5, 0.0, loads=(2,))) == split_of(jobs(0.1, 0.1, loads=(3,)))
    assert split_of(jobs(0.5, 0.0, loads=(2,))).share == DEFAULT_SHARE


def test_a_worker_that_stopped_is_named_and_one_with_pauses_is_not() -> None:
    rounds = [*range(40), 0, 1, 2, *range(0, 40, 9)]
    worker = [0] * 40 + [1] * 3 + [2] * 5
    one = np.ones(48)
    known = Jobs(3, np.array(rounds), np.array(worker), one, one, np.full(48, np.nan))
    tables = job_tables(known, split_of(known))
    assert tables.stopped == ((1, 2),) and tables.missing == 120 - 48
    assert (tables.fixed + tables.compute == 1).all()


def test_a_worker_that_came_late_is_named(tmp_path: Path) -> None:
    jobs = "".join(f"{t},{i},{1 + 0.01 * t * i}\n" for t in range(30) for i in range(3) if i != 2 or t >= 12)
    known = read_measured(write(tmp_path / "t.csv", "round,worker,seconds\n" + jobs)).jobs
    tables = job_tables(known, split_of(known))
    assert tables.late == ((2, 12),) and not tables.stopped and tables.missing == 12


def test_a_gap_takes_the_next_time_of_its_worker() -> None:
    known = Jobs(
        2,
        np.array([1, 1, 2, 3, 3]),
        np.array([0, 1, 0, 0, 1]),
        np.ones(5),
        np.array([1.0, 2, 3, 4, 5]),
        np.full(5, np.nan),
    )
    tables = job_tables(known, split_of(known, given=0.0))
    assert tables.fixed.tolist() == [[1, 2], [3, 5], [4, 5]]
    assert re.match(r"0\.00 \(given\)", split_of(known, given=0.0).told())


def test_garbage_is_collected_again_after_a_table_was_read_or_refused(tmp_path: Path) -> None:
    assert gc.isenabled()
    times_of(write(tmp_path / "t.csv", "a,b\n1.5,2.5\n1.25,3.5\n"))
    refusal(write(tmp_path / "u.csv", "a,b\n1.5,2.5,3\n"))
    assert gc.isenabled()
