"""`fl-gradcode plan`: from a law, a table of times or a ledger to a verdict; bad input gets one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from fl_gradcode import GradientCoding, Shards, VirtualGrid, cyclic_repetition, fractional_repetition
from fl_gradcode.cli.app import app
from fl_gradcode.cli.plan import LAWS
from fl_gradcode.cli.plan_source import read_source
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.latency.populations import POPULATIONS, named
from fl_gradcode.planning.planner import make_plan
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app
from tests.runlog.ledger_rows import CODE, row

QUICK = ("--s", "1", "--s", "2")


def plan(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, result.stderr


def as_json(*arguments: str) -> Any:
    code, out, err = plan(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def jobs(path: Path, table: np.ndarray, *, columns: str = "round,worker,seconds") -> str:
    lines = [f"{t},{i},{seconds}" for t, row in enumerate(table) for i, seconds in enumerate(row)]
    return write(path, "\n".join([columns, *lines]) + "\n")


# What it says


def test_a_light_tail_is_not_coded_and_a_heavy_one_is() -> None:
    code, out, _ = plan("none", "-n", "8", *QUICK)
    assert code == 0 and "Do not code" in out and "plain Flower" in out
    code, out, _ = plan("pareto", "-n", "8", *QUICK)
    assert code == 0 and "Code: partial work" in out and "strategy = GradientCoding(" in out


def test_the_table_fits_eighty_columns_and_cuts_nothing() -> None:
    _, out, _ = plan("phones", "-n", "6", "--model", "20", "--all", *QUICK)
    assert "…" not in out
    assert max(len(line) for line in out.splitlines() if "strategy =" not in line) <= 80
    assert all(word in out for word in ("wait for all", "over-select", "any n - s", "m = 2", "at once", "up"))


def test_it_says_the_same_as_the_function() -> None:
    told = as_json("virtual-machines", "-n", "6", *QUICK)
    made = make_plan(named("virtual-machines"), 6, tolerances=[1, 2])
    assert told["verdict"] == made.verdict
    assert [one["scheme"] for one in told["schemes"]] == [line.scheme.name for line in made.lines]
    assert told["schemes"][0]["seconds-over-a-run"] == pytest.approx(made.lines[0].steady)


def test_the_line_to_paste_makes_the_strategy() -> None:
    names = {
        "GradientCoding": GradientCoding,
        "Shards": Shards,
        "fractional_repetition": fractional_repetition,
        "cyclic_repetition": cyclic_repetition,
        "np": np,
        "strategy": FedAvg(),
    }
    for one in as_json("bimodal", "-n", "9", "--model", "1", *QUICK)["schemes"]:
        if one["exact"] and "GradientCoding" in one["python"]:
            made: dict[str, Any] = {}
            exec(one["python"], dict(names), made)
            assert made["strategy"].code.s == one["s"]


def test_a_figure_is_written(tmp_path: Path) -> None:
    for ending in ("png", "svg"):
        file = tmp_path / f"plan.{ending}"
        assert plan("virtual-machines", "-n", "6", *QUICK, "--figure", str(file))[0] == 0
        assert file.stat().st_size > 5_000
    svg = (tmp_path / "plan.svg").read_text()
    # Matplotlib draws text as shapes, and writes what it says beside them as a comment.
    assert "<!-- mean seconds a round, over a run -->" in svg
    assert "<!-- 6 workers, law virtual-machines -->" in svg and "<!-- recommended: -->" in svg
    assert "<!-- Code: partial work" in svg


def test_the_help_names_the_laws_that_there_are() -> None:
    assert (*POPULATIONS,) == LAWS


def test_the_planner_is_imported_when_it_is_used() -> None:
    program = (
        "import sys; import fl_gradcode.cli.app; "
        "print([name for name in sys.modules if name.startswith('fl_gradcode.planning.') or name == 'scipy.stats'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_a_slow_link_makes_shorter_replies_worth_their_work() -> None:
    fast, slow = (
        as_json("none", "-n", "12", "--model", "50", "--link", link, "--compute-share", "0.05", "--s", "1")
        for link in ("100000", "8")
    )
    halves = [one for one in slow["schemes"] if "m = 2" in one["scheme"]]
    assert not fast["recommended"]["scheme"].endswith("m = 2")
    assert slow["recommended"]["scheme"] == halves[0]["scheme"]
    assert halves[0]["megabytes-up"] == pytest.approx(slow["schemes"][0]["megabytes-up"] / 2)


# Files


def test_a_table_of_rounds_says_how_many_workers_and_which_are_slow(tmp_path: Path) -> None:
    times = np.random.default_rng(0).lognormal(0, 0.2, (40, 9))
    times[:, [4, 7]] *= 8
    np.savetxt(tmp_path / "rounds.csv", times, delimiter=",")
    np.savez(tmp_path / "rounds.npz", other=times[:, :3], train=times * 1000)
    told = as_json(str(tmp_path / "rounds.csv"), *QUICK)
    assert told["workers"] == 9 and set(told["always-slow"]) == {4, 7}
    assert told["recommended"]["exact"] and told["recommended"]["scheme"].startswith("partial work")
    again = as_json(str(tmp_path / "rounds.npz"), "--key", "train", "--unit", "ms", *QUICK)
    assert again["schemes"][0]["seconds-over-a-run"] == pytest.approx(
        told["schemes"][0]["seconds-over-a-run"], rel=1e-6
    )


def test_a_table_of_jobs_is_the_same_as_one_of_rounds(tmp_path: Path) -> None:
    times = np.random.default_rng(1).lognormal(0, 0.4, (30, 6))
    np.savetxt(tmp_path / "rounds.csv", times, delimiter=",")
    rounds = as_json(str(tmp_path / "rounds.csv"), *QUICK, "--compute-share", "0.8")
    table = as_json(jobs(tmp_path / "jobs.csv", times), *QUICK, "--compute-share", "0.8")
    for one, other in zip(rounds["schemes"], table["schemes"], strict=True):
        assert one["seconds-over-a-run"] == pytest.approx(other["seconds-over-a-run"], rel=1e-5)


def test_one_column_is_a_sample_for_all_workers(tmp_path: Path) -> None:
    sample = np.random.default_rng(2).exponential(1.0, 200)
    file = write(tmp_path / "sample.csv", "seconds\n" + "\n".join(map(str, sample)) + "\n")
    told = as_json(file, "-n", "16", "--s", "1")
    assert told["workers"] == 16
    assert told["fits"][0]["law"].startswith(("shifted_exponential", "exponential"))
    plain = told["schemes"][0]
    assert plain["idle-start-is-closed-form"]
    # E[max of 16 draws from the sample] from its distribution function.
    points = np.sort(sample)
    expected = points[0] + np.sum(np.diff(points) * (1 - (np.arange(1, 200) / 200) ** 16))
    assert plain["seconds-idle-start"] == pytest.approx(expected)


def test_the_ledger_of_a_run_predicts_another_scheme(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    latency = Latency(fixed=0.2, compute=0.8, slowdown=scaled(lognormal(1.0, 0.3), {0: 10, 1: 10}))

    def run(send: str, path: Path | None) -> float:
        with InProcessGrid(toy_app(), 9) as inner:
            inner_strategy = FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
            strategy = GradientCoding(inner_strategy, fractional_repetition(9, 2), send=send, ledger=path)  # type: ignore[arg-type]
            grid = VirtualGrid(inner, latency, seed=5)
            strategy.start(grid, initial_arrays(), 40, timeout=1e6)
            return grid.now() / 40

    run("shards", ledger)
    told = as_json(str(ledger), "--s", "2")
    seconds = {one["scheme"]: one["seconds-over-a-run"] for one in told["schemes"]}
    assert told["workers"] == 9 and {0, 1} <= set(told["always-slow"])
    assert seconds["repetition, s = 2"] == pytest.approx(run("coded", None), rel=0.1)


def test_measured_times_contain_the_transfer() -> None:
    without = read_source("none", model_megabytes=10.0)
    assert without.latency.transfer == 0.0
    assert read_source("none", model_megabytes=10.0, link=80.0).latency.transfer == pytest.approx(0.1)


def test_workers_are_renumbered_from_0_and_none_is_invented(tmp_path: Path) -> None:
    times = np.random.default_rng(3).lognormal(0, 0.3, (20, 10))
    lines = [f"{t},{i + 1},{seconds}" for t, row in enumerate(times) for i, seconds in enumerate(row)]
    told = as_json(write(tmp_path / "one.csv", "\n".join(["round,worker,seconds", *lines]) + "\n"), "--s", "1")
    assert told["workers"] == 10 and "1, 2, 3 and 7 more are 0, 1, ... here" in told["source"]


def test_times_that_cannot_contain_the_transfer_are_refused_or_have_it_added(tmp_path: Path) -> None:
    times = np.random.default_rng(4).uniform(0.9, 1.3, (20, 6))
    np.savetxt(tmp_path / "t.csv", times, delimiter=",")
    arguments = (str(tmp_path / "t.csv"), "--model", "45", "--link", "20", "--s", "1")
    code, _, err = plan(*arguments)
    assert code == 2 and "transferring the model takes 36 s at this bandwidth" in err and "--add-transfer" in err
    added = as_json(*arguments, "--add-transfer")["schemes"][0]["seconds-over-a-run"]
    assert added == pytest.approx(np.mean(times.max(axis=1)) * (1 + 36 / np.median(times)), rel=0.05)


# What tables say


def test_all_rounds_count_and_parts_that_differ_are_named(tmp_path: Path) -> None:
    lines = [f"1,1,1,1,1,{1 if t < 1600 else 20}\n" for t in range(10_000)]
    told = as_json(write(tmp_path / "slow.csv", "".join(lines)), "--s", "1")
    assert told["schemes"][0]["seconds-over-a-run"] == pytest.approx(1 + 19 * 0.84, rel=0.03)
    assert told["recommended"]["s"] == 1 and told["evidence"]["rounds"] == 10_000
    assert any('beginning (rounds 1 to 1000) would get "do not code"' in one for one in told["evidence"]["parts"])


def test_time_that_does_not_grow_with_the_load_is_seen(tmp_path: Path) -> None:
    lines = [f"{t},{i},{1 if t < 10 else 4},10.0" for t in range(20) for i in range(6)]
    told = as_json(write(tmp_path / "t.csv", "\n".join(["round,worker,shards,seconds", *lines])), "--s", "1")
    assert (told["compute-share"]["origin"], told["compute-share"]["share"]) == ("fitted", 0.0)
    assert told["schemes"][0]["seconds-over-a-run"] == pytest.approx(10.0)


def test_the_assumed_split_is_said_with_the_range_for_which_the_verdict_holds(tmp_path: Path) -> None:
    times = np.random.default_rng(5).lognormal(0, 0.1, (60, 8))
    times[np.arange(60), np.random.default_rng(6).integers(8, size=60)] *= 8
    np.savetxt(tmp_path / "t.csv", times, delimiter=",")
    told = as_json(str(tmp_path / "t.csv"), *QUICK)
    share = told["compute-share"]
    assert (share["share"], share["origin"]) == (0.8, "assumed") and share["holds-from"] <= 0.8 <= share[
        "holds-to"
    ] == 1.0
    assert share["below"] is None or share["below"].startswith("code: ")
    _, out, _ = plan(str(tmp_path / "t.csv"), *QUICK)
    assert "Share of a job that grows with its shards: 0.80 (assumed, not measured)." in out
    # At an edge of the range, the share itself is planned with: below it, something else is recommended.
    edge = as_json(str(tmp_path / "t.csv"), *QUICK, "--compute-share", str(share["holds-from"]))
    assert edge["recommended"]["seconds-over-a-run"] >= 0.94 * told["recommended"]["seconds-over-a-run"]


def test_missing_jobs_are_said_and_who_stopped_is_named(tmp_path: Path) -> None:
    lines = [f"{t},node-{i},1" for t in range(40) for i in range(8) if i != 7 or t == 0]
    notes = as_json(write(tmp_path / "t.csv", "\n".join(["round,worker,seconds", *lines])), "--s", "1")["notes"]
    assert any(note.startswith("39 of 320 times are missing") for note in notes)
    assert any(note.startswith("worker node-7 stopped answering after round 0") for note in notes)


def test_who_came_late_and_which_jobs_failed_is_said(tmp_path: Path) -> None:
    rows = [(t, i, "ok") for t in range(30) for i in range(6) if i != 4 or t >= 12]
    rows = [(t, i, "failed" if (t, i) in ((3, 1), (20, 2)) else state) for t, i, state in rows]
    text = "".join(f"{t},w{i},{1 + (7 * t + 3 * i) % 11 / 50},{state}\n" for t, i, state in rows)
    notes = as_json(write(tmp_path / "t.csv", "round,worker,seconds,status\n" + text), *QUICK)["notes"]
    assert "2 jobs failed by column 'status', and count as without a time" in notes
    assert "worker w4 answered in round 12 first; before, it is planned with its first time" in notes


def test_few_rounds_cannot_tell_and_many_can(tmp_path: Path) -> None:
    table = np.ones((4, 6))
    table[2, 3] = 9.0
    np.savetxt(tmp_path / "few.csv", table, delimiter=",", fmt="%.2f")
    np.savetxt(tmp_path / "many.csv", np.tile(table, (30, 1)), delimiter=",", fmt="%.2f")
    np.savetxt(tmp_path / "some.csv", np.vstack([table, table[:2]]), delimiter=",", fmt="%.2f")
    few, some, many = (as_json(str(tmp_path / f"{name}.csv"), "--s", "1") for name in ("few", "some", "many"))
    assert not some["evidence"]["sure"] and some["verdict"].startswith("cannot tell: by 6 measured rounds, ")
    assert not few["evidence"]["sure"] and few["verdict"].startswith("cannot tell yet: 4 measured rounds are too few")
    assert many["evidence"]["sure"] and "Over 120 measured rounds, it is between " in many["verdict"]
    low, high = many["evidence"]["times-faster"]
    assert low < many["schemes"][0]["seconds-over-a-run"] / many["recommended"]["seconds-over-a-run"] < high
    assert all(one["interval"][0] <= one["seconds-over-a-run"] <= one["interval"][1] for one in many["schemes"])


def test_the_answer_comes_first_and_six_rows_follow(tmp_path: Path) -> None:
    _, out, _ = plan("virtual-machines", "-n", "9", *QUICK)
    assert out.startswith("Code: ") and "raw data of other" in out.replace("\n", " ")
    assert "from fl_gradcode import GradientCoding, Shards, fractional_repetition" in out
    assert 'fractional_repetition(9, 2), send=Shards(patience="learned"))' in out
    assert sum(line.count(" > ") or line.startswith(" >") for line in out.splitlines()) == 1
    rows = [line for line in out.splitlines() if re.search(r"\d\.\d\dx +[\d.]+\*? ", line)]
    assert 4 <= len(rows) <= 6
    assert len(plan("virtual-machines", "-n", "9", *QUICK, "--all")[1].splitlines()) > len(out.splitlines())


# Bad input


BAD = {
    "empty": ("", "has no rows of times"),
    "only a header": ("worker,seconds\n", "has no rows of times"),
    "missing column": ("worker,speed\n0,1\n", "has columns worker, speed and lacks seconds"),
    "one round": ("round,a,b\n1,2,3\n", "one round does not tell how the next ones go"),
    "negative": ("worker,seconds\n0,1\n1,-2\n", "has seconds -2 in line 3"),
    "nothing but nan": ("worker,seconds\n0,nan\n1,nan\n", "has no job with a time above 0"),
    "text in jobs": ("worker,seconds\n0,fast\n1,2\n", "has 'fast' as seconds in line 2"),
    "short row of jobs": ("worker,seconds\n0\n1,2\n", "has a row of 1 cells in line 2, and the header has 2"),
    "half a worker": ("worker,seconds\n0.5,1\n1,2\n", "has worker 0.5 in line 2"),
    "a silent worker": ("1,nan\n2,nan\n", "has no time above 0 of worker 1: leave the column out"),
    "negative round": ("1,2\n3,-4\n", "has column 2 -4 in line 2; it must be at least 0"),
    "ragged": ("1,2\n3,4,5\n", "has a row of 3 cells in line 2, and line 1 has 2"),
    "text": ("a,b\nc,d\n", "has 'c' as a in line 2; it must be a number"),
    "one column": ("1\n2\n", "say how many, with --workers"),
    "one worker": ("worker,seconds\n0,2\n0,1\n", "planning needs at least 2"),
    "milliseconds": ("900000,800000\n900000,700000\n", "if they are milliseconds"),
    "nothing takes time": ("0,0\n0,0\n", "no job is that short"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_gets_one_sentence(name: str, tmp_path: Path) -> None:
    text, sentence = BAD[name]
    code, out, err = plan(write(tmp_path / "times.csv", text))
    assert code == 2 and not out
    assert sentence in err and err.startswith("fl-gradcode: ") and err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nosuch"], "is neither a law"),
        (["times.xlsx"], "is neither a law"),
        (["nowhere.csv"], "There is no trace file"),
        (["nowhere.jsonl"], "cannot be read"),
        (["none"], "The number of workers is missing"),
        (["none", "-n", "1"], "planning needs at least 2"),
        (["none", "-n", "-4"], "planning needs at least 2"),
        (["none", "-n", "8", "--model", "-3"], "The model size -3.0 MB must be a finite number"),
        (["none", "-n", "8", "--model", "nan"], "The model size nan MB must be a finite number"),
        (["none", "-n", "8", "--link", "0"], "The network bandwidth 0.0 Mbit/s must be a finite number"),
        (["none", "-n", "8", "--compute-share", "80"], "must lie in 0..1"),
        (["none", "-n", "8", "--s", "8"], "a tolerance lies in 1..7"),
        (["none", "-n", "8", "--unit", "h"], "choose one of s, ms, us"),
        (["none", "-n", "8", "--s", "1", "--figure", "/nowhere/at/all.png"], "cannot be written"),
        (["none", "-n", "8", "--s", "1", "--figure", "plan.docx"], "cannot be written"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(arguments: list[str], sentence: str) -> None:
    code, out, err = plan(*arguments)
    assert code == 2 and not out
    assert sentence in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no rounds yet"),
        ("nonsense\n", "is not JSON"),
        ('{"a": 1}\n', "Line 1 of the ledger '{}': This is not a ledger row: it has no field 'schema'."),
        ("[1, 2]\n", "it is [1, 2] and must be an object"),
        (json.dumps(row(1, code={**CODE, "k": 0})), "code has n=6 workers and k=0 shards"),
        (json.dumps(row(1, code={**CODE, "n": "four"})), "code.n is 'four' and must be a whole number"),
        (json.dumps({**row(1), "round": None}), "round is None and must be a whole number"),
        (json.dumps(row(1, seconds=[None] * 6)), "no training times: no reply to a training message has come in yet"),
        (json.dumps(row(1, timings=[{"worker": 0}])), "train.timings[0].kind is missing"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path / "ledger.jsonl", text)
    code, _, err = plan(path)
    assert code == 2 and sentence.replace("{}", path) in err and err.count("\n") == 1


def test_a_file_of_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "times.csv", "1,2\n2,1\n")
    assert "--workers 7, but times.csv: 2 rounds of 2 workers" in plan(file, "-n", "7")[2]
    assert plan(file, "-n", "2", "--s", "1")[0] == 0


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("fl-gradcode")
    done = subprocess.run(
        [str(command), "--help"], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}, timeout=60
    )
    assert done.returncode == 0 and "plan" in done.stdout
