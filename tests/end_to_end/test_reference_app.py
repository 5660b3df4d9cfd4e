"""The repository itself as a Flower app: `flwr run .`, with and without coding, and with settings that cannot work."""

from __future__ import annotations

import json
import logging
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.errors import AppConfigError
from experiments.engine import Engine
from fl_gradcode import FlGradcodeError, Ledger
from fl_gradcode.cli.plan_source import read_source
from fl_gradcode.errors import NotDecodable
from fl_gradcode.planning.planner import make_plan
from fl_gradcode.testing import InProcessGrid
from server.app import _one_sentence, main
from tests.end_to_end.conftest import ROOT, on_engine

NODES = 6
SHORT = {"num-server-rounds": 3, "dataset": "digits"}


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    defaults = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return {**defaults, **settings}


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@on_engine("simulation")
def test_a_run_in_the_engine_learns_as_a_plain_one_and_leaves_times_to_plan_with(
    engine: Engine, tmp_path: Path
) -> None:
    plain = {**SHORT, "num-server-rounds": 5, "strategy": "fedavg", "results": str(tmp_path / "plain.jsonl")}
    run_config = with_defaults(plain)
    with InProcessGrid(client_app, NODES, run_config=run_config) as grid:
        main(grid, Context(1, 0, {}, RecordDict(), run_config))
    ledger = tmp_path / "ledger.jsonl"
    coded = {**plain, "code": "fractional", "stragglers": 2, "results": str(tmp_path / "coded.jsonl")}
    outcome = engine.run(ROOT, {**coded, "send": "adaptive", "ledger": str(ledger)}, timeout=500)
    assert outcome.completed, outcome.log
    expected, actual = results(tmp_path / "plain.jsonl"), results(tmp_path / "coded.jsonl")
    assert [row["round"] for row in actual] == [row["round"] for row in expected] == [*range(6)]
    for one, other in zip(actual, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=1e-5)
    assert actual[-1]["loss"] < actual[0]["loss"], "nothing was learnt"
    rows = Ledger.read(ledger)
    assert [row["train"]["outcome"] for row in rows] == ["exact"] * 5
    assert rows[0]["way"] == {"send": "shards", "patience": 2.0, "load": 1}
    timings = [one for row in rows for one in row["train"]["timings"] if one["worker"] is not None]
    # Two cores serve six nodes: whoever is never served before a round ends leaves no time.
    assert len({one["worker"] for one in timings}) >= NODES - 2
    assert all(0 < one["computing"] < one["seconds"] and one["shards"] >= 1 for one in timings)
    source = read_source(str(ledger))
    plan = make_plan(source.latency, NODES, tolerances=[1, 2], rounds=20, populations=1)
    assert source.n == NODES and 0 < plan.lines[0].steady < 60


@pytest.mark.slow
@on_engine("fleet")
def test_a_setting_that_cannot_work_is_told_in_one_sentence(engine: Engine) -> None:
    outcome = engine.run(ROOT, {**SHORT, "code": "bogus"}, timeout=400)
    assert outcome.status == "finished:failed"
    sentence = "code='bogus' is not known; choose one of none, uncoded, fractional, cyclic, universal, reed-solomon."
    assert outcome.log.count(sentence) == 1, outcome.log
    assert "Traceback" not in outcome.log


@pytest.mark.parametrize("kind", [AppConfigError, NotDecodable])
def test_mistakes_are_logged_as_a_sentence_and_bugs_with_their_traceback(kind: type[Exception]) -> None:
    told = {}
    for error in (kind("3 of 4 workers."), RuntimeError("a bug")):
        record = logging.makeLogRecord({"msg": "ServerApp failed", "exc_info": (type(error), error, None)})
        assert _one_sentence(record)
        told[type(error)] = logging.Formatter().format(record)
    assert told[kind] == "3 of 4 workers."
    assert told[RuntimeError].startswith("ServerApp failed") and "RuntimeError: a bug" in told[RuntimeError]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown code": ({"code": "bogus"}, AppConfigError, "code='bogus' is not known; choose one of none, "),
    "unknown strategy": ({"strategy": "krum"}, AppConfigError, "strategy='krum' is not known; choose one of fedavg, "),
    "unknown data set": ({"dataset": "nope"}, AppConfigError, "There is no data set 'nope'; dataset is one of "),
    "unknown model": ({"model": "llm"}, AppConfigError, "There is no model 'llm'; model is one of logistic, cnn"),
    "unknown partitioner": ({"partitioner": "zigzag"}, AppConfigError, "'zigzag'"),
    "missing folder": (
        {"dataset": "mnist", "data-dir": "/nowhere/at/all"},
        AppConfigError,
        "data-dir is '/nowhere/at/all', and there is no such folder",
    ),
    "relative ledger": (
        {"code": "fractional", "ledger": "ledger.jsonl"},
        AppConfigError,
        "ledger='ledger.jsonl' is a relative path",
    ),
    "relative checkpoint": (
        {"code": "fractional", "checkpoint": "run.ckpt"},
        AppConfigError,
        "checkpoint='run.ckpt' is a relative path",
    ),
    "checkpoint without a code": (
        {"checkpoint": "/tmp/run.ckpt"},
        AppConfigError,
        "checkpoint= is written by a coded run",
    ),
    "ledger without a code": ({"ledger": "/tmp/ledger.jsonl"}, AppConfigError, "ledger= is written by a coded run"),
    "fewer clients than nodes": (
        {"code": "fractional", "num-clients": 4},
        FlGradcodeError,
        "6 nodes are online, but the code has n=4 workers. Build the code for 6, or for as many as there are shards.",
    ),
    "more clients than nodes": (
        {"code": "fractional", "num-clients": 9},
        FlGradcodeError,
        "6 nodes are online after 0 s; the code has n=9 workers and needs at least n - s = 8.",
    ),
    "more stragglers than clients": ({"code": "cyclic", "stragglers": 6}, FlGradcodeError, "s=6"),
    "capacities that do not suffice": (
        {"code": "universal", "stragglers": 2, "capacities": "3,3,3,3,3,2"},
        FlGradcodeError,
        "need 18",
    ),
    "capacities for other clients": (
        {"code": "universal", "capacities": "3,3,3"},
        AppConfigError,
        "capacities='3,3,3' are 3 numbers; there are 6 clients.",
    ),
    "capacities that are no numbers": (
        {"code": "reed-solomon", "capacities": "3;3"},
        AppConfigError,
        "capacities='3;3' must be whole numbers with commas between",
    ),
    "a shorter upload than the code can have": (
        {"code": "cyclic", "upload-reduction": 2},
        AppConfigError,
        "upload-reduction=2 needs code 'fractional', 'universal' or 'reed-solomon', not 'cyclic'.",
    ),
    "shards under a field": (
        {"code": "reed-solomon", "send": "shards"},
        FlGradcodeError,
        "send='shards' sends plain updates",
    ),
    "no noise": (
        {"dp": "shared", "code": "fractional"},
        AppConfigError,
        "takes either noise-multiplier or target-epsilon",
    ),
    "two wishes": (
        {"dp": "shared", "code": "fractional", "noise-multiplier": 1.0, "target-epsilon": 1.0},
        AppConfigError,
        "takes either noise-multiplier or target-epsilon",
    ),
    "unknown privacy": ({"dp": "magic"}, AppConfigError, "dp='magic' is not known; choose one of none, shared"),
    "central without a code": (
        {"dp": "central", "noise-multiplier": 1.0, "code": "none"},
        AppConfigError,
        "adds its noise after decoding: choose a code",
    ),
    "private fedprox": (
        {"dp": "shared", "noise-multiplier": 1.0, "strategy": "fedprox"},
        AppConfigError,
        "Private training has no proximal term",
    ),
    "sample rate": (
        {"dp": "shared", "noise-multiplier": 1.0, "code": "fractional", "sample-rate": 2.0},
        FlGradcodeError,
        "sample_rate=2.0 must be a number from",
    ),
    "relative keys": (
        {"dp": "shared", "noise-multiplier": 1.0, "code": "fractional", "privacy-dir": "keys"},
        AppConfigError,
        "privacy-dir='keys' is a relative path",
    ),
    "text for a number": ({"stragglers": "two"}, AppConfigError, "stragglers='two' must be a whole number."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused_by_name_before_anything_is_sent(case: str) -> None:
    wrong, kind, sentence = WRONG[case]
    config = with_defaults({**SHORT, **wrong})
    with InProcessGrid(client_app, NODES, run_config=config) as grid:
        with pytest.raises(kind, match=re.escape(sentence)) as caught:
            main(grid, Context(1, 0, {}, RecordDict(), config))
        assert grid.calls == [0] * NODES
    assert "\n" not in str(caught.value)
