"""Blocks become one HTML file without any external request, and Markdown with PNG files."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.report.blocks import Block, Heading, Shown, flat
from experiments.report.style import INK, SCREEN

__all__ = ["write_html", "write_markdown"]


def write_html(path: Path, title: str, lead: str, blocks: Sequence[Block]) -> None:
    """Figures are SVG inside the page, and take the colour of its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = {block.name: Markup(_svg(block.name, block.figure)) for block in flat(blocks) if isinstance(block, Shown)}
    path.write_text(_render("page.html.j2", title, lead, blocks, svg=svg))


def write_markdown(path: Path, title: str, lead: str, blocks: Sequence[Block]) -> None:
    """Figures are files in `images/` beside the page, each named report-*.png."""
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob("report-*.png"):
        old.unlink()
    for block in flat(blocks):
        if isinstance(block, Shown):
            with matplotlib.rc_context(SCREEN):
                block.figure.savefig(images / f"report-{block.name}.png", dpi=130, facecolor="white")
    path.write_text(_render("page.md.j2", title, lead, blocks))


def _render(template: str, title: str, lead: str, blocks: Sequence[Block], **more: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = _inline
    contents = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    return environment.get_template(template).render(title=title, lead=lead, blocks=blocks, contents=contents, **more)


def _inline(text: str) -> Markup:
    """`code` and **strong** as HTML; everything else is text."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped))


def _svg(name: str, figure: Figure) -> str:
    """The figure as an <svg> element: no prologue, no metadata, no ids that another figure has too."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**SCREEN, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' id="image[^"]*"', "", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' d="[^"]*"', _rounded, text)
    text = text.replace(INK.lower(), "currentColor")
    width = 96 * figure.get_figwidth()
    return text.replace("<svg", f'<svg style="max-width: {width:.0f}px"', 1)


def _rounded(path: re.Match[str]) -> str:
    """A path to a tenth of a point: what is finer nobody sees, and it is most of the page."""
    return re.sub(r"(\.\d)\d+", r"\1", path[0])
