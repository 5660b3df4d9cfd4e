"""How the tags of a worker's classes travel: as text, one after another, in the order in which it sends the classes."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TAG_BYTES", "shown_tag", "tags_by_place", "tags_in"]

#: Length of a tag.
TAG_BYTES = 32
_DIGITS = 2 * TAG_BYTES
_NONE = "." * _DIGITS


def tags_in(text: str, number: int) -> list[str]:
    """Returns the tags of so many classes in a text, as hexadecimal; none if it holds anything else."""
    if len(text) != _DIGITS * number or {*text} - {*"0123456789abcdef"}:
        return []
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]


def tags_by_place(tags: Mapping[int, str]) -> str:
    """Returns the text of some tags, with dots for those that are missing.

    Args:
        tags: Place of the class among those that the worker sends -> its tag, as hexadecimal.
    """
    return "".join(tags.get(place, _NONE) for place in range(max(tags, default=-1) + 1))


def shown_tag(text: str, place: int) -> str:
    """Returns the tag at a place of a text, as hexadecimal, or an empty text if there is none."""
    tag = text[_DIGITS * place : _DIGITS * (place + 1)]
    return "" if tag == _NONE else tag
