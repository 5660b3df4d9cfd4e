"""`fl-gradcode place` called as a user does, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from fl_gradcode import cyclic_repetition, fractional_repetition
from fl_gradcode.cli.app import app
from fl_gradcode.codes import GradientCode, for_assignment
from fl_gradcode.placement.manifest import Manifest


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def placed(*arguments: object) -> dict[str, Any]:
    code, out, error = call("place", *arguments, "--json")
    assert code == 0, error
    told: dict[str, Any] = json.loads(out)
    return told


def refused(*arguments: object) -> str:
    code, out, error = call("place", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("fl-gradcode: ") and error.count("\n") == 1
    return error


def code_of(line: str) -> GradientCode:
    """The code of the line to paste for the server."""

    class FedAvg:
        pass

    def strategy(inner: object, code: GradientCode, manifest: str) -> GradientCode:
        assert Manifest.read(manifest).k == code.k
        return code

    names = {
        "GradientCoding": strategy,
        "FedAvg": FedAvg,
        "np": np,
        "Manifest": Manifest,
        "for_assignment": for_assignment,
    }
    names |= {"fractional_repetition": fractional_repetition, "cyclic_repetition": cyclic_repetition}
    made = eval(line, names)
    assert isinstance(made, GradientCode)
    return made


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
