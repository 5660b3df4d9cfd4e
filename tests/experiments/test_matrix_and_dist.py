"""What `make matrix` runs in and what `make dist` looks for."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from experiments import dist, matrix
from fl_gradcode._versions import TESTED_FLOWER


def test_every_test_of_the_core_suite_is_there() -> None:
    for name in (*matrix.CORE, *matrix.WITH_TORCH):
        assert (matrix.ROOT / name).exists(), name


def test_each_python_is_paired_with_each_flower_and_the_oldest_with_the_oldest() -> None:
    told = [str(pair) for pair in matrix.pairs(["3.11", "3.13"])]
    assert told == [f"{python}+{flower}" for python in ("3.11", "3.13") for flower in TESTED_FLOWER] + ["3.11+lowest"]
    assert matrix.pairs([]) == []


def test_this_interpreter_is_found_by_its_minor_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minor = "{}.{}".format(*sys.version_info)
    broken = tmp_path / "versions" / f"{minor}.99" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / f"python{minor}").symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.interpreters() == {minor: tmp_path / f"python{minor}"}


def test_the_documented_versions_are_those_that_are_tested() -> None:
    page = (matrix.ROOT / "docs" / "versions.md").read_text()
    for flower in TESTED_FLOWER:
        assert f"flwr {flower}" in page
    for python in matrix.PYTHONS:
        assert f"Python {python}" in page


def test_a_file_that_is_missing_or_too_many_is_named(tmp_path: Path) -> None:
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    inside = [path.relative_to(dist.ROOT).as_posix() for path in (dist.ROOT / "fl_gradcode").rglob("*.py")]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*inside, "fl_gradcode/py.typed", "a.dist-info/METADATA"]:
            file.writestr(name, "")
    with tarfile.open(sdist, "w:gz") as archive:
        for name in [*inside, *dist.IN_THE_SDIST]:
            archive.addfile(tarfile.TarInfo(f"a/{name}"))
    assert dist.missing(wheel, sdist) == []
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*inside[1:], "fl_gradcode/py.typed", "tests/conftest.py"]:
            file.writestr(name, "")
    assert dist.missing(wheel, sdist) == [f"a.whl: {inside[0]}", "a.whl: tests/conftest.py"]
