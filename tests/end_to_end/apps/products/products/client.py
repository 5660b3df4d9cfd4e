"""The worker function as it is, behind some trouble."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_gradcode.matmul import coded_matmul_worker

app = ClientApp()


@app.query("matmul")
def matmul(message: Message, context: Context) -> Message:
    """Sleep or raise if this node is to; else multiply."""
    config, node = context.run_config, context.node_config["partition-id"]
    if node == config["sleeper"]:
        until = time.monotonic() + float(config["sleep-seconds"])
        # the file comes when the run is over: nobody need wait for what is left of the sleep
        while time.monotonic() < until and not (Path(str(config["folder"])) / "wake-up").exists():
            time.sleep(0.2)
    if node == config["raiser"]:
        raise RuntimeError(f"node {node} is out of disk")
    return coded_matmul_worker(message, context)
