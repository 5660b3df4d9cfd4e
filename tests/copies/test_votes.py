"""With votes=e, e holders of a shard may lie: they are located and named, and the model is that of the honest ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, VirtualGrid, codes, fractional_repetition
from fl_gradcode.codes import GradientCode, P, PrimeField, locate_wrong_replies, locates_wrong_replies, reed_solomon
from fl_gradcode.errors import InvalidCode, InvalidSetting
from fl_gradcode.latency import Latency, Law
from fl_gradcode.protocol import METRICS, UPDATE
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app

Lie = Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]]


def _as_field(values: np.ndarray[Any, Any], changed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (changed % P).astype(np.uint32) if values.dtype == np.uint32 else changed.astype(values.dtype)


#: What a liar sends instead of the vector that it computed, by its worker number.
LIES: dict[str, Lie] = {
    "random": lambda x, who: _as_field(x, np.random.default_rng(who).integers(1, 1000, x.size)),
    "common error": lambda x, who: _as_field(x, x.astype(np.float64) + 1 + np.arange(x.size)),
    "scaled": lambda x, who: _as_field(x, x.astype(np.float64) * 3),
    "sign flipped": lambda x, who: _as_field(x, -x.astype(np.float64)),
    "one entry": lambda x, who: _as_field(x, np.where(np.arange(x.size) == 5, x.astype(np.float64) + 1, x)),
}
CODES: dict[str, tuple[Callable[[int], GradientCode], Any]] = {
    "groups": (lambda e: fractional_repetition(2 * (2 * e + 2), 2 * e + 1), "coded"),
    "shards": (lambda e: fractional_repetition(2 * (2 * e + 2), 2 * e + 1), "shards"),
    "field": (lambda e: reed_solomon(2 * e + 5, 2 * e + 1), "coded"),
    "field, m=2": (lambda e: reed_solomon(2 * e + 6, 2 * e + 1, m=2), "coded"),
}


def lying(liars: tuple[int, ...], lie: Lie) -> Callable[[int, Message, Message], Message]:
    """Honest figures and metrics beside wrong values."""

    def tamper(worker: int, message: Message, reply: Message) -> Message:
        if worker in liars and reply.has_content():
            for name, record in reply.content.array_records.items():
                for key in record:
                    if name != UPDATE or key != METRICS:
                        values = record[key].numpy()
                        record[key] = Array(lie(values.reshape(-1), worker).reshape(values.shape))
        return reply

    return tamper


def first(workers: tuple[int, ...], gone: int) -> Latency:
    """These workers answer at once, and one never does."""
    times = {**dict.fromkeys(workers, 0.01), gone: float("inf")}
    return Latency(compute=Law("", lambda seed, worker, tick: times.get(worker, 1.0 + 0.01 * worker)))


@pytest.mark.parametrize("e", [1, 2])
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", CODES)
def test_liars_are_located_and_the_sum_is_that_of_the_honest(name: str, lie: str, e: int) -> None:
    make, send = CODES[name]
    code = make(e)
    expected = run_plain(toy_app(), code.k, FedAvg(fraction_evaluate=0.0), rounds=2).arrays
    random = np.random.default_rng((e, len(lie), len(name)))
    for _ in range(3):
        *liars, gone = random.choice(code.n, e + 1, replace=False).tolist()
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send=send, votes=e, verify=0)
        with InProcessGrid(toy_app(), code.n, tamper=lying(tuple(liars), LIES[lie])) as grid:
            result = strategy.start(VirtualGrid(grid, first(tuple(liars), gone)), initial_arrays(), num_rounds=2)
        rows = [row["train"] for row in strategy.ledger.rows]
        assert [row["outcome"] for row in rows] == ["exact", "exact"]
        assert relative(result.arrays, expected) < (1e-3 if isinstance(code.numbers, PrimeField) else 1e-6)
        assert {one["worker"] for row in rows for one in row["rejected"]} == {*liars}, (liars, rows)
        assert not {*liars} & {worker for row in rows for worker in row["used"]}
        assert not {*liars} & {*rows[1]["asked"]}


def test_a_liar_that_sends_what_was_right_before_is_located() -> None:
    kept: dict[int, Any] = {}

    def stale(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1 and reply.has_content():
            record = reply.content[UPDATE]
            assert isinstance(record, ArrayRecord)
            record["arrays"] = kept.setdefault(worker, record["arrays"])
        return reply

    for code in (fractional_repetition(6, 2), reed_solomon(7, 2)):
        kept.clear()
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, votes=1)
        with InProcessGrid(toy_app(), code.n, tamper=stale) as grid:
            result = strategy.start(grid, initial_arrays(), num_rounds=3)
        rows = [row["train"] for row in strategy.ledger.rows]
        assert [row["outcome"] for row in rows] == ["exact"] * 3
        assert [[one["kind"] for one in row["rejected"]] for row in rows] == [[], ["wrong-value"], []]
        plain = run_plain(toy_app(), code.k, FedAvg(fraction_evaluate=0.0)).arrays
        assert relative(result.arrays, plain) < (1e-3 if isinstance(code.numbers, PrimeField) else 1e-6)


def test_liars_are_located_where_a_sample_of_the_shards_is_trained() -> None:
    """Workers without a sampled shard send nothing, and are not missing."""
    for code in (reed_solomon(9, 2), fractional_repetition(9, 2)):
        inner = FedAvg(fraction_train=0.4, fraction_evaluate=0.0)
        strategy = GradientCoding(inner, code, votes=1, verify=0)
        with InProcessGrid(toy_app(), 9, tamper=lying((4,), LIES["random"])) as grid:
            strategy.start(grid, initial_arrays(), num_rounds=4)
        rows = [row["train"] for row in strategy.ledger.rows]
        assert [row["outcome"] for row in rows] == ["exact"] * 4
        assert all(4 not in row["used"] for row in rows)
        assert any(row["workers"] < 9 for row in rows) or code.groups is not None


def test_too_few_replies_to_locate_a_liar_are_said() -> None:
    """Six of seven decode, and one that lies among them could not be told."""
    latency = Latency(compute=Law("", lambda seed, worker, tick: float("inf") if worker == 6 else 1.0))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), reed_solomon(7, 2), votes=1, give_up_rounds=None)
    with InProcessGrid(toy_app(), 7) as grid:
        strategy.start(VirtualGrid(grid, latency), initial_arrays(), num_rounds=1, timeout=60.0)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["skipped"]


def test_votes_over_an_assignment_of_more_holders_than_its_code_tolerates() -> None:
    code = codes.for_assignment(np.ones((3, 3), bool), s=1, rng=np.random.default_rng(0))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send="shards", votes=1, verify=0)
    with InProcessGrid(toy_app(), 3, tamper=lying((1,), LIES["scaled"])) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=3)
    assert relative(result.arrays, run_plain(toy_app(), 3, FedAvg(fraction_evaluate=0.0)).arrays) < 1e-6


def test_more_liars_than_votes_are_said_and_not_used() -> None:
    code = reed_solomon(9, 4)
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, votes=1, give_up_rounds=None)
    with InProcessGrid(toy_app(), 9, tamper=lying((2, 5), LIES["random"])) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=2)
    assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["skipped", "skipped"]
    assert relative(result.arrays, initial_arrays()) == 0


def test_two_liars_of_three_who_agree_win_the_vote_and_one_of_two_cannot_lose_it() -> None:
    """The documented limit: e + 1 holders of a shard who agree on a lie."""
    with InProcessGrid(toy_app(), 3, tamper=lying((0, 1), LIES["common error"])) as grid:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(3, 2), votes=1)
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "exact" and [one["worker"] for one in row["train"]["rejected"]] in ([2], [])
    with InProcessGrid(toy_app(), 4, tamper=lying((0,), LIES["random"])) as grid:
        two = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(4, 1), on_disagreement="skip")
        two.start(grid, initial_arrays(), num_rounds=1)
    (row,) = two.ledger.rows
    assert row["train"]["outcome"] == "skipped" and row["train"]["rejected"] == []


@pytest.mark.parametrize("send", ["coded", "shards"])
def test_without_votes_the_third_copy_says_who_is_wrong(send: Any, caplog: pytest.LogCaptureFixture) -> None:
    code = fractional_repetition(6, 2)
    expected = run_plain(toy_app(), 6, FedAvg(fraction_evaluate=0.0)).arrays
    with InProcessGrid(toy_app(), 6, tamper=lying((3,), LIES["scaled"])) as grid:
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, send=send)
        result = strategy.start(VirtualGrid(grid, first((3,), -1)), initial_arrays(), num_rounds=3)
    assert relative(result.arrays, expected) < 1e-6
    assert "Worker 3 (node" in caplog.text and "is left out from now on" in caplog.text
    assert all(3 not in row["train"]["used"] for row in strategy.ledger.rows)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda: fractional_repetition(6, 1), {"votes": 1}, "needs 3 holders of each shard"),
        (
            lambda: codes.cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
            {"votes": 1},
            "cannot tell whose reply is wrong under a cyclic",
        ),
        (lambda: reed_solomon(6, 1), {"votes": 1}, "takes two of the code's s=1 stragglers for each wrong reply"),
        (lambda: fractional_repetition(6, 2), {"votes": -1}, "votes=-1 must be a number of wrong replies"),
        (lambda: fractional_repetition(6, 2), {"votes": 1, "send": "adaptive"}, "send='adaptive' may send one copy"),
        (
            lambda: fractional_repetition(6, 2),
            {"votes": 1, "on_undecodable": "approximate"},
            "uses copies that nobody has confirmed",
        ),
    ],
)
def test_votes_that_cannot_be_counted_are_refused(
    make: Callable[[], GradientCode], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidSetting, match=sentence):
        GradientCoding(FedAvg(), make(), **options)


# The locator


def drawn(size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng().integers(0, P, size)


def test_every_pair_of_missing_worker_and_liar_is_located() -> None:
    code = reed_solomon(9, 3)
    random = np.random.default_rng(4)
    sent = code.encode(random.integers(-99, 99, (9, 7)))
    for gone, liar in itertools.permutations(range(9), 2):
        there = [i for i in range(9) if i != gone]
        wrong = [sent[i] if i != liar else (sent[i] + random.integers(1, P, 7)) % P for i in there]
        assert locate_wrong_replies(code, [[x] for x in wrong], there, 1, drawn) == (liar,)


@pytest.mark.parametrize(("n", "s", "m", "e"), [(15, 5, 1, 2), (15, 5, 2, 2), (40, 10, 1, 5), (100, 20, 1, 10)])
def test_liars_with_one_common_error_are_located_100_of_100_times(n: int, s: int, m: int, e: int) -> None:
    code = reed_solomon(n, s, m=m)
    random = np.random.default_rng((n, m))
    right = code.encode(random.integers(-99, 99, (n, 6)))
    for _ in range(100):
        gone = random.choice(n, s - 2 * e, replace=False)
        there = random.permutation(np.setdiff1d(np.arange(n), gone)).tolist()
        liars = sorted(random.choice(there, int(random.integers(0, e + 1)), replace=False).tolist())
        sent, error = right.copy(), random.integers(0, P, right.shape[1])
        sent[liars] = (sent[liars] + error) % P
        assert locate_wrong_replies(code, [[sent[i]] for i in there], there, e, drawn) == tuple(liars)


def test_more_than_e_independent_errors_are_noticed() -> None:
    code = reed_solomon(12, 4)
    random = np.random.default_rng(7)
    right = code.encode(random.integers(-99, 99, (12, 6)))
    for _ in range(200):
        sent = right.copy()
        liars = random.choice(12, 3, replace=False)
        sent[liars] = random.integers(0, P, (3, right.shape[1]))
        assert locate_wrong_replies(code, [[x] for x in sent], range(12), 2, drawn) is None


def test_long_vectors_are_looked_at_in_every_entry() -> None:
    code = reed_solomon(5, 2)
    right = code.encode(np.ones((5, 300_001), np.int64)).astype(np.uint32)
    for entry in (0, 2047, 2048, 131_072, 300_000):
        sent = right.copy()
        sent[3, entry] ^= 1
        assert locate_wrong_replies(code, [[x] for x in sent], range(5), 1, drawn) == (3,)
    assert locate_wrong_replies(code, [[x] for x in right], range(5), 1, drawn) == ()


def test_codes_without_checks_are_refused() -> None:
    assert locates_wrong_replies(reed_solomon(6, 2, m=2)) and not locates_wrong_replies(fractional_repetition(6, 2))
    own = GradientCode(np.ones((3, 2), np.int64), 2, numbers=PrimeField())
    assert not locates_wrong_replies(own)
    with pytest.raises(InvalidCode, match="Use reed_solomon"):
        locate_wrong_replies(own, [[np.zeros(1)]] * 3, range(3), 1, drawn)
    with pytest.raises(InvalidCode, match="with s=2, 1 wrong replies are located while at most 0 are"):
        locate_wrong_replies(reed_solomon(6, 2), [[np.zeros(1)]] * 5, range(5), 1, drawn)
