"""The library's imports point down and its files stay short: those rules are written here."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "fl_gradcode"
PROGRAMS = ("clients", "server", "experiments")
MAX_LINES = 300


@dataclass(frozen=True)
class Layer:
    """Modules on one level, and the packages outside the library that they may import as well as those below.

    peers: Whether modules of this layer may import each other.
    """

    name: str
    modules: frozenset[str]
    packages: frozenset[str] = frozenset()
    peers: bool = False


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# From bottom to top. A new module must be entered here. Packages are exact names (`flwr.app` does not include
# `flwr.app.message`), except those in WHOLE_PACKAGES.
LAYERS = (
    # Everything may raise or take these, so they know nothing.
    Layer("ground", names("errors locks")),
    # Codes are linear algebra: they know neither Flower nor torch nor time.
    # Peers: a code hands out the incremental decoder, which is written in terms of the code.
    Layer(
        "mathematics",
        names("codes gradient_code reals prime_field combine axpy incremental estimate field_decoding border")
        | names("repetition classical universal field_codes approximate")
        | names("bases product_blocks product_code product_codes product_check"),
        names("numpy scipy"),
        peers=True,
    ),
    # Planning reads codes and clocks; it must run without Flower.
    Layer(
        "plan",
        names("latency laws marginals traces populations history assignment placing discovered")
        | names("manifest shard_files shards cutting node_folders")
        | names("schemes round_times order_statistics planner product_plan")
        | names("run_rows run_workers run_notices run_status run_advice"),
        peers=True,
    ),
    # What privacy needs apart from Flower. PyTorch and the rest are granted below, module by module: they are extras.
    Layer(
        "protection",
        names("account accounting opacus_import privacy_settings keyed key_files spending")
        | names("dp_optimizer stepping ghost_clipping"),
        peers=True,
    ),
    # Flower's public names alone: the rest is internal or legacy, and changes without notice.
    Layer(
        "Flower",
        names("wire messages pack unpack mods seeding watched roster bucket inbox carry phase sending shardwise memory")
        | names("options report contract inner asking opening ways running strategy")
        | names("probing holdings versions resuming checkpoint strategy_state")
        | names("arrivals polling stop waiting grid virtual ledger testing")
        | names("privacy private_training privacy_records guard binding clipping release run_privacy")
        | names("product_messages product_worker product_nodes product_rule coded_matmul matmul"),
        names("flwr.app flwr.clientapp flwr.clientapp.mod")
        | names("flwr.serverapp flwr.serverapp.strategy flwr.serverapp.exception"),
        peers=True,
    ),
    # The command line sits on top of everything.
    Layer(
        "face",
        names("cli privacy_commands place_commands placement_wish status_commands status_page")
        | names("sources plan_figure product_report"),
        names("typer rich matplotlib"),
        peers=True,
    ),
    # The package itself re-exports: it sees all, and no module may import it.
    Layer("package", names("__init__")),
)

# (module, package outside the library): granted to one module, not to its layer.
EXTRAS = {
    ("opacus_import", "opacus"),
    ("keyed", "torch"),  # faster than NumPy at logarithms and sines
    ("keyed", "cryptography"),
    ("dp_optimizer", "torch"),
    ("stepping", "torch"),
    ("ghost_clipping", "torch"),
    ("private_training", "torch"),
    ("strategy_state", "torch"),  # tensors that a strategy keeps; imported where there are any
    ("binding", "torch"),  # a type
    ("cutting", "flwr_datasets.partitioner"),  # extra "app": the Dirichlet split
    ("cutting", "datasets"),
    (
        "testing",
        "flwr.supercore",
    ),  # a message outside a run needs the task identity, which has no public name
}

# Two halves that run on different machines: what they share goes into `wire`.
NEVER = {("strategy", "mods"), ("mods", "strategy")}

WHOLE_PACKAGES = names("numpy scipy torch opacus cryptography flwr.supercore typer rich matplotlib")

# The reference client is the honest baseline only while it knows nothing of coding.
CODING_WORDS = ("coded", "straggler", "gradient_coding")


def layer_of(module: str) -> int | None:
    """Position of the layer that lists the module."""
    return next((i for i, layer in enumerate(LAYERS) if module in layer.modules), None)


def imports(source: str) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name imported from it) of every import, made absolute.

    Those inside functions and under TYPE_CHECKING count too. Every module is taken to lie directly in the
    library's package.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level == 1:
                base = f"{LIBRARY}.{base}".rstrip(".")
            elif node.level > 1:
                base = f"{'.' * node.level}{base}"  # above the package: no module that anyone may import
            yield from ((node.lineno, base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            if called in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value), None


def library_module(imported: str, name: str | None) -> str:
    """The module of the library that an import reaches: `from fl_gradcode import codes` reaches codes."""
    parts = imported.split(".")
    if len(parts) > 1:
        return parts[1]
    return name if name is not None and layer_of(name) is not None else "__init__"


def may_import_package(module: str, position: int, imported: str, name: str | None) -> bool:
    """Whether the module, whose layer is at the position, may import this from outside the library."""
    if imported.split(".")[0] in sys.stdlib_module_names:
        return True
    granted = {package for layer in LAYERS[: position + 1] for package in layer.packages}
    granted |= {package for owner, package in EXTRAS if owner == module}
    reached = {imported} if name is None else {imported, f"{imported}.{name}"}
    whole = {package for package in granted & WHOLE_PACKAGES if f"{imported}.".startswith(f"{package}.")}
    return bool(reached & granted or whole)


def violations(module: str, source: str) -> list[str]:
    """What the module's source imports against the rules, one line each."""
    position = layer_of(module)
    if position is None:
        return [f"{module}: in no layer; enter it in LAYERS of {Path(__file__).name}"]
    layer = LAYERS[position]
    found = []
    for line, imported, name in imports(source):
        where = f"{module}.py:{line}"
        if imported.split(".")[0] != LIBRARY:
            if not may_import_package(module, position, imported, name):
                what = imported if name is None else f"{imported} ({name})"
                found.append(f"{where}: the {layer.name} layer may not import {what}")
            continue
        target = library_module(imported, name)
        target_position = layer_of(target)
        if target_position is None:
            found.append(f"{where}: imports {target}, which is in no layer")
        elif target_position > position:
            found.append(f"{where}: imports up, {target} of the {LAYERS[target_position].name} layer")
        elif target_position == position and target != module and not layer.peers:
            found.append(f"{where}: modules of the {layer.name} layer may not import each other ({target})")
        elif (module, target) in NEVER:
            found.append(f"{where}: {module} and {target} never import each other: use wire")
    return found


def module_name(path: Path) -> str:
    """Name of the module or subpackage directly in the library that the file belongs to."""
    return path.relative_to(ROOT / LIBRARY).parts[0].removesuffix(".py")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(LIBRARY), ids=relative)
def test_imports_point_down(path: Path) -> None:
    assert violations(module_name(path), path.read_text()) == []


def test_library_has_no_subpackages() -> None:
    # `imports` resolves relative imports on this assumption.
    assert [relative(path) for path in sources(LIBRARY) if path.parent != ROOT / LIBRARY] == []


def test_every_layered_module_is_listed_once() -> None:
    listed = [module for layer in LAYERS for module in layer.modules]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", sources("clients"), ids=relative)
def test_reference_client_contains_no_coding_words(path: Path) -> None:
    text = path.read_text().lower()
    if path == ROOT / "clients" / "app.py":
        text = text.replace("gradient_coding_mod", "")  # the one line that turns coding on
    assert [word for word in CODING_WORDS if word in text] == []


@pytest.mark.parametrize("path", sources(LIBRARY, *PROGRAMS), ids=relative)
def test_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


# The checker itself: what it allows, and what it must find.


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import collections.abc\nfrom __future__ import annotations"),
        ("codes", "import numpy as np\nfrom numpy.typing import NDArray\nfrom scipy import linalg"),
        ("codes", "from .errors import NotDecodable\ndef f():\n    from .incremental import Decoder"),
        ("latency", "from .codes import GradientCode\nimport scipy.stats"),
        ("strategy", "from flwr.serverapp.strategy import FedAvg\nfrom flwr.serverapp import exception"),
        ("strategy", "from . import codes, wire\nfrom fl_gradcode import errors\nimport fl_gradcode.codes"),
        ("keyed", "def f():\n    import torch.random"),
        ("testing", "from flwr.supercore.task_identity import TaskIdentity"),
        ("cli", "from .strategy import GradientCoding\nfrom . import latency"),
        ("__init__", "from .cli import main\nfrom .errors import NotDecodable"),
    ],
)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("codes", "import flwr.app", "may not import flwr.app"),
        ("codes", "from flwr.app import Message", r"may not import flwr.app \(Message\)"),
        ("codes", "def f():\n    import torch", "codes.py:2: .* may not import torch"),
        ("codes", "if TYPE_CHECKING:\n    from .strategy import GradientCoding", "imports up, strategy"),
        ("codes", "import importlib\nimportlib.import_module('torch')", "may not import torch"),
        ("errors", "import numpy", "may not import numpy"),
        ("errors", "from . import codes", "imports up, codes"),
        ("codes", "import numpyro", "may not import numpyro"),
        ("wire", "from fl_gradcode import cli", "imports up, cli"),
        ("wire", "from fl_gradcode import GradientCode", "imports up, __init__"),
        ("wire", "import fl_gradcode", "imports up, __init__"),
        ("wire", "from . import unheard_of", "imports up, __init__"),
        ("wire", "from .unheard_of import thing", "unheard_of, which is in no layer"),
        ("wire", "from flwr.common import Message", "may not import flwr.common"),
        ("wire", "from flwr.app.message import Message", "may not import flwr.app.message"),
        ("wire", "import flwr", "may not import flwr"),
        ("strategy", "import torch", "may not import torch"),
        ("grid", "from flwr.supercore import task_identity", "may not import flwr.supercore"),
        ("strategy", "def f():\n    from .mods import gradient_coding_mod", "never import each other"),
        ("mods", "from fl_gradcode.strategy import GradientCoding", "never import each other"),
        ("cli", "from experiments import demo", "may not import experiments"),
        ("cli", "import server.app", "may not import server.app"),
        ("cli", "from ..clients import app", "may not import ..clients"),
        ("cli", "import tests", "may not import tests"),
        ("unheard_of", "", "in no layer"),
    ],
)
def test_checker_finds(module: str, source: str, reason: str) -> None:
    (found,) = violations(module, source)
    assert re.search(reason, found)
