"""Lets the library's lines appear where Flower's do, in an app that has not set up logging itself."""

from __future__ import annotations

import logging

__all__ = ["speak_through_flower"]


def speak_through_flower() -> None:
    """Send the library's lines to the handlers of Flower's logger, from level INFO.

    An app that has given handlers to the root logger or to `fl_gradcode` keeps them. A level that it has set for
    `fl_gradcode` stays, so `logging.getLogger("fl_gradcode").setLevel(logging.WARNING)` switches the lines of each
    round off.
    """
    own, flower = logging.getLogger("fl_gradcode"), logging.getLogger("flwr")
    if own.handlers or logging.getLogger().handlers or not flower.handlers:
        return
    own.parent = flower
    if own.level == logging.NOTSET:
        own.setLevel(logging.INFO)
