"""One round of Flower's SecAgg+ by its own workflow in its simulation engine; prints stages, bytes and CPU as JSON.

    python -m experiments.secagg_plus --size 1000000

Clients return parameters of a given size without training. Some answer no more once their keys are shared, so that the
workflow rebuilds their masks. Whatever is measured stands around Flower's own functions: a mod before `secaggplus_mod`,
and the grid's `send_and_receive`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid
from flwr.simulation import run_simulation

__all__ = ["STAGES"]

STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
_CONFIGS = "secaggplus_configs"


def size_of(content: RecordDict) -> int:
    """Returns the bytes of all arrays and values of a message."""
    total = 0
    for record in content.values():
        for key, value in record.items():
            data = getattr(value, "data", value)
            parts = data if isinstance(data, list) else [data]
            total += len(key) + sum(len(one) if isinstance(one, bytes | str) else 8 for one in parts)
    return total


def client_app(size: int, dropped: int, folder: str) -> ClientApp:
    """Returns clients that write what each stage costs them to a folder."""

    class Client(NumPyClient):
        def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
            return [np.full(size, 0.25, np.float32)], 400, {}

    def measured(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        worker = int(context.node_config["partition-id"])
        config: Any = message.content[_CONFIGS]
        stage = str(config["stage"])
        if stage in STAGES[2:] and worker < dropped:
            raise RuntimeError("this client has gone")
        down, started = size_of(message.content), time.process_time()
        reply = call_next(message, context)
        row = {"stage": stage, "cpu": time.process_time() - started, "down": down, "up": size_of(reply.content)}
        (Path(folder) / f"{worker}-{stage}.json").write_text(json.dumps(row))
        return reply

    return ClientApp(client_fn=lambda context: Client().to_client(), mods=[measured, secaggplus_mod])


class _Measured:
    """A grid that counts the stages, and the time that the server's thread spends outside of them."""

    def __init__(self, grid: Grid) -> None:
        self._grid, self.stages, self.cpu, self._since = grid, 0, 0.0, time.thread_time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Any, **options: Any) -> Any:
        messages = [*messages]
        self.cpu += time.thread_time() - self._since
        replies = [*self._grid.send_and_receive(messages, **options)]
        self.stages += 1
        self._since = time.thread_time()
        return replies

    def stop(self) -> None:
        self.cpu += time.thread_time() - self._since


def server_app(size: int, shares: int, threshold: int, told: dict[str, Any]) -> ServerApp:
    """Returns a server that runs one round by Flower's workflow."""
    app = ServerApp()
    initial = ndarrays_to_parameters([np.zeros(size, np.float32)])
    workflow = SecAggPlusWorkflow(shares, threshold, max_weight=500.0, clipping_range=1.0, timeout=300.0)

    def fit(grid: Grid, context: Context) -> None:
        measured: Any = _Measured(grid)
        workflow(measured, context)
        measured.stop()
        told["stages"], told["server_cpu"] = measured.stages, measured.cpu

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_fit=1.0, fraction_evaluate=0.0, initial_parameters=initial)
        legacy = LegacyContext(context, config=ServerConfig(num_rounds=1), strategy=strategy)
        DefaultWorkflow(fit_workflow=fit)(grid, legacy)
        record: Any = legacy.state.array_records["parameters"]
        told["mean"] = float(next(iter(record.values())).numpy().mean())

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000, help="entries of the parameters")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--dropped", type=int, default=3, help="clients that go after their keys are shared")
    parser.add_argument("--shares", type=int, default=7, help="shares of each key, one for each neighbour and itself")
    parser.add_argument("--threshold", type=int, default=4, help="shares that rebuild a key")
    asked = parser.parse_args()
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_simulation(
            server_app(asked.size, asked.shares, asked.threshold, told),
            client_app(asked.size, asked.dropped, folder),
            num_supernodes=asked.clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
        )
        rows = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    by_stage = defaultdict(list)
    for row in rows:
        by_stage[row["stage"]].append(row)
    for key in ("cpu", "up", "down"):
        told[f"client_{key}"] = sum(float(np.median([row[key] for row in rows])) for rows in by_stage.values())
    print("RESULT " + json.dumps(told))


if __name__ == "__main__":
    main()
