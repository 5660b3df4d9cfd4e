"""The engine of tests and experiments: what it starts it ends, and a secure one refuses whom it should."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.engine import Engine, EngineError, free_port
from experiments.processes import Member, Processes
from tests.end_to_end.conftest import TEMPLATE, on_engine

#: A process that starts another one in a session of its own, as Flower does.
PARENT = ["sh", "-c", "setsid sleep 300 & echo started; wait"]


def until(true: Callable[[], object], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path, os.environ)
    yield started
    started.stop_all(patience=0.1)


def with_a_child(processes: Processes, name: str) -> tuple[subprocess.Popen[bytes], Member]:
    process = processes.start(PARENT, name)
    until(lambda: [one for one in processes.members(process) if one.command == "sleep 300"])
    (child,) = [one for one in processes.members(process) if one.command == "sleep 300"]
    return process, child


@pytest.mark.parametrize("how", ["kill", "stop", "the parent alone has ended"])
def test_a_process_ends_with_all_that_it_started(processes: Processes, how: str) -> None:
    process, child = with_a_child(processes, "parent")
    assert os.getpgid(child.pid) != os.getpgid(process.pid)
    if how == "kill":
        processes.kill(process)
    else:
        if how != "stop":
            process.kill()
            process.wait()
        processes.stop(process, patience=0.5)
    assert not child.runs()
    assert process.poll() is not None
    assert processes.members(process) == []


def test_other_processes_go_on(processes: Processes) -> None:
    process, child = with_a_child(processes, "parent")
    other, its_child = with_a_child(processes, "other")
    processes.kill(process)
    assert not child.runs()
    assert other.poll() is None and its_child.runs()


def test_after_the_end_nothing_runs_and_nothing_is_started(processes: Processes) -> None:
    started = [with_a_child(processes, f"parent-{number}") for number in range(2)]
    processes.stop_all(patience=0.1)
    assert not any(child.runs() for _, child in started)
    assert all(process.poll() is not None for process, _ in started)
    with pytest.raises(RuntimeError, match="late is not started any more"):
        processes.start(PARENT, "late")


def test_a_process_that_got_the_number_of_another_is_left_alone(processes: Processes) -> None:
    _, child = with_a_child(processes, "parent")
    another = dataclasses.replace(child, began="1")
    another.signal(signal.SIGKILL)
    assert child.runs() and not another.runs()


def test_simulated_nodes_have_no_connection_to_secure() -> None:
    with pytest.raises(ValueError, match="secure=True needs deployed=True"):
        Engine(2, secure=True)


def statuses(engine: Engine) -> dict[int | None, str]:
    return {node["number"]: node["status"] for node in engine.listed_nodes() if node["status"] != "unregistered"}


def all_online(engine: Engine) -> bool:
    return statuses(engine) == dict.fromkeys(range(engine.nodes), "online")


def start_another_node(engine: Engine, name: str, *options: str) -> subprocess.Popen[bytes]:
    command = ["flower-supernode", "--superlink", engine.address, "--port", str(free_port()), *options]
    return engine._processes.start(command, name)


def words_of_a_refused_node(engine: Engine, *options: str) -> str:
    before = len(engine._processes.log("refused"))
    process = start_another_node(engine, "refused", *options)
    assert process.wait(timeout=60) == 1
    engine._processes.kill(process)  # its SuperExec would go on for a while
    return engine._processes.log("refused")[before:]


def trust(engine: Engine) -> tuple[str, str]:
    return "--root-certificates", str(engine.folder / "certificates" / "ca.crt")


def new_key(file: Path) -> tuple[str, str]:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(file)], check=True)
    return "--auth-supernode-private-key", str(file)


@pytest.mark.slow
@on_engine("secure fleet")
def test_registered_nodes_come_online_under_the_ids_of_their_keys(engine: Engine) -> None:
    until(lambda: all_online(engine))
    assert {node["id"] for node in engine.listed_nodes()} == set(engine.node_ids.values())


@pytest.mark.slow
@on_engine("secure fleet")
def test_a_node_without_a_registered_key_is_refused(engine: Engine, tmp_path: Path) -> None:
    words = words_of_a_refused_node(engine, *trust(engine))
    assert "SuperNode authentication is enabled. All SuperNodes must be registered via the CLI." in words
    words = words_of_a_refused_node(engine, *trust(engine), *new_key(tmp_path / "key"))
    assert "[code: 2004] Failed to activate SuperNode." in words
    assert all_online(engine)


@pytest.mark.slow
@on_engine("secure fleet")
def test_a_superlink_whose_certificate_is_not_trusted_is_not_spoken_to(engine: Engine, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "deploy" / "make-certificates.sh"
    subprocess.run([str(script), str(tmp_path), "127.0.0.1"], check=True, capture_output=True)
    words = words_of_a_refused_node(engine, "--root-certificates", str(tmp_path / "ca.crt"))
    assert "CERTIFICATE_VERIFY_FAILED" in words


@pytest.mark.slow
@on_engine("secure fleet")
def test_a_node_keeps_its_id_and_is_refused_while_the_old_one_counts_as_online(engine: Engine) -> None:
    until(lambda: all_online(engine))
    old = engine._nodes.pop(0)  # it runs on: the restart finds it online, as one that was killed is for a minute
    back = threading.Thread(target=engine.restart_node, args=(0,), kwargs={"pause": 1.0})
    back.start()
    until(lambda: "[code: 2004] Failed to activate SuperNode." in engine._processes.log("supernode-0"))
    assert back.is_alive()
    engine._processes.stop(old)
    back.join(timeout=60)
    assert not back.is_alive()
    assert engine._nodes[0].poll() is None
    assert all_online(engine)
    assert engine._processes.log("supernode-0").count(f"SuperNode ID: {engine.node_ids[0]}") == 2


@pytest.mark.slow
@on_engine("secure fleet")
def test_a_superlink_with_a_database_knows_its_nodes_after_it_was_killed(engine: Engine) -> None:
    engine.kill_superlink()
    with pytest.raises(EngineError, match="flwr supernode list failed"):
        engine.listed_nodes()
    engine.start_superlink()
    until(lambda: all_online(engine))


@pytest.mark.slow
@on_engine("secure fleet")
def test_only_the_serverapp_is_killed(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="No ServerApp is running"):
        engine.kill_serverapp()
    app = tmp_path / "app"
    shutil.copytree(TEMPLATE, app, ignore=shutil.ignore_patterns("__pycache__"))
    run_id = engine.submit(app, {"folder": str(tmp_path)})
    until((tmp_path / "events.jsonl").exists)
    assert engine._link is not None
    before = engine._processes.members(engine._link)
    (serverapp,) = [child for child in before if "flwr-serverapp" in child.command]
    engine.kill_serverapp()
    until(lambda: not serverapp.runs(), seconds=5)
    assert [child for child in before if child.runs()] == [child for child in before if child != serverapp]
    engine.flwr.stop(run_id)
    assert engine.wait(run_id, 60).status == "finished:stopped"


@pytest.mark.slow
@on_engine("secure fleet")
def test_a_node_that_is_unregistered_ends_and_its_key_is_refused_for_ever(engine: Engine, tmp_path: Path) -> None:
    options = (*trust(engine), *new_key(tmp_path / "key"))
    node_id = engine.flwr.register(tmp_path / "key.pub")
    process = start_another_node(engine, "another", *options)
    until(lambda: f"SuperNode ID: {node_id}" in engine._processes.log("another"))
    engine.flwr.unregister(node_id)
    until(lambda: process.poll() is not None)
    assert "SuperNode terminated gracefully." in engine._processes.log("another")
    assert "[code: 2004] Failed to activate SuperNode." in words_of_a_refused_node(engine, *options)
    with pytest.raises(EngineError, match="Public key already in use"):
        engine.flwr.register(tmp_path / "key.pub")
