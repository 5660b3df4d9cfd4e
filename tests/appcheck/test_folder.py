"""Apps on disk: the three quickstarts and the reference app pass, and the command prints what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from typer.testing import CliRunner

from fl_gradcode.appcheck import AppReport, Finding
from fl_gradcode.appcheck.capture import capture
from fl_gradcode.cli.app import app as command_line
from fl_gradcode.errors import InvalidSetting, UnsuitableApp
from fl_gradcode.testing import check_app
from tests.programs.test_quickstart_apps import APPS, NAMES, load

ARRAYS = ArrayRecord({"w": Array(np.zeros(3))})
ROOT = Path(__file__).resolve().parents[2]
SERVER = "\nfrom flwr.serverapp import ServerApp\nserver = ServerApp()\nserver.main()(main)\n"
PLAIN = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import {strategy}

app = ClientApp()

@app.train()
def train(message, context):
    partition = context.node_config["partition-id"]
    w = message.content["arrays"]["w"].numpy()
    {body}
    metrics = MetricRecord({{"num-examples": 5}})
    return Message(RecordDict({{"arrays": ArrayRecord({{"w": Array(w)}}), "metrics": metrics}}), reply_to=message)

def main(grid, context):
    arrays = ArrayRecord({{"w": Array(np.zeros(context.run_config["size"]))}})
    {strategy}().start(grid, arrays, num_rounds=2)
"""


def folder_of(path: Path, source: str, config: dict[str, Any]) -> Path:
    """A Flower app of one module."""
    path.mkdir(exist_ok=True)
    (path / "one_module.py").write_text(source + SERVER)
    values = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    (path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "one_module:server"\nclientapp = "one_module:app"\n'
        f"[tool.flwr.app.config]\n{values}\n"
    )
    return path


def small(path: Path, body: str = "w = w + partition", strategy: str = "FedAvg") -> Path:
    return folder_of(path, PLAIN.format(body=body, strategy=strategy), {"size": 4})


@pytest.mark.parametrize("name", NAMES)
def test_the_quickstarts_pass(name: str, tmp_path: Path) -> None:
    report = check_app(folder_of(tmp_path, (APPS / f"{name}.py").read_text(), load(name).RUN_CONFIG))
    assert report.failed == () and report.send == "coded"
    assert {one.key: one.verdict for one in report.findings}["mods"] == "note"  # not listed yet
    assert report.lines == (
        "strategy = GradientCoding(FedAvg(...), fractional_repetition(n=12, s=2))",
        "app = ClientApp(mods=[gradient_coding_mod])",
    )


def test_the_reference_app_passes() -> None:
    report = check_app(ROOT, run_config={"dataset": "digits", "num-clients": 4, "code": "fractional"}, partitions=4)
    assert report.failed == () and report.strategy == "FedAvg"
    assert {one.key: one.verdict for one in report.findings}["mods"] == "ok"


def test_the_order_of_a_set_is_found_in_fresh_interpreters(tmp_path: Path) -> None:
    body = "w = w + partition + [*{'a', 'b', 'c', 'd', 'e'}].index('a') + 10 * [*{'f', 'g', 'h', 'i', 'j'}].index('f')"
    assert check_app(small(tmp_path, body)).failed == ("order",)


def test_the_command_says_what_it_found_and_ends_with_a_code(tmp_path: Path) -> None:
    good = CliRunner().invoke(command_line, ["check", str(small(tmp_path / "good", strategy="FedMedian"))])
    assert good.exit_code == 0, good.output
    assert 'FedMedian(...), fractional_repetition(n=12, s=2), send="shards")' in good.output
    broken = small(tmp_path / "broken", "w = w + 1")
    done = CliRunner().invoke(command_line, ["check", str(broken), "--json", "--partitions", "3"])
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert not found["passed"]
    assert [one["key"] for one in found["findings"] if one["verdict"] == "fails"] == ["data"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "defines no Flower app"),
        ("[tool", "cannot be read"),
        ('[tool.flwr.app]\nconfig = 5\n[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "a:b"\n', "a table"),
        ('[tool.flwr.app.components]\nserverapp = "nowhere"\nclientapp = "a:b"\n', "must be module:attribute"),
        (
            '[tool.flwr]\nfederations = "x"\n[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "a:b"\n',
            "No module named",
        ),
        ('[tool.flwr.app.components]\nserverapp = "nowhere:server"\nclientapp = "nowhere:app"\n', "No module named"),
    ],
    ids=["no app", "no TOML", "no config", "no attribute", "odd federations", "no module"],
)
def test_a_folder_that_is_no_app_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    done = CliRunner().invoke(command_line, ["check", str(tmp_path)])
    assert done.exit_code == 2 and sentence in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        ("def main(grid, context): pass", "ended without starting a strategy"),
        ("def main(grid, context): raise OSError('no data')", "OSError: no data"),
        ("def main(grid, context): raise SystemExit(3)", "ended without an answer"),
        ("main = None", "The serverapp in pyproject.toml is a|TypeError|NoneType"),
    ],
    ids=["nothing", "an error", "an exit", "no function"],
)
def test_a_server_that_starts_nothing_is_told(server: str, sentence: str, tmp_path: Path) -> None:
    source = PLAIN.format(body="pass", strategy="FedAvg").partition("def main")[0] + server
    with pytest.raises(UnsuitableApp, match=sentence):
        check_app(folder_of(tmp_path, source, {}))


def test_brackets_in_what_an_app_says_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = AppReport((Finding("runs", "train() returns", "fails", "train() raised no data in [/tmp/x]."),), "", "coded")
    monkeypatch.setattr("fl_gradcode.appcheck.check_app", lambda *args, **kwargs: told)
    done = CliRunner().invoke(command_line, ["check", str(tmp_path)])
    assert done.exit_code == 1 and "[/tmp/x]" in done.output


def with_something_to_do_afterwards(grid: Grid, context: Context) -> None:
    try:
        result = FedAvg().start(grid, ARRAYS)
    finally:
        print(result.arrays)


def with_a_wrapper_that_wants_many_nodes(grid: Grid, context: Context) -> None:
    inner = FedAvg(min_available_nodes=40, fraction_train=0.1, weighted_by_key="rows")
    DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 4).start(grid, ARRAYS, 2, 60.0)


@pytest.mark.parametrize("main", [with_something_to_do_afterwards, with_a_wrapper_that_wants_many_nodes])
def test_a_server_is_stopped_where_it_starts(main: Any) -> None:
    captured = capture(main, {}, 3)
    assert captured.content["arrays"] == ARRAYS and captured.message_type == "train"
    assert captured.weight_key == ("rows" if main is with_a_wrapper_that_wants_many_nodes else "num-examples")


@pytest.mark.parametrize("text", ["lr", "lr=", "lr=a", "=3"])
def test_a_setting_that_is_no_toml_is_told(text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(command_line, ["check", str(small(tmp_path)), "--run-config", text])
    assert done.exit_code == 2 and "must be key=value" in done.output


def test_settings_of_the_command_reach_the_app(tmp_path: Path) -> None:
    app = small(tmp_path, "w = w + partition * (len(w) == 7) * context.node_config['factor']")
    done = CliRunner().invoke(
        command_line, ["check", str(app), "--run-config", "size=7", "--node-config", "factor=2.5"]
    )
    assert done.exit_code == 0, done.output
    with pytest.raises(InvalidSetting, match="at least 2"):
        check_app(app, partitions=1)
