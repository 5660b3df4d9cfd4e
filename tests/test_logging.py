"""The lines of the library in an app without logging of its own: through Flower's logger, and easy to switch off."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import logging
import flwr.app
from fl_gradcode._logging import speak_through_flower
{before}
speak_through_flower()
logging.getLogger("fl_gradcode.runlog.ledger").info("round 1 train: exact")
logging.getLogger("fl_gradcode.strategy.run").warning("something is wrong")
"""
BEFORE = {
    "nothing set up": ("", True, True),
    "switched off": ('logging.getLogger("fl_gradcode").setLevel(logging.WARNING)', False, True),
    "all switched off": ('logging.getLogger("fl_gradcode").setLevel(logging.CRITICAL)', False, False),
    "logging of its own": ("logging.basicConfig(level=logging.WARNING)", False, True),
}


@pytest.mark.parametrize("case", BEFORE)
def test_lines_appear_unless_the_app_says_otherwise(case: str) -> None:
    before, lines, warnings = BEFORE[case]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True, timeout=120, check=True
    )
    told = done.stdout + done.stderr
    assert ("round 1 train: exact" in told) == lines
    assert ("something is wrong" in told) == warnings
