"""Adapts the README to the page of a package index, which does not resolve links relative to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def for_an_index(readme: str, repository: str | None) -> str:
    """Returns the README with absolute links, or without its relative links if the repository has no address yet."""
    if repository is None:
        return _RELATIVE_LINK.sub(r"\1", readme)
    return _RELATIVE_LINK.sub(rf"[\1]({repository.rstrip('/')}/blob/main/\2)", readme)


class ReadmeHook(MetadataHookInterface):
    """Sets the project's description when a wheel or an sdist is built; the address is `Repository` of project.urls."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds `readme` to the metadata of the project."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = for_an_index(readme, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
