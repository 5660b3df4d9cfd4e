"""Cut a data set of the reference app into files, one a shard, for `fl-gradcode place`.

    python -m experiments.make_shards --dataset digits --shards 6 --out shards
    fl-gradcode place shards placed --workers 6 --s 2

With `shards-dir` in its node config, a node trains on its files, to the same bits as if it had cut the data set itself
with the same partitioner, alpha and seed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clients.data import DATASET_NAMES, load_dataset
from clients.errors import AppConfigError
from clients.partition import PARTITIONER_NAMES, partition_indices
from clients.shards import write_shard

__all__ = ["main", "make_shards"]


def make_shards(
    out: Path,
    dataset: str,
    shards: int,
    *,
    partitioner: str,
    alpha: float,
    seed: int,
    owners: int,
    data_dir: str,
    train_examples: int,
) -> list[Path]:
    """Write shard-000.npz and so on, and return their paths. Other arguments are as in the run config."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AppConfigError(f"{out} is there and not an empty folder: give a new one.")
    whole = load_dataset(dataset, data_dir, train_examples, seed=seed)
    parts = partition_indices(whole, shards, partitioner=partitioner, alpha=alpha, seed=seed, owners=owners)
    out.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(shards - 1)))
    paths = [out / f"shard-{number:0{digits}}.npz" for number in range(shards)]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, whole, part)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.make_shards", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASET_NAMES, default="digits")
    parser.add_argument("--shards", type=int, required=True, help="how many")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--partitioner", choices=PARTITIONER_NAMES, default="dirichlet")
    parser.add_argument("--alpha", type=float, default=0.3)
    parser.add_argument("--owners", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="the run's: the app's own cut depends on it")
    parser.add_argument("--train-examples", type=int, default=0, help="a random part of so many; 0: all")
    parser.add_argument("--data-dir", default="", help="absolute path of the data set's files")
    given = vars(parser.parse_args(arguments))
    try:
        paths = make_shards(given.pop("out"), given.pop("dataset"), given.pop("shards"), **given)
    except (AppConfigError, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in paths)
    print(
        f"{len(paths)} shards, {size / 1e6:.3g} MB, in {paths[0].parent}. Next: fl-gradcode place {paths[0].parent} OUT"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
