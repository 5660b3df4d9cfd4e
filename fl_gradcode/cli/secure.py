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
from ..privacy import SHARDS_SPENT, BudgetLedger, IntegerNoise, read_keys, write_keys
from ._errors import one_sentence
from .enrolment import agree, allowed_in, identity, tell_node, write_body

if TYPE_CHECKING:
    from ..secagg import ManifestBody, Sending

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
_SENDING: dict[str, Sending] = {"coded": "coded", "shards": "shardwise"}
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
            ' without the weight; length -1 for a single number. "evaluation": {name: length} are the metrics of'
            " evaluate(); without them nodes answer no evaluation."
        ),
    ],
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")],
    stragglers: Annotated[int, typer.Option("--stragglers", "-s", help="Straggler tolerance s of the code.")],
    largest_weight: Annotated[
        float | None,
        typer.Option(
            help="Largest weight of a shard, such as its number of examples; a larger one fails. Not with noise."
        ),
    ] = None,
    code: Annotated[str, typer.Option(help=f"The code: {', '.join(_CODES)}.")] = "fractional",
    m: Annotated[int, typer.Option("-m", help="Upload reduction m; with reed-solomon.")] = 1,
    send: Annotated[
        str, typer.Option(help="coded or shards: one coded vector per worker, or one shard per message.")
    ] = "coded",
    rehearsal: Annotated[
        bool, typer.Option("--rehearsal", help="Holders compare tags of their integers before any vector is sent.")
    ] = False,
    agree_always: Annotated[
        bool,
        typer.Option(
            "--agree-always",
            help="Holders compare tags before the vectors of each round: more than half of them have to answer.",
        ),
    ] = False,
    bound: Annotated[float | None, typer.Option(help="Clipping bound of an update, 1.0 by default.")] = None,
    clip: Annotated[
        str | None, typer.Option(help="entries or norm: what the bound limits, entries by default.")
    ] = None,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="Integer noise in each shard, over what a shard can change: differential privacy."),
    ] = None,
    clipping_norm: Annotated[
        float | None, typer.Option(help="With --noise-multiplier: bound of the norm of a shard's update.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="With --noise-multiplier: shard or sum, what has the whole noise.")
    ] = "shard",
    colluders: Annotated[int, typer.Option(help="Workers that may collude with the server.")] = 1,
    min_classes: Annotated[int, typer.Option(help="Fewest classes of shards in a sum.")] = 3,
    weight_key: Annotated[str, typer.Option(help="Name of the metric that is a shard's weight.")] = "num-examples",
    data: Annotated[
        Path | None, typer.Option(help="manifest.json that `place` wrote: holders then refuse other data.")
    ] = None,
    pin: Annotated[
        str,
        typer.Option(
            help="Packages, separated by commas, of which each node must have the same version as this machine."
        ),
    ] = "numpy",
    pin_machine: Annotated[
        bool,
        typer.Option(
            "--pin-machine", help="Nodes must have the same processor, SIMD sets and threads as this machine."
        ),
    ] = False,
    allow_list: Annotated[
        Path | None,
        typer.Option(
            help="Public lines of all workers (`secure identity`): no keys are made, but a body to agree on, and nodes "
            "exchange keys through the server."
        ),
    ] = None,
    first_use: Annotated[
        bool, typer.Option("--first-use", help="As with --allow-list, and nodes trust the identities that come first.")
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
        if send not in _SENDING:
            raise InvalidSetting(f"--send {send!r} must be one of {', '.join(_SENDING)}.")
        noise = _noise_of(noise_multiplier, clipping_norm, scope, others=(bound, clip, largest_weight))
        if noise is None and largest_weight is None:
            raise InvalidSetting("--largest-weight is missing: the largest weight of a shard, or --noise-multiplier.")
        built = _CODES[code](workers, stragglers, m)
        if send == "shards" and m > 1:
            raise InvalidSetting(f"-m {m} divides updates, and --send shards sends them whole. Leave -m out.")
        arrays, metrics, evaluation = _layout_in(layout)
        relayed = allow_list is not None or first_use
        if relayed and data is not None:
            raise InvalidSetting("--data is for a dealer; without one, lead holders commit to the data that they hold.")
        identities = (allowed_in(allow_list, first_use=first_use) or ()) if relayed else ()
        if identities and len(identities) != workers:
            raise InvalidSetting(f"The allow-list {allow_list} has {len(identities)} workers; -n is {workers}.")
        new = not relayed and not any(folder.glob("node-*/keys.json"))
        if new:
            make_folder(folder)
            write_keys(folder, [built.shards_of(worker) for worker in range(built.n)])
        body = make_body(
            built,
            arrays=arrays,
            metrics=metrics,
            evaluation=evaluation,
            rehearsal=rehearsal,
            agree="always" if agree_always else "",
            sending=_SENDING[send],
            colluders=colluders,
            min_classes=min_classes,
            holders=None if relayed else holders_in(folder),
            identities=identities,
            bound=1.0 if bound is None else bound,
            clip=clip or "entries",
            largest_weight=largest_weight or 1.0,
            privacy=noise,
            weight_key=weight_key,
            versions=versions_of(name.strip() for name in pin.split(",") if name.strip()),
            environment=environment_words() if pin_machine else (),
        )
        if relayed and body.first_use:
            raise InvalidSetting(f"--first-use does not go with this body: {body.first_use}.")
        if relayed:
            write_body(folder, body)
            _show(body)
            return
        digests = None if data is None else DataManifest.for_all_shards(data, built.k).digests
        manifest = deal(folder, body, data=digests)
        replace_file(folder / MANIFEST_FILE, manifest.to_bytes())
    typer.echo(f"{'Keys and a' if new else 'A'} manifest for {built.n} workers in {folder}:")
    typer.echo(f"  digest      {manifest.digest.hex()}")
    _show(manifest.body)
    typer.echo("Bring each node its own folder, and start it with")
    typer.echo(
        '    --node-config \'partition-id=0 num-partitions=... secagg-dir="/path/to/node-0" '
        f"secagg-colluders={colluders}'"
    )
    sending = "" if send == "coded" else f", send={send!r}"
    typer.echo(
        f"The server needs {folder / MANIFEST_FILE} alone: secure=SecureAggregation(PATH){sending}{_told(noise)}. "
        "Bring it no keys."
    )


@secure.command("check")
def check(
    folder: Annotated[Path, typer.Argument(help="A node's folder.")],
    delta: Annotated[float, typer.Option(help="Delta at which spent privacy is computed.")] = 1e-5,
) -> None:
    """Print which manifest a node has pinned, whether its keys are the manifest's, and what it has answered."""
    with one_sentence():
        from ..enrolment import is_enrolled
        from ..secagg import AnsweredRequests, class_keys, read_manifest, seeds_of

        if is_enrolled(folder):
            _show(tell_node(folder))
        else:
            own, manifest = read_keys(folder), read_manifest(folder)
            class_keys(manifest, own.worker, seeds_of(own, manifest.body.classes))
            typer.echo(f"  digest      {manifest.digest.hex()}")
            _show(manifest.body)
            typer.echo(f"  worker      {own.worker}, whose keys are the manifest's")
        rows = AnsweredRequests(folder / "answered").rows()
        ledger = BudgetLedger(folder / SHARDS_SPENT)
        spent = {shard: ledger.epsilon(shard, delta, accountant=IntegerNoise.accountant) for shard in ledger.shards}
    requests = {(row.run, row.kind, row.round) for row in rows}
    typer.echo(f"  answered    {len(requests)} requests" + (f", last round {rows[-1].round}" if rows else ""))
    if spent:
        typer.echo(f"  spent       epsilon {max(spent.values()):.3g} at most, delta {delta:g}, of a shard")


secure.command("identity")(identity)
secure.command("agree")(agree)


def _noise_of(
    multiplier: float | None, norm: float | None, scope: str, *, others: tuple[object, ...]
) -> IntegerNoise | None:
    """Returns the integer noise that the options ask for, or None.

    Raises:
        InvalidSetting: Some of them are missing, or exclude each other.
    """
    if multiplier is None:
        if norm is not None or scope != "shard":
            raise InvalidSetting("--clipping-norm and --scope are for integer noise: say --noise-multiplier too.")
        return None
    if norm is None:
        raise InvalidSetting("--noise-multiplier needs --clipping-norm, the bound of the norm of a shard's update.")
    if any(one is not None for one in others):
        raise InvalidSetting("With --noise-multiplier, leave --bound, --clip and --largest-weight out: weights are 1.")
    return IntegerNoise(noise_multiplier=multiplier, clipping_norm=norm, scope=scope)  # type: ignore[arg-type]


def _told(noise: IntegerNoise | None) -> str:
    """Returns what the server's settings have to say of the noise."""
    if noise is None:
        return ""
    scope = "" if noise.scope == "shard" else f", scope={noise.scope!r}"
    return (
        f", privacy=IntegerNoise(noise_multiplier={noise.noise_multiplier:.10g}, "
        f"clipping_norm={noise.clipping_norm:g}{scope})"
    )


def _show(body: ManifestBody) -> None:
    certificate, quantiser = body.certificate(), body.quantiser
    error = body.classes.k * 2.0**-quantiser.fraction_bits
    typer.echo(f"  classes     {len(body.classes)} of {body.classes.k} shards, modulo {body.classes.ring.modulus}")
    way = "one coded vector a worker" if body.classes.sending == "coded" else "one shard a message"
    covered = "training and evaluation" if body.evaluation else "training alone"
    typer.echo(f"  replies     {way}, for {covered}")
    typer.echo(f"  certified   for any {certificate.colluders} colluding workers ({certificate.method})")
    if body.rehearsal or body.always:
        when = "before the vectors of each round" if body.always else "before the first vectors and after each round"
        typer.echo(f"  compared    {when}, by tags of more than half of the holders")
    typer.echo(
        f"  updates     clipped at {quantiser.bound:g} ({quantiser.clip}), {quantiser.fraction_bits} fraction bits: "
        f"sums are off by at most {error:.1e}"
    )
    if (noise := body.noise()) is not None:
        whose = "each shard alone" if noise.scope == "shard" else "the shards that no colluder holds together"
        typer.echo(
            f"  noise       {noise.noise_multiplier:.6g} times what a shard changes, by {whose}; {quantiser.noise:.6g} "
            "units a shard"
        )


def _layout_in(path: Path) -> tuple[list[tuple[str, str, list[int]]], list[tuple[str, int]], list[tuple[str, int]]]:
    """Returns the arrays, the metrics of training, and the metrics of evaluation of a layout file.

    Raises:
        InvalidSetting: It cannot be read, or is not one.
    """
    try:
        values: Any = parse_json(read_file(path, _LARGEST))
        arrays = [(str(name), str(dtype), [int(x) for x in shape]) for name, dtype, shape in values["arrays"]]
        metrics, evaluation = (
            sorted((str(name), int(length)) for name, length in values.get(kind, {}).items())
            for kind in ("metrics", "evaluation")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidSetting(
            f'{path} must hold, as JSON, {{"arrays": [["name", "float32", [10, 3]], ...], "metrics": {{"loss": -1}}}}.'
        ) from None
    return arrays, metrics, evaluation
