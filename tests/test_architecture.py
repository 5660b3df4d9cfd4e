"""The house: folders are layers, imports point down, each folder is used through its face."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from experiments.house import PLACES, with_house

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "fl_gradcode"
MOST_FILES, MOST_LINES = 18, 600


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Standing before is not enough for these: they never meet but in `protocol`, or must run without the other.
NEVER = {
    ("strategy", "client"),
    ("codes", "_seeding"),
    ("codes", "_flower_internals"),
    ("latency", "_flower_internals"),
    ("placement", "_flower_internals"),
    ("planning", "_flower_internals"),
    ("protocol", "_flower_internals"),
    ("planning", "placement"),
    ("latency", "codes"),
    ("placement", "latency"),
}

#: Packages outside the library by place. Exact names (`flwr.app` does not include `flwr.app.message`), except WHOLE.
FLOWER = names("flwr.app flwr.serverapp flwr.serverapp.strategy flwr.serverapp.exception")
PACKAGES: dict[str, frozenset[str]] = {
    "_npy": names("numpy"),
    "_seeding": names("numpy"),
    "codes": names("numpy scipy"),
    "latency": names("numpy scipy"),
    "placement": names("numpy scipy"),
    "staleness": names("numpy"),
    "planning": names("numpy scipy"),
    "protocol": names("numpy flwr.app"),
    "runlog": names("numpy flwr.app"),
    "grid": names("flwr.app flwr.serverapp"),
    "privacy": names("numpy scipy flwr.app"),
    "masking": names("numpy"),
    "secagg": names("numpy"),
    "enrolment": names("flwr.app flwr.serverapp"),
    "client": names("numpy flwr.app flwr.clientapp"),
    "roster": names("numpy flwr.app flwr.serverapp"),
    "copies": names("numpy flwr.app"),
    "averaging": names("numpy flwr.app"),
    "checkpoints": names("numpy flwr.app flwr.serverapp.strategy"),
    "strategy": FLOWER | names("numpy"),
    "matmul": names("numpy scipy flwr.app flwr.serverapp flwr.clientapp"),
    "appcheck": FLOWER | names("numpy flwr.clientapp"),
    "testing": names("numpy flwr.app flwr.serverapp flwr.clientapp"),
    "cli": names("numpy typer rich matplotlib"),
    # Flower's internals, each with its reason there.
    "_flower_internals": names("numpy flwr.app flwr.clientapp.mod flwr.supercore"),
}
#: (file, package): granted to one file. PyTorch and the rest are extras.
EXTRAS = {
    ("privacy/_opacus.py", "opacus"),
    ("privacy/key_derivation.py", "torch"),  # faster than NumPy at logarithms and sines
    ("privacy/key_derivation.py", "cryptography"),
    ("privacy/dp_optimizer.py", "torch"),
    ("privacy/attempts.py", "torch"),  # for a type alone
    ("privacy/model_checks.py", "torch"),
    ("privacy/record_gradients.py", "torch"),
    ("privacy/record_losses.py", "torch"),
    ("privacy/step_guards.py", "torch"),
    ("privacy/training.py", "torch"),
    ("masking/labels.py", "cryptography"),
    ("masking/streams.py", "cryptography"),
    ("secagg/keys.py", "cryptography"),
    ("enrolment/identities.py", "cryptography"),
    ("enrolment/wraps.py", "cryptography"),
    ("checkpoints/strategy_state.py", "torch"),  # tensors that a strategy keeps; imported where there are any
    ("placement/splitting.py", "flwr_datasets.partitioner"),  # extra "app": the Dirichlet split
    ("placement/splitting.py", "datasets"),
    ("runlog/frames.py", "pandas"),
    ("runlog/recorders.py", "mlflow"),
    ("runlog/recorders.py", "tensorboard.summary"),
}
WHOLE = names("numpy scipy torch opacus cryptography flwr.supercore typer rich matplotlib")

# The reference client is the honest baseline only while it knows nothing of coding.
CODING_WORDS = ("coded", "straggler", "gradient_coding")


@dataclass(frozen=True)
class Import:
    """An import as absolute names.

    Attributes:
        line: Where it stands.
        module: The module that is imported, or imported from.
        name: What is imported from it; None: the module itself.
    """

    line: int
    module: str
    name: str | None = None


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of a library file (`codes/reals.py`), inside functions and under TYPE_CHECKING too."""
    package = [LIBRARY, *file.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, base]).rstrip(".") if kept else f"{'.' * node.level}{base}"
            yield from (Import(node.lineno, base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            if called in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield Import(node.lineno, str(target.value))


def place_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def may_import_package(file: str, one: Import) -> bool:
    if one.module.split(".")[0] in sys.stdlib_module_names:
        return True
    granted = PACKAGES.get(place_of(file), frozenset()) | {package for owner, package in EXTRAS if owner == file}
    reached = {one.module} if one.name is None else {one.module, f"{one.module}.{one.name}"}
    whole = {package for package in granted & WHOLE if f"{one.module}.".startswith(f"{package}.")}
    return bool(reached & granted or whole)


def violation(file: str, one: Import) -> str | None:
    """What is wrong with one import; None: nothing."""
    place, parts = place_of(file), one.module.split(".")
    if parts[0] != LIBRARY:
        what = one.module if one.name is None else f"{one.module} ({one.name})"
        return None if may_import_package(file, one) else f"{place} may not import {what}"
    if len(parts) == 1:  # from .. import x
        parts = [*parts, one.name or ""]
    target = parts[1]
    if target not in PLACES:
        return f"imports {target or LIBRARY}, which is in no place of PLACES"
    if target == place:
        return None
    if PLACES.index(target) > PLACES.index(place):
        return f"imports up, {target} from {place}"
    if (place, target) in NEVER:
        return f"{place} and {target} never import each other"
    if len(parts) > 2 or (one.name and (ROOT / LIBRARY / target / f"{one.name}.py").exists()):
        return f"imports past the face of {target}: say `from ..{target} import ...`"
    return None


def violations(file: str, source: str) -> list[str]:
    """What a file's source imports against the rules, one line each."""
    if place_of(file) not in PLACES and file != "__init__.py":
        return [f"{file}: in no place; enter {place_of(file)} in PLACES of {Path(__file__).name}"]
    if file == "__init__.py":
        return []
    found = ((one, violation(file, one)) for one in imports(source, file))
    return [f"{file}:{one.line}: {wrong}" for one, wrong in found if wrong]


def library_files() -> list[str]:
    return sorted(path.relative_to(ROOT / LIBRARY).as_posix() for path in (ROOT / LIBRARY).rglob("*.py"))


def text_of(file: str) -> str:
    return (ROOT / LIBRARY / file).read_text()


def folders() -> list[str]:
    return sorted({file.split("/")[0] for file in library_files() if "/" in file})


def siblings(file: str) -> Iterator[str]:
    """The files of its own folder that a file imports."""
    folder = file.split("/")[0]
    for one in imports(text_of(file), file):
        parts = one.module.split(".")
        if parts[:2] == [LIBRARY, folder]:
            yield f"{folder}/{parts[2] if len(parts) > 2 else one.name}.py"


def circle_in(imported: Mapping[str, Collection[str]]) -> list[str]:
    """The files of a circle, or none."""
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return [*error.args[1]]
    return []


@pytest.mark.parametrize("file", library_files())
def test_imports_point_down_and_go_through_faces(file: str) -> None:
    assert violations(file, text_of(file)) == []


@pytest.mark.parametrize("folder", folders())
def test_files_of_a_folder_import_each_other_in_no_circle(folder: str) -> None:
    files = [file for file in library_files() if file.startswith(f"{folder}/") and not file.endswith("__init__.py")]
    assert circle_in({file: set(siblings(file)) for file in files}) == []


@pytest.mark.parametrize("folder", folders())
def test_a_folder_has_a_face_and_is_small_enough_to_look_over(folder: str) -> None:
    face = text_of(f"{folder}/__init__.py")
    tree = ast.parse(face)
    assert ast.get_docstring(tree)
    assert len([file for file in library_files() if file.startswith(f"{folder}/")]) - 1 <= MOST_FILES
    promised = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    promised -= {"TYPE_CHECKING", "lazy_names"}
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    assert promised == set(listed)
    package = __import__(f"{LIBRARY}.{folder}", fromlist=["__all__"])
    assert all(getattr(package, name) is not None for name in listed)


@pytest.mark.parametrize("folder", ["experiments", "server", "clients"])
def test_programs_use_the_library_through_its_faces(folder: str) -> None:
    deep = [
        f"{path.relative_to(ROOT)}:{one.line}: {one.module}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for one in imports(path.read_text(), "program.py")
        if one.module.split(".")[0] == LIBRARY and one.module.count(".") > 1
    ]
    assert deep == []


@pytest.mark.parametrize("file", library_files())
def test_a_long_file_says_why(file: str) -> None:
    source = text_of(file)
    if len(source.splitlines()) > MOST_LINES:
        assert "Long because" in (ast.get_docstring(ast.parse(source)) or "")


def test_every_place_exists() -> None:
    assert {place_of(file) for file in library_files()} == {*PLACES, "__init__"}


def test_the_design_page_has_the_table_of_todays_folders() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    assert with_house(page) == page, "run: python -m experiments.house"


def face_of(folder: str) -> dict[str, str]:
    """Name in the folder's face -> the file that has it."""
    tree = ast.parse(text_of(f"{folder}/__init__.py"))
    return {
        alias.name: f"{folder}/{node.module}.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }


def reached_from(file: str) -> set[str]:
    """The library's files that a file imports something from, through faces too."""
    found = set(siblings(file)) if "/" in file else set()
    for one in imports(text_of(file), file):
        parts = one.module.split(".")
        if parts[0] == LIBRARY and len(parts) == 2 and (ROOT / LIBRARY / parts[1]).is_dir():
            found.add(face_of(parts[1]).get(one.name or "", ""))
        elif parts[0] == LIBRARY and len(parts) == 2:
            found.add(f"{parts[1]}.py")
    return found - {""}


@pytest.mark.parametrize(("path", "most"), [("path of a round", 12), ("path of a message", 6)])
def test_the_path_of_a_round_is_short_and_each_file_is_reached_from_those_before_it(path: str, most: int) -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    listed = re.findall(
        r"^\d+\. `([\w/]+\.py)`", page.split(f"<!-- {path} -->")[1].split("<!-- end of path -->")[0], re.M
    )
    assert 0 < len(listed) <= most
    known: set[str] = {listed[0]}
    for file in listed:
        assert file in known, f"no file before {file} in the {path} imports it"
        known |= reached_from(file)


@pytest.mark.parametrize("path", sorted((ROOT / "clients").rglob("*.py")), ids=lambda path: path.name)
def test_reference_client_contains_no_coding_words(path: Path) -> None:
    text = path.read_text().lower()
    if path == ROOT / "clients" / "app.py":
        text = text.replace("gradient_coding_mod", "")  # the one line that turns coding on
    assert [word for word in CODING_WORDS if word in text] == []


# The checker itself: what it allows, and what it must find.


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("errors.py", "import collections.abc\nfrom __future__ import annotations"),
        ("codes/reals.py", "import numpy as np\nfrom numpy.typing import NDArray\nfrom scipy import linalg"),
        ("codes/decoder.py", "from ..errors import NotDecodable\ndef f():\n    from .reals import REALS"),
        ("strategy/run.py", "from flwr.serverapp.strategy import FedAvg\nfrom flwr.serverapp import exception"),
        ("strategy/run.py", "from . import report\nfrom ..codes import GradientCode\nfrom .. import errors"),
        ("privacy/key_derivation.py", "def f():\n    import torch.random"),
        ("_flower_internals.py", "from flwr.supercore.task_identity import TaskIdentity"),
        ("cli/plan.py", "from ..strategy import GradientCoding\nfrom rich.table import Table"),
        ("__init__.py", "from .client import gradient_coding_mod"),
    ],
)
def test_checker_allows(file: str, source: str) -> None:
    assert violations(file, source) == []


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("codes/reals.py", "import flwr.app", "may not import flwr.app"),
        ("codes/reals.py", "from flwr.app import Message", r"may not import flwr.app \(Message\)"),
        ("codes/reals.py", "def f():\n    import torch", "codes/reals.py:2: codes may not import torch"),
        ("codes/reals.py", "if TYPE_CHECKING:\n    from ..strategy import GradientCoding", "imports up, strategy"),
        ("codes/reals.py", "import importlib\nimportlib.import_module('torch')", "may not import torch"),
        ("codes/reals.py", "import numpyro", "may not import numpyro"),
        ("errors.py", "import numpy", "may not import numpy"),
        ("errors.py", "from . import codes", "imports up, codes"),
        ("protocol/records.py", "from fl_gradcode import cli", "imports up, cli"),
        ("protocol/records.py", "from fl_gradcode import GradientCode", "imports GradientCode, which is in no place"),
        ("protocol/records.py", "import fl_gradcode", "imports fl_gradcode, which is in no place"),
        ("protocol/records.py", "from ..codes.prime_field import P", "past the face of codes"),
        ("protocol/records.py", "from ..codes import prime_field", "past the face of codes"),
        ("protocol/records.py", "from flwr.common import Message", "may not import flwr.common"),
        ("protocol/records.py", "from flwr.app.message import Message", "may not import flwr.app.message"),
        ("protocol/records.py", "import flwr", "may not import flwr"),
        ("strategy/run.py", "import torch", "may not import torch"),
        ("grid/virtual.py", "from flwr.supercore import task_identity", "may not import flwr.supercore"),
        ("strategy/run.py", "def f():\n    from ..client import gradient_coding_mod", "never import each other"),
        ("client/mod.py", "from fl_gradcode.strategy import GradientCoding", "imports up, strategy"),
        ("cli/app.py", "from experiments import demo", "may not import experiments"),
        ("cli/app.py", "from ...clients import app", "may not import ...clients"),
        ("unheard_of/one.py", "", "in no place"),
    ],
)
def test_checker_finds(file: str, source: str, reason: str) -> None:
    (found,) = violations(file, source)
    assert re.search(reason, found)


def test_checker_finds_a_circle() -> None:
    assert sorted({*circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}})}) == ["b", "c"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []
