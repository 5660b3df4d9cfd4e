"""Private rounds: whoever answers, the sum of the shards' private updates, released once."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import (
    GradientCode,
    GradientCoding,
    VirtualGrid,
    cyclic_repetition,
    fractional_repetition,
    gradient_coding_mod,
    uncoded,
)
from fl_gradcode.codes import for_assignment, reed_solomon
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.conftest import flat
from tests.once import Once
from tests.privacy.private_app import initial, keys_for, private_app, settings

HELD = [[0, 1, 2, 5], [1, 2, 3], [2, 3, 4], [3, 4, 5, 0], [4, 5, 0], [5, 0, 1, 3]]
CODES: dict[str, GradientCode] = {
    "fractional": fractional_repetition(6, 2),
    "fractional, m=2": fractional_repetition(6, 2, m=2),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
    "cyclic, well drawn": cyclic_repetition(6, 2, rng=np.random.default_rng(13)),  # kappa at most 4.8, not 18
    "universal": for_assignment(HELD, s=2),
    "field": reed_solomon(6, 2),
}
PAIRS = list(itertools.combinations(range(6), 2))
TRAINED_BY = """
import sys
from pathlib import Path
from fl_gradcode.testing import inside_a_run
from tests.privacy.test_private_rounds import digests
with inside_a_run():
    print(digests(int(sys.argv[1]), Path(sys.argv[2])))
"""


def run(
    code: GradientCode, folder: Path, silent: tuple[int, ...] = (), rounds: int = 1, **kwargs: Any
) -> tuple[ArrayRecord, list[dict[str, Any]]]:
    """On a virtual clock; the `silent` never answer."""
    if not (folder / "node-0").exists():
        keys_for(code, folder)
    privacy, app = kwargs.pop("privacy", settings()), kwargs.pop("app", None) or private_app()
    inner, tamper = kwargs.pop("inner", None) or FedAvg(fraction_evaluate=0.0), kwargs.pop("tamper", None)
    arrays = kwargs.pop("arrays", None) or initial()
    strategy = GradientCoding(inner, code, privacy=privacy, **{"run": "r", **kwargs})
    latency = Latency(compute=scaled(lognormal(), dict.fromkeys(silent, float("inf"))))
    random.seed(0)  # which shards are sampled
    with InProcessGrid(app, code.n, run_config={"privacy-dir": str(folder)}, tamper=tamper) as clients:
        result = strategy.start(VirtualGrid(clients, latency, seed=1), arrays, num_rounds=rounds, timeout=1000.0)
    return result.arrays, strategy.ledger.rows


def one_holder_each(code: GradientCode, folder: Path, **kwargs: Any) -> np.ndarray[Any, Any]:
    """The oracle: every shard trained once, by one holder, with the same secrets and a ledger of its own; of one round
    the updates that train() returned, added up here."""
    heard: list[tuple[int, np.ndarray[Any, Any]]] = []

    def listen(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        content: Any = reply.content
        heard.append((content["metrics"]["num-examples"], flat(content["arrays"]) - flat(initial())))
        return reply

    keys_for(code, folder / "keys")
    alone = folder / "alone"
    for shard in range(code.k):
        shutil.copytree(folder / "keys" / f"node-{code.holders_of(shard)[0]}", alone / f"node-{shard}")
    arrays, rows = run(uncoded(code.k), alone, app=private_app(mods=[gradient_coding_mod, listen]), **kwargs)
    if len(rows) > 1:
        return flat(arrays) - flat(initial())
    assert len(heard) == len(rows[0]["train"]["shards"])
    return np.average([update for _, update in heard], axis=0, weights=[w for w, _ in heard])


def apart(arrays: ArrayRecord, expected: np.ndarray[Any, Any]) -> float:
    moved = flat(arrays) - flat(initial())
    return float(np.linalg.norm(moved - expected) / np.linalg.norm(expected))


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "hooks") for name in CODES), ("fractional", "ghost"), ("cyclic", "ghost")]
)
def test_any_four_of_six_decode_to_the_sum_of_the_private_updates(name: str, mode: str, tmp_path: Path) -> None:
    code, privacy = CODES[name], settings(grad_sample_mode=mode)
    expected = one_holder_each(code, tmp_path, privacy=privacy)
    app = Once(private_app())  # whoever is silent, the others are asked the same
    for silent in PAIRS:
        arrays, (row,) = run(code, tmp_path / "keys", silent, app=app, privacy=privacy)
        entry = row["train"]
        assert entry["outcome"] == "exact" and not {*entry["used"], *entry["answered"]} & {*silent}
        assert entry["compared"] and entry["replica-disagreement"] < 1e-6
        # float32 travels: a code with signs amplifies its rounding by kappa, and says so.
        rounding = entry["rounding-error"] if entry["quantisation-error"] is None else entry["quantisation-error"] * 10
        assert apart(arrays, expected) < max(1e-6, 2 * rounding), (silent, entry["kappa"])
    assert len(app.known) <= code.n  # each holder has trained its shards once at most


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["cyclic", "universal"])
def test_float64_updates_decode_to_nine_digits(name: str, tmp_path: Path) -> None:
    expected = one_holder_each(CODES[name], tmp_path)
    app = Once(private_app())
    for silent in PAIRS:
        arrays, _ = run(CODES[name], tmp_path / "keys", silent, app=app)
        assert apart(arrays, expected) < 1e-9, silent


@pytest.mark.parametrize("send", ["shards", "adaptive"])
def test_however_shards_are_sent_the_private_model_is_the_same(send: str, tmp_path: Path) -> None:
    code = CODES["universal"]
    expected = one_holder_each(code, tmp_path, rounds=3)
    for silent in PAIRS[::4]:
        arrays, rows = run(code, tmp_path / "keys", silent, rounds=3, send=send)
        assert [row["train"]["outcome"] for row in rows] == ["exact"] * 3
        assert apart(arrays, expected) < 1e-6, silent


@pytest.mark.parametrize("name", ["fractional", "cyclic"])
def test_a_sample_of_the_shards_decodes_to_the_sum_of_theirs(name: str, tmp_path: Path) -> None:
    def half() -> FedAvg:
        return FedAvg(fraction_train=0.5, fraction_evaluate=0.0)

    code = CODES[name]
    expected = one_holder_each(code, tmp_path, inner=half())
    app = Once(private_app())
    for silent in PAIRS:
        arrays, (row,) = run(code, tmp_path / "keys", silent, app=app, inner=half())
        assert row["train"]["shards"] == [0, 3, 5] and row["train"]["outcome"] == "exact"
        assert apart(arrays, expected) < max(1e-6, 2 * row["train"]["rounding-error"]), silent


def digests(worker: int, folder: Path) -> str:
    """Of the private updates of a worker's shards, by shard."""
    import hashlib
    import json

    from flwr.app import ConfigRecord, Context, Message, RecordDict

    from fl_gradcode.privacy.records import Asked
    from tests.privacy.private_app import train_privately

    found = {}
    for shard in CODES["fractional"].shards_of(worker):
        content = RecordDict({"arrays": initial(), "config": ConfigRecord({"server-round": 1})})
        Asked(settings(), "r", 1, shard, worker, 3).add_to(content)
        node: dict[str, Any] = {"partition-id": shard, "privacy-dir": str(folder / f"node-{worker}")}
        message = Message(content, dst_node_id=worker, message_type="train")
        reply: Any = train_privately(message, Context(1, worker, node, RecordDict(), {}))
        arrays = b"".join(a.tobytes() for a in reply.content["arrays"].to_numpy_ndarrays())
        found[shard] = hashlib.sha256(arrays).hexdigest()
    return json.dumps(found)


def test_holders_in_processes_of_their_own_send_the_same_bits(tmp_path: Path) -> None:
    """The other process is this one, which has done other things before."""
    keys_for(CODES["fractional"], tmp_path)
    one, other = CODES["fractional"].holders_of(0)[:2]
    command = [sys.executable, "-c", TRAINED_BY, str(one), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    with inside_a_run():
        theirs, ours = done.stdout.strip(), digests(other, tmp_path)
        assert theirs == ours and ours.count('": "') == 3
        # Another secret, another update: the digests do not agree whatever happens.
        keys_for(CODES["fractional"], tmp_path / "others")
        assert digests(one, tmp_path / "others") != ours
