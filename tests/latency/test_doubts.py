"""Tables that nearly say something else: what they say is read, or refused with the line or column that misleads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import measured_rounds, read_measured
from tests.latency.test_exports import refusal, times_of

ROUNDS, WORKERS = 12, 5
TIMES = np.round(np.random.default_rng(7).lognormal(0.0, 0.3, (ROUNDS, WORKERS)) + 1, 3)
TIMES[:, 3] = np.round(6 * TIMES[:, 3], 3)  # the slowest in each round
NAMES = [f"w{i}" for i in range(WORKERS)]
PEOPLE = ["alice", "bob", "carol", "dave", "erin"]
JOBS = [(t, i, TIMES[t, i]) for t in range(ROUNDS) for i in range(WORKERS)]


def sheet(head: Iterable[object], rows: Iterable[Iterable[object]], separator: str = ",") -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in ([[*head]] if head else []) + [[*r] for r in rows])


def wide(head: Iterable[object], *more: object, names: Iterable[object] = NAMES) -> str:
    """A table of rounds with a first column, and with other columns that are the same in each row."""
    return sheet([*head, *names], ([t, *row, *more] for t, row in enumerate(TIMES)))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def comma(value: float) -> str:
    return f"{value:.4f}".replace(".", ",")


RULE = "+-------+--------+---------+"
RIGHT = {
    "German": sheet(["Runde", "Knoten", "Dauer (s)"], ((t, f"K{i}", comma(x)) for t, i, x in JOBS), ";"),
    "French": sheet(["tour", "client", "durée (ms)"], ((t, i, round(1000 * x)) for t, i, x in JOBS), ";"),
    "Spanish": sheet(["ronda", "trabajador", "segundos"], JOBS),
    "Chinese": sheet(["轮次", "客户端", "耗时"], JOBS),
    "camel case": sheet(["roundNumber", "clientId", "durationMs"], ((t, i, round(1000 * x)) for t, i, x in JOBS)),
    "nanoseconds": sheet(["round", "worker", "duration_ns"], ((t, i, round(1e9 * x)) for t, i, x in JOBS)),
    "hours": sheet(["round", "worker", "duration_h"], ((t, i, f"{x / 3600:.9f}") for t, i, x in JOBS)),
    "a column of units": sheet(
        ["round", "worker", "duration", "unit"], ((t, i, round(1000 * x), "ms") for t, i, x in JOBS)
    ),
    "units in brackets": sheet([f"{name} [ms]" for name in PEOPLE], np.round(1000 * TIMES).astype(int)),
    "SQL": f"{RULE}\n| round | worker | seconds |\n{RULE}\n"
    + "".join(f"| {t:5} | {i:6} | {x:7} |\n" for t, i, x in JOBS)
    + f"{RULE}\n{len(JOBS)} rows in set (0.00 sec)\n",
    "psql": " round | worker | seconds\n-------+--------+--------\n"
    + "".join(f" {t} | {i} | {x} \n" for t, i, x in JOBS)
    + f"({len(JOBS)} rows)\n",
    "Markdown": "| round | worker | seconds |\n|---|---|---|\n" + "".join(f"| {t} | {i} | {x} |\n" for t, i, x in JOBS),
    "three digits behind a German comma": sheet(
        ["Runde", "Knoten", "Sekunden"], ((t, i, f"{x:.3f}".replace(".", ",")) for t, i, x in JOBS), ";"
    ),
    "R's write.table": '"round" "worker" "seconds"\n'
    + "".join(f'"{k + 1}" {t} "w{i}" {x}\n' for k, (t, i, x) in enumerate(JOBS)),
    "R's write.table with commas": '"round","worker","seconds"\n'
    + "".join(f'"{k + 1}",{t},"w{i}",{x}\n' for k, (t, i, x) in enumerate(JOBS)),
    "pandas prints": "    round  worker  seconds\n"
    + "".join(f"{k:<4}{t:7}{i:8}{x:9}\n" for k, (t, i, x) in enumerate(JOBS)),
    "W&B's history": sheet(
        ["_step", "_runtime", "_timestamp", *(f"client_{i}/fit_time" for i in range(WORKERS))],
        ([t, 30.5 * t + 1, 1772366400.25 + 30 * t, *row] for t, row in enumerate(TIMES)),
    ),
    "W&B's chart": sheet(
        ["Step", *(f"run - w{i}{end}" for i in range(WORKERS) for end in ("", "__MIN", "__MAX"))],
        ([t, *np.repeat(row, 3)] for t, row in enumerate(TIMES)),
    ),
    "settings beside names": sheet(
        ["round", *PEOPLE, "lr", "batch_size"], ([t, *row, 0.01, 32] for t, row in enumerate(TIMES))
    ),
    "who is always slowest, and the slowest": sheet(
        [*PEOPLE, "worst"], ([*row, max(row)] for row in TIMES)
    ),
    "a mean that was rounded": sheet([*PEOPLE, "typical"], ([*row, round(float(np.mean(row)), 3)] for row in TIMES)),
    "totals beside parts": sheet(
        ["round", "client", "train_time", "upload_time", "total_time"], ((t, i, x / 2, x / 2, x) for t, i, x in JOBS)
    ),
    "jobs twice": sheet(["round", "worker", "seconds"], (job for job in JOBS for _ in range(2))),
    "training among evaluations": sheet(
        ["round", "client", "method", "seconds"],
        ((t, i, kind, x * by) for t, i, x in JOBS for kind, by in (("fit", 1), ("evaluate", 0.2))),
    ),
    "out of order, with a clock": sheet(
        ["time", "worker", "duration"],
        [(f"2026-03-01 12:{t:02}:00", i, x) for t, i, x in sorted(JOBS, key=lambda job: job[2])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_a_table_says_is_read(name: str, tmp_path: Path) -> None:
    found = times_of(write(tmp_path / "t.csv", RIGHT[name]))
    np.testing.assert_allclose(found, TIMES, rtol=0, atol=1e-5)


GROUPED = [(t, i, round(1000 * x)) for t, i, x in JOBS]
WRONG = {
    "English thousands": (
        sheet(["round", "worker", "duration_ms"], ((t, i, f'"{x:,}"') for t, i, x in GROUPED)),
        f"has '{GROUPED[0][2]:,}' in line 2, column 3, which may be {GROUPED[0][2]} or",
    ),
    "German thousands": (
        sheet(["round", "worker", "duration_ms"], ((t, i, f"{x:,}".replace(",", ".")) for t, i, x in GROUPED), ";"),
        f"in line 2, column 'duration_ms', which may be {GROUPED[0][2]} or",
    ),
    "German milliseconds that may be grouped": (
        sheet(["round", "worker", "duration_ms"], ((t, i, f"{x:,}") for t, i, x in GROUPED), ";"),
        f"in line 2, column 'duration_ms', which may be {GROUPED[0][2]} or",
    ),
    "a million": ('a,b\n"1,234,567",2\n3,4\n', "has '1,234,567' in line 2, column 1: write numbers without thousands"),
    "workers as rows": (
        sheet(["", *(f"round_{t}" for t in range(ROUNDS))], ([NAMES[i], *TIMES[:, i]] for i in range(WORKERS))),
        "has columns 'round_0', 'round_1', 'round_2' and 9 more: swap rows and columns",
    ),
    "workers as rows, rounds without a name": (
        sheet(["", *range(1, ROUNDS + 1)], ([NAMES[i], *TIMES[:, i]] for i in range(WORKERS))),
        "has 'w0' in line 2, column 1: each row is a round with its number",
    ),
    "workers as rows, called so": (
        sheet(["client", *range(1, ROUNDS + 1)], ([i, *TIMES[:, i]] for i in range(WORKERS))),
        "swap rows and columns",
    ),
    "a last row of means": (wide(["round"]) + "Mean,1,1,1,1,1\n", "has 'Mean' in line 14, column 'round'"),
    "a last row of totals": (sheet(["worker", "seconds"], [*((i, x) for _, i, x in JOBS), ("All", 99)]), "has 'All'"),
    "a title": (
        "Times of run 17\n\n" + wide(["round"]),
        "has one cell in its first line, 'Times of run 17', and 6 in line 3",
    ),
    "names in two lines": ("Region A,,,Region B,,\n" + wide(["round"]), "has 'round' in line 2, above numbers"),
    "two runs, one below the other": (2 * wide(["round"]), "has its header again in line 14"),
    "jobs in words of no known language": (sheet(["xx", "yy", "zz"], JOBS), "column 'xx' with the numbers 0 to 11"),
    "jobs without names of columns": (sheet([], ((i, x) for _, i, x in JOBS)), "column 1 with the numbers 0 to 4"),
    "texts for workers": (sheet(["xx", "zz"], ((f"K{i}", x) for _, i, x in JOBS)), "has 'K0' as xx in line 2"),
    "whole numbers": (
        sheet(["round", *PEOPLE, "jobs_queued"], ([t, *row, 3 + t % 4] for t, row in enumerate(TIMES))),
        "has column 'jobs_queued' with whole numbers (3, 4, ...) beside decimals",
    ),
    "a constant": (
        sheet(["round", *PEOPLE, "decay"], ([t, *row, 0.5] for t, row in enumerate(TIMES))),
        "has column 'decay', which is 0.5 in each row",
    ),
    "rates": (sheet([f"{name}_rate" for name in NAMES], 500 / TIMES), "which is named after no time (rate)"),
    "metrics": (
        sheet([*NAMES, "drift", "norm", "angle"], ([*row, *row[:3] / 3] for row in TIMES)),
        "has a column 'drift' beside w0",
    ),
    "a column twice": (sheet([*PEOPLE, "frank"], ([*row, row[0]] for row in TIMES)), "'alice' and column 'frank'"),
    "parts of jobs": (
        sheet([f"{w}_{part}" for part in ("train", "upload") for w in NAMES], ([*row, *row / 9] for row in TIMES)),
        "has columns 'w0_train' and 'w0_upload' of one worker",
    ),
    "units that differ": (
        sheet([f"{w}_{unit}" for unit in ("s", "ms") for w in NAMES], ([*row, *row * 997] for row in TIMES)),
        "which are of different units",
    ),
    "minutes and seconds": (
        sheet(NAMES, ([f"{int(x)}:{int(60 * x) % 60:02}" for x in row] for row in TIMES)),
        "a time must be a number of seconds",
    ),
    "a negative time": ("worker,seconds\n0,-1\n1,2\n", "it must be at least 0, or empty if the job never came back"),
    "start and end": (sheet(["worker", "start", "end"], JOBS), "Give the end less the start as seconds"),
    "training without its transfer": (
        sheet(["round", "client", "fit_time", "upload_time"], ((t, i, x, x / 3) for t, i, x in JOBS)),
        "has column 'fit_time' beside 'upload_time'",
    ),
    "times that add up": (
        sheet(["round", "worker", "seconds"], ((t, i, TIMES[: t + 1, i].sum()) for t, i, _ in JOBS)),
        "which only grows from round to round of each worker",
    ),
    "the round's time": (
        sheet(["round", "worker", "seconds"], ((t, i, TIMES[t].max()) for t, i, _ in JOBS)),
        "which is the same for all workers in each round",
    ),
    "epochs": (
        sheet(["round", "epoch", "worker", "seconds"], ((t, e, i, x + e) for t, i, x in JOBS for e in (0, 1))),
        "has lines 2 and 3 of worker 0 in one round, which differ in column 'epoch'",
    ),
    "parts as rows": (
        sheet(["round", "worker", "phase", "seconds"], ((t, i, p, x) for t, i, x in JOBS for p in ("train", "upload"))),
        "has upload in column 'phase', beside training: add up",
    ),
    "runs of other nodes": (
        sheet(["run", "round", "worker", "seconds"], ((k, t, f"{k}{i}", x) for k in "ab" for t, i, x in JOBS)),
        "has runs 'a' and 'b' in column 'run', and each worker is in one of them only",
    ),
    "names in two ways": (
        sheet(["round", "worker", "seconds"], ((t, f"{'Nn'[t % 2]}ode{i}", x) for t, i, x in JOBS)),
        "has workers 'Node0' and 'node0' in column 'worker'",
    ),
    "numbers in two ways": ("worker,seconds\n01,2\n1,3\n", "has workers '01' and '1'"),
    "ids with decimals": ("worker,seconds\n12297829382473033728.0,1\n5.0,2\n", "has lost digits"),
    "loads in examples": (
        sheet(["round", "worker", "load", "seconds"], ((t, i, 512 * (1 + t % 2), x) for t, i, x in JOBS)),
        "has 512 in line 2, column 'load'; no job of 5 workers has so many shards",
    ),
    "a machine's load": (
        sheet(["round", "worker", "load", "seconds"], ((t, i, 0.3, x) for t, i, x in JOBS)),
        "has 0.3 in line 2, column 'load'; shards are whole numbers",
    ),
    "several units": ("worker,duration,unit\n0,1,s\n1,900,ms\n", "has units ms and s in column 'unit'"),
    "a sheet of Excel": ("PK\x03\x04 and more", "looks like an Excel sheet or a zip file: save the sheet as CSV"),
    "JSON": ('{"worker": 0, "seconds": 1.5}\n', "looks like JSON: write it as CSV"),
    "a web page": ("<html><body>404</body></html>\n", "looks like a web page"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_misleads_is_named(name: str, tmp_path: Path) -> None:
    text, sentence = WRONG[name]
    assert sentence in refusal(write(tmp_path / "t.csv", text))


@pytest.mark.parametrize(
    "table", [np.column_stack([np.arange(ROUNDS), TIMES]), TIMES.cumsum(axis=0), 1.7e9 + 30 * TIMES.cumsum(axis=0)]
)
def test_arrays_that_count_or_add_up_are_refused(table: np.ndarray) -> None:
    with pytest.raises(InvalidSetting, match=r"t\.npz has column 0, which only grows or tells when"):
        measured_rounds("t.npz", table)


def test_failed_jobs_have_no_time(tmp_path: Path) -> None:
    def state(t: int, i: int) -> bool:
        return (t + i) % 5 == 0

    expected = np.array([[np.nan if state(t, i) else TIMES[t, i] for i in range(WORKERS)] for t in range(ROUNDS)])
    for head, good, bad in (
        ("status", "Code.OK", "FAILED"),
        ("success", "True", "false"),
        ("error", "", "no route to it"),
    ):
        rows = ((t, i, 0.05 if state(t, i) else x, bad if state(t, i) else good) for t, i, x in JOBS)
        path = write(tmp_path / f"{head}.csv", sheet(["round", "worker", "seconds", head], rows))
        np.testing.assert_allclose(times_of(path), expected)
        assert f"12 jobs failed by column '{head}', and count as without a time" in read_measured(path).notes


def test_a_limit_of_time_and_a_metric_are_no_failures(tmp_path: Path) -> None:
    rows = ((t, i, x, 60, 0.1) for t, i, x in JOBS)
    path = write(tmp_path / "t.csv", sheet(["round", "worker", "seconds", "timeout", "error"], rows))
    np.testing.assert_allclose(times_of(path), TIMES)


def test_rounds_of_several_runs_follow_one_another(tmp_path: Path) -> None:
    rows = ((k, t, i, x * (1 + k)) for k in (0, 1) for t, i, x in JOBS)
    path = write(tmp_path / "t.csv", sheet(["run", "round", "worker", "seconds"], rows))
    np.testing.assert_allclose(times_of(path), np.concatenate([TIMES, 2 * TIMES]))
    assert "2 runs by column 'run': their rounds follow one another" in read_measured(path).notes


def test_several_jobs_in_a_round_are_said(tmp_path: Path) -> None:
    rows = ((t, i, (i + k) % WORKERS, x * (1 + k)) for t, i, x in JOBS for k in (0, 1))
    path = write(tmp_path / "t.csv", sheet(["round", "worker", "shard", "seconds"], rows))
    notes = read_measured(path).notes
    assert f"{len(JOBS)} times a worker has several jobs in a round, which count with their mean" in notes


def test_loads_in_other_units_are_said(tmp_path: Path) -> None:
    rows = ((t, i, 500 * (1 + t % 2), x) for t, i, x in JOBS)
    path = write(tmp_path / "t.csv", sheet(["round", "worker", "num_examples", "seconds"], rows))
    assert any("'num_examples' differs among the jobs of a worker" in note for note in read_measured(path).notes)


def test_workers_of_any_script_are_in_order(tmp_path: Path) -> None:
    names = [f"Müller, {letter}²" for letter in "ABCDE"]
    path = write(
        tmp_path / "t.csv", sheet(["round", "worker", "seconds"], ((t, f'"{names[i]}"', x) for t, i, x in JOBS))
    )
    assert list(read_measured(path).workers) == names


def test_rounds_are_called_as_the_file_calls_them(tmp_path: Path) -> None:
    found = read_measured(write(tmp_path / "t.csv", wide(["round"])))
    assert np.unique(found.jobs.round).tolist() == [*range(ROUNDS)]


@pytest.mark.parametrize(
    "text",
    [
        sheet([], ([1, 1, 1, 1, 1 if t < 5 else 20] for t in range(20))),
        sheet(NAMES, ([1, 1.01, 1.02, 10, 1.5] for _ in range(20))),
        sheet([f"gpu-{i}" for i in range(WORKERS)], TIMES),
        sheet(["a1", "a2", "b1", "b2", "b3"], TIMES),
        sheet(["pi4", "pi3", "jetson", "laptop", "nuc1"], TIMES),
        sheet(["worker", "seconds", "lr"], ((i, 1.0, 0.1) for _ in range(20) for i in range(WORKERS))),
        sheet(["round", "worker", "shards", "seconds"], ((t, i, 2, x) for t, i, x in JOBS)),
        sheet(["run", "round", "worker", "seconds"], ((f"run-{i}", t, i, x) for t, i, x in JOBS)),
        sheet(NAMES, ([f"{x:.3f}" for x in row] for row in TIMES), ";"),
    ],
)
def test_what_is_plain_is_not_refused(text: str, tmp_path: Path) -> None:
    found = times_of(write(tmp_path / "t.csv", text))
    assert found.shape[1] == WORKERS and found.shape[0] in (ROUNDS, 20) and not np.isnan(found).any()
