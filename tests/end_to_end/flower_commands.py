"""Two of Flower's commands, each started without importing the others of its package: half of what a start costs.

Flower starts a process for each message of a deployed node, and finds the command by its name on the PATH. What runs is
Flower's own function; only the package's `__init__`, which imports every command that Flower has for such nodes, is not
run. A version of Flower that lays its commands out in another way gets them started as usual.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_PACKAGES = {"flwr-clientapp": "flwr.supernode.cli", "flower-superexec": "flwr.supercore.cli"}


def write_commands(folder: Path) -> Path:
    """Write the commands into a folder, to be put at the beginning of the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _PACKAGES:
        command = folder / name
        command.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from {Path(__file__).stem} import start\ndel sys.path[0]\nstart({name!r})\n"
        )
        command.chmod(0o755)
    return folder


def start(name: str) -> None:
    """Run a command in this process."""
    package, function = _PACKAGES[name], name.replace("-", "_")
    parent, _, last = package.rpartition(".")
    (folder,) = importlib.import_module(parent).__path__
    sys.modules[package] = bare = ModuleType(package)
    bare.__path__ = [str(Path(folder) / last)]
    try:
        module = importlib.import_module(f"{package}.{function}")
    except ImportError:
        del sys.modules[package]
        module = importlib.import_module(package)
    sys.exit(getattr(module, function)())
