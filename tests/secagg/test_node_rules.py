"""What a node with a `secagg-dir` refuses, what binds its reply, and the settings that the server refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from fl_gradcode import Discovered, GradientCoding, cyclic_repetition, fractional_repetition
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import FlGradcodeError, InvalidCode, InvalidSetting, NotCertified, PrivacyRefused, SecureRefused
from fl_gradcode.placement import Manifest as DataManifest
from fl_gradcode.privacy import DPSGD, CentralNoise, IntegerNoise, privacy_to_json
from fl_gradcode.protocol import Plan, Reply, probe_content
from fl_gradcode.secagg import MANIFEST_FILE, SecureAggregation, deal, make_body
from tests.codes.samples import at_small_points
from tests.secagg.rounds import ARRAYS, METRICS, ask, copy_of, dealt, known_app, start

FRC = fractional_repetition(8, 1)
INTEGER = IntegerNoise(noise_multiplier=2.0, clipping_norm=1.0)
W = 2  # the worker that is asked, who holds a class of two shards with worker 6


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecordDict]:
    """Nodes that have answered nothing, and what worker W is sent in round 1."""
    folder = tmp_path_factory.mktemp("nodes")
    dealt(folder / "fresh", FRC, colluders=1)
    copy_of(folder / "fresh", folder / "used")
    sent: dict[int, RecordDict] = {}

    def keep(worker: int, message: Message, reply: Message) -> Message:
        sent[worker] = message.content
        return reply

    start(FRC, folder / "used", tamper=keep, verify=0)
    assert W in sent or W + 4 in sent
    content = sent.get(W) or sent[W + 4]
    plan = Plan.find_in(content)
    assert plan is not None
    rows = {W: next(iter(plan.rows.values()))}
    return folder / "fresh", replace(plan, rows=rows).add_to(Plan.remove_from(content))


@pytest.fixture
def node(asked: tuple[Path, RecordDict], tmp_path: Path) -> Path:
    return copy_of(asked[0], tmp_path / "nodes")


def changed(content: RecordDict, **plan: Any) -> RecordDict:
    """The same message with other fields in its plan."""
    found = Plan.find_in(content)
    assert found is not None
    return replace(found, **plan).add_to(Plan.remove_from(content))


def request_in(reply: Message) -> str:
    found = Reply.find_in(reply.content)
    assert found is not None and found.outcome == "masked"
    return found.request


def words_in(reply: Message) -> np.ndarray:
    record: Any = reply.content["fl-gradcode.update"]
    return np.asarray(record["masked"].numpy())


def refused(node: Path, content: RecordDict | None, match: str, kind: str = "secure-refused", **how: Any) -> None:
    """Nothing is sent, nothing is trained, and the server reads the kind."""
    trained: list[int] = []
    app = known_app(before=lambda shard, message, context: trained.append(shard))
    with pytest.raises(FlGradcodeError, match=match) as error:
        ask(app, node, W, content, **how)
    assert str(error.value).startswith(f"fl-gradcode/{kind}: ")
    assert not trained


# ---- refusals ----


def test_a_node_answers_nothing_unmasked(node: Path, asked: tuple[Path, RecordDict]) -> None:
    content = asked[1]
    plain = Plan.remove_from(content)
    refused(node, plain, "answers nothing unmasked")
    refused(node, changed(content, secure=""), "answers nothing unmasked")
    refused(node, None, "answers nothing unmasked")
    refused(node, plain, "answers nothing unmasked", message_type="evaluate")
    refused(node, plain, "answers nothing unmasked", message_type="query")
    refused(
        node, changed(content, secure="", kind="evaluate", arrays_key=""), "nothing unmasked", message_type="evaluate"
    )
    masked_evaluation = changed(content, kind="evaluate", arrays_key="")
    refused(node, masked_evaluation, "covers training", message_type="evaluate")


def test_a_probe_is_told_the_worker_s_number_alone(node: Path) -> None:
    reply = Reply.find_in(ask(known_app(), node, W, probe_content()).content)
    assert reply is not None and reply.worker == W and reply.holds == () and reply.shards == ()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"secure": "00" * 32}, "another manifest"),
        ({"n": 9}, "other workers, shards or weights"),
        ({"k": 4}, "other workers, shards or weights"),
        ({"weight_key": "w"}, "other workers, shards or weights"),
        ({"figures": True}, "does not combine"),
        ({"open": True}, "does not combine"),
        ({"as_returned": True}, "does not combine"),
        ({"privacy": privacy_to_json(INTEGER)}, "without integer noise"),
        ({"rows": {}}, "whole classes"),
        ({"round": "1"}, "whole numbers"),
        ({"seed": 0.5}, "whole numbers"),
    ],
    ids=str,
)
def test_a_plan_that_asks_for_anything_else_is_refused(
    node: Path, asked: tuple[Path, RecordDict], change: dict[str, Any], match: str
) -> None:
    refused(node, changed(asked[1], **change), match)


def test_part_of_a_class_is_refused(node: Path, asked: tuple[Path, RecordDict]) -> None:
    plan = Plan.find_in(asked[1])
    assert plan is not None
    row = plan.rows[W]
    part = replace(row, shards=row.shards[:1], coefficients=row.coefficients[:1])
    refused(node, changed(asked[1], rows={W: part}), "not asked for its whole classes")
    other = replace(row, shards=(0, 1))
    refused(node, changed(asked[1], rows={W: other}), "not asked for its whole classes")


def test_a_record_of_our_name_is_refused(node: Path, asked: tuple[Path, RecordDict]) -> None:
    refused(node, RecordDict({**asked[1], "fl-gradcode.decoy": ConfigRecord({"x": 1})}), "besides its plan")


def test_the_owner_s_own_requirements_are_checked_by_the_node(node: Path, asked: tuple[Path, RecordDict]) -> None:
    content = asked[1]
    refused(node, content, "as this node's owner requires", node_config={"secagg-colluders": 3})
    refused(node, content, "as this node's owner requires", node_config={"secagg-min-classes": 5})
    # A certificate for less is no certificate for more.
    ask(known_app(), node, W, content, node_config={"secagg-colluders": 1, "secagg-min-classes": 3})
    refused(node, content, "as this node's owner requires", node_config={"secagg-colluders": 3})
    refused(node, content, "must be a whole number", "invalid-setting", node_config={"secagg-colluders": "2"})


def test_the_number_of_requests_is_the_owner_s(node: Path, asked: tuple[Path, RecordDict]) -> None:
    content = asked[1]
    most = {"secagg-max-requests": 1}
    ask(known_app(), node, W, content, node_config=most)
    ask(known_app(), node, W, content, node_config=most)  # the same request
    refused(node, changed(content, run="another name"), "as many as its owner allows", node_config=most)


def test_other_data_or_another_environment_are_refused(tmp_path: Path, asked: tuple[Path, RecordDict]) -> None:
    content = asked[1]
    for name, settings, match in (
        ("data", {"data": {j: f"{j:064x}" for j in range(8)}}, "are not those that the manifest was made for"),
        ("version", {"versions": {"numpy": "0.1"}}, "pins numpy 0.1"),
        ("machine", {"environment": ["machine=abacus"]}, "pins the environment 'machine=abacus'"),
        ("app", {"app": "00" * 32}, "cannot do"),
    ):
        manifest = dealt(tmp_path / name, FRC, **settings)
        refused(tmp_path / name, changed(content, secure=manifest.digest.hex()), match)


def test_changed_files_of_a_shard_are_refused_without_a_number(tmp_path: Path, asked: tuple[Path, RecordDict]) -> None:
    for shard in range(8):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / f"shard-{shard}.csv").write_text(f"{shard},1\n" * 10)
    place = f"place {tmp_path / 'shards'} {tmp_path / 'placed'} --workers 8 --s 1"
    assert CliRunner().invoke(command_line, place.split()).exit_code == 0
    data = DataManifest.for_all_shards(tmp_path / "placed" / "manifest.json", 8).digests
    manifest = dealt(tmp_path / "keys", FRC, data=dict(data))
    content, placed = changed(asked[1], secure=manifest.digest.hex()), tmp_path / "placed" / f"node-{W}"
    assert request_in(ask(known_app(), tmp_path / "keys", W, content, node_config={"shards-dir": str(placed)}))
    refused(tmp_path / "keys", changed(content, round=2), "are not those that the manifest was made for")
    other = tmp_path / "placed" / "node-3"
    refused(tmp_path / "keys", changed(content, round=2), "The data of", node_config={"shards-dir": str(other)})
    file = next(placed.glob("shard-*.csv"))
    file.chmod(0o600)
    file.write_text("9,9\n")
    refused(tmp_path / "keys", changed(content, round=2), r"shards-dir\.$", node_config={"shards-dir": str(placed)})


def test_a_folder_of_another_worker_or_with_others_keys_is_refused(
    node: Path, tmp_path: Path, asked: tuple[Path, RecordDict]
) -> None:
    refused(node, asked[1], "has the keys of worker 3", node_config={"secagg-dir": str(node / "node-3")})
    dealt(tmp_path / "others", FRC, colluders=1)
    keys = node / f"node-{W}" / "keys.json"
    keys.write_bytes((tmp_path / "others" / f"node-{W}" / "keys.json").read_bytes())
    refused(node, asked[1], "another public key")


def test_a_server_does_not_choose_where_a_node_reads(node: Path, asked: tuple[Path, RecordDict]) -> None:
    none = {"secagg-dir": ""}
    refused(
        node,
        asked[1],
        "only simulations use",
        "invalid-setting",
        node_config=none,
        run_config={"secagg-dir": str(node)},
    )
    refused(node, asked[1], "no secagg-dir in its node config", node_config=none)


def test_a_private_node_is_not_asked_without_noise(node: Path, asked: tuple[Path, RecordDict]) -> None:
    with pytest.raises(PrivacyRefused):
        ask(known_app(), node, W, asked[1], node_config={"max-epsilon": 1.0})


# ---- the request digest, the ledger and the cache ----


def test_the_same_request_gets_the_same_bytes_without_training_and_any_other_is_refused(
    node: Path, asked: tuple[Path, RecordDict]
) -> None:
    content = asked[1]
    trained: list[int] = []
    app = known_app(before=lambda shard, message, context: trained.append(shard))
    first = ask(app, node, W, content)
    again = ask(app, node, W, content)
    assert (words_in(first) == words_in(again)).all() and request_in(first) == request_in(again)
    assert len(trained) == 2  # its two shards, once
    other_order = RecordDict({name: content[name] for name in reversed([*content])})
    assert (words_in(ask(app, node, W, other_order)) == words_in(first)).all()

    arrays: Any = content["arrays"]
    model = ArrayRecord({**arrays, "1": type(arrays["1"])(arrays["1"].numpy() + 1)})
    config: Any = content["config"]
    different = {
        "model": RecordDict({**content, "arrays": model}),
        "config": RecordDict({**content, "config": ConfigRecord({**config, "rate": 0.1})}),
        "type": RecordDict({**content, "config": ConfigRecord({**config, "server-round": 1.0})}),
        "decoy": RecordDict({**content, "decoy": arrays}),
        "arrays_key": changed(RecordDict({**content, "decoy": arrays}), arrays_key="decoy"),
        "seed": changed(content, seed=1),
        "fixed": changed(content, allow_fixed_data=True),
    }
    for one in different.values():
        refused(node, one, "Another request for round 1")
    refused(node, content, "Another request for round 1", run_config={"rate": 0.1})
    refused(node, content, "Another request for round 1", message_type="train.other")
    later = changed(content, round=3)
    assert request_in(ask(app, node, W, later)) != request_in(first)
    refused(node, changed(content, round=2), "later round")


def test_holders_that_are_sent_different_models_give_a_server_nothing(
    asked: tuple[Path, RecordDict], tmp_path: Path
) -> None:
    """A decoy whose arrays clip everywhere would show the update itself, if its mask were the same."""
    content = asked[1]
    arrays: Any = content["arrays"]
    decoy = ArrayRecord({name: type(one)(one.numpy() + np.float32(1e6)) for name, one in arrays.items()})
    both = RecordDict({**content, "decoy": decoy})
    nodes = copy_of(asked[0], tmp_path / "nodes")
    plan = Plan.find_in(content)
    assert plan is not None
    one = ask(known_app(), nodes, W, both)
    other = ask(known_app(), nodes, W + 4, changed(both, arrays_key="decoy", rows={W + 4: plan.rows[W]}))
    assert request_in(one) != request_in(other)
    apart = np.abs((words_in(one) - words_in(other)).view(np.int32).astype(np.float64))
    assert np.median(apart) > 2.0**27  # of 2^31: no small difference


def test_what_an_app_keeps_is_thrown_away(node: Path, asked: tuple[Path, RecordDict]) -> None:
    seen: list[list[str]] = []

    def keep(shard: int, message: Message, context: Context) -> None:
        seen.append([*context.state])
        context.state["momentum"] = ConfigRecord({"x": 1})

    app = known_app(before=keep)
    ask(app, node, W, asked[1])
    ask(app, node, W, changed(asked[1], round=2))
    assert len(seen) == 4 and not any(seen)


def test_an_unforeseen_failure_tells_its_kind_alone(
    node: Path, asked: tuple[Path, RecordDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_gradcode.client import masked_call

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the data are 0.25")

    monkeypatch.setattr(masked_call, "masked_reply", fail)
    with pytest.raises(SecureRefused) as error:
        ask(known_app(), node, W, asked[1])
    assert "RuntimeError" in str(error.value) and "0.25" not in str(error.value)


# ---- the server's settings ----


def secure_of(folder: Path, code: Any = FRC, **settings: Any) -> SecureAggregation:
    return SecureAggregation(dealt(folder, code, **settings))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"send": "shards"}, "has a manifest for send='coded'.*--send shards"),
        ({"send": "adaptive"}, "choose send='coded'"),
        ({"on_undecodable": "approximate"}, "exact sum or nothing"),
        ({"on_disagreement": "skip"}, "leave on_disagreement= out"),
        (
            {"privacy": DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, steps=1, noise="independent")},
            "difference would show noise in clear",
        ),
        ({"privacy": CentralNoise(noise_multiplier=1.0, clipping_norm=1.0)}, "metrics of training"),
        ({"privacy": INTEGER}, "make one with .*--noise-multiplier 2 --clipping-norm 1"),
    ],
    ids=str,
)
def test_what_masks_do_not_combine_with_is_refused_with_one_sentence(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    code = fractional_repetition(9, 2)
    with pytest.raises(InvalidSetting, match=match):
        GradientCoding(FedAvg(), code, secure=secure_of(tmp_path, code), **options)


def test_other_codes_and_sampling_are_refused(tmp_path: Path) -> None:
    secure = secure_of(tmp_path / "frc")
    with pytest.raises(InvalidSetting, match="made for another code"):
        GradientCoding(FedAvg(), fractional_repetition(8, 3), secure=secure)
    with pytest.raises(InvalidCode, match="over the reals"):
        GradientCoding(FedAvg(), cyclic_repetition(8, 1, rng=np.random.default_rng(0)), secure=secure)
    with pytest.raises(InvalidSetting, match="another code"):
        GradientCoding(FedAvg(), reed_solomon(8, 1), secure=secure)
    earlier = secure_of(tmp_path / "earlier", at_small_points(8, 1))
    GradientCoding(FedAvg(), at_small_points(8, 1), secure=earlier)
    with pytest.raises(InvalidSetting, match=r"m=1, as this one, but other holders or coefficients\. Make a manifest"):
        GradientCoding(FedAvg(), reed_solomon(8, 1), secure=earlier)
    with pytest.raises(InvalidSetting, match="Discovered"):
        GradientCoding(FedAvg(), Discovered(8), secure=secure)
    with pytest.raises(InvalidSetting, match=r"fraction_train=0\.5"):
        GradientCoding(FedAvg(fraction_train=0.5), FRC, secure=secure)


def test_manifests_that_no_run_can_use_are_refused(tmp_path: Path) -> None:
    for name, settings, match in (
        ("cohorts", {"cohorts": 2, "min_classes": 2}, "2 cohorts"),
        ("counter", {"arrays": [("steps", "int64", ())]}, "clipped counters"),
        ("order", {"metrics": [("b", -1), ("a", -1)]}, "sorted by name"),
        ("evaluation", {"evaluation": [("b", -1), ("a", -1)]}, "sorted by name"),
    ):
        with pytest.raises(InvalidSetting, match=match):
            secure_of(tmp_path / name, **settings)
    with pytest.raises(NotCertified):
        SecureAggregation(dealt(tmp_path / "few", FRC), colluders=3)
    with pytest.raises(InvalidSetting, match="cannot be read"):
        SecureAggregation(tmp_path / "nothing.json")
    assert SecureAggregation(tmp_path / "few" / "node-0" / MANIFEST_FILE).body.classes.n == 8


def test_a_run_goes_on_under_its_own_manifest_only(tmp_path: Path) -> None:
    dealt(tmp_path / "nodes", FRC)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "run.ckpt"}
    start(FRC, tmp_path / "nodes", rounds=1, **kept)
    deal(tmp_path / "nodes", make_body(FRC, arrays=ARRAYS, metrics=METRICS, colluders=0, bound=2.0, largest_weight=16))
    with pytest.raises(InvalidSetting, match="another secure manifest"):
        start(FRC, tmp_path / "nodes", rounds=2, **kept)


def test_a_reply_under_another_manifest_or_without_masks_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dealt(tmp_path, FRC)

    def meddle(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.reply"]
        told = json.loads(record["json"])
        change = {0: {"manifest": "00" * 32}, 1: {"request": "zz"}, 2: {"seconds": [1.0]}, 3: {"outcome": "coded"}}
        told |= change.get(worker % 4, {})
        record["json"] = json.dumps(told)
        return reply

    strategy, _, _ = start(FRC, tmp_path, tamper=meddle)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "skipped"
    reasons = {one["worker"]: (one["kind"], one["reason"]) for one in train["rejected"] if one["worker"] is not None}
    assert any("another manifest" in reason for _, reason in reasons.values())
    assert {kind for kind, _ in reasons.values()} <= {"layout", "unreadable", "wrong-shards"}


def test_a_node_that_got_another_request_is_named_and_the_others_decode(tmp_path: Path) -> None:
    """The odd one's masks belong to another request, and its reply goes into no sum with the others'."""
    dealt(tmp_path, FRC)
    first: list[int] = []

    def another(worker: int, message: Message, reply: Message) -> Message:
        record: Any = reply.content["fl-gradcode.reply"]
        if not first or worker == first[0]:
            first[:] = [worker]
            record["json"] = json.dumps({**json.loads(record["json"]), "request": "11" * 32})
        return reply

    strategy, _, _ = start(FRC, tmp_path, tamper=another)
    train = strategy.ledger.rows[0]["train"]
    assert train["outcome"] == "exact" and first[0] not in train["used"]
    assert [one["worker"] for one in train["rejected"]] == first and "another request" in train["rejected"][0]["reason"]
