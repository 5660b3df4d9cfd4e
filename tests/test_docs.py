"""Examples in the docs run as they stand."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

import fl_gradcode.codes.gradient_code

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)
        for expected in re.findall(r"print\(.*\)  # (.*)", block):
            assert expected in capsys.readouterr().out


def test_the_example_of_the_code_s_docstring_runs() -> None:
    assert doctest.testmod(fl_gradcode.codes.gradient_code).failed == 0


def test_the_two_lines_of_the_readme_build_a_strategy_and_an_app() -> None:
    readme = (ROOT / "README.md").read_text()
    (block, *_) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    imports = (
        "from flwr.clientapp import ClientApp\nfrom flwr.serverapp.strategy import FedAvg\n"
        "from fl_gradcode import GradientCoding, fractional_repetition, gradient_coding_mod\n"
    )
    namespace: dict[str, Any] = {}
    exec(imports + block, namespace)
    assert namespace["strategy"].code.n == 12


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_run_config_key_of_the_readme_exists() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    table = (ROOT / "README.md").read_text().split("| key | values | meaning |")[1].split("\n\n")[0]
    for cell in re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", table, re.MULTILINE):
        for key in re.findall(r"`([a-z-]+)`", cell):
            assert re.search(rf"^{key} = ", pyproject, re.MULTILINE), key
