"""Opacus has every name that the overridden steps of its optimizers rely on; a version that lacks one is refused."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import opacus
import pytest

from fl_gradcode.privacy._opacus import RELIED_ON, check_relied_on


def owner_of(path: str) -> tuple[Any, str]:
    """The module or class whose own attribute the last name of a path is."""
    *way, name = path.split(".")
    found: Any = opacus
    for part in way:
        found = getattr(found, part)
    if isinstance(found, type):
        found = next(kind for kind in found.__mro__ if name in vars(kind))
    return found, name


def test_the_installed_opacus_has_every_name() -> None:
    check_relied_on(opacus)


@pytest.mark.parametrize("path", [path for path in RELIED_ON if not path.endswith(".__init__")])
def test_a_name_that_is_missing_is_told_with_version_and_remedy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = owner_of(path)
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError) as caught:
        check_relied_on(opacus)
    told = str(caught.value)
    assert told.startswith(f"Opacus {version('opacus')} has no ") and f".{name}, which private training" in told
    assert told.endswith("pip install 'opacus==1.6.0'.")


@pytest.mark.parametrize("path", [path for path, used in RELIED_ON.items() if used])
def test_a_step_that_no_longer_calls_what_is_overridden_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = owner_of(path)
    monkeypatch.setattr(owner, name, lambda self: self.another_name())
    with pytest.raises(ImportError, match=r"^Opacus .* has no \w+ in "):
        check_relied_on(opacus)


OTHER_OPACUS = """
import opacus.grad_sample.grad_sample_module as module
del module.promote_current_grad_sample
from fl_gradcode.privacy import Spend, epsilon_of
try:
    epsilon_of([Spend(1.0, 0.1, 1)], 1e-5)
except ImportError as error:
    print(error)
"""


def test_it_is_told_before_anything_is_computed() -> None:
    command = [sys.executable, "-W", "ignore", "-c", OTHER_OPACUS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert (
        "has no grad_sample.grad_sample_module.promote_current_grad_sample, which private training relies on."
        in done.stdout
    )
