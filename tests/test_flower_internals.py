"""The installed Flower still has each detail that `_flower_internals` relies on."""

from __future__ import annotations

import ast
import functools
import importlib
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flwr
import flwr.clientapp.mod
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fl_gradcode._flower_internals import (
    CLIPPING_MODS,
    FLOWER_MODULES_WITH_JITTER,
    WhenImported,
    caller_among,
    clipping_mods_around_or_inside,
    inside_a_run,
    is_legacy_server,
    isolate_flower_random,
    message_like,
    mods_around,
    mods_of,
    number_message,
    reply_in_process,
    with_entry,
)
from fl_gradcode.strategy.wrapped import PRIVACY_WRAPPERS

FLOWER = Path(flwr.__file__).parent
#: Flower's other mods, which leave replies as they are.
HARMLESS_MODS = {"arrays_size_mod", "message_size_mod"}
#: Modules that draw from the global generator and may: where clients are sampled, a run has to repeat.
DRAWS_FOR_THE_USER = {
    "flwr.serverapp.strategy.strategy_utils",
    "flwr.server.client_manager",
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
    "flwr.supercore.task_process.agent.grid",
}


# Mods


def test_flower_has_no_other_mods() -> None:
    assert {*flwr.clientapp.mod.__all__} == {*CLIPPING_MODS} | HARMLESS_MODS


def chain(*mods: Any) -> list[str]:
    """What is found by a mod that stands between others in an app of Flower's."""
    found: list[str] = []

    def looking(message: Message, context: Context, call_next: Any) -> Message:
        found.extend(clipping_mods_around_or_inside(call_next))
        raise StopIteration

    app = ClientApp(mods=[looking if mod is ... else mod for mod in mods])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise AssertionError

    with inside_a_run():
        arrays = ArrayRecord([np.zeros(2, np.float32)])
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"clipping_norm": 1.0})})
        with pytest.raises(StopIteration):
            app(Message(content, dst_node_id=1, message_type="train"), Context(1, 1, {}, RecordDict(), {}))
    return found


def test_a_mod_finds_the_mods_before_it_and_an_app_says_which_it_lists() -> None:
    found: list[list[str]] = []

    def looking(message: Message, context: Context, call_next: Any) -> Message:
        found.append(mods_around())
        return Message(RecordDict(), reply_to=message)

    cases: list[tuple[list[Any], list[Any], list[str]]] = [
        ([passing, looking], [], ["passing"]),
        ([looking, passing], [], []),
        ([passing, flwr.clientapp.mod.message_size_mod, looking], [], ["passing"]),
        ([passing], [looking], ["passing"]),
        ([], [looking], []),
    ]
    with inside_a_run():
        message = Message(RecordDict(), dst_node_id=1, message_type="train.more")
        for mods, more, expected in cases:
            app = ClientApp(mods=[*mods])
            app.train("more", mods=[*more])(lambda message, context: message)
            app(message, Context(1, 1, {}, RecordDict(), {}))
            assert found.pop() == expected
            assert mods_of(app, "train.more") == [mod.__name__ for mod in [*mods, *more]]
    assert mods_of(passing, "train") == []


def passing(message: Message, context: Context, call_next: Any) -> Message:
    return call_next(message, context)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CLIPPING_MODS)
def test_a_mod_finds_clipping_mods_before_and_behind_it(name: str) -> None:
    mod: Any = getattr(flwr.clientapp.mod, name)
    if name == "LocalDpMod":
        mod = mod(1.0, 1.0, 1.0, 1e-5)
    assert chain(passing, mod, passing, ..., passing) == [name]
    assert chain(passing, ..., passing, functools.partial(mod), passing) == [name]
    assert chain(passing, ..., passing) == []


def old_client(context: Context) -> Any:
    raise AssertionError


def old_server(context: Context) -> Any:
    raise AssertionError


def test_the_legacy_interface_is_told_apart() -> None:
    assert mods_of(ClientApp(client_fn=old_client), "train") is None
    assert is_legacy_server(ServerApp(server_fn=old_server)) and not is_legacy_server(ServerApp())


# Wrappers


def test_flower_has_no_other_privacy_wrappers() -> None:
    assert {kind.__name__ for kind in PRIVACY_WRAPPERS} == {n for n in flower.__all__ if n.startswith("Diff")}


class Looking(FedAvg):
    found: object | None = None

    def configure_train(self, *args: Any) -> Any:
        self.found = caller_among(PRIVACY_WRAPPERS)
        return []


WRAPPERS: list[Callable[[Strategy], Any]] = [
    lambda s: flower.DifferentialPrivacyServerSideFixedClipping(s, 1.0, 1.0, 6),
    lambda s: flower.DifferentialPrivacyClientSideFixedClipping(s, 1.0, 1.0, 6),
    lambda s: flower.DifferentialPrivacyServerSideAdaptiveClipping(s, 0.1, 6),
    lambda s: flower.DifferentialPrivacyClientSideAdaptiveClipping(s, 0.1, 6),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=range(len(WRAPPERS)))
def test_a_strategy_finds_the_wrapper_that_calls_it(wrap: Callable[[Strategy], Any]) -> None:
    inner = Looking()
    outer = wrap(inner)
    outer.configure_train(1, ArrayRecord(), ConfigRecord(), None)
    assert inner.found is outer
    inner.configure_train()
    assert inner.found is None


# Random numbers


def imports_random(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.Import) and any(a.name == "random" for a in node.names) for node in ast.walk(tree))


def test_every_module_of_flower_that_draws_from_the_global_generator_is_known() -> None:
    found = {
        ".".join(("flwr", *path.relative_to(FLOWER).with_suffix("").parts))
        for path in FLOWER.rglob("*.py")
        if imports_random(path)
    }
    assert found == {*FLOWER_MODULES_WITH_JITTER} | DRAWS_FOR_THE_USER


@pytest.mark.parametrize("name", FLOWER_MODULES_WITH_JITTER)
def test_flower_modules_with_jitter_get_a_generator_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "random", random)  # as in a new process
    isolate_flower_random()
    before = random.getstate()
    module.random.uniform(0, 1)
    assert random.getstate() == before


# Task identity


def test_a_message_can_be_built_inside_a_pretended_run_alone() -> None:
    def build() -> int:
        return Message(RecordDict(), dst_node_id=1, message_type="train").metadata.run_id

    with pytest.raises(RuntimeError, match="TaskIdentity"):
        build()
    with inside_a_run(7):
        assert build() == 7
        with inside_a_run(8):
            assert build() == 8
        assert build() == 7
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        build()


def test_flower_keeps_nothing_else_in_its_task_identity() -> None:
    kept = {name for name in vars(TaskIdentity) if name.startswith("_") and not name.startswith("__")}
    assert kept == {"_task_id", "_run_id", "_node_id"}


# Imports


@pytest.fixture
def module_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "imported_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imported_late", raising=False)
    return "imported_late"


def test_an_action_follows_the_first_import_at_once(module_file: str) -> None:
    seen: list[Any] = []
    watch = WhenImported(module_file, lambda: seen.append(sys.modules[module_file].value))
    assert watch.watch() and not watch.watch()
    try:
        assert find_spec(module_file) is not None and seen == []  # as libraries look, without importing it
        importlib.import_module(module_file)
        assert seen == [1] and watch not in sys.meta_path
        importlib.import_module(module_file)
        assert seen == [1]
    finally:
        watch.stop()


def test_a_watch_that_was_stopped_does_nothing(module_file: str) -> None:
    watch = WhenImported(module_file, lambda: pytest.fail("it was stopped"))
    watch.watch()
    watch.stop()
    importlib.import_module(module_file)
    assert watch not in sys.meta_path


def test_a_numbered_message_has_that_id_and_its_reply_answers_it() -> None:
    with inside_a_run():
        message = Message(RecordDict(), dst_node_id=1, message_type="train")
        number_message(message, "message-7")
        assert message.metadata.message_id == "message-7"
        assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "message-7"


def test_flower_s_simulation_calls_apps_from_the_module_that_is_known() -> None:
    from fl_gradcode._flower_internals import SIMULATING_MODULES, in_a_simulation

    source = Path(importlib.util.find_spec(SIMULATING_MODULES[0]).origin).read_text()  # type: ignore[union-attr, arg-type]
    assert "app(message=message, context=context)" in source.replace("client_app(", "app(")
    assert not in_a_simulation()
    frame = {"__name__": SIMULATING_MODULES[0], "asked": in_a_simulation}
    exec("found = (lambda: asked())()", frame)
    assert frame["found"] is True


# Many messages that are alike


def _told(message: Message) -> dict[str, Any]:
    """What a message's metadata say, but for moments, which no two messages share."""
    assert {*vars(message)} == {"_metadata", "_content", "_error"}
    return {name: value for name, value in vars(message.metadata).items() if name not in ("_created_at", "_ttl")}


def test_a_message_like_another_is_what_flower_would_have_made() -> None:
    with inside_a_run(7):
        content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
        first = Message(RecordDict(), dst_node_id=3, message_type="train", ttl=60.0, group_id="2")
        wanted = Message(content, dst_node_id=5, message_type="train", ttl=60.0, group_id="2")
        made = message_like(first, content, 5)
        assert _told(made) == _told(wanted) and made.metadata.ttl == 60.0 and made.content is content
        assert made.metadata.created_at == pytest.approx(wanted.metadata.created_at, abs=60.0)
        assert first.metadata.dst_node_id == 3 and not made.has_error()
        number_message(made, "1")
        assert first.metadata.message_id == ""


def test_a_reply_to_a_draft_is_what_flower_would_have_made() -> None:
    with inside_a_run(7):
        draft = Message(RecordDict(), dst_node_id=3, message_type="train.name", ttl=600.0, group_id="2", dst_task_id=9)
        number_message(draft, "draft 1")
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        made, wanted = reply_in_process(content, draft), Message(content, reply_to=draft)
        assert _told(made) == _told(wanted) and made.content is content
        assert made.metadata.ttl == pytest.approx(wanted.metadata.ttl, abs=60.0) and made.metadata.ttl <= 600.0


def test_an_entry_is_added_to_a_copy() -> None:
    record, content = ConfigRecord({"a": 1}), RecordDict({"old": ConfigRecord()})
    assert with_entry(record, "b", "two") == ConfigRecord({"a": 1, "b": "two"})
    assert with_entry(content, "new", record)["new"] is record
    assert [*record] == ["a"] and [*content] == ["old"]
