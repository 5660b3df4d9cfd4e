"""Peak memory at 11.7 M parameters: a server holds the replies and two vectors, a client one more than plain Flower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "strategy" / "memory_use.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak that Linux keeps"),
]

#: 10 MB, in vectors of 47 MB: scratch, threads, what Python sets aside.
SLACK = 10 / 46.8
SERVER = ["fractional", "cyclic", "two-blocks", "field"]
CLIENT = ["one-shard", "three-shards", "three-cyclic", "three-two-blocks", "three-field"]


def peaks(side: str, cases: list[str]) -> dict[str, dict[str, float]]:
    """Of each case, in vectors; in a process of its own, whose allocator gives back what is large at once."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    command = [sys.executable, str(PROGRAM), side, *cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == cases
    return {line["case"]: line for line in lines}


@pytest.fixture(scope="module")
def server() -> dict[str, dict[str, float]]:
    return peaks("server", ["plain", "plain-32", "as-returned", *SERVER])


@pytest.fixture(scope="module")
def client() -> dict[str, dict[str, float]]:
    return peaks("client", [prefix + case for prefix in ("", "sparing-") for case in ["plain", *CLIENT]])


@pytest.mark.parametrize("case", SERVER)
def test_a_server_holds_32_replies_and_two_vectors(server: dict[str, dict[str, float]], case: str) -> None:
    assert server[case]["peak"] <= 2 + SLACK


@pytest.mark.parametrize("case", SERVER)
def test_the_replies_are_gone_when_the_inner_strategy_works(server: dict[str, dict[str, float]], case: str) -> None:
    """What is left then is the decoded model; what FedAvg makes of it is Flower's own."""
    replies = 32 / (2 if case == "two-blocks" else 1)
    assert server[case]["at-entry"] <= 1 - replies + SLACK
    assert server["plain"]["peak"] > 1  # it has been measured at all


def test_records_as_they_were_returned_take_one_vector_more_than_in_plain_flower(
    server: dict[str, dict[str, float]],
) -> None:
    assert server["plain-32"]["peak"] > 1
    assert server["as-returned"]["peak"] <= server["plain-32"]["peak"] + 1 + SLACK


def test_enough_replies_were_used(server: dict[str, dict[str, float]]) -> None:
    assert [server[case]["used"] for case in SERVER] == [8, 32, 32, 29]


@pytest.mark.parametrize("case", CLIENT)
@pytest.mark.parametrize("training", ["", "sparing-"])
def test_a_client_needs_one_vector_more_than_without_coding(
    client: dict[str, dict[str, float]], training: str, case: str
) -> None:
    """For training as examples write it, and for one that never has an array twice."""
    plain = client[training + "plain"]["peak"]
    assert plain > 1
    assert client[training + case]["peak"] - plain <= 1 + SLACK
