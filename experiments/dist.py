"""Build the wheel and the sdist, check them, and use the wheel as a stranger would: python -m experiments.dist.

The wheel is built from the sdist, so that both are complete. twine and the empty environment come by uv.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "dist"
UV = (sys.executable, "-m", "uv", "--no-progress")
IN_THE_SDIST = (
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "fl_gradcode/py.typed", "hatch_build.py", "pyproject.toml",
)  # fmt: skip


class DistError(RuntimeError):
    """A file of the distribution is not as it should be."""


def missing(wheel: Path, sdist: Path) -> list[str]:
    """Returns what is in the repository and should be in the wheel or the sdist, but is not."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fl_gradcode").rglob("*.py")}
    with zipfile.ZipFile(wheel) as file:
        inside = {*file.namelist()}
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    lacking = [f"{wheel.name}: {name}" for name in sorted({*sources, "fl_gradcode/py.typed"} - inside)]
    lacking += [f"{wheel.name}: {name}" for name in sorted(inside) if not _belongs(name)]
    return lacking + [f"{sdist.name}: {name}" for name in sorted({*sources, *IN_THE_SDIST} - packed)]


def _belongs(name: str) -> bool:
    return name.startswith("fl_gradcode/") or ".dist-info/" in name


def first_run(folder: Path) -> Path:
    """Writes the blocks of docs/getting-started.md to a program: a plain app, the two lines, a silent client."""
    page = (ROOT / "docs" / "getting-started.md").read_text()
    program = folder / "first_run.py"
    program.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    return program


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command without the checkout on its path; returns what it printed.

    Raises:
        DistError: It failed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise DistError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout.strip()


def main() -> int:
    """Builds, checks and tries; returns 0 if all went well."""
    try:
        _main()
    except DistError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", OUT)
    (wheel,), (sdist,) = OUT.glob("*.whl"), OUT.glob("*.tar.gz")
    if lacking := missing(wheel, sdist):
        raise DistError("Missing, or not meant to be there:\n" + "\n".join(lacking))
    for path in (wheel, sdist):
        print(f"built {path.name}, {path.stat().st_size / 1e3:.0f} kB", flush=True)
    print(
        run(*UV, "tool", "run", "--with", "readme-renderer[md]", "twine", "check", "--strict", wheel, sdist), flush=True
    )
    folder = ROOT / "out" / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    run(*UV, "venv", "--python", sys.executable, folder / "venv")
    run(*UV, "pip", "install", "--python", python, wheel)
    print(f"in an empty environment: {run(python.with_name('fl-gradcode'), '--version', cwd=folder)}", flush=True)
    run(python, first_run(folder), cwd=folder)
    print("The two-line app of docs/getting-started.md ran with the wheel; its model equals plain Flower's.")


if __name__ == "__main__":
    sys.exit(main())
