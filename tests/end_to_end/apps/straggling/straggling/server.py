"""FedAvg under GradientCoding; the test may make it pause between rounds, or take turns with plain FedAvg."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Discovered, GradientCode, GradientCoding, Shards, fractional_repetition
from fl_gradcode.grid.arrivals import ForwardingGrid

from .client import initial_arrays, note, read_notes

_PATIENCE = 200.0  # seconds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; leave the final arrays in a file."""
    config: Any = context.run_config
    folder = Path(str(config["folder"]))
    if config["blocks"]:
        _take_turns(grid, config, folder)
        return
    pauses = {int(part) for part in str(config["pauses"]).split(",") if part}

    def between(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        note(str(folder), what="ended", round=server_round)
        deadline = time.monotonic() + _PATIENCE
        while server_round in pauses and not (folder / f"go-{server_round}").exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"The test never let round {server_round + 1} begin.")
            time.sleep(0.1)
        note(str(folder), what="went on", round=server_round)

    strategy = GradientCoding(
        FedAvg(fraction_evaluate=config["fraction-evaluate"]),
        _code(config),
        send=Shards(staleness=int(config["staleness"])) if config["staleness"] else config["send"],
        ledger=folder / "ledger.jsonl",
        checkpoint=config["checkpoint"] or None,
        manifest=config["manifest"] or None,
        on_round_end=between,
        verify=0,  # the tests measure when rounds end
    )
    note(str(folder), what="went on", round=0)
    result = strategy.start(grid, initial_arrays(), num_rounds=config["num-server-rounds"])
    np.savez(folder / "final.npz", *result.arrays.to_numpy_ndarrays())


def _code(config: Any) -> GradientCode | Discovered:
    nodes, s = int(config["nodes"]), int(config["stragglers"])
    return Discovered(k=nodes, s=s) if config["discovered"] else fractional_repetition(nodes, s)


def _take_turns(grid: Grid, config: Any, folder: Path) -> None:
    """Blocks of rounds from a model of zeros: by turns plain FedAvg with nobody asleep, and coded with a sleeper."""
    rounds = int(config["num-server-rounds"])
    for block in range(int(config["blocks"])):
        coded = bool(block % 2)
        strategy: Any = FedAvg(fraction_evaluate=0.0)
        if coded:
            strategy = GradientCoding(strategy, _code(config), ledger=folder / "ledger.jsonl", verify=0)

        def over(number: int, arrays: ArrayRecord, block: int = block) -> None:
            note(str(folder), what="over", block=block, round=number)

        result = strategy.start(
            _Noting(grid, folder, block),
            initial_arrays(),
            num_rounds=rounds,
            train_config=ConfigRecord({"block": block, "asleep": coded}),
            evaluate_fn=over,
        )
        np.savez(folder / f"block-{block}.npz", *result.arrays.to_numpy_ndarrays())
        if coded and block + 1 < config["blocks"]:
            _wake_up(folder, block)


def _wake_up(folder: Path, block: int) -> None:
    """The next block begins with everybody free."""
    (folder / f"wake-up-block-{block}").touch()
    deadline = time.monotonic() + _PATIENCE

    def times(what: str) -> int:
        return sum(event["what"] == what and event.get("block") == block for event in read_notes(folder))

    while times("awake") < times("asleep") and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3.0)  # its reply is sent, and its node asks for work again


class _Noting(ForwardingGrid):
    """Notes when replies were pulled."""

    def __init__(self, grid: Grid, folder: Path, block: int) -> None:
        super().__init__(grid)
        self._folder, self._block = str(folder), block

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(self.inner.pull_messages(message_ids))
        if replies:
            note(self._folder, what="pulled", block=self._block, replies=len(replies))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.inner.send_and_receive(messages, timeout=timeout)
