"""One hostile node of each sort: the run ends with the honest nodes' model, and the node is named."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Discovered, GradientCoding, VirtualGrid, codes, fractional_repetition
from fl_gradcode.codes import GradientCode, P
from fl_gradcode.errors import RoundFailed
from fl_gradcode.latency import Latency, Law
from fl_gradcode.protocol import UPDATE, Plan, Reply, is_probe, payload_encoding
from fl_gradcode.protocol.records import PROTOCOL
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app

REPLY = "fl-gradcode.reply"
Tamper = Callable[[int, Message, Message], Message]


def said(reply: Message) -> dict[str, Any]:
    return dict(json.loads(str(reply.content.config_records[REPLY]["json"])))


def say(reply: Message, **values: Any) -> Message:
    """The reply with other values in our record."""
    record = reply.content.config_records[REPLY]
    record["json"] = json.dumps({**json.loads(str(record["json"])), **values})
    return reply


def by(worker: int, change: Callable[[Message, Message], Message]) -> Tamper:
    def tamper(who: int, message: Message, reply: Message) -> Message:
        answered = reply.has_content() and REPLY in reply.content
        return change(message, reply) if who == worker and answered else reply

    return tamper


class Unknowing(VirtualGrid):
    """A virtual grid that draws latencies by worker, and does not tell the strategy who is who."""

    _drawing = False

    def push(self, messages: Any) -> list[str | None]:
        self._drawing = True
        try:
            return super().push(messages)
        finally:
            self._drawing = False

    def known_workers(self) -> dict[int, int]:
        return super().known_workers() if self._drawing else {}


def run(
    code: GradientCode | Discovered,
    tamper: Tamper,
    *,
    nodes: int = 6,
    rounds: int = 4,
    first: int = 0,
    config: Any = None,
    **options: Any,
) -> tuple[Any, GradientCoding]:
    """A run in which the engine does not say who is who, and one worker is always first."""
    latency = Latency(compute=Law("", lambda seed, worker, tick: 0.01 if worker == first else 1.0 + worker / 100))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, node_timeout=3, **options)
    with InProcessGrid(toy_app(), nodes, tamper=tamper, node_config=config) as grid:
        result = strategy.start(Unknowing(grid, latency), initial_arrays(), num_rounds=rounds)
    return result, strategy


def is_honest(result: Any, k: int, rounds: int = 4) -> bool:
    return relative(result.arrays, run_plain(toy_app(), k, FedAvg(fraction_evaluate=0.0), rounds=rounds).arrays) < 1e-4


def rejected(strategy: GradientCoding) -> list[dict[str, Any]]:
    return [one for row in strategy.ledger.rows for one in row["train"]["rejected"]]


# Who holds what


def _holds(worker: int) -> dict[str, Any]:
    held = [worker % 3, worker % 3 + 3] if worker < 6 else range(6)
    return {"partition-id": worker, "num-partitions": 6, "shards": ",".join(map(str, held))}


def _sybil(numbers: Callable[[], int], digest: Callable[[], str]) -> Tamper:
    """Answers as the worker that it says it is, with data of its own for every shard."""
    last = [6]

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker != 6:
            answered = reply.has_content() and REPLY in reply.content
            return say(reply, holds=[[j, f"honest {j}"] for j, _ in said(reply)["holds"]]) if answered else reply
        holds = tuple((j, digest()) for j in range(6))
        if is_probe(message.content):
            return Message(Reply("", 0, "probe", 6, "idle", holds=holds).content(), reply_to=message)
        plan = Plan.find_in(message.content)
        assert plan is not None
        row, before = plan.rows.get(last[0]), message.content.get("arrays")
        if row is not None and row.shards and isinstance(before, ArrayRecord):
            layout = tuple((key, array.dtype, tuple(array.shape)) for key, array in before.items())
            made = Reply(
                plan.run, plan.round, plan.kind, last[0], "coded", shards=row.shards, layout=layout, holds=holds
            )
            vectors = {"arrays": Array(np.full(11, 6.66e3, np.float32)), "metrics": Array(np.array([1.0]))}
            told = {"metrics_layout": (("num-examples", -1, True),), "arrays_name": "arrays", "metrics_name": "metrics"}
            content = Reply(**{**vars(made), **told}).content(**{UPDATE: ArrayRecord(vectors)})
            return Message(content, reply_to=message)
        last[0] = numbers()
        idle = Reply(plan.run, plan.round, plan.kind, last[0], "idle", holds=holds)
        return Message(idle.content(), reply_to=message)

    return tamper


@pytest.mark.parametrize(
    "sort", ["a new worker each round", "honest workers in turn", "one worker, other data each round"]
)
def test_one_node_has_one_vote_on_data(sort: str, caplog: pytest.LogCaptureFixture) -> None:
    fresh, digests = itertools.count(100), itertools.count()
    numbers = {
        "a new worker each round": lambda: next(fresh),
        "honest workers in turn": lambda: next(fresh) % 6,
        "one worker, other data each round": lambda: 6,
    }
    tamper = _sybil(numbers[sort], lambda: f"evil {next(digests) if 'other data' in sort else ''}")
    result, strategy = run(Discovered(k=6, s=1), tamper, nodes=7, rounds=6, first=6, config=_holds)
    assert is_honest(result, 6, 6)
    assert all(6 not in row["train"]["used"] for row in strategy.ledger.rows)
    assert "Worker 6" in caplog.text


# Figures


@pytest.mark.parametrize(
    "code",
    [
        codes.cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
        codes.reed_solomon(6, 2),
        fractional_repetition(6, 2, m=2),
        codes.cyclic_repetition(6, 1, rng=np.random.default_rng(1)),  # of two holders each: it contradicts two others
        codes.reed_solomon(7, 2, m=2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "figures", [lambda mine: [9.0] * len(mine), lambda mine: [0.0] * len(mine), lambda mine: mine[:1]]
)
def test_false_figures_do_not_veto_rounds(code: GradientCode, figures: Any) -> None:
    def lie(message: Message, reply: Message) -> Message:
        return say(reply, figures=[figures(mine) for mine in said(reply)["figures"]])

    result, strategy = run(code, by(3, lie), first=3, nodes=code.n)
    outcomes = [row["train"]["outcome"] for row in strategy.ledger.rows]
    assert outcomes == ["exact"] * 4 and is_honest(result, code.k)
    assert {one["worker"] for one in rejected(strategy)} == {3}


@pytest.mark.parametrize(
    "code",
    [
        codes.cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
        fractional_repetition(6, 2, m=2),
        codes.reed_solomon(6, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("of", ["the sum", "a shard too"])
def test_a_false_weight_is_noticed_where_the_code_mixes_shards(code: GradientCode, of: str) -> None:
    """Its update is right. The sum of weights divides all updates, so the model would take a step of another length."""

    def lie(message: Message, reply: Message) -> Message:
        figures, plan = said(reply)["figures"], Plan.find_in(message.content)
        if UPDATE not in reply.content or plan is None or plan.kind != "train":
            return reply
        record = reply.content.array_records[UPDATE]
        metrics = np.array(record["metrics"].numpy())
        if of == "the sum":
            metrics[0] += 1000
        else:
            encoding = payload_encoding(plan.fraction_bits, plan.k)
            first, *_ = plan.rows[3].coefficients
            metrics += encoding.add_metrics(None, np.array([1000.0, 0.0, 0.0, 0.0]), first[:1])
            metrics = metrics if plan.fraction_bits is None else metrics % P
            figures[0][-1] += 1000
        record["metrics"] = Array(metrics)
        return say(reply, figures=figures)

    result, strategy = run(code, by(3, lie), first=3, nodes=code.n)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows][1:] == ["exact"] * 3
    assert {one["worker"] for one in rejected(strategy)} == {3}
    if of == "the sum":
        assert is_honest(result, code.k) and "wrong-figures" in {one["kind"] for one in rejected(strategy)}


# Layouts


def _first_only(layout: Any) -> Any:
    return layout[:1]


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "empty": lambda layout: [],
    "first only": lambda layout: layout[:1],
    "int8": lambda layout: [[layout[0][0], "int8", layout[0][2]], layout[1]],
    "bool": lambda layout: [[name, "bool", shape] for name, _, shape in layout],
    "float16": lambda layout: [[name, "float16", shape] for name, _, shape in layout],
    "reordered": lambda layout: layout[::-1],
    "renamed": lambda layout: [["2", *layout[0][1:]], layout[1]],
    "twice": lambda layout: [layout[0], layout[0]],
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_one_early_reply_does_not_decide_on_the_arrays(case: str) -> None:
    def lie(message: Message, reply: Message) -> Message:
        if said(reply)["round"] != 2:
            return reply
        layout = LAYOUTS[case](said(reply)["layout"])
        record = reply.content.array_records[UPDATE]
        values = record["arrays"].numpy()[: sum(int(np.prod(shape)) for _, _, shape in layout)]
        record["arrays"] = Array(np.asarray(values, np.float32).copy())
        return say(reply, layout=layout)

    result, strategy = run(fractional_repetition(3, 2), by(0, lie), nodes=3)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 4
    assert [(name, array.dtype) for name, array in result.arrays.items()] == [("0", "float32"), ("1", "float32")]
    assert case == "reordered" or (is_honest(result, 3) and 0 in {one["worker"] for one in rejected(strategy)})


def test_an_app_that_returns_fewer_arrays_or_other_dtypes_still_decides_on_them() -> None:
    for keep, dtype in ((1, np.float32), (2, np.float64)):
        app = toy_app()

        def tamper(worker: int, message: Message, reply: Message, keep: int = keep, dtype: Any = dtype) -> Message:
            layout = [[name, np.dtype(dtype).name, shape] for name, _, shape in said(reply)["layout"]][:keep]
            record = reply.content.array_records[UPDATE]
            size = sum(int(np.prod(shape)) for _, _, shape in layout)
            record["arrays"] = Array(record["arrays"].numpy()[:size].astype(dtype))
            return say(reply, layout=layout)

        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 4))
        with InProcessGrid(app, 6, tamper=tamper) as grid:
            result = strategy.start(grid, initial_arrays(), num_rounds=3)
        assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 3
        assert len(result.arrays) == keep and all(
            array.dtype == np.dtype(dtype).name for array in result.arrays.values()
        )


@pytest.mark.parametrize("weight", [-1.0, -20.9999, -1e300])
def test_weights_below_zero_are_rejected(weight: float) -> None:
    def lie(message: Message, reply: Message) -> Message:
        record = reply.content.array_records[UPDATE]
        record["metrics"] = Array(np.array([weight, *record["metrics"].numpy()[1:]]))
        return reply

    result, strategy = run(fractional_repetition(6, 2), by(0, lie))
    assert is_honest(result, 6) and {one["kind"] for one in rejected(strategy)} == {"wrong-weight"}


# Nobody ends another's run


def test_a_node_that_claims_to_have_fixed_data_does_not_end_the_run() -> None:
    result, strategy = run(fractional_repetition(6, 2), by(0, lambda message, reply: say(reply, outcome="fixed-data")))
    assert is_honest(result, 6) and {one["kind"] for one in rejected(strategy)} == {"fixed-data"}


@pytest.mark.parametrize("kind", ["unsuitable-app", "invalid-setting", "version", "shard-mismatch"])
def test_a_node_that_refuses_before_anybody_else_has_answered_does_not_end_the_run(kind: str) -> None:
    """The others are too slow for the first round."""

    def refuse(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, f"ValueError: fl-gradcode/{kind}: nobody can take part"), reply_to=message)

    slow = Latency(compute=Law("", lambda seed, worker, tick: 0.1 if worker == 0 else 1.0 if tick <= 2 else 0.1))
    inner = FedAvg(fraction_evaluate=0.0)
    strategy = GradientCoding(inner, fractional_repetition(6, 2), node_timeout=3, give_up_rounds=None)
    with InProcessGrid(toy_app(), 6, tamper=lambda w, m, r: refuse(w, m, r) if w == 0 else r) as grid:
        strategy.start(VirtualGrid(grid, slow), initial_arrays(), num_rounds=6, timeout=2.0)
    outcomes = [row["train"]["outcome"] for row in strategy.ledger.rows]
    assert outcomes[0] == "skipped" and "exact" in outcomes


def test_where_all_refuse_the_run_still_ends_at_once() -> None:
    with (
        InProcessGrid(toy_app(), 6, tamper=lambda w, m, r: say(r, outcome="fixed-data")) as grid,
        pytest.raises(Exception, match="never read context.node_config"),
    ):
        GradientCoding(FedAvg(), fractional_repetition(6, 2)).start(grid, initial_arrays(), num_rounds=3)


def test_a_shard_that_only_liars_hold_is_said_to_lack_holders() -> None:
    tamper = by(0, lambda message, reply: say(reply, worker=(said(reply)["round"] + 1) % 2))
    with pytest.raises(RoundFailed, match="is left out|answers as worker|undecodable"):
        run(fractional_repetition(2, 0), tamper, nodes=2)


# Texts and sizes

BIG = 1_900_000


@pytest.mark.parametrize(
    "values",
    [
        {"run": "R" * BIG},
        {"kind": "\x1b]0;owned\x07" + "K" * BIG},
        {"outcome": "O" * BIG},
        {"shards": [10**9] * (BIG // 12)},
        {"arrays_name": "", "metrics_name": "M" * BIG},
        {"metrics_layout": [["num-examples", "x" * BIG, True]]},
        {"metrics_layout": [["\x1b[2J" * (BIG // 8), -1, True]]},
        {"kept_file": "\x1b[2J\r\n2029-01-01 fake" + "F" * BIG},
        {"environment": "\u202e" * (BIG // 6)},
        {"holds": [[j, "d" * 1000] for j in range(1500)]},
        {"layout": [["\x07" * (BIG // 8), "float32", [3, 2]]]},
        {"more": "m" * 5_000_000},
    ],
    ids=lambda values: next(iter(values)),
)
def test_texts_of_a_client_reach_neither_disk_nor_log_uncut(
    values: dict[str, Any], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "ledger.jsonl"
    result, _ = run(
        fractional_repetition(6, 2), by(0, lambda message, reply: say(reply, **values)), rounds=2, ledger=path
    )
    assert is_honest(result, 6, 2)
    assert path.stat().st_size < 12_000 and len(caplog.text) < 20_000
    raw = path.read_text() + caplog.text
    assert not {"\x1b", "\x07", "\u202e", "\r"} & {*raw} and "\n2029" not in raw


@pytest.mark.parametrize("numbers", [range(6, 100_000), [10**4000]], ids=["many", "large"])
def test_shards_that_a_node_makes_up_are_named_shortly(numbers: Any, caplog: pytest.LogCaptureFixture) -> None:
    def lie(message: Message, reply: Message) -> Message:
        return say(reply, holds=[[j, ""] for j in numbers])

    _, strategy = run(Discovered(k=6, s=1), by(5, lie), config=_holds, rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * 2
    assert "Worker 5's shard" in caplog.text and len(caplog.text) < 2_000


@pytest.mark.parametrize("name", ["arrays_name", "metrics_name"])
def test_a_reply_is_not_outvoted_without_a_reason(name: str) -> None:
    _, strategy = run(fractional_repetition(6, 1), by(0, lambda message, reply: say(reply, **{name: "mine"})))
    (reason, *_) = (one["reason"] for one in rejected(strategy) if one["kind"] == "outvoted")
    assert reason.startswith("its records are named (") and "'mine'" in reason


def test_a_version_s_text_is_cut_and_escaped(tmp_path: Any) -> None:
    def lie(message: Message, reply: Message) -> Message:
        record = reply.content.config_records[REPLY]
        record["protocol"], record["version"] = PROTOCOL + 1, "\x1b[2J\r\n" + "V" * BIG
        return reply

    path = tmp_path / "ledger.jsonl"
    result, strategy = run(fractional_repetition(6, 2), by(0, lie), rounds=2, ledger=path)
    assert is_honest(result, 6, 2) and path.stat().st_size < 12_000
    assert {one["kind"] for one in rejected(strategy)} == {"version"}
    assert "\x1b" not in path.read_text()


def test_a_reply_with_more_records_than_its_own_is_no_larger_in_the_row(tmp_path: Any) -> None:
    def lie(message: Message, reply: Message) -> Message:
        more = {f"more-{i}": ArrayRecord([np.zeros(1000)]) for i in range(50)}
        return Message(RecordDict({**dict(reply.content.items()), **more}), reply_to=message)

    path = tmp_path / "ledger.jsonl"
    result, _ = run(fractional_repetition(6, 2), by(0, lie), rounds=2, ledger=path)
    assert is_honest(result, 6, 2) and path.stat().st_size < 12_000


def test_a_record_that_is_larger_than_any_of_ours_is_not_read() -> None:
    result, strategy = run(
        fractional_repetition(6, 2), by(0, lambda message, reply: say(reply, more="m" * 2_000_000)), rounds=2
    )
    assert is_honest(result, 6, 2)
    assert {one["kind"] for one in rejected(strategy)} == {"unreadable"}
    assert all("characters; at most 2000000 are read" in one["reason"] for one in rejected(strategy))
