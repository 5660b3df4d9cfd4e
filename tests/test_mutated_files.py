"""Every reader of files: whatever is in a file, there is one sentence or a result, and nothing else happens.

`FL_GRADCODE_MUTATIONS=2000 pytest tests/test_mutated_files.py` tries ten times as many files as CI does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvgM

from fl_gradcode import GradientCoding, Ledger, fractional_repetition
from fl_gradcode.checkpoints.checkpoint import Checkpoint
from fl_gradcode.checkpoints.strategy_state import StrategyState
from fl_gradcode.cli._assignment_file import read_assignment
from fl_gradcode.cli.plan_source import read_source
from fl_gradcode.errors import FlGradcodeError
from fl_gradcode.latency import read_trace
from fl_gradcode.placement.manifest import Manifest, Shard
from fl_gradcode.placement.splitting import count_examples
from fl_gradcode.privacy.accounting import Spend
from fl_gradcode.privacy.budget_ledger import BudgetLedger, Request
from fl_gradcode.privacy.keys import read_keys, write_keys
from fl_gradcode.privacy.run_account import Account
from fl_gradcode.runlog.reader import LedgerReader
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app
from tests.mutations import COUNT, limited, mutated, state_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory, and /proc")

MEGABYTES, SECONDS = 100, 20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of every kind, from a run of two rounds."""
    folder = tmp_path_factory.mktemp("good")
    strategy = GradientCoding(
        FedAvgM(server_momentum=0.9, fraction_evaluate=0.5),
        fractional_repetition(4, 1),
        ledger=folder / "ledger.jsonl",
        checkpoint=folder / "run.ckpt",
        run="r",
    )
    with InProcessGrid(toy_app(), 4) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=2)
    account = Account.new({0: 2, 1: 2}).released([0, 1], (1, 3)).drawn([0])
    Checkpoint(folder / "run.ckpt").save_privacy("r", account.state)
    shards = tuple(Shard(j, f"shard-{j}.npz", 10, 100, f"{j:064x}") for j in range(4))
    Manifest(4, shards, worker=1, held=((0, 1), (1, 2), (2, 3)), code="reed_solomon(4, 1)").write(
        folder / "shards.json"
    )
    write_keys(folder / "keys", [(0, 1), (1, 0)])
    for number in (1, 2, 3):
        BudgetLedger(folder / "spent").charge(Request(0, "r", number, "c", Spend(1.0, 0.1, 3)), delta=1e-5)
    (folder / "assignment.json").write_text(json.dumps([[0, 1], [1, 2], [2, 0]]))
    rng = np.random.default_rng(0)
    np.savez(folder / "times.npz", times=rng.exponential(1.0, (12, 4)))
    np.savez_compressed(folder / "packed.npz", times=rng.exponential(1.0, (12, 4)))
    np.savez(folder / "data.npz", x=rng.random((12, 3)), y=rng.integers(3, size=12), z=np.array(["a", "b", "c"] * 4))
    table = "\n".join(",".join(f"{x:.4f}" for x in row) for row in rng.exponential(1.0, (12, 4)))
    (folder / "rounds.csv").write_text(f"a,b,c,d\n{table}\n")
    jobs = "\n".join(f"{i % 4},{1 + i * 5 % 24 / 7:.3f},{1 + i // 4},1,{i * 5 % 24 / 9:.3f}" for i in range(24))
    (folder / "jobs.csv").write_text(f"worker,seconds,round,shards,computing\n{jobs}\n")
    return folder


def read_checkpoint(path: Path) -> None:
    saved = Checkpoint(path).load()
    if saved is not None:
        strategy = FedAvgM(server_momentum=0.9)
        StrategyState(strategy).restore(saved.strategy)
        assert strategy.aggregate_train.__func__ is FedAvgM.aggregate_train  # type: ignore[attr-defined]


def read_account(path: Path) -> None:
    found = Checkpoint(path.with_name("run.ckpt")).load_privacy("r")
    if found is not None:
        Account.new({0: 2, 1: 2}).merged(found)


def read_ledger(path: Path) -> None:
    def told() -> object:
        rows = Ledger.read(path)
        return all(isinstance(row, dict) for row in rows)

    reader = LedgerReader(path)
    # Each of them reads the whole file in a way of its own.
    for read in (told, lambda: Ledger.read_rounds(path), reader.read, lambda: read_source(str(path))):
        assert read() is not NotImplemented
    for run in reader.runs.values():
        assert len(run.recent) == len(run.rounds)


def read_keyfile(path: Path) -> None:
    keys = read_keys(path.parent)
    assert all(len(secret) == 32 for secret in keys.secrets.values())


def read_spent(path: Path) -> None:
    for one in BudgetLedger(path.parent).entries(0):
        assert one.spend.noise_multiplier > 0 and one.spend.steps >= 1


def read_manifest(path: Path) -> None:
    assert Manifest.read(path).k >= 0


def read_assigned(path: Path) -> None:
    assert all(len({*shards}) == len(shards) for shards in read_assignment(path))


def read_times(path: Path) -> None:
    source = read_source(str(path), n=4)
    assert source.n is None or source.n >= 1


def read_npz(path: Path) -> None:
    assert read_trace(path).dtype == np.float64


def read_data(path: Path) -> None:
    assert (count_examples(path) or 0) >= 0


READERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "checkpoint": ("run.ckpt", read_checkpoint),
    "account": ("run.ckpt.privacy", read_account),
    "ledger": ("ledger.jsonl", read_ledger),
    "manifest": ("shards.json", read_manifest),
    "keys": ("keys/node-0/keys.json", read_keyfile),
    "spent": ("spent/shard-0.jsonl", read_spent),
    "assignment": ("assignment.json", read_assigned),
    "rounds": ("rounds.csv", read_times),
    "jobs": ("jobs.csv", read_times),
    "npz": ("times.npz", read_npz),
    "compressed npz": ("packed.npz", read_times),
    "data": ("data.npz", read_data),
}


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_one_sentence_or_a_result(name: str, good: Path, tmp_path: Path) -> None:
    file, read = READERS[name]
    folder = tmp_path / "mutated"
    folder.mkdir(mode=0o700)
    Checkpoint(folder / "run.ckpt")  # makes the file of its lock
    read(good / file)
    refused, locks = 0, ("run.ckpt.lock", "nothing.lock")  # where a link leads, the lock is beside that file
    for number, path in enumerate(mutated(good / file, folder, count=COUNT, seed=len(name))):
        before = state_of(folder)
        try:
            with limited(SECONDS, MEGABYTES):
                read(path)
        except FlGradcodeError as error:
            refused += 1
            text = str(error)
            assert 10 < len(text) < 900 and "\n" not in text and text.isprintable(), (number, text[:900])
        except BaseException as error:
            path.is_file() and path.stat().st_size < 10**8 and (tmp_path / f"bad-{number}").write_bytes(
                path.read_bytes()
            )
            raise AssertionError(f"file {number} of {name}: {type(error).__name__}: {error}") from error
        assert {**state_of(folder), **dict.fromkeys(locks, None)} == {**before, **dict.fromkeys(locks, None)}, number
    assert refused > COUNT // 10 or name == "data"  # of which only the number of rows is asked
