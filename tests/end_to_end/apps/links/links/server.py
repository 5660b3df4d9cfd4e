"""FedAvg under GradientCoding, with a grid that notes when which reply was pulled."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.grid.arrivals import ForwardingGrid

from .client import initial_arrays, note

_NODES = 4
_PATIENCE = 120.0  # seconds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; leave the final arrays in a file."""
    config: Any = context.run_config
    folder = Path(str(config["folder"]))
    noting = _Noting(grid, folder)

    def between(server_round: int, arrays: ArrayRecord, row: dict[str, Any]) -> None:
        note(str(folder), what="ended", round=server_round)
        deadline = time.monotonic() + _PATIENCE
        while server_round == config["pause"] and noting.owed(1):
            if time.monotonic() > deadline:
                raise TimeoutError("The slow reply to round 1 never came.")
            time.sleep(0.1)

    strategy = GradientCoding(
        FedAvg(fraction_evaluate=0.0),
        fractional_repetition(_NODES, 1),
        ledger=folder / "ledger.jsonl",
        on_round_end=between,
        verify=0,  # the test measures when rounds end
    )
    result = strategy.start(noting, initial_arrays(), num_rounds=config["num-server-rounds"])
    np.savez(folder / "final.npz", *result.arrays.to_numpy_ndarrays())


class _Noting(ForwardingGrid):
    """Notes when each reply was pulled; knows which are still to come."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        super().__init__(grid)
        self._folder = str(folder)
        self._round: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = list(self.inner.push_messages(pushed))
        for message_id, message in zip(ids, pushed, strict=True):
            content: Any = message.content
            self._round[message_id] = int(content["config"]["server-round"])
            note(self._folder, what="pushed", round=self._round[message_id], node=message.metadata.dst_node_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(self.inner.pull_messages(message_ids))
        for reply in replies:
            server_round = self._round.pop(reply.metadata.reply_to_message_id)
            note(self._folder, what="pulled", round=server_round, node=reply.metadata.src_node_id)
        return replies

    def owed(self, server_round: int) -> int:
        """How many replies to this round are still to come."""
        return list(self._round.values()).count(server_round)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.inner.send_and_receive(messages, timeout=timeout)
