"""Runs a trial, or a ServerApp up to its first round, in a process of its own, so that nothing is kept between two."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FlGradcodeError, UnsuitableApp
from .capture import Captured, capture
from .clock import set_clock, set_dates
from .trial import Ran, Trial, run_trial

__all__ = ["AppProcesses", "ForkedProcesses", "FreshProcesses"]

_CHILD = "fl_gradcode.appcheck.processes"
_LONGEST = 600.0  # seconds until a process counts as stuck
_TRUE_TIME = time.time
_OTHER = 400 * 86_400 + 7 * 3_600 + 13 * 60.0  # seconds: another year, month, day and hour
_INSTANT = 1_700_000_000.0


class AppProcesses(ABC):
    """Where an app is called: in a process of its own each time."""

    @abstractmethod
    def run(self, trial: Trial) -> Ran:
        """Run a trial.

        Raises:
            UnsuitableApp: The app cannot be loaded, or its process ended or never ends.
        """


class ForkedProcesses(AppProcesses):
    """Calls an app that is an object of this process, in forks of it.

    Args:
        app: The ClientApp.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app

    def run(self, trial: Trial) -> Ran:
        """Run a trial."""
        if "fork" not in multiprocessing.get_all_start_methods():
            raise UnsuitableApp("This system cannot fork a process: pass the path of the app's folder instead.")
        context = multiprocessing.get_context("fork")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            process = context.Process(target=self._child, args=(trial, out))
            process.start()
            process.join(_LONGEST)
            if process.is_alive():
                process.kill()
                process.join()
                raise _stuck()
            return _result_in(out, "")  # type: ignore[no-any-return]

    def _child(self, trial: Trial, out: Path) -> None:
        torch = sys.modules.get("torch")
        if torch is not None:  # OpenMP's threads do not survive a fork
            torch.set_num_threads(1)
        _answer(out, lambda: _ran(trial, lambda: self._app))


@dataclass(frozen=True)
class FreshProcesses(AppProcesses):
    """Calls an app that is imported by its name, in fresh interpreters.

    Args:
        folder: Folder that is put on Python's path.
        client: Name of the ClientApp, "module:attribute".
    """

    folder: Path
    client: str

    def run(self, trial: Trial) -> Ran:
        """Run a trial."""
        return self._start("trial", self.client, trial, trial.hash_seed)  # type: ignore[no-any-return]

    def captured(self, server: str, run_config: Mapping[str, Any], partitions: int) -> Captured:
        """Returns what a ServerApp would send in round 1.

        Args:
            server: Its name, "module:attribute".
            run_config: Contents of `context.run_config`.
            partitions: Number of nodes.

        Raises:
            UnsuitableApp: It cannot be loaded, or starts no strategy.
        """
        return self._start("capture", server, (dict(run_config), partitions), 0)  # type: ignore[no-any-return]

    def _start(self, task: str, reference: str, value: Any, hash_seed: int) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            job, out, log = Path(folder) / "job", Path(folder) / "out", Path(folder) / "log"
            job.write_bytes(pickle.dumps((str(self.folder), task, reference, value)))
            command = [sys.executable, "-m", _CHILD, str(job), str(out)]
            environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"}
            try:
                with log.open("wb") as told:
                    subprocess.run(
                        command, env=environment, stdout=told, stderr=told, stdin=subprocess.DEVNULL, timeout=_LONGEST
                    )
            except subprocess.TimeoutExpired:
                raise _stuck() from None
            lines = log.read_text(errors="replace").strip().splitlines()
            return _result_in(out, lines[-1] if lines else "")


def _stuck() -> UnsuitableApp:
    return UnsuitableApp(f"The app did not end within {_LONGEST:.0f} s: name smaller inputs, or fewer steps.")


def _result_in(out: Path, last_line: str) -> Any:
    if not out.exists():
        raise UnsuitableApp(f"The app's process ended without an answer. {last_line}".strip())
    good, value = pickle.loads(out.read_bytes())  # written by our own child
    if not good:
        raise UnsuitableApp(value)
    return value


def _answer(out: Path, work: Callable[[], Any]) -> None:
    """Write the result of some work, or one sentence about what it raised."""
    try:
        result = True, work()
    except FlGradcodeError as error:
        result = False, str(error)
    except Exception as error:  # whatever the app's modules may raise
        result = False, f"The app cannot be loaded: {type(error).__name__}: {error}"
    out.write_bytes(pickle.dumps(result))


def _ran(trial: Trial, load: Callable[[], Any]) -> Ran:
    """Run a trial by its clock, on an app that is loaded under it."""
    moments = itertools.count()
    clocks: dict[str, Callable[[], float]] = {
        "other": lambda: _TRUE_TIME() + _OTHER,
        "steps": lambda: _INSTANT + next(moments) * 1e-3,
    }
    now = clocks.get(trial.clock)
    if now is not None:
        set_clock(now, spans=trial.clock == "steps")
    app = load()
    if now is not None:
        set_dates(now)
    return run_trial(app, trial)


def _loaded(folder: str, reference: str) -> Any:
    """Returns an object by its name, "module:attribute"."""
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise UnsuitableApp(f"{reference!r} in the app's pyproject.toml must be module:attribute.")
    sys.path.insert(0, folder)
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def _main(job: Path, out: Path) -> None:
    folder, task, reference, value = pickle.loads(job.read_bytes())  # written by our own parent

    def work() -> Any:
        if task == "capture":
            return capture(_loaded(folder, reference), *value)
        return _ran(value, lambda: _loaded(folder, reference))

    _answer(out, work)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
