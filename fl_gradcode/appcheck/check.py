"""Checks a Flower app: whether its updates are functions of the message, the shard and the seeded generators alone."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from ..errors import InvalidSetting
from .capture import StrategyFacts, facts_of
from .findings import Finding, examined
from .processes import AppProcesses, ForkedProcesses, FreshProcesses
from .trial import Inputs

__all__ = ["AppReport", "check_app", "settings_of"]

_MOD = "gradient_coding_mod"
_PARTITIONS = 10
_PROJECT = "pyproject.toml"


@dataclass(frozen=True)
class AppReport:
    """What `check_app` found.

    Attributes:
        findings: One finding for each thing that was looked at.
        strategy: The class of the app's strategy; empty if it is not known.
        send: The way of sending that app and strategy need, "coded" (or any other) or "shards".
    """

    findings: tuple[Finding, ...]
    strategy: str
    send: str

    @property
    def passed(self) -> bool:
        """Whether a coded run trains what a plain one does, as far as the check saw."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Keys of the findings that fail."""
        return tuple(finding.key for finding in self.findings if finding.verdict == "fails")

    @property
    def lines(self) -> tuple[str, str]:
        """The two lines to paste, that of the server and that of the client."""
        send = "" if self.send == "coded" else f', send="{self.send}"'
        return (
            f"strategy = GradientCoding({self.strategy or 'FedAvg'}(...), fractional_repetition(n=12, s=2){send})",
            f"app = ClientApp(mods=[{_MOD}])",
        )

    @property
    def imports(self) -> str:
        """The line that imports what the two lines use."""
        return "from fl_gradcode import GradientCoding, fractional_repetition, gradient_coding_mod"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON can hold it."""
        return {
            "passed": self.passed,
            "strategy": self.strategy or None,
            "send": self.send,
            "findings": [
                {"key": one.key, "verdict": one.verdict, "title": one.title, "text": one.text} for one in self.findings
            ],
            "lines": [*self.lines],
        }


def check_app(
    app: ClientApp | str | Path,
    *,
    arrays: ArrayRecord | None = None,
    config: Mapping[str, Any] | None = None,
    strategy: Strategy | None = None,
    run_config: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
    partitions: int | None = None,
) -> AppReport:
    """Returns whether an app's updates depend on the message, the shard and the seeded generators alone.

        report = check_app("path/of/my-app")
        assert report.passed, report.failed

    `train()` is called some eight times, for two partitions, in two or more processes of this machine: in two orders,
    after other partitions, with and without a missed round, and for two partitions with the same random numbers. No
    engine is started. What `train()` writes to disk is written.

    Args:
        app: The folder of a Flower app, or a ClientApp of this process, which is called in forks of it.
        arrays: The model that training starts from, sent as an ArrayRecord named "arrays". By default, the app's
            ServerApp is run until its first round, and what it would send is taken.
        config: Further values that the server sends, in a ConfigRecord named "config".
        strategy: The strategy, if the ServerApp is not run.
        run_config: Values that replace those of the app's pyproject.toml.
        node_config: Further contents of `context.node_config`.
        partitions: Number of partitions; by default that of the app's simulation (`options.num-supernodes`), or 10.

    Raises:
        InvalidSetting: There is no such app, or a ClientApp is given without `arrays`.
        UnsuitableApp: The app cannot be loaded, or starts no strategy.
    """
    if partitions is not None and partitions < 2:
        raise InvalidSetting(f"partitions={partitions}: a check needs at least 2, to compare two of them.")
    content = None
    if arrays is not None:
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1, **(config or {})})})
    facts = None if strategy is None else facts_of(strategy)
    weight_key, message_type = str(getattr(strategy, "weighted_by_key", "num-examples")), "train"
    values: dict[str, Any] = dict(run_config or {})
    processes: AppProcesses
    if isinstance(app, str | Path):
        project = _Project.of(Path(app))
        values = {**project.run_config, **values}
        partitions = partitions or project.partitions
        fresh = processes = FreshProcesses(project.folder, project.client)
        if content is None:
            captured = fresh.captured(project.server, values, partitions)
            content, message_type, weight_key = captured.content, captured.message_type, captured.weight_key
            facts = facts or captured.strategy
    else:
        processes = ForkedProcesses(app)
        if content is None:
            raise InvalidSetting(
                "With a ClientApp alone, the check does not know what to send: pass arrays=, the initial model."
            )
    inputs = Inputs(content, message_type, values, dict(node_config or {}), partitions or _PARTITIONS, weight_key)
    findings, mods = examined(processes, inputs)
    findings.append(_mods(mods))
    only_shards = any(one.key == "records" and one.verdict == "note" for one in findings)
    if facts is not None:
        findings.append(_strategy(facts))
        only_shards = only_shards or bool(facts.why_no_average)
    name = "" if facts is None else facts.name
    return AppReport(tuple(findings), name, "shards" if only_shards else "coded")


def _mods(mods: tuple[str, ...]) -> Finding:
    key, title = "mods", "mods"
    if _MOD not in mods:
        others = f", before {', '.join(mods)}" if mods else ""
        return Finding(key, title, "note", f"{_MOD} is not listed yet: list it first{others}.")
    before = mods[: mods.index(_MOD)]
    if before:
        text = f"List {_MOD} first: coded vectors would pass through {', '.join(before)}, which stands before it."
        return Finding(key, title, "fails", text)
    return Finding(key, title, "ok", f"{_MOD} is listed first.")


def _strategy(facts: StrategyFacts) -> Finding:
    key, title = "strategy", "strategy"
    if not facts.why_no_average:
        return Finding(key, title, "ok", f"{facts.name} averages: coded vectors and one shard per message both work.")
    text = (
        f"{facts.name} {facts.why_no_average}: pass send='shards', which gives it one reply for each shard, or "
        "sees='mean' if a mean is all it needs."
    )
    return Finding(key, title, "note", text)


@dataclass(frozen=True)
class _Project:
    """A Flower app on disk.

    Attributes:
        folder: Its folder.
        client, server: Names of its two apps, "module:attribute".
        run_config: The values of its pyproject.toml.
        partitions: Number of nodes of its simulation.
    """

    folder: Path
    client: str
    server: str
    run_config: dict[str, Any]
    partitions: int

    @classmethod
    def of(cls, folder: Path) -> _Project:
        """Returns the app in a folder.

        Raises:
            InvalidSetting: The folder holds no Flower app.
        """
        path = folder / _PROJECT
        if not path.is_file():
            raise InvalidSetting(f"{folder} contains no Flower app: it has no {_PROJECT}.")
        try:
            tool: Any = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidSetting(f"{path} cannot be read: {error}.") from None
        try:
            flower = tool["tool"]["flwr"]
            parts = flower["app"]["components"]
            client, server = str(parts["clientapp"]), str(parts["serverapp"])
        except (KeyError, TypeError):
            raise InvalidSetting(
                f"{path} defines no Flower app: [tool.flwr.app.components] needs a clientapp and a serverapp."
            ) from None
        config = flower["app"].get("config", {})
        if not isinstance(config, dict):
            raise InvalidSetting(f"{path}: [tool.flwr.app.config] is {config!r} and must be a table.")
        federations = _table(flower.get("federations"))
        options = _table(_table(federations.get(str(federations.get("default", "")))).get("options"))
        nodes = options.get("num-supernodes", _PARTITIONS)
        partitions = max(2, nodes) if type(nodes) is int else _PARTITIONS
        return cls(folder.absolute(), client, server, _flat(config), partitions)


def _table(value: object) -> dict[str, Any]:
    """Returns a table of a TOML file, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables with the names of their entries joined by dots, as Flower does."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def settings_of(text: str) -> dict[str, Any]:
    """Returns the values of a text such as "lr=0.1 name='x'", as `flwr run --run-config` reads it.

    Raises:
        InvalidSetting: A part is no `key=value`.
    """
    values: dict[str, Any] = {}
    for part in shlex.split(text, posix=False):
        key, equals, value = part.partition("=")
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            equals = ""
        if not equals or not key:
            raise InvalidSetting(f"{part!r} must be key=value, with the value as in TOML: lr=0.1, name='x', flag=true.")
    return values
