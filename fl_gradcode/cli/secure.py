"""The command line for secure aggregation: `fl-gradcode secure` makes a manifest, and shows what a node has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import MEGABYTE, make_folder, parse_json, read_file, replace_file
from ..codes import GradientCode, fractional_repetition, reed_solomon
from ..errors import InvalidSetting
from ..placement import Manifest as DataManifest
from ..privacy import read_keys, write_keys
from ._errors import one_sentence

if TYPE_CHECKING:
    from ..secagg import Manifest

__all__ = ["secure"]

secure = typer.Typer(
    help="Make the manifest of secure aggregation from key files, and show what a node has.",
    no_args_is_help=True,
    suggest_commands=False,  # click does
)

_CODES: dict[str, Callable[[int, int, int], GradientCode]] = {
    "fractional": lambda n, s, m: fractional_repetition(n, s),
    "reed-solomon": lambda n, s, m: reed_solomon(n, s, m=m),
}
_LARGEST = 16 * MEGABYTE


@secure.command("make")
def make(
    folder: Annotated[
        Path, typer.Argument(help="Folder with node-0/keys.json, ..., as `keys make` made it; made if it is missing.")
    ],
    layout: Annotated[
        Path,
        typer.Option(
            help='JSON file with what train() returns: {"arrays": [[name, dtype, [shape]]], "metrics": {name: length}},'
            " without the weight; length -1 for a single number."
        ),
    ],
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")],
    stragglers: Annotated[int, typer.Option("--stragglers", "-s", help="Straggler tolerance s of the code.")],
    largest_weight: Annotated[
        float, typer.Option(help="Largest weight of a shard, such as its number of examples; a larger one fails.")
    ],
    code: Annotated[str, typer.Option(help=f"The code: {', '.join(_CODES)}.")] = "fractional",
    m: Annotated[int, typer.Option("-m", help="Upload reduction m; with reed-solomon.")] = 1,
    bound: Annotated[float, typer.Option(help="Clipping bound of an update.")] = 1.0,
    clip: Annotated[str, typer.Option(help="entries or norm: what the bound limits.")] = "entries",
    colluders: Annotated[int, typer.Option(help="Workers that may collude with the server.")] = 1,
    min_classes: Annotated[int, typer.Option(help="Fewest classes of shards in a sum.")] = 3,
    weight_key: Annotated[str, typer.Option(help="Name of the metric that is a shard's weight.")] = "num-examples",
    data: Annotated[
        Path | None, typer.Option(help="manifest.json that `place` wrote: holders then refuse other data.")
    ] = None,
    pin: Annotated[
        str, typer.Option(help="Packages whose version here must be each node's, with commas between.")
    ] = "numpy",
    pin_machine: Annotated[
        bool, typer.Option("--pin-machine", help="Nodes must have this machine's processor, SIMD sets and threads.")
    ] = False,
) -> None:
    """Make the manifest of a code from the key files of all workers, and pin it in each node's folder."""
    with one_sentence():
        from ..client import environment_words, versions_of
        from ..secagg import MANIFEST_FILE, deal, holders_in, make_body

        if code not in _CODES:
            raise InvalidSetting(f"--code {code!r} must be one of {', '.join(_CODES)}.")
        if m != 1 and code != "reed-solomon":
            raise InvalidSetting(f"-m {m} needs --code reed-solomon; masks of other codes have m = 1.")
        built = _CODES[code](workers, stragglers, m)
        arrays, metrics = _layout_in(layout)
        new = not any(folder.glob("node-*/keys.json"))
        if new:
            make_folder(folder)
            write_keys(folder, [built.shards_of(worker) for worker in range(built.n)])
        body = make_body(
            built,
            arrays=arrays,
            metrics=metrics,
            colluders=colluders,
            min_classes=min_classes,
            holders=holders_in(folder),
            bound=bound,
            clip=clip,
            largest_weight=largest_weight,
            weight_key=weight_key,
            versions=versions_of(name.strip() for name in pin.split(",") if name.strip()),
            environment=environment_words() if pin_machine else (),
        )
        digests = None if data is None else DataManifest.for_all_shards(data, built.k).digests
        manifest = deal(folder, body, data=digests)
        replace_file(folder / MANIFEST_FILE, manifest.to_bytes())
    typer.echo(f"{'Keys and a' if new else 'A'} manifest for {built.n} workers in {folder}:")
    _show(manifest)
    typer.echo("Bring each node its own folder, and start it with")
    typer.echo(
        '    --node-config \'partition-id=0 num-partitions=... secagg-dir="/path/to/node-0" '
        f"secagg-colluders={colluders}'"
    )
    typer.echo(f"The server needs {folder / MANIFEST_FILE} alone: secure=SecureAggregation(PATH). Bring it no keys.")


@secure.command("check")
def check(folder: Annotated[Path, typer.Argument(help="A node's folder.")]) -> None:
    """Print which manifest a node has pinned, whether its keys are the manifest's, and what it has answered."""
    with one_sentence():
        from ..secagg import AnsweredRequests, class_keys, read_manifest, seeds_of

        own, manifest = read_keys(folder), read_manifest(folder)
        class_keys(manifest, own.worker, seeds_of(own, manifest.body.classes))
        rows = AnsweredRequests(folder / "answered").rows()
    _show(manifest)
    typer.echo(f"  worker      {own.worker}, whose keys are the manifest's")
    typer.echo(f"  answered    {len(rows)} requests" + (f", last round {rows[-1].round}" if rows else ""))


def _show(manifest: Manifest) -> None:
    body = manifest.body
    certificate, quantiser = body.certificate(), body.quantiser
    error = body.classes.k * 2.0**-quantiser.fraction_bits
    typer.echo(f"  digest      {manifest.digest.hex()}")
    typer.echo(f"  classes     {len(body.classes)} of {body.classes.k} shards, modulo {body.classes.ring.modulus}")
    typer.echo(f"  certified   for any {certificate.colluders} colluding workers ({certificate.method})")
    typer.echo(
        f"  updates     clipped at {quantiser.bound:g} ({quantiser.clip}), {quantiser.fraction_bits} fraction bits: "
        f"sums are off by at most {error:.1e}"
    )


def _layout_in(path: Path) -> tuple[list[tuple[str, str, list[int]]], list[tuple[str, int]]]:
    """Returns the arrays and metrics of a layout file.

    Raises:
        InvalidSetting: It cannot be read, or is not one.
    """
    try:
        values: Any = parse_json(read_file(path, _LARGEST))
        arrays = [(str(name), str(dtype), [int(x) for x in shape]) for name, dtype, shape in values["arrays"]]
        metrics = sorted((str(name), int(length)) for name, length in values.get("metrics", {}).items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidSetting(
            f'{path} must hold, as JSON, {{"arrays": [["name", "float32", [10, 3]], ...], "metrics": {{"loss": -1}}}}.'
        ) from None
    return arrays, metrics
