"""Bounded staleness: rounds that end with last updates, each with its full weight, and none too old."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedYogi
from numpy.typing import NDArray

from fl_gradcode import (
    Discovered,
    EarlyStopGrid,
    GradientCode,
    GradientCoding,
    Shards,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    uncoded,
)
from fl_gradcode.errors import IncompatibleStrategy, InvalidSetting, RoundFailed
from fl_gradcode.latency import Latency, Law, lognormal, pareto, scaled, shifted_exponential
from fl_gradcode.privacy import CentralNoise
from fl_gradcode.runlog import RoundRow
from fl_gradcode.staleness import UpdateMemory
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app, update_of
from tests.strategy.test_bad_replies import with_update
from tests.strategy.test_shardwise import Watched, table

STALE = Shards(staleness=3)
SOON = Shards(staleness=3, fresh=0.5)
WEIGHTS = np.arange(1, 13)  # of the toy app's shards
LAWS = {
    "exponential": Latency(compute=shifted_exponential(0.2, 1.0)),
    "shifted": Latency(compute=shifted_exponential(1.0, 1.5)),
    "phones": Latency(compute=pareto(1.5)),
    "one slow": table({1: 40.0}),
    "one dead": table({2: float("inf")}),
    "log-normal": Latency(compute=lognormal(2.0)),
}

CODES = [fractional_repetition(6, 2, k=8), cyclic_repetition(6, 2, rng=np.random.default_rng(1)), uncoded(5)]


def run(
    code: GradientCode, latency: Latency, send: Shards = STALE, *, rounds: int = 12, **kwargs: Any
) -> tuple[Any, list[dict[str, Any]], Watched]:
    seed, tamper = kwargs.pop("seed", 0), kwargs.pop("tamper", None)
    inner, deployed = kwargs.pop("inner", FedAvg(fraction_evaluate=0.0)), kwargs.pop("deployed", False)
    strategy = GradientCoding(inner, code, send=send, **{"verify": 0, **kwargs})
    with InProcessGrid(toy_app(), code.n, tamper=tamper) as clients:
        grid = Watched(VirtualGrid(clients, latency, seed=seed), deployed)
        result = strategy.start(grid, initial_arrays(), num_rounds=rounds)
        grid.computed = sum(clients.calls)
    return result, strategy.ledger.rows, grid


def versions(rows: list[dict[str, Any]], k: int) -> list[NDArray[np.int_]]:
    """The round of each shard's update that entered each round's model, by the ledger alone."""
    used = []
    for row in rows:
        version = np.full(k, row["round"])
        for one in row["train"]["filled-in"]:
            version[one["shards"]] = one["round"]
        used.append(version)
    return used


def expected(rows: list[dict[str, Any]], k: int) -> NDArray[np.float64]:
    """The model by hand: in each round the weighted mean of all shards' updates, of the rounds that the ledger says."""
    model = flat(initial_arrays())
    for used in versions(rows, k):
        model = model + sum((j + 1) * update_of(int(t), j, 11) for j, t in enumerate(used)) / sum(range(1, k + 1))
    return model


@pytest.mark.parametrize("deployed", [False, True], ids=["virtual", "deployed"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    "code",
    [fractional_repetition(6, 2, k=8), cyclic_repetition(6, 2, rng=np.random.default_rng(1)), uncoded(5)],
    ids=str,
)
def test_the_model_has_all_shards_at_full_weight_and_none_too_old(code: GradientCode, law: str, deployed: bool) -> None:
    if law == "one dead" and code.s == 0:
        return
    result, rows, grid = run(code, LAWS[law], deployed=deployed)
    assert np.allclose(flat(result.arrays), expected(rows, code.k), rtol=0, atol=2e-5)
    assert rows[0]["train"]["outcome"] == "exact" and rows[0]["train"]["ages"] == [code.k]
    assert grid.most == 1
    for row, used in zip(rows, versions(rows, code.k), strict=True):
        train, ages = row["train"], row["round"] - used
        assert ages.min() == 0 and ages.max() <= 3
        assert (ages == 0).sum() >= np.ceil(0.6 * code.k)
        assert WEIGHTS[: code.k][ages == 0].sum() >= WEIGHTS[: code.k].sum() / 2
        assert train["ages"] == np.bincount(ages).tolist()
        assert train["outcome"] == ("stale" if ages.any() else "exact")
        assert RoundRow.from_json(row).to_json() == row
    for before, after in zip(versions(rows, code.k), versions(rows, code.k)[1:], strict=False):
        assert (after >= before).all()  # nothing is forgotten


def test_it_is_sooner_than_exact_rounds_and_no_later_where_all_are_alike() -> None:
    code, rounds = fractional_repetition(12, 2), 20
    for law in ("exponential", "phones"):
        exact, stale = (
            sum(row["train"]["seconds"]["waiting"] for row in run(code, LAWS[law], send, rounds=rounds, seed=3)[1])
            for send in (Shards(), STALE)
        )
        assert stale < 0.8 * exact
    alike = Latency(compute=Law("alike", lambda seed, worker, tick: 1.0 + 0.01 * ((7 * worker + 3 * tick) % 4) / 4))
    _, rows, _ = run(code, alike, rounds=rounds)
    assert all(row["train"]["outcome"] == "exact" for row in rows)  # the grace waits for those that are nearly there


@pytest.mark.parametrize("law", LAWS)
def test_without_staleness_nothing_changes_by_a_bit(law: str) -> None:
    code = fractional_repetition(6, 2)
    # sees="mean", since Flower draws the order in which it adds up several replies.
    one, rows, _ = run(code, LAWS[law], Shards(), sees="mean")
    other, others, _ = run(code, LAWS[law], Shards(staleness=0, fresh=0.1, grace=0.5), sees="mean")
    assert (flat(one.arrays) == flat(other.arrays)).all()
    assert [row["train"]["seconds"]["waiting"] for row in rows] == [
        row["train"]["seconds"]["waiting"] for row in others
    ]
    assert all(row["train"]["outcome"] == "exact" and "ages" not in row["train"] for row in rows)


def test_a_shard_at_the_bound_is_waited_for() -> None:
    # Without redundancy, only node 4 has shard 4, and takes ten rounds of the others for it.
    _, rows, _ = run(uncoded(5), table({4: 10.0}), Shards(staleness=2), rounds=8)
    used = np.array(versions(rows, 5))
    assert (used[:, :4] == np.arange(1, 9)[:, None]).all()
    assert (np.arange(1, 9) - used[:, 4]).max() == 2
    waits = [row["train"]["seconds"]["waiting"] for row in rows]
    assert max(waits[1:]) > 5 and min(waits) < 1.5


@pytest.mark.parametrize("deployed", [False, True], ids=["virtual", "deployed"])
def test_a_model_never_repeats_more_than_half_of_the_weight(deployed: bool) -> None:
    # Of two shards, one has two thirds of the weight. One update of two would be enough, but its node is waited for.
    light_is_late, heavy_is_late = (
        [row["train"] for row in run(uncoded(2), table({late: 2.5}), SOON, rounds=8, deployed=deployed)[1]]
        for late in (0, 1)
    )
    assert [row["outcome"] for row in light_is_late].count("stale") > 3
    assert {row["outcome"] for row in heavy_is_late} == {"exact"}
    assert all(row["seconds"]["waiting"] == 2.5 for row in heavy_is_late)
    lower = Shards(staleness=3, fresh=0.3)  # who asks for less than half gets less
    _, rows, _ = run(uncoded(2), table({1: 2.5}), lower, rounds=8, deployed=deployed)
    assert [row["train"]["outcome"] for row in rows].count("stale") > 3


def test_a_round_ends_where_too_much_weight_is_out_of_reach() -> None:
    def without(gone: int) -> list[str]:
        def breaks(worker: int, message: Message, reply: Message) -> Message:
            late = int(cast("Any", message.content)["config"]["server-round"]) > 2
            return Message(Error(2, "broken"), reply_to=message) if worker == gone and late else reply

        _, rows, _ = run(uncoded(2), Latency(compute=1.0), SOON, rounds=5, tamper=breaks, give_up_rounds=None)
        assert all(row["train"]["seconds"]["waiting"] == 1 for row in rows)
        return [row["train"]["outcome"] for row in rows]

    assert without(0) == ["exact"] * 2 + ["stale"] * 3
    assert without(1) == ["exact"] * 2 + ["skipped"] * 3


def test_late_updates_count_and_those_that_are_superseded_are_not_computed() -> None:
    code = fractional_repetition(6, 2)
    _, rows, grid = run(code, LAWS["exponential"], rounds=30, seed=5)
    used = np.array(versions(rows, code.k))
    own = np.arange(1, len(rows) + 1)[:, None]
    late = [(j, t) for t in range(1, len(rows)) for j in range(code.k) if used[t - 1, j] < used[t, j] < own[t]]
    assert late  # an update that came after its round entered a later one
    assert grid.computed < len(grid.asked)


@pytest.mark.parametrize("store", ["float16", "file"])
def test_updates_may_be_kept_in_half_the_memory_or_in_a_file(store: str, tmp_path: Path) -> None:
    where = str(tmp_path / "last.npy") if store == "file" else store
    code = fractional_repetition(6, 2, k=8)
    result, rows, _ = run(code, LAWS["exponential"], Shards(staleness=3, store=where))
    assert any(row["train"]["outcome"] == "stale" for row in rows)
    atol = 2e-5 if store == "file" else 12 * 8 * 2.0**-11 * 4
    assert np.allclose(flat(result.arrays), expected(rows, code.k), rtol=0, atol=atol)
    assert [*tmp_path.iterdir()] == []  # nothing is left of the file, and nobody else can open it


@pytest.mark.parametrize("size", [1e-60, 1e50])
@pytest.mark.parametrize("kept", ["float16", ""])
def test_half_the_memory_holds_updates_of_any_size(size: float, kept: str) -> None:
    """Updates of a float64 model may be too small or too large for a float32 scale."""
    memory = UpdateMemory(2, "float16")
    update = size * np.random.default_rng(0).standard_normal(1500)
    memory.keep(1, 3, update, np.ones(1), ("layout",), sender=0)
    other = UpdateMemory(2, kept)
    other.restore(memory.state())
    for one in (memory, other):
        (last,) = one.of([1])
        assert np.abs(last.update - update).max() < 2.0**-11 * np.abs(update).max()


def test_a_file_that_cannot_be_written_is_refused_before_the_first_round(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("a file of somebody's")
    for name, why in (("no/file", "No such file"), ("there", "File exists"), ("", "File exists")):
        with pytest.raises(InvalidSetting, match=f"cannot be made: {why}"):
            run(fractional_repetition(6, 2), LAWS["exponential"], Shards(staleness=1, store=str(tmp_path / name)))
    assert (tmp_path / "there").read_text() == "a file of somebody's"


def test_how_much_is_kept_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fl_gradcode")
    run(fractional_repetition(6, 2), LAWS["exponential"], rounds=2)
    assert [one for one in caplog.messages if "last updates" in one] == [
        "The last updates of 6 shards take up to 0.0 MB, in memory."
    ]


@pytest.mark.parametrize("store", ["", "float16"])
def test_a_killed_run_goes_on_with_the_same_memory(store: str, tmp_path: Path) -> None:
    code, send = fractional_repetition(6, 2, k=8), Shards(staleness=3, store=store)

    class Killed(Exception):
        pass

    def die(number: int, arrays: Any, row: Any) -> None:
        if number == 5:
            raise Killed

    path, ledger = str(tmp_path / "run"), str(tmp_path / "ledger.jsonl")
    with pytest.raises(Killed):
        run(code, LAWS["exponential"], send, rounds=8, checkpoint=path, ledger=ledger, on_round_end=die, run="r")
    first = [json.loads(line) for line in Path(ledger).read_text().splitlines()]
    resumed, _, _ = run(code, LAWS["exponential"], send, rounds=8, checkpoint=path, ledger=ledger, run="r")
    rows = [json.loads(line) for line in Path(ledger).read_text().splitlines()]
    rows = [*{row["round"]: row for row in rows}.values()]
    assert [row["round"] for row in rows] == [*range(1, 9)] and len(first) == 5
    assert rows[4]["train"]["outcome"] == "stale"  # round 5 is repeated with what was known after round 4
    atol = 8 * 8 * 2.0**-11 * 4 if store else 2e-5
    assert np.allclose(flat(resumed.arrays), expected(rows, code.k), rtol=0, atol=atol)


@pytest.mark.parametrize("stores", [("float16", ""), ("", "float16"), ("float16", "file"), ("file", "float16")])
def test_a_run_may_go_on_with_another_store(stores: tuple[str, str], tmp_path: Path) -> None:
    code, options = fractional_repetition(6, 2, k=8), {"checkpoint": str(tmp_path / "run"), "run": "r"}
    ledger = str(tmp_path / "ledger.jsonl")
    for store, rounds in zip(stores, (5, 10), strict=True):
        where = str(tmp_path / "last") if store == "file" else store
        send = Shards(staleness=3, store=where)
        result, _, _ = run(code, LAWS["exponential"], send, rounds=rounds, ledger=ledger, **options)
    rows = [json.loads(line) for line in Path(ledger).read_text().splitlines()]
    assert np.allclose(flat(result.arrays), expected(rows, code.k), rtol=0, atol=10 * 8 * 2.0**-11 * 4)


def test_last_updates_of_a_worker_that_is_left_out_count_no_more() -> None:
    def wrong(worker: int, message: Message, reply: Message) -> Message:
        return with_update(lambda update: -50 * update)(reply) if worker == 1 else reply

    code, looked_at = fractional_repetition(6, 2), 0
    for seed in range(8):
        models = [flat(initial_arrays())]
        options: dict[str, Any] = {"verify": 3, "seed": seed, "rounds": 8, "give_up_rounds": None, "tamper": wrong}
        options["on_round_end"] = lambda number, arrays, row, models=models: models.append(flat(arrays))
        _, rows, _ = run(code, LAWS["exponential"], deployed=True, **options)
        blamed = [row["round"] for row in rows for one in row["train"]["rejected"] if one["kind"] == "wrong-value"]
        for row, used in zip(rows, versions(rows, code.k), strict=True):
            if blamed and row["round"] >= blamed[0] and row["train"]["outcome"] != "skipped":
                honest = sum((j + 1) * update_of(int(t), j, 11) for j, t in enumerate(used)) / 21
                moved = models[row["round"]] - models[row["round"] - 1]
                assert np.allclose(moved, honest, rtol=0, atol=1e-4), row["round"]
                looked_at += 1
    assert looked_at > 10


def test_late_replies_of_an_earlier_run_of_the_same_name_are_not_taken() -> None:
    code = fractional_repetition(6, 2)
    with InProcessGrid(toy_app(), code.n) as clients:
        grid = EarlyStopGrid(VirtualGrid(clients, LAWS["phones"], seed=3))
        for _ in range(2):
            strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send=STALE, run="r", verify=0)
            result = strategy.start(grid, initial_arrays(), num_rounds=8)
    assert np.allclose(flat(result.arrays), expected(strategy.ledger.rows, code.k), rtol=0, atol=2e-5)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


@pytest.mark.parametrize("deployed", [False, True], ids=["virtual", "deployed"])
def test_late_replies_are_checked_as_those_in_time_are(deployed: bool) -> None:
    def spoil(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1 and "fl-gradcode.update" in reply.content:
            arrays: Any = reply.content["fl-gradcode.update"]
            for name in arrays:
                arrays[name] = type(arrays[name])(np.full_like(arrays[name].numpy(), np.nan))
        return reply

    code = fractional_repetition(6, 2)
    result, rows, _ = run(code, table({1: 2.5}), tamper=spoil, deployed=deployed)
    assert np.allclose(flat(result.arrays), expected(rows, code.k), rtol=0, atol=2e-5)
    told = [one["reason"] for row in rows for one in row["train"]["rejected"] if one["worker"] == 1]
    assert any(text.startswith("late: ") and "not finite" in text for text in told)


def test_failing_nodes_leave_their_shards_to_others_or_to_the_policy() -> None:
    def broken(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "broken"), reply_to=message) if worker in gone else reply

    code = fractional_repetition(6, 2)
    gone = {0, 1}
    result, rows, _ = run(code, LAWS["exponential"], tamper=broken)
    assert np.allclose(flat(result.arrays), expected(rows, code.k), rtol=0, atol=2e-5)
    gone = {0, 2, 4}  # a whole group: nothing is known of its shards
    with pytest.raises(RoundFailed):
        run(code, LAWS["exponential"], tamper=broken, on_undecodable="raise")


def test_shards_without_holders_are_used_until_they_are_too_old() -> None:
    def breaks(worker: int, message: Message, reply: Message) -> Message:
        late = int(cast("Any", message.content)["config"]["server-round"]) > 2
        return Message(Error(2, "broken"), reply_to=message) if worker in (0, 2, 4) and late else reply

    code = fractional_repetition(6, 2)
    _, rows, _ = run(
        code, Latency(compute=1.0), Shards(staleness=2, fresh=0.5), rounds=7, tamper=breaks, give_up_rounds=None
    )
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 2 + ["stale"] * 2 + ["skipped"] * 3
    assert rows[3]["train"]["ages"] == [3, 0, 3]
    assert all(row["train"]["ended"] == "hopeless" for row in rows[4:])


def test_updates_of_a_round_without_a_model_are_remembered() -> None:
    """Worker group {0, 2, 4} fails from round 2 to 4, and when it is back, the other group does."""

    def breaks(worker: int, message: Message, reply: Message) -> Message:
        now = int(cast("Any", message.content)["config"]["server-round"])
        broken = (0, 2, 4) if 2 <= now <= 4 else (1, 3, 5) if now > 4 else ()
        return Message(Error(2, "broken"), reply_to=message) if worker in broken else reply

    code = fractional_repetition(6, 2)
    send = Shards(staleness=2, fresh=0.4)
    result, rows, _ = run(code, Latency(compute=1.0), send, rounds=7, tamper=breaks, give_up_rounds=None)
    outcomes = [row["train"]["outcome"] for row in rows]
    assert outcomes == ["exact", "stale", "stale", "skipped", "stale", "stale", "skipped"]
    assert [(one["shards"], one["round"]) for one in rows[4]["train"]["filled-in"]] == [([j], 4) for j in (1, 3, 5)]
    with_models = [row for row, outcome in zip(rows, outcomes, strict=True) if outcome != "skipped"]
    assert np.allclose(flat(result.arrays), expected(with_models, code.k), rtol=0, atol=2e-5)


def test_evaluation_is_of_all_shards_and_renews_updates_too() -> None:
    code = fractional_repetition(6, 2)
    result, rows, _ = run(code, LAWS["exponential"], inner=FedAvg(), rounds=10)
    assert all(row["evaluate"]["outcome"] == "exact" for row in rows)
    assert np.allclose(flat(result.arrays), expected(rows, code.k), rtol=0, atol=2e-5)
    weights = np.arange(1, 7)
    assert result.evaluate_metrics_clientapp[10]["accuracy"] == pytest.approx(weights @ (np.arange(6) / 10) / 21)


@pytest.mark.parametrize(
    ("inner", "what"),
    [
        (FedAdam(), "FedAdam adapts its rates"),
        (FedYogi(), "FedYogi adapts its rates"),
        (FedAdagrad(), "FedAdagrad adapts its rates"),
        (FedAvgM(server_momentum=0.9), "FedAvgM has momentum 0.9"),
        (FedAvgM(server_learning_rate=0.5), "FedAvgM has a server learning rate of 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_optimisers_that_oscillate_are_refused_or_forced(inner: Any, what: str, caplog: Any) -> None:
    code = fractional_repetition(6, 2)
    with pytest.raises(IncompatibleStrategy, match=what):
        GradientCoding(inner, code, send=STALE)
    GradientCoding(inner, code, send=Shards(staleness=3, forced=True))
    assert any(what in text for text in caplog.messages)
    GradientCoding(inner, code, send=Shards())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Shards(staleness=-1), "staleness=-1 must be a whole number"),
        (lambda: Shards(staleness=1.5), "staleness=1.5 must be a whole number"),  # type: ignore[arg-type]
        (lambda: Shards(staleness=1, fresh=0), "fresh=0 must be a share"),
        (lambda: Shards(staleness=1, fresh=1.2), "fresh=1.2 must be a share"),
        (lambda: Shards(staleness=1, grace=-0.1), "grace=-0.1 must be a share"),
        (lambda: Shards(staleness=1, store="here"), "store='here' must be"),
        (lambda: _coding(FedAvg(fraction_train=0.5)), "fraction_train=0.5 samples shards"),
        (lambda: _coding(on_undecodable="approximate"), "uses last updates already"),
        (lambda: _coding(votes=1), "nobody has confirmed"),
        (lambda: _coding(privacy=CentralNoise(noise_multiplier=1.0, clipping_norm=1.0)), "several rounds"),
        (lambda: _coding(code=Discovered(6)), "needs a fixed code"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=sentence):
        make()


def test_a_strategy_that_needs_each_reply_is_refused() -> None:
    with pytest.raises(IncompatibleStrategy, match="updates of earlier rounds"):
        _coding(FedMedian())


def _coding(inner: Any = None, code: Any = None, **kwargs: Any) -> GradientCoding:
    return GradientCoding(inner or FedAvg(), code or fractional_repetition(6, 4), send=STALE, **kwargs)


def test_equal_laws_give_equal_runs() -> None:
    one, rows, _ = run(fractional_repetition(6, 2), scaled_phones(), rounds=8, seed=2)
    other, others, _ = run(fractional_repetition(6, 2), scaled_phones(), rounds=8, seed=2)
    assert versions(rows, 6)[-1].tolist() == versions(others, 6)[-1].tolist()
    assert (flat(one.arrays) == flat(other.arrays)).all()


def scaled_phones() -> Latency:
    return Latency(compute=scaled(lognormal(1.0), {2: 5.0}))
