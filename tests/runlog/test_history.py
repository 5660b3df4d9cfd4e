"""History: what the times of a ledger say about other schemes, and about whom they come from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, Shards, VirtualGrid, gradient_coding_mod
from fl_gradcode.codes import cyclic_repetition, fractional_repetition, uncoded
from fl_gradcode.errors import InvalidSetting
from fl_gradcode.latency import Latency, Law, constant, exponential, lognormal, scaled
from fl_gradcode.latency.populations import named
from fl_gradcode.planning.planner import make_plan
from fl_gradcode.planning.schemes import Scheme, any_code, partial_work, repetition, wait_for_all
from fl_gradcode.planning.simulation import steady_rounds
from fl_gradcode.runlog.history import History, Timing
from fl_gradcode.runlog.ledger import Ledger
from fl_gradcode.runlog.rows import JobLine, RoundRow
from fl_gradcode.testing import InProcessGrid
from tests.runlog.ledger_rows import row, typed

N = 12


def app() -> ClientApp:
    clients = ClientApp(mods=[gradient_coding_mod])

    @clients.train()
    def train(message: Message, context: Context) -> Message:
        assert context.node_config["partition-id"] is not None
        content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    @clients.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert context.node_config["partition-id"] is not None
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return clients


def run(
    code: GradientCode, latency: Latency, rounds: int = 60, *, seed: int = 0, evaluate: bool = False, **options: Any
) -> list[RoundRow]:
    """The ledger's rows of a run, as they are read from a file."""
    fedavg = FedAvg() if evaluate else FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
    with InProcessGrid(app(), code.n) as inner:
        strategy = GradientCoding(fedavg, code, verify=0, **options)
        strategy.start(VirtualGrid(inner, latency, seed=seed), ArrayRecord([np.zeros(1, np.float32)]), rounds, 1e9)
    return [RoundRow.from_json(json.loads(json.dumps(row))) for row in strategy.ledger.rows]


def waited(rows: list[RoundRow]) -> float:
    return float(np.mean([phase.seconds.waiting for row in rows for phase in [row.train] if phase is not None]))


def with_timings(row: RoundRow, change: Callable[[JobLine], JobLine]) -> RoundRow:
    """The row with each job of its training changed."""
    assert row.train is not None
    return replace(row, train=replace(row.train, timings=tuple(map(change, row.train.timings))))


def predicted(rows: list[RoundRow], scheme: Scheme) -> float:
    latency = History.of_ledger(rows).latency()
    parts = latency.parts(seed=0, n=scheme.n, rounds=len(rows))
    return float(steady_rounds(scheme, parts).seconds.mean())


CODES: dict[str, tuple[GradientCode, dict[str, Any], Scheme]] = {
    "wait for all": (uncoded(N), {}, wait_for_all(N)),
    "cyclic": (cyclic_repetition(N, 2, rng=np.random.default_rng(0)), {}, any_code(N, 2)),
    "repetition": (fractional_repetition(N, 3), {}, repetition(N, 3)),
    "m = 2": (fractional_repetition(N, 2, m=2), {}, repetition(N, 2, m=2)),
    "partial work": (
        fractional_repetition(N, 3),
        {"send": Shards(patience=0.0)},
        partial_work(N, 3, patience=0.0),
    ),
    "patient": (fractional_repetition(N, 3), {"send": "shards"}, partial_work(N, 3)),
}
MEMORYLESS = ("exponential", "bimodal", "serverless")


@cache
def rows_of(name: str, law: str) -> list[RoundRow]:
    code, options, _ = CODES[name]
    return run(code, named(law), **options)


@pytest.mark.parametrize("law", ["exponential", "pareto", "bimodal", "virtual-machines", "phones"])
@pytest.mark.parametrize("name", list(CODES))
def test_a_ledger_predicts_the_run_that_wrote_it(name: str, law: str) -> None:
    rows, scheme = rows_of(name, law), CODES[name][2]
    assert predicted(rows, scheme) == pytest.approx(waited(rows), rel=0.01)


@pytest.mark.parametrize("law", [*MEMORYLESS, "pareto", "virtual-machines", "phones"])
def test_a_ledger_of_partial_work_predicts_repetition(law: str) -> None:
    really = waited(rows_of("repetition", law))
    assert predicted(rows_of("patient", law), repetition(N, 3)) == pytest.approx(really, rel=0.1)


@pytest.mark.parametrize("law", MEMORYLESS)
@pytest.mark.parametrize("name", ["repetition", "patient"])
def test_a_slow_moment_counts_once_however_many_rounds_it_kept_a_worker(name: str, law: str) -> None:
    """Else waiting for all would look up to three times as slow as it is, and a code would be recommended for it."""
    really = predicts = 0.0
    code, options, _ = CODES[name]
    for seed in range(2):
        rows = run(code, named(law), seed=seed, **options) if seed else rows_of(name, law)
        predicts += predicted(rows, wait_for_all(N))
        really += steady_rounds(wait_for_all(N), named(law).parts(seed=seed, n=N, rounds=60)).seconds.mean()
    assert predicts == pytest.approx(really, rel=0.3 if law == "serverless" else 0.15)


def test_a_ledger_says_who_is_slow() -> None:
    latency = Latency(0.2, scaled(lognormal(0.8, 0.1), {1: 10.0, 5: 6.0}))
    for name in ("repetition", "patient"):
        code, options, _ = CODES[name]
        history = History.of_ledger(run(code, latency, 40, **options))
        assert make_plan(history.latency(), N, tolerances=(2,)).slow == (1, 5)


def test_late_replies_that_come_in_while_evaluating_are_learnt_from() -> None:
    latency = Latency(compute=scaled(constant(1.0), {0: 1.2}), evaluation=5.0)
    rows = run(fractional_repetition(N, 3), latency, 6, evaluate=True)
    assert any(job.kind == "train" for row in rows if row.evaluate is not None for job in row.evaluate.timings)
    _, compute = History.of_ledger(rows).tables()
    assert compute[:, 0] == pytest.approx(1.2) and compute[:, 1:] == pytest.approx(1.0)


def test_the_split_is_what_clients_say() -> None:
    assert History.of_ledger(rows_of("repetition", "exponential")).split() == pytest.approx(0.8)
    assert History.of_ledger(rows_of("patient", "phones")).split() > 0.5
    fixed = History.of_ledger(run(fractional_repetition(N, 3), Latency(fixed=exponential()), 20))
    assert fixed.split() == 0.0  # a client that computes for no time says so
    assert fixed.tables()[1].max() == 0.0


def test_without_a_word_of_the_clients_all_is_compute() -> None:
    told = rows_of("repetition", "bimodal")
    rows = [with_timings(row, lambda job: replace(job, computing=None)) for row in told]
    history = History.of_ledger(rows)
    assert history.split() == 1.0
    fixed, compute = history.tables()
    assert not fixed.any() and compute.min() > 0
    # Some say so: the others are split alike.
    half = with_timings(told[0], lambda job: replace(job, computing=0.5 * (job.seconds or 0.0)))
    assert History.of_ledger([half, *rows[1:]]).split() == pytest.approx(
        0.5 / 4 / (0.5 + 0.5 / 4)
    )  # of four shards, for one


def test_workers_that_owe_a_reply_count_as_slow() -> None:
    latency = Latency(compute=scaled(constant(1.0), {2: math.inf}))
    for name in ("repetition", "patient", "cyclic"):
        code, options, _ = CODES[name]
        _, compute = History.of_ledger(run(code, latency, 10, **options)).tables()
        assert compute[:, 2].min() > 5.0
        assert np.delete(compute, 2, axis=1) == pytest.approx(1.0)


def test_a_worker_that_falls_silent_is_no_longer_as_fast_as_it_was() -> None:
    dies = Law("dies", lambda seed, worker, tick: math.inf if worker == 2 and tick >= 10 else 1.0)
    for name in ("repetition", "patient"):
        code, options, _ = CODES[name]
        _, compute = History.of_ledger(run(code, Latency(compute=dies), 25, **options)).tables()
        assert compute[:3, 2] == pytest.approx(1.0) and compute[8:, 2].min() > 4.0


def test_who_owes_a_second_shard_is_slow_although_the_first_came() -> None:
    history = History(2)
    history.add([Timing(1, 0, 1, 2.0), Timing(1, 1, 1, 2.0), Timing(1, 0, 1, 300.0, owing=True)])
    history.add([Timing(2, 1, 1, 2.0)])
    _, compute = history.tables()
    assert compute[:, 0].min() > 100 and compute[:, 1].tolist() == [2.0, 2.0]


def test_what_was_owed_and_has_come_counts_once() -> None:
    history = History(2)
    history.add([Timing(1, 1, 1, 1.0), Timing(1, 0, 1, 1.0, owing=True)])
    history.add([Timing(2, 1, 1, 1.0), Timing(1, 0, 1, 2.0, owing=True)])
    assert history.tables()[1].tolist() == [[2.0, 1.0], [2.0, 1.0]]  # so far: the last word
    history.add([Timing(3, 1, 1, 1.0), Timing(1, 0, 1, 2.5), Timing(3, 0, 1, 0.7)])
    assert history.tables()[1].tolist() == [[2.5, 1.0], [0.7, 1.0], [0.7, 1.0]]


def test_who_has_been_silent_for_longer_than_the_window_is_not_forgotten() -> None:
    history = History(2, window=4)
    for number in range(1, 20):
        history.add([Timing(number, 1, 1, 1.0)])
        history.add([Timing(1, 0, 1, float(number), owing=True)])
        assert history.rounds <= 4
        assert history.tables()[1][:, 0].max() == number
    assert len(history._timings) <= 4 + 5  # nothing piles up
    history.add([Timing(20, 0, 1, 1.0), Timing(20, 1, 1, 1.0)])
    for number in range(21, 25):
        history.add([Timing(number, worker, 1, 1.0) for worker in (0, 1)])
    assert history.tables()[1].tolist() == [[1.0, 1.0]] * 4


def test_gaps_take_the_next_time_and_after_the_last_one_that() -> None:
    history = History(3)
    history.add([Timing(1, 0, 1, 1.0), Timing(2, 1, 1, 2.0), Timing(5, 0, 2, 8.0), Timing(7, 1, 1, 3.0)])
    _, compute = history.tables()  # rounds 1, 2, 5 and 7
    assert compute[:, 0].tolist() == [1.0, 4.0, 4.0, 4.0]
    assert compute[:, 1].tolist() == [2.0, 2.0, 3.0, 3.0]
    assert compute[:, 2].tolist() == [2.5] * 4  # the median of what is known


def test_a_job_that_has_just_begun_says_nothing_of_how_long_its_worker_takes() -> None:
    history = History(2)
    history.add(
        [Timing(number, 0, 1, 5.0) for number in (1, 4)] + [Timing(number, 1, 1, 1.0) for number in range(1, 7)]
    )
    history.add([Timing(6, 0, 1, 0.5, owing=True)])
    assert history.tables()[1][:, 0].tolist() == [5.0] * 6
    history.add([Timing(6, 0, 1, 9.0, owing=True)])  # longer than usual: that is known already
    assert history.tables()[1][:, 0].tolist() == [5.0, 5.0, 5.0, 5.0, 9.0, 9.0]
    history.add([Timing(6, 1, 2, 1.5, owing=True)])  # of other loads it says what it says
    assert history.jobs().seconds.tolist().count(1.5) == 1


def test_a_window_forgets_and_nonsense_is_not_learnt() -> None:
    history = History(2, window=2)
    history.add([Timing(number, 0, 1, float(number)) for number in range(1, 6)])
    assert history.rounds == 2 and history.tables()[1][:, 0].tolist() == [4.0, 5.0]
    history.add([Timing(9, 0, 0, 1.0), Timing(9, 2, 1, 1.0), Timing(9, -1, 1, 1.0), Timing(2, 1, 1, 7.0)])
    assert history.rounds == 2 and history.tables()[1][:, 0].tolist() == [4.0, 5.0]
    with pytest.raises(InvalidSetting, match=r"^There are no times to plan with\.$"):
        History(2).tables()


def test_a_shard_of_the_ledger_counts_as_what_it_is_of_a_workers_own() -> None:
    latency = Latency(0.5, 1.0)
    halves = fractional_repetition(N, 3, k=2 * N)  # a worker's own are two shards, of which each takes a second
    fixed, compute = History.of_ledger(run(halves, latency, 3)).tables()
    assert fixed == pytest.approx(0.5) and compute == pytest.approx(2.0)


def test_runs_that_were_appended_to_one_file_follow_each_other() -> None:
    one, other = (run(fractional_repetition(N, 3), named("bimodal"), 30, seed=seed) for seed in (0, 1))
    both = History.of_ledger([*one, *other])
    assert both.rounds == 60
    alone = [History.of_ledger(rows).tables()[1] for rows in (one, other)]
    known = both.tables()[1]
    np.testing.assert_allclose(known[30:], alone[1])
    assert (known[:30] == alone[0]).mean() > 0.9  # but for gaps at the end, which now are followed by something
    again = [*one, *one]  # the same strategy, started twice
    assert History.of_ledger(again).rounds == 60


def test_a_ledger_that_was_written_to_a_file_is_read_back(tmp_path: Any) -> None:
    path = tmp_path / "ledger.jsonl"
    with InProcessGrid(app(), 6) as inner:
        strategy = GradientCoding(FedAvg(), fractional_repetition(6, 1), ledger=Ledger(path))
        strategy.start(VirtualGrid(inner, named("pareto")), ArrayRecord([np.zeros(1, np.float32)]), 5)
    history = History.of_ledger(Ledger.read_rounds(path))
    assert history.n == 6 and history.rounds == 5
    assert np.array_equal(history.tables(), History.of_ledger(strategy.ledger.rounds).tables())


def strip(rows: list[RoundRow]) -> list[RoundRow]:
    return [replace(row, train=replace(row.train, timings=(), owing=())) for row in rows if row.train is not None]


NO_TIMES = "The ledger has no training times: no reply to a training message has come in yet."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: [], "The ledger has no rounds yet; let the run finish at least one."),
        (strip, NO_TIMES),
        (lambda rows: [replace(row, train=None) for row in rows], NO_TIMES),
        (
            lambda rows: [*rows, replace(rows[0], code=replace(rows[0].code, n=5))],
            "The ledger has codes for 5 and 12 workers; give the ledger of one run.",
        ),
    ],
    ids=["no rows", "no times", "no training", "two codes"],
)
def test_a_ledger_without_times_is_refused_in_one_sentence(change: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{re.escape(sentence)}$"):
        History.of_ledger(change(rows_of("repetition", "bimodal")))


def test_a_replay_is_the_rounds_as_they_were() -> None:
    history = History.of_ledger(rows_of("repetition", "bimodal"))
    parts, fixed = history.replay(100), history.tables()[0]
    np.testing.assert_array_equal(parts.fixed, np.concatenate([fixed, fixed])[:100])
    assert not parts.transfer.any()
    drawn = history.latency().parts(seed=5, n=N, rounds=100)
    np.testing.assert_array_equal(drawn.fixed, parts.fixed)
    np.testing.assert_array_equal(drawn.compute, parts.compute)


def test_a_plan_from_a_ledger_finds_what_the_law_would_have_said() -> None:
    for law, pays in (("none", False), ("virtual-machines", True), ("phones", True)):
        rows = rows_of("patient", law)
        found = make_plan(History.of_ledger(rows).latency(), N, tolerances=(3,), populations=5)
        assert found.codes == pays


def test_a_first_round_in_which_processes_start_is_left_out_and_told() -> None:
    usual = [typed([row(t, seconds=(1.0, 1.2, 0.8, 1.0, 1.0, 9.0))])[0] for t in range(1, 8)]
    slow = typed([row(1, seconds=(9.0, 8.0, 9.0, 4.0, 1.0, 9.0))])
    history = History.of_ledger([*slow, *usual[1:]])
    assert history.rounds == 6 and float(history.jobs().seconds.max()) == 9.0
    assert history.notes[0].startswith("round 1 left out: ")
    told = History.of_ledger(usual).notes
    assert not any("left out" in note for note in told)


@pytest.mark.parametrize(
    "first",
    [
        (9.0, 8.0, 1.0, 1.0, 1.0, 9.0),  # two of six workers: they may be slow now and then
        (2.9, 2.9, 2.9, 2.9, 2.9, 20.0),  # less than three times as long
    ],
)
def test_a_first_round_with_some_slow_workers_counts(first: tuple[float, ...]) -> None:
    usual = typed([row(t, seconds=(1.0, 1.0, 1.0, 1.0, 1.0, 9.0)) for t in range(2, 8)])
    assert History.of_ledger([*typed([row(1, seconds=first)]), *usual]).rounds == 7


def test_a_start_needs_later_rounds_and_is_found_in_each_run_of_a_file() -> None:
    slow, usual = (9.0,) * 6, (1.0,) * 6
    few = typed([row(1, seconds=slow), *(row(t, seconds=usual) for t in (2, 3))])
    assert History.of_ledger(few).rounds == 3
    runs = [row(t, run=run, seconds=slow if t == 1 else usual) for run in ("one", "two") for t in range(1, 6)]
    history = History.of_ledger(typed(runs))
    assert history.rounds == 8 and history.notes[0].startswith("rounds 1 and 6 left out: ")


def test_a_slow_round_in_the_middle_of_a_run_is_no_start_unless_it_is_the_first_after_a_resume() -> None:
    later = [row(t, seconds=(1.0,) * 6) for t in range(8, 13)]
    assert (
        History.of_ledger(typed([row(7, seconds=(9.0,) * 6), *later])).rounds == 6
    )  # status reads the last rows alone
    resumed = History.of_ledger(typed([row(7, seconds=(9.0,) * 6, resumed=True), *later]))
    assert resumed.rounds == 5 and resumed.notes[0].startswith("round 7 left out: ")
