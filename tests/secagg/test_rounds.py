"""Secure rounds end to end: the model is the mean of the unmasked integers, whoever answers; nothing else leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, fractional_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.latency import Latency, constant, lognormal, scaled
from fl_gradcode.masking import streams as masking_streams
from fl_gradcode.privacy import IntegerNoise
from fl_gradcode.secagg import SecureAggregation, encoding
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays
from tests.secagg.rounds import copy_of, dealt, known_app, mean_of_integers, start, update_for

FRC = fractional_repetition(8, 1)
CODES = [FRC, reed_solomon(6, 2), reed_solomon(6, 1, m=2)]


def assert_exact(folder: Path, code: GradientCode, strategy: GradientCoding, models: dict[int, ArrayRecord]) -> None:
    """Each round's model is bit for bit what the unmasked integers give, and near the mean of the floats."""
    for row in strategy.ledger.rows:
        train, number = row["train"], row["round"]
        assert train["outcome"] == "exact" and row["evaluate"] is None
        expected = mean_of_integers(folder, code, models[number - 1], number, train["secure"]["request"])
        assert (flat(models[number]).astype(np.float32) == expected).all()
        weights = np.arange(1, code.k + 1)
        floats = sum(weights[j] * update_for(number, j).astype(np.float64) for j in range(code.k)) / weights.sum()
        moved = flat(models[number]) - flat(models[number - 1])
        rounding = 2.0**-22 * max(1.0, float(np.abs(flat(models[number])).max()))  # of the float32 model
        assert np.abs(moved - floats).max() <= train["quantisation-error"] + rounding
        assert train["secure"]["clipped"] == 0 and train["secure"]["simulated"]


@pytest.mark.parametrize("code", CODES, ids=str)
def test_a_secure_run_has_the_mean_of_the_unmasked_integers(tmp_path: Path, code: GradientCode) -> None:
    dealt(tmp_path, code)
    strategy, models, result = start(code, tmp_path, rounds=3)
    assert_exact(tmp_path, code, strategy, models)
    loss = sum((j + 1) * j for j in range(code.k)) / sum(j + 1 for j in range(code.k))
    metrics = result.train_metrics_clientapp[3]
    assert metrics["loss"] == pytest.approx(loss, abs=1e-8) and metrics["pair"][0] == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_in_virtual_time_rounds_end_early_and_are_exact(tmp_path: Path, code: GradientCode) -> None:
    dealt(tmp_path, code)
    strategy, models, _ = start(code, tmp_path, rounds=4, latency=Latency(compute=lognormal(1.0, 0.8)))
    assert_exact(tmp_path, code, strategy, models)
    used = [frozenset(row["train"]["used"]) for row in strategy.ledger.rows]
    assert len({*used}) > 1 and all(len(one) < code.n for one in used)  # several decodable sets
    assert all(row["train"]["ended"] == "decoded" for row in strategy.ledger.rows)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_killed_nodes_and_lost_replies_change_nothing(tmp_path: Path, code: GradientCode) -> None:
    dealt(tmp_path, code)

    def dies(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "killed"), reply_to=message) if worker == 1 else reply

    strategy, models, _ = start(code, tmp_path, rounds=2, tamper=dies)
    assert_exact(tmp_path, code, strategy, models)
    assert all(1 not in row["train"]["used"] for row in strategy.ledger.rows)
    late = tmp_path / "late"
    dealt(late, code)
    slow = Latency(compute=scaled(constant(1.0), {0: 1e6}))
    strategy, models, _ = start(code, late, rounds=2, latency=slow)
    assert_exact(late, code, strategy, models)
    assert all(0 not in row["train"]["used"] for row in strategy.ledger.rows)


def test_the_run_config_names_the_folder_in_a_simulation_and_the_row_says_that_it_protects_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = dealt(tmp_path, FRC)
    seen: list[dict[str, Any]] = []
    app = known_app(before=lambda shard, message, context: seen.append(dict(context.run_config)))
    with InProcessGrid(app, 8, run_config={"secagg-dir": str(tmp_path), "rate": 0.1}) as grid:
        strategy = GradientCoding(FedAvg(), FRC, secure=SecureAggregation(manifest))
        strategy.start(grid, initial_arrays(), num_rounds=1)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "exact" and row["train"]["secure"]["simulated"]
    assert "in a simulation protects nothing" in caplog.text
    assert seen and all(one == {"rate": 0.1} for one in seen)


# ---- what leaves ----


def transcript(replies: list[tuple[int, Message]]) -> list[tuple[Any, ...]]:
    """All that reaches the server, by the node that sent it."""
    found: list[tuple[Any, ...]] = []
    for worker, reply in replies:
        assert not reply.has_error()
        for name, record in sorted(reply.content.items()):
            for key, value in sorted(record.items()):
                is_array = isinstance(record, ArrayRecord)
                content: Any = (value.dtype, value.shape, value.stype, value.data) if is_array else value  # type: ignore[union-attr]
                found.append((worker, type(record).__name__, name, key, content))
    return found


@pytest.mark.parametrize(
    ("code", "noise"),
    [*((code, None) for code in CODES), (FRC, IntegerNoise(noise_multiplier=2.0, clipping_norm=4.0))],
    ids=str,
)
def test_the_transcript_of_a_round_is_the_same_for_inputs_with_equal_sums_and_transported_keys(
    tmp_path: Path, code: GradientCode, noise: IntegerNoise | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run has other data on every shard, and streams that carry the differences along the graph's edges."""
    folder = tmp_path / "first"
    settings: dict[str, Any] = {} if noise is None else {"privacy": noise, "metrics": []}
    dealt(folder, code, **settings)
    other = copy_of(folder, tmp_path / "second")
    first: dict[int, dict[str, np.ndarray]] = {}
    moved: dict[int, dict[str, np.ndarray]] = {}
    mask = encoding.mask
    modulus = 2**32 if code is FRC else 2**31 - 1
    # Noise depends on what it is added to; whatever it is, the masks cover it.
    monkeypatch.setattr(encoding, "discrete_gaussian", lambda key, sigma, size: np.arange(size) * 1000)

    def recording(keys: Any, integers: Any, request: bytes) -> None:
        first.update({c: {part: one.copy() for part, one in parts.items()} for c, parts in integers.items()})
        mask(keys, integers, request)

    def transported(keys: Any, integers: Any, request: bytes) -> None:
        theirs = {c: {part: one.astype(np.int64) for part, one in parts.items()} for c, parts in integers.items()}
        mask(keys, integers, request)
        for c, parts in integers.items():
            moved[c] = {part: (first[c][part].astype(np.int64) - theirs[c][part]) % modulus for part in parts}
            for part, one in parts.items():
                one.setflags(write=True)
                one[:] = (one.astype(np.int64) + moved[c][part]) % modulus

    def seen(*, reverse: bool) -> tuple[list[tuple[Any, ...]], ArrayRecord]:
        def turned(shard: int) -> int:
            return code.k - 1 - shard if reverse else shard

        # Whole multiples of a unit, so that no rounding makes the sums differ.
        app = known_app(
            lambda r, j: (np.round(update_for(r, turned(j)) * 256) / 256).astype(np.float32),
            weight=lambda shard: 16,
            loss=lambda shard: float(turned(shard)),
        )
        replies: list[tuple[int, Message]] = []

        def keep(worker: int, message: Message, reply: Message) -> Message:
            replies.append((worker, reply))
            return reply

        monkeypatch.setattr(encoding, "mask", transported if reverse else recording)
        _, models, _ = start(code, other if reverse else folder, app, tamper=keep, privacy=noise)
        return transcript(replies), models[1]

    one, model = seen(reverse=False)
    two, same = seen(reverse=True)
    assert one == two and one
    assert (flat(model) == flat(same)).all()
    assert any(part["update"].any() for part in moved.values())  # the inputs did differ
    if len(moved) == len(first):
        for part in ("update", "metrics", "check", "status"):  # so there are such streams: the differences sum to zero
            assert not (np.sum([parts[part] for parts in moved.values()], axis=0) % modulus).any()


def test_a_masked_reply_says_in_clear_what_is_listed_and_no_more(tmp_path: Path) -> None:
    dealt(tmp_path, FRC)
    replies: list[Message] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        replies.append(reply)
        return reply

    start(FRC, tmp_path, tamper=keep)
    for reply in replies:
        assert {*reply.content} == {"fl-gradcode.reply", "fl-gradcode.update"}
        told, update = reply.content["fl-gradcode.reply"], reply.content["fl-gradcode.update"]
        assert isinstance(told, ConfigRecord) and isinstance(update, ArrayRecord)
        assert {*told} == {"json", "protocol", "version"} and {*update} == {"masked"}
        assert {*json.loads(str(told["json"]))} == {
            *("run", "round", "kind", "worker", "outcome", "shards", "manifest", "request", "simulated", "tags"),
        }
        assert json.loads(str(told["json"]))["tags"] == ""  # the manifest has no rehearsal


def test_train_is_handed_the_hashed_records_and_constants(tmp_path: Path) -> None:
    dealt(tmp_path, FRC)
    seen: list[tuple[Any, ...]] = []

    def look(shard: int, message: Message, context: Context) -> None:
        meta = message.metadata
        ids = (meta.run_id, meta.message_id, meta.src_node_id, meta.dst_node_id, meta.group_id, meta.created_at)
        config = {key: context.node_config[key] for key in context.node_config if key != "partition-id"}
        seen.append(
            (
                ids,
                context.run_id,
                context.node_id,
                [*context.state],
                config,
                dict(context.run_config),
                [*message.content],
            )
        )

    start(
        FRC,
        tmp_path,
        known_app(before=look),
        owner={"data-dir": "/data", "token": "x", "secagg-app-config": "data-dir"},
    )
    assert len(seen) == 8 and all(one == seen[0] for one in seen)
    ids, run_id, node_id, state, config, run_config, records = seen[0]
    assert ids[:4] == (0, "", 0, 0) and (run_id, node_id, state) == (0, 0, [])
    assert config == {"num-partitions": 8, "data-dir": "/data"} and run_config == {}
    assert records == ["arrays", "config"]


# ---- failures leave the model untouched, and show at no node ----


def assert_untouched(strategy: GradientCoding, models: dict[int, ArrayRecord], caplog: Any, why: str) -> None:
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "skipped" and row["train"]["secure"]["request"] is None
    assert (flat(models[1]) == flat(initial_arrays())).all()
    assert why in caplog.text


def test_an_app_that_makes_numpy_raise_decides_nothing(tmp_path: Path) -> None:
    code = CODES[0]
    dealt(tmp_path, code)

    def update(server_round: int, shard: int) -> np.ndarray:
        np.seterr(all="raise")
        return np.full_like(update_for(server_round, shard), 1e-30 if shard == 2 else 0.1)

    with np.errstate():  # restored afterwards
        strategy, *_ = start(code, tmp_path, known_app(update))
    assert strategy.ledger.rows[0]["train"]["rejected"] == []
    assert strategy.ledger.rows[0]["train"]["outcome"] == "exact"


class Trap(Exception):
    pass


@pytest.mark.parametrize("failure", ["raises", "exits", "nan", "weight", "state", "layout"])
@pytest.mark.parametrize("code", CODES[:2], ids=str)
def test_a_failed_shard_shows_at_no_node(
    tmp_path: Path, code: GradientCode, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A model with one weight of 1e30 asks whether a shard has a record; the answer is one for all shards together."""
    dealt(tmp_path, code)
    sizes: set[tuple[Any, ...]] = set()

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sizes.add(tuple(one[1:4] + one[4][:2] if one[3] == "masked" else one[1:3] for one in transcript([(0, reply)])))
        return reply

    def before(shard: int, message: Message, context: Context) -> None:
        if shard == 2 and failure == "raises":
            raise Trap("a record of shard 2")
        if shard == 2 and failure == "exits":
            raise SystemExit(1)
        if shard == 2 and failure == "state":
            context.state["kept"] = ConfigRecord({"x": 1})
        if shard == 2 and failure == "layout":
            arrays: Any = message.content["arrays"]
            message.content["arrays"] = ArrayRecord(arrays.to_numpy_ndarrays()[:1])

    def update(server_round: int, shard: int) -> np.ndarray:
        moves = update_for(server_round, shard)
        if failure == "nan" and shard == 2:
            moves[4] = np.nan
        return moves[:6] if failure == "layout" and shard == 2 else moves

    app = known_app(update, before=before, weight=lambda j: 17 if failure == "weight" and j == 2 else j + 1)
    strategy, models, _ = start(code, tmp_path, app, tamper=keep)
    assert_untouched(strategy, models, caplog, f"1 of {code.k} shards failed on their holders")
    assert len(sizes) == 1  # all replies have the same form
    assert strategy.ledger.rows[0]["train"]["rejected"] == []


@pytest.mark.parametrize("what", ["a wrong key", "a lost edge", "changed words"])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_masks_that_do_not_cancel_leave_the_model_untouched(
    tmp_path: Path, code: GradientCode, what: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt(tmp_path, code)
    streams = masking_streams.mask_streams
    calls = [0]

    def wrong(edges: Any, request: bytes, part: Any) -> Any:
        made = streams(edges, request, part)
        calls[0] += part == "update"
        if what == "a lost edge" and calls[0] == 1:
            return made[1:]
        if what == "a wrong key" and calls[0] == 1:
            return streams({edge: bytes(32) for edge in edges}, request, part)
        return made

    def change(worker: int, message: Message, reply: Message) -> Message:
        if what == "changed words" and worker == strange[0]:
            record: Any = reply.content["fl-gradcode.update"]
            words = record["masked"].numpy().copy()
            words[-2] ^= 1  # a check word; it stays an element of the field
            reply.content["fl-gradcode.update"] = ArrayRecord({"masked": type(record["masked"])(words)})
        return reply

    strange = [0]
    monkeypatch.setattr(encoding, "mask_streams", wrong)
    strategy, models, _ = start(code, tmp_path, tamper=change)
    train = strategy.ledger.rows[0]["train"]
    if what == "changed words" and train["outcome"] == "exact":  # another holder's reply was used
        strange[0] = train["used"][0]
        again = tmp_path / "again"
        dealt(again, code)
        caplog.clear()
        strategy, models, _ = start(code, again, tamper=change)
    assert_untouched(strategy, models, caplog, "The masks do not cancel")


def test_holders_that_send_different_integers_are_named_and_nothing_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt(tmp_path, FRC)
    calls: list[int] = []

    def update(server_round: int, shard: int) -> np.ndarray:
        calls.append(shard)
        return update_for(server_round, shard) + np.float32(0.01 * (calls.count(shard) - 1))

    # The server does not know who is who, and has to read all replies that are there.
    monkeypatch.setattr(InProcessGrid, "known_workers", lambda grid: {})
    strategy, models, _ = start(FRC, tmp_path, known_app(update))
    assert_untouched(strategy, models, caplog, "hold the same shards and sent different integers")


# ---- retries and restarts ----


class Killed(BaseException):
    pass


def test_a_killed_server_goes_on_with_the_replies_of_both_attempts(tmp_path: Path) -> None:
    dealt(tmp_path / "nodes", FRC)
    copy_of(tmp_path / "nodes", tmp_path / "calm")
    trained: list[tuple[int, int]] = []

    def count(shard: int, message: Message, context: Context) -> None:
        content: Any = message.content
        trained.append((int(content["config"]["server-round"]), shard))

    def kill(server_round: int) -> None:
        if server_round == 2:
            raise Killed

    kept: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl", "run": None}
    lost = [0]

    def lose(worker: int, message: Message, reply: Message) -> Message:
        return Message(Error(2, "killed"), reply_to=message) if worker == lost[0] else reply

    app = known_app(before=count)
    with pytest.raises(Killed):
        start(FRC, tmp_path / "nodes", app, rounds=3, kill=kill, tamper=lose, **kept)
    before = trained.count((2, 0))
    lost[0] = 2
    strategy, models, _ = start(FRC, tmp_path / "nodes", app, rounds=3, tamper=lose, **kept)
    assert [row["round"] for row in strategy.ledger.rows][-2:] == [2, 3]
    assert trained.count((2, 0)) == before  # those who had answered round 2 did not train again
    calm, undisturbed, _ = start(FRC, tmp_path / "calm", rounds=3, run=strategy.run)
    assert (flat(models[3]) == flat(undisturbed[3])).all()
    assert calm.ledger.rows[-1]["train"]["secure"] == strategy.ledger.rows[-1]["train"]["secure"]
