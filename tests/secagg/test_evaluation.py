"""Masked evaluation: the server learns the mean of the metrics over all shards, and nodes answer no other one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCode, GradientCoding, fractional_repetition
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import InvalidSetting, SecureRefused
from fl_gradcode.latency import Latency, lognormal
from fl_gradcode.privacy import IntegerNoise
from fl_gradcode.protocol import Plan
from fl_gradcode.secagg import SecureAggregation, decode, make_body
from tests.secagg.rounds import ARRAYS, ask, dealt, known_app, start
from tests.secagg.samples import body_of, replies_of, results_for, sealed

FRC = fractional_repetition(8, 1)
EVALUATION = [("accuracy", -1), ("per-class", 2)]
CASES = [
    (FRC, "coded"),
    (FRC, "shardwise"),
    (reed_solomon(6, 2), "coded"),
    (reed_solomon(6, 1, m=2), "coded"),
]


def evaluated(shard: int, message: Message) -> MetricRecord:
    config: Any = message.content["config"]
    metrics = MetricRecord({"accuracy": shard / 7, "per-class": [float(shard), float(config["server-round"])]})
    metrics["num-examples"] = 1000 * (shard + 1)  # more than the largest weight of training
    return metrics


@pytest.mark.parametrize(("code", "sending"), CASES, ids=str)
def test_the_metrics_are_the_weighted_means_over_all_shards(tmp_path: Path, code: GradientCode, sending: Any) -> None:
    dealt(tmp_path, code, sending=sending, evaluation=EVALUATION)
    latency = Latency(compute=lognormal(1.0, 0.8))
    strategy, _, result = start(code, tmp_path, known_app(evaluated=evaluated), rounds=2, latency=latency)
    weights = [shard + 1 for shard in range(code.k)]
    mean = sum(w * j for j, w in enumerate(weights)) / sum(weights)
    for number in (1, 2):
        found = result.evaluate_metrics_clientapp[number]
        assert found["accuracy"] == pytest.approx(mean / 7, abs=1e-9)
        assert found["per-class"] == pytest.approx([mean, number], abs=1e-9)
    for row in strategy.ledger.rows:
        assert row["train"]["outcome"] == row["evaluate"]["outcome"] == "exact"
        assert row["evaluate"]["secure"]["request"] != row["train"]["secure"]["request"]
        assert row["evaluate"]["quantisation-error"] < 1e-12


def test_a_reply_to_an_evaluation_has_no_number_in_clear(tmp_path: Path) -> None:
    dealt(tmp_path, FRC, evaluation=EVALUATION)
    told: list[dict[str, Any]] = []
    sizes: set[int] = set()

    def keep(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.reply"]
        values = json.loads(record["json"])
        if values["kind"] == "evaluate":
            assert {*reply.content} == {"fl-gradcode.reply", "fl-gradcode.update"}
            told.append(values)
            update: Any = reply.content["fl-gradcode.update"]
            sizes.add(update["masked"].numpy().size)
        return reply

    start(FRC, tmp_path, known_app(evaluated=evaluated), tamper=keep)
    assert told and all(
        {*one} == {*("run", "round", "kind", "worker", "outcome", "shards", "manifest", "request", "simulated", "tags")}
        for one in told
    )
    assert sizes == {6 * (2 + 3) + 4 + 1}


def test_an_evaluation_that_fails_on_a_shard_shows_only_in_the_sum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(shard: int, message: Message) -> MetricRecord:
        if shard == 5:
            raise RuntimeError("the data are 0.25")
        return evaluated(shard, message)

    dealt(tmp_path, FRC, evaluation=EVALUATION)
    strategy, _, _ = start(FRC, tmp_path, known_app(evaluated=fails))
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "exact" and row["evaluate"]["outcome"] == "skipped"
    assert row["evaluate"]["rejected"] == [] and "1 of 8 shards failed" in caplog.text


def test_a_metric_that_is_not_finite_makes_its_mean_nan_alone() -> None:
    body = body_of(FRC, evaluation=EVALUATION)
    results = results_for(body)
    found = {j: type(one)(one.update[:0], 2.0, one.update[:3].astype(float)) for j, one in results.items()}
    found[4].metrics[1] = math.inf
    manifest = sealed(body)
    (total,) = decode(manifest, replies_of(manifest, found, kind="evaluate"))
    assert total.weight == 16 and total.integers.size == 0
    assert math.isnan(total.metrics[1])
    assert total.metrics[0] == pytest.approx(sum(one.metrics[0] for one in found.values()), abs=1e-8)


def test_without_it_in_the_manifest_nodes_are_not_asked_and_refuse(tmp_path: Path) -> None:
    sent: list[Any] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent.append((worker, message.content))
        return reply

    dealt(tmp_path / "nodes", FRC)
    strategy, _, _ = start(FRC, tmp_path / "nodes", tamper=keep)
    assert strategy.ledger.rows[0]["evaluate"] is None
    worker, content = sent[0]
    plan = Plan.find_in(content)
    assert plan is not None
    other = Plan(**{**vars(plan), "kind": "evaluate", "arrays_key": ""}).add_to(Plan.remove_from(content))
    with pytest.raises(SecureRefused, match="covers training alone"):
        ask(known_app(evaluated=evaluated), tmp_path / "nodes", worker, other, message_type="evaluate")


def test_a_node_evaluates_only_what_the_manifest_says(tmp_path: Path) -> None:
    """A message of the other kind is refused, as are other metrics, which fail the shard."""
    dealt(tmp_path, FRC, evaluation=EVALUATION)
    sent: list[Any] = []

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent.append((worker, message.content, message.metadata.message_type))
        return reply

    start(FRC, tmp_path, known_app(evaluated=evaluated), tamper=keep, run="other")
    for worker, content, kind in sent:
        wrong = "train" if kind == "evaluate" else "evaluate"
        with pytest.raises(SecureRefused, match="and the message does not"):
            ask(known_app(evaluated=evaluated), tmp_path, worker, content, message_type=wrong)
    strategy, _, _ = start(
        FRC, tmp_path, known_app(evaluated=lambda shard, message: MetricRecord({"num-examples": 1, "accuracy": 0.5}))
    )
    assert strategy.ledger.rows[0]["evaluate"]["outcome"] == "skipped"


def test_sampling_of_evaluations_and_noise_are_refused(tmp_path: Path) -> None:
    secure = SecureAggregation(dealt(tmp_path, FRC, evaluation=EVALUATION))
    with pytest.raises(InvalidSetting, match=r"fraction_evaluate=0\.5"):
        GradientCoding(FedAvg(fraction_evaluate=0.5), FRC, secure=secure)
    GradientCoding(FedAvg(fraction_evaluate=0.0), FRC, secure=secure)
    noise = IntegerNoise(noise_multiplier=1.0, clipping_norm=1.0)
    with pytest.raises(InvalidSetting, match="no metric leaves a node"):
        make_body(FRC, arrays=ARRAYS, evaluation=EVALUATION, privacy=noise)
