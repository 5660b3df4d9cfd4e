"""Examples in the docs run as they stand, links lead somewhere, and the README says what the project shows."""

from __future__ import annotations

import contextlib
import doctest
import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import fl_gradcode.codes.gradient_code
from experiments import idea
from fl_gradcode.testing import InProcessGrid
from hatch_build import for_an_index

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if "```python" in path.read_text())
EVERY_PAGE = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)
        for expected in re.findall(r"print\(.*\)  # (.*)", block):
            assert expected in capsys.readouterr().out


def test_the_app_of_the_first_tutorial_is_as_accurate_coded_and_less_than_half_as_long_under_way() -> None:
    """Its files as the page has them, on a grid in this process in place of `flwr run`."""
    files = re.findall(r"```python\n(.*?)```", (DOCS / "first-run.md").read_text(), re.DOTALL)
    client: dict[str, Any] = {}
    server: dict[str, Any] = {}
    for source, namespace in zip(files, (client, server), strict=True):
        exec(compile(source, "first-run.md", "exec"), namespace)
    printed = []
    for coded in (False, True):
        settings: dict[str, Any] = {"coded": coded, "ledger": ""}
        context = Context(1, 0, {}, RecordDict(), settings)
        with InProcessGrid(client["app"], num_nodes=12, run_config=settings) as grid:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                server["main"](grid, context)
        printed += re.findall(r"^accuracy (.*)% after (.*) virtual seconds$", out.getvalue(), re.MULTILINE)
    (accuracy, seconds), (same, fewer) = printed
    assert same == accuracy and float(fewer) < 0.5 * float(seconds)
    # The seconds are drawn and not measured: the page has them to the digit.
    said = re.findall(r"^accuracy .*% after (.*) virtual seconds$", (DOCS / "first-run.md").read_text(), re.MULTILINE)
    assert said == [seconds, fewer]


def test_the_example_of_the_code_s_docstring_runs() -> None:
    assert doctest.testmod(fl_gradcode.codes.gradient_code).failed == 0


def test_the_readme_is_short_and_needs_no_file_beside_it_for_its_picture() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert "![" not in readme, "a relative image is broken on the page of a package index"


def test_an_index_gets_a_readme_without_relative_links() -> None:
    readme = (ROOT / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?:)([^)]+)\)", readme)
    assert len(relative) > 20
    absolute = for_an_index(readme, "https://example.org/project/")
    assert re.findall(r"\]\(https://example.org/project/blob/main/([^)]+)\)", absolute) == relative
    assert "](docs/" not in for_an_index(readme, None) and "your first coded run" in for_an_index(readme, None)
    # The build calls it: metadata is what an index reads.
    metadata = ProjectMetadata(str(ROOT), PluginManager())
    assert metadata.core.readme == for_an_index(readme, metadata.core.urls.get("Repository"))


def test_the_picture_of_the_readme_is_what_the_three_schemes_do(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    (picture,) = re.findall(r"```text\n(Waiting.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert picture == idea.as_text(idea.pictures(rounds=1))


def test_the_readme_and_the_gallery_show_the_same_demo() -> None:
    """Seconds, accuracy and worst class of the three schemes, in columns of another order."""

    def numbers(page: Path, first: str) -> list[set[str]]:
        rows = page.read_text().split(first)[1].split("\n\n")[0].splitlines()[2:]
        return [set(re.findall(r"\d+(?:\.\d+)?", row.split("|", 2)[2])) for row in rows]

    readme = numbers(ROOT / "README.md", "| | time (simulated) ")
    assert len(readme) == 3 and readme == numbers(DOCS / "gallery.md", "| scheme | accuracy | worst class ")


def test_no_two_figures_are_the_same_and_each_is_on_a_page() -> None:
    images = sorted((DOCS / "images").glob("*.png"))
    assert len({image.read_bytes() for image in images}) == len(images)
    text = "".join(page.read_text() for page in EVERY_PAGE)
    assert [image.name for image in images if f"images/{image.name}" not in text] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in EVERY_PAGE:
        for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in _anchors(path), f"{page.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation_once() -> None:
    listed = []
    for index in (DOCS / "index.md", DOCS / "reference" / "index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(), re.DOTALL):
            entries = [line for line in tree.splitlines() if line.strip() and not line.startswith(":")]
            names = [re.sub(r".*<(.*)>", r"\1", entry) for entry in entries]
            listed += [index.parent / f"{name}.md" for name in names]
    assert sorted(listed) == sorted(page for page in DOCS.rglob("*.md") if page != DOCS / "index.md")


def test_every_run_config_key_of_the_reference_app_s_page_exists() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    table = (DOCS / "reference-app.md").read_text().split("| key | values | meaning |")[1].split("\n\n")[0]
    for cell in re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", table, re.MULTILINE):
        for key in re.findall(r"`([a-z-]+)`", cell):
            assert re.search(rf"^{key} = ", pyproject, re.MULTILINE), key


def test_every_public_module_has_a_page_in_the_python_reference() -> None:
    modules = re.findall(r"^## `(fl_gradcode[.a-z]*)`", (DOCS / "api.md").read_text(), re.MULTILINE)
    pages = [page.read_text() for page in (DOCS / "reference").glob("*.md")]
    assert sorted(modules) == sorted(re.findall(r"\.\. automodule:: (\S+)", "\n".join(pages)))
