"""Runs whose nodes exchange their keys: exact rounds, late workers, killed servers and nodes, and what the rows say."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fl_gradcode import GradientCode, GradientCoding, fractional_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.enrolment import Answer, ClassKey, EnrolledNode, Hello, Setup, make_identity, read_identity
from fl_gradcode.enrolment.statements import digest_of
from fl_gradcode.errors import InvalidSetting, RoundFailed, SecureRefused
from fl_gradcode.latency import Latency, constant, lognormal, scaled
from fl_gradcode.protocol import Plan, Reply, is_setup
from fl_gradcode.secagg import ClassIntegers, SecureAggregation, ShardResult
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays
from tests.enrolment.fleet import enrolled, manifest_of, start
from tests.secagg.rounds import ask, known_app, update_for

FRC = fractional_repetition(8, 1)
FRC_OF_THREE = fractional_repetition(6, 2)  # three holders a class: two are more than half
CODES = [FRC, reed_solomon(6, 2), reed_solomon(6, 1, m=2)]


def mean_of_integers(
    folder: Path, code: GradientCode, model: ArrayRecord, server_round: int, request: str, run: str = "run-1"
) -> NDArray[np.float32]:
    """The model after a round, from the integers of all classes without masks, by the seeds that nodes have now."""
    seeds: dict[int, bytes] = {}
    for worker in range(code.n):
        manifest, held = EnrolledNode(folder / f"node-{worker}", worker, None).keys_of(run)
        seeds |= held
    body, weight, total = manifest.body, 0.0, np.zeros(11, np.int64)
    for c, shards in enumerate(body.classes.members):
        ours = ClassIntegers(body, c, seeds[c], bytes.fromhex(request))
        for shard in shards:
            before = flat(model).astype(np.float32)
            moved = (before + update_for(server_round, shard)) - before
            ours.add(shard, ShardResult(moved, shard + 1.0, np.zeros(3)))
            weight += shard + 1.0
        total += np.asarray(body.classes.ring.to_signed(ours.parts()["update"])[:11], np.int64)
    unit = 2.0**-body.quantiser.fraction_bits * body.quantiser.largest_weight
    after: NDArray[np.float32] = (flat(model) + total * unit / weight).astype(np.float32)
    return after


def assert_near(rows: Iterable[dict[str, Any]], code: GradientCode, models: dict[int, ArrayRecord]) -> None:
    """Each round's model is near the mean of the floats: every shard is in it, with its weight."""
    weights = np.arange(1, code.k + 1)
    for row in rows:
        number = row["round"]
        floats = sum(weights[j] * update_for(number, j).astype(np.float64) for j in range(code.k)) / weights.sum()
        moved = flat(models[number]) - flat(models[number - 1])
        assert row["train"]["outcome"] == "exact"
        assert np.abs(moved - floats).max() <= 1e-5


@pytest.mark.parametrize("code", CODES, ids=str)
def test_a_run_without_a_dealer_has_the_mean_of_the_unmasked_integers(tmp_path: Path, code: GradientCode) -> None:
    enrolled(tmp_path / "nodes", code)
    strategy, models, _ = start(code, tmp_path / "nodes", rounds=3)
    for row in strategy.ledger.rows:
        secure = row["train"]["secure"]
        expected = mean_of_integers(tmp_path / "nodes", code, models[row["round"] - 1], row["round"], secure["request"])
        assert (flat(models[row["round"]]).astype(np.float32) == expected).all()
        assert (secure["setup"], secure["epoch"], secure["simulated"]) == ("allow-list", 1, True)
    assert_near(strategy.ledger.rows, code, models)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_in_virtual_time_rounds_end_early_and_are_exact(tmp_path: Path, code: GradientCode) -> None:
    enrolled(tmp_path / "nodes", code)
    latency = Latency(compute=lognormal(1.0, 0.8))
    strategy, models, _ = start(code, tmp_path / "nodes", rounds=4, latency=latency)
    assert_near(strategy.ledger.rows, code, models)
    assert all(len(row["train"]["used"]) < code.n for row in strategy.ledger.rows)


def step_of(message: Message) -> str:
    """The step of the set-up that a message asks for."""
    return str(json.loads(str(message.content["fl-gradcode.setup"]["json"]))["step"])


def test_one_shard_a_message_works_without_a_dealer_too(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC, sending="shardwise")
    latency = Latency(compute=lognormal(1.0, 0.8))
    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=2, latency=latency, send="shards")
    assert_near(strategy.ledger.rows, FRC, models)
    assert all(row["train"]["secure"]["setup"] == "allow-list" for row in strategy.ledger.rows)


def test_a_node_that_never_answers_is_left_out_of_the_set_up_and_of_the_rounds(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    latency = Latency(compute=scaled(constant(1.0), {0: float("inf")}))
    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=2, latency=latency)
    assert_near(strategy.ledger.rows, FRC, models)
    assert all(0 not in row["train"]["used"] for row in strategy.ledger.rows)
    assert manifest_of(tmp_path / "nodes", 4).digest.hex() == strategy.ledger.rows[0]["train"]["secure"]["manifest"]


def test_the_app_is_called_for_training_alone_and_sees_nothing_of_the_set_up(tmp_path: Path) -> None:
    seen: list[Any] = []
    enrolled(tmp_path / "nodes", FRC)
    app = known_app(before=lambda shard, message, context: seen.append((sorted(message.content), context.node_config)))
    start(FRC, tmp_path / "nodes", app)
    assert seen and all(records == ["arrays", "config"] for records, _ in seen)
    assert not any("secagg" in key for _, config in seen for key in config)


# ---- workers that come later ----


class Hiding(InProcessGrid):
    """A grid on which some workers are not connected until a round is over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden: set[int] = set()

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if self._worker[node] not in self.hidden]

    def known_workers(self) -> dict[int, int]:
        return {node: worker for node, worker in super().known_workers().items() if worker not in self.hidden}


def late_run(folder: Path, hidden: set[int], *, until: int, rounds: int = 4, **options: Any) -> Any:
    def node_config(worker: int) -> dict[str, Any]:
        return {"partition-id": worker, "num-partitions": 8, "secagg-dir": str(folder / f"node-{worker}")}

    models = {0: initial_arrays()}
    code = options.pop("code", FRC)
    grid = Hiding(known_app(), code.n, node_config=node_config, tamper=options.pop("tamper", None))
    grid.hidden = set(hidden)
    between = options.pop("between", lambda server_round: None)

    def keep(server_round: int, arrays: ArrayRecord, row: Any) -> None:
        models[server_round] = arrays
        between(server_round)
        if server_round == until:
            grid.hidden = set()

    options = {"run": "run-1", "give_up_rounds": None, "node_timeout": 1.0, **options}
    secure = SecureAggregation(folder / "secagg-body.json")
    strategy = GradientCoding(FedAvg(), code, secure=secure, on_round_end=keep, **options)
    with grid:
        strategy.start(grid, initial_arrays(), num_rounds=rounds)
    return strategy, models


@pytest.mark.parametrize("late", [0, 7], ids=["the lowest holder of its class", "the highest"])
def test_a_worker_that_comes_later_begins_a_new_epoch(
    tmp_path: Path, late: int, caplog: pytest.LogCaptureFixture
) -> None:
    enrolled(tmp_path / "nodes", FRC)
    caplog.set_level(logging.INFO)
    strategy, models = late_run(tmp_path / "nodes", {late}, until=2)
    rows = strategy.ledger.rows
    assert [row["train"]["secure"]["epoch"] for row in rows] == [1, 1, 2, 2]
    manifests = [row["train"]["secure"]["manifest"] for row in rows]
    assert manifests[0] == manifests[1] != manifests[2] == manifests[3]
    assert_near(rows, FRC, models)
    assert f"Worker {late} without keys: they are set up again." in caplog.text
    assert manifest_of(tmp_path / "nodes", late).digest.hex() == manifests[3]


def test_a_new_epoch_rehearses_again(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC_OF_THREE, rehearsal=True, min_classes=2)
    strategy, _ = late_run(tmp_path / "nodes", {0}, until=1, rounds=3, code=FRC_OF_THREE)
    rows = strategy.ledger.rows
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 3
    assert [row["train"]["secure"]["epoch"] for row in rows] == [1, 2, 2]
    for worker in range(1, 6):
        known = json.loads((tmp_path / "nodes" / f"node-{worker}" / "comparisons.json").read_text())
        assert [one["passed"] for one in known["runs"].values()] == [True, True]


def test_a_request_of_an_old_epoch_is_refused_after_a_new_one(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    sent: list[RecordDict] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        if worker == 3 and Plan.find_in(message.content) is not None:
            sent.append(message.content)
        return reply

    late_run(tmp_path / "nodes", {0}, until=1, rounds=2, tamper=keep, verify=8)
    old, new = sent[0], sent[-1]
    with pytest.raises(Exception, match="another manifest than this node has pinned"):
        ask(known_app(), tmp_path / "nodes", 3, old)
    found = Reply.find_in(ask(known_app(), tmp_path / "nodes", 3, new).content)
    assert found is not None and found.outcome == "masked"
    plan = Plan.find_in(new)
    assert plan is not None
    moved = replace(plan, run="run-2").add_to(Plan.remove_from(new))
    with pytest.raises(Exception, match="No set-up of this run has ended on this node"):
        ask(known_app(), tmp_path / "nodes", 3, moved)


def test_a_node_that_lost_its_keys_takes_part_again_from_the_next_epoch_on(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)

    settings: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl"}
    start(FRC, tmp_path / "nodes", rounds=1, **settings)
    (tmp_path / "nodes" / "node-2" / "secagg-setup.json").unlink()
    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=3, **settings)  # all nodes are asked who they are
    assert [row["train"]["secure"]["epoch"] for row in strategy.ledger.rows] == [1, 2, 2]
    models[1] = models.pop(1, initial_arrays())
    assert_near(strategy.ledger.rows[2:], FRC, models)
    assert manifest_of(tmp_path / "nodes", 2).digest.hex() == strategy.ledger.rows[2]["train"]["secure"]["manifest"]


def test_a_server_that_was_killed_in_the_middle_of_a_set_up_begins_another(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    settings: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl"}
    for step in ("hello", "lead", "confirm"):
        seen = 0

        def dies(worker: int, message: Message, reply: Message, step: str = step) -> Message:
            nonlocal seen
            seen += is_setup(message.content) and not reply.has_error() and Answer.find_in(reply.content).step == step
            if seen == 3:
                raise KeyboardInterrupt
            return reply

        with pytest.raises(KeyboardInterrupt):
            start(FRC, tmp_path / "nodes", tamper=dies, rounds=2, **settings)
    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=2, **settings)
    rows = [row for row in strategy.ledger.rows if row["train"] is not None]
    assert_near(rows[-2:], FRC, models)
    assert rows[-1]["train"]["secure"]["manifest"] == manifest_of(tmp_path / "nodes", 5).digest.hex()


def test_a_set_up_for_a_new_worker_that_fails_leaves_the_keys_as_they_are(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)

    def refuses(worker: int, message: Message, reply: Message) -> Message:
        content = message.content
        second = is_setup(content) and json.loads(str(content["fl-gradcode.setup"]["json"]))["epoch"] > 1
        return Message(Error(2, "no"), reply_to=message) if second and worker in (1, 5) else reply

    strategy, models = late_run(tmp_path / "nodes", {0}, until=2, tamper=refuses)
    assert_near(strategy.ledger.rows, FRC, models)
    assert [row["train"]["secure"]["epoch"] for row in strategy.ledger.rows] == [1] * 4


# ---- kills ----


def test_a_killed_server_resumes_under_the_same_keys_and_uses_replies_of_both_attempts(tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    enrolled(folder, FRC)
    settings: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt", "ledger": tmp_path / "ledger.jsonl"}
    trained: list[tuple[int, int]] = []
    app = known_app(
        before=lambda shard, message, context: trained.append((int(message.content["config"]["server-round"]), shard))  # type: ignore[arg-type]
    )
    masked = 0

    def dies(worker: int, message: Message, reply: Message) -> Message:
        nonlocal masked
        found = None if reply.has_error() else Reply.find_in(reply.content)
        if found is not None and found.round == 2:
            masked += 1
            if masked == 3:  # in the middle of round 2
                raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        start(FRC, folder, app, rounds=3, tamper=dies, verify=0, **settings)
    before = {shard for number, shard in trained if number == 2}
    trained.clear()
    strategy, models, _ = start(FRC, folder, app, rounds=3, verify=0, **settings)
    rows = strategy.ledger.rows
    assert [row["round"] for row in rows if not row.get("ended-by")] == [1, 2, 3]
    assert {row["train"]["secure"]["epoch"] for row in rows if not row.get("ended-by")} == {1}
    again = [shard for number, shard in trained if number == 2]
    assert before and len(again) < FRC.k * 2 and not {*again} >= {*range(FRC.k)}  # cached replies were used
    assert_near([row for row in rows if row["round"] == 3], FRC, models)


def test_a_damaged_set_up_beside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "nodes", tmp_path / "run.ckpt"
    enrolled(folder, FRC)
    start(FRC, folder, rounds=1, checkpoint=checkpoint)
    saved = tmp_path / "run.ckpt.secagg"
    good = saved.read_text()
    for bad in ("{", "[]", '{"run": "run-1"}', good.replace('"epoch": 1', '"epoch": "1"'), good.replace("hellos", "x")):
        saved.write_text(bad)
        with pytest.raises(InvalidSetting, match="cannot be read"):
            start(FRC, folder, rounds=2, checkpoint=checkpoint)
    saved.unlink()  # without it nodes set up new keys, after the epochs that they remember
    strategy, _, _ = start(FRC, folder, rounds=2, checkpoint=checkpoint)
    assert strategy.ledger.rows[-1]["train"]["secure"]["epoch"] == 2


def test_a_leader_that_dies_in_the_middle_costs_an_epoch(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    dead: set[int] = set()

    def dies(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1 and is_setup(message.content) and not reply.has_error():
            dead.update([1] if Answer.find_in(reply.content).step == "lead" else [])
        return Message(Error(2, "killed"), reply_to=message) if worker in dead else reply

    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=2, tamper=dies)
    assert_near(strategy.ledger.rows, FRC, models)
    assert strategy.ledger.rows[0]["train"]["secure"]["epoch"] == 2


# ---- what the server sees to ----


def test_without_an_allow_list_the_start_and_each_row_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    enrolled(tmp_path / "nodes", FRC, first_use=True)
    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=2)
    assert "There is no allow-list: nodes trust the identities" in caplog.text
    assert [row["train"]["secure"]["setup"] for row in strategy.ledger.rows] == ["first-use"] * 2
    assert_near(strategy.ledger.rows, FRC, models)


def changed(reply: Message, answer: Answer) -> Message:
    reply.content = answer.content()
    return reply


def test_a_node_that_confirms_other_keys_is_named_and_two_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    enrolled(tmp_path / "nodes", FRC)
    liars = {6}

    def lies(worker: int, message: Message, reply: Message) -> Message:
        if worker in liars and is_setup(message.content):
            answer = Answer.find_in(reply.content)
            if answer.confirmation is not None:
                return changed(reply, replace(answer, confirmation=replace(answer.confirmation, manifest="00" * 32)))
        return reply

    strategy, models, _ = start(FRC, tmp_path / "nodes", tamper=lies)
    assert_near(strategy.ledger.rows, FRC, models)
    assert "Worker 6 confirmed other keys in epoch 1 of run run-1 than the server has, and cannot help" in caplog.text
    liars.add(3)
    with pytest.raises(RoundFailed, match=r"Workers 3 and 6 confirmed other keys in epoch 1 of run run-2"):
        start(FRC, tmp_path / "nodes", tamper=lies, run="run-2")


def test_an_epoch_that_too_few_confirm_is_followed_by_another(tmp_path: Path) -> None:
    """Two confirmations are lost, one more than rounds could do without."""
    enrolled(tmp_path / "nodes", FRC)
    left = {2, 5}

    def lose(worker: int, message: Message, reply: Message) -> Message:
        said = worker in left and is_setup(message.content) and not reply.has_error()
        if not said or Answer.find_in(reply.content).step != "confirm":
            return reply
        left.discard(worker)
        return Message(Error(2, "lost"), reply_to=message)

    strategy, _, _ = start(FRC, tmp_path / "nodes", tamper=lose)
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "exact" and row["train"]["secure"]["epoch"] == 2


def test_a_leader_that_gives_no_key_of_its_own_is_left_out_and_harms_no_other_class(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)

    def lies(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1 and is_setup(message.content) and not reply.has_error():
            answer = Answer.find_in(reply.content)
            if answer.step == "lead":
                forged = [replace(answer.classes[0], number=number) for number in range(4)]
                boxes = {(number, to): bytes(48) for number in range(-1, 9) for to in range(-1, 9)}
                return changed(reply, replace(answer, classes=tuple(forged), wraps=boxes))
        return reply

    # Its key of class 1 is genuine; the wraps of class 1 are not, so worker 5 refuses. Other classes are untouched.
    strategy, models, _ = start(FRC, tmp_path / "nodes", tamper=lies)
    assert strategy.ledger.rows[0]["train"]["secure"]["epoch"] == 1
    assert all(manifest_of(tmp_path / "nodes", worker) for worker in (0, 4, 2, 6, 3, 7))

    def silent(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1 and is_setup(message.content) and not reply.has_error():
            answer = Answer.find_in(reply.content)
            return changed(reply, replace(answer, classes=()))
        return reply

    strategy, models, _ = start(FRC, tmp_path / "nodes", tamper=silent, run="run-2")
    assert_near(strategy.ledger.rows, FRC, models)
    assert strategy.ledger.rows[0]["train"]["secure"]["epoch"] == 2
    assert 1 not in strategy.ledger.rows[0]["train"]["used"]


def test_a_node_that_says_hello_as_another_is_left_out(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)

    def lies(worker: int, message: Message, reply: Message) -> Message:
        if worker == 6 and is_setup(message.content) and not reply.has_error():
            answer = Answer.find_in(reply.content)
            if answer.hello is not None:
                return changed(reply, replace(answer, worker=5, hello=replace(answer.hello, worker=5)))
        return reply

    strategy, models, _ = start(FRC, tmp_path / "nodes", tamper=lies, rounds=1)
    assert_near(strategy.ledger.rows, FRC, models)
    hellos = json.dumps(strategy.ledger.rows)
    assert '"epoch": 1' in hellos


def test_too_few_workers_end_the_run_with_the_reasons(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    for worker in (1, 2):
        shutil.rmtree(tmp_path / "nodes" / f"node-{worker}")
        make_identity(tmp_path / "nodes" / f"node-{worker}", worker)
    with pytest.raises(RoundFailed, match=r"Hellos of 6 workers are too few.*no body that its owner agreed to"):
        start(FRC, tmp_path / "nodes")


def test_a_run_name_that_was_used_before_gets_a_later_epoch_and_nobody_answers_a_round_twice(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    before, _, _ = start(FRC, tmp_path / "nodes", rounds=1)
    again, _, _ = start(FRC, tmp_path / "nodes", rounds=1)
    first, second = (strategy.ledger.rows[0]["train"] for strategy in (before, again))
    assert (first["secure"]["epoch"], second["secure"]["epoch"]) == (1, 2)
    assert not {*first["answered"]} & {*second["used"]}


def test_another_loop_is_told_to_use_start(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    strategy = GradientCoding(FedAvg(), FRC, secure=SecureAggregation(tmp_path / "nodes" / "secagg-body.json"))
    with InProcessGrid(known_app(), 8) as grid, pytest.raises(InvalidSetting, match="run the strategy by its start"):
        list(strategy.configure_train(1, initial_arrays(), ConfigRecord({"server-round": 1}), grid))


def test_a_checkpoint_is_of_one_body(tmp_path: Path) -> None:
    folder = tmp_path / "nodes"
    enrolled(folder, FRC)
    start(FRC, folder, rounds=1, checkpoint=tmp_path / "run.ckpt")
    other = tmp_path / "other"
    enrolled(other, FRC, bound=2.0)
    with pytest.raises(InvalidSetting, match="another secure manifest"):
        start(FRC, other, rounds=2, checkpoint=tmp_path / "run.ckpt")


def test_a_node_that_missed_its_confirmation_gets_the_keys_of_the_same_epoch(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    asked = 0

    def lose(worker: int, message: Message, reply: Message) -> Message:
        nonlocal asked
        if worker != 2 or not is_setup(message.content):
            return reply
        step = step_of(message)
        asked += step == "confirm"
        return Message(Error(2, "gone"), reply_to=message) if step == "confirm" and asked == 1 else reply

    def node_is_killed(node: EnrolledNode, request: Any, data: Any) -> Any:
        if node.worker == 2 and request.step == "confirm" and not asked:
            raise SecureRefused("killed")
        return answer(node, request, data)

    answer = EnrolledNode.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnrolledNode, "answer", node_is_killed)
        strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=3, tamper=lose)
    assert_near(strategy.ledger.rows, FRC, models)
    assert [row["train"]["secure"]["epoch"] for row in strategy.ledger.rows] == [1] * 3
    last = strategy.ledger.rows[-1]["train"]
    assert manifest_of(tmp_path / "nodes", 2).digest.hex() == last["secure"]["manifest"] and 2 in last["asked"]


def test_a_node_that_never_confirms_costs_nobody_else_an_epoch(tmp_path: Path) -> None:
    enrolled(tmp_path / "nodes", FRC)
    asked = 0

    def lose(worker: int, message: Message, reply: Message) -> Message:
        nonlocal asked
        if worker != 6 or not is_setup(message.content):
            return reply
        step = step_of(message)
        asked += step == "confirm"
        if step == "hello":  # it never tells that it has keys
            return changed(reply, replace(Answer.find_in(reply.content), confirmation=None))
        return Message(Error(2, "no"), reply_to=message)

    strategy, models, _ = start(FRC, tmp_path / "nodes", rounds=4, tamper=lose)
    assert_near(strategy.ledger.rows, FRC, models)
    assert [row["train"]["secure"]["epoch"] for row in strategy.ledger.rows] == [1] * 4 and asked == 3


@pytest.mark.parametrize("what", ["hello", "class"])
def test_a_key_of_small_order_is_refused_alone_and_named(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a key gives everybody the same secret of zeros, so that nodes refuse the set-up that it is part of."""
    folder = tmp_path / "nodes"
    enrolled(folder, FRC)

    def lies(worker: int, message: Message, reply: Message) -> Message:
        if worker != 1 or not is_setup(message.content) or reply.has_error():
            return reply
        answer, mine = Answer.find_in(reply.content), read_identity(folder / "node-1")
        values = json.loads(str(message.content["fl-gradcode.setup"]["json"]))
        setup = Setup(values["run"], values["epoch"], values["body"])
        if what == "hello" and answer.hello is not None:
            return changed(reply, replace(answer, hello=Hello.signed(setup, mine, bytes([1]) + bytes(31))))
        if what == "class" and answer.classes:
            digest = digest_of([*map(Hello.from_list, values["hellos"])])
            (key,) = answer.classes
            forged = ClassKey.signed(setup, digest, mine, key.number, bytes(32), bytes.fromhex(key.commitment))
            return changed(reply, replace(answer, classes=(forged,)))
        return reply

    strategy, models, _ = start(FRC, folder, tamper=lies)
    (row,) = strategy.ledger.rows
    assert_near([row], FRC, models)
    assert 1 not in row["train"]["used"] and row["train"]["secure"]["epoch"] == (1 if what == "hello" else 2)
    assert all(manifest_of(folder, worker) for worker in range(8) if worker != 1)


def test_a_leader_whose_wraps_most_others_refuse_is_left_out(tmp_path: Path) -> None:
    """The class would have no holder but it otherwise, with a vote on its own update alone."""
    folder = tmp_path / "nodes"
    enrolled(folder, FRC_OF_THREE, min_classes=2)

    def lies(worker: int, message: Message, reply: Message) -> Message:
        if worker == 1 and is_setup(message.content) and not reply.has_error():
            answer = Answer.find_in(reply.content)
            return changed(reply, replace(answer, wraps={at: bytes(48) for at in answer.wraps}))
        return reply

    strategy, models, _ = start(FRC_OF_THREE, folder, tamper=lies)
    (row,) = strategy.ledger.rows
    assert_near([row], FRC_OF_THREE, models)
    assert row["train"]["secure"]["epoch"] == 2 and 1 not in row["train"]["used"]
    assert all(manifest_of(folder, worker) for worker in (0, 2, 3, 4, 5))
