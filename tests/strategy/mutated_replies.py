"""Replies as no honest client sends them: `python -m tests.strategy.mutated_replies 100000`, or `memory 2000`.

In each run some workers' replies are mutated, and as many are honest as suffice. Whatever the others send, the run must
not crash or hang, and each round that reads "exact" must be the honest one's, unless a liar has sent other numbers.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import Discovered, GradientCode, GradientCoding, codes, fractional_repetition
from fl_gradcode.errors import FlGradcodeError
from fl_gradcode.matmul import coded_matmul, coded_matmul_worker, polynomial
from fl_gradcode.privacy import CentralNoise
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, toy_app, update_of

REPLY = "fl-gradcode.reply"
ROUNDS = 3
Random = np.random.Generator

JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**70, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), 5e-324),
    *(
        "",
        "a",
        "\x1b[2J",
        "0",
        "float32",
        "x" * 3000,
        "\u202e\x00",
        "arrays",
        "num-examples",
        "coded",
        "returned",
        "idle",
    ),
    *([], [[]], {}, [None], [1, 2, 3], [[1, "a"]], [["0", "float32", [3, 2]]], {"a": 1}, [[0, ""], [1, "d"]]),
)


def _junk(random: Random) -> Any:
    return JUNK[int(random.integers(len(JUNK)))]


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# Each mutation changes the reply's content in place, or returns another reply. It returns whether numbers were changed
# that a liar may send.


def _field(content: RecordDict, random: Random) -> bool:
    """One value of our record is junk, is missing, or is somebody else's."""
    record = content.get(REPLY)
    if not isinstance(record, ConfigRecord):
        return False
    values = json.loads(str(record["json"]))
    name = list(values)[int(random.integers(len(values)))]
    kind = int(random.integers(5))
    if kind == 0:
        del values[name]
    elif kind == 1 and isinstance(values[name], list) and values[name]:
        values[name][int(random.integers(len(values[name])))] = _junk(random)
    elif kind == 2 and isinstance(values[name], list):
        values[name] = values[name][::-1]
    elif kind == 3 and type(values[name]) is int:
        values[name] += int(random.integers(-3, 4))
    else:
        values[name] = _junk(random)
    record["json"] = json.dumps(values)
    return False


def _text(content: RecordDict, random: Random) -> bool:
    """The text of our record is cut, junk, nested or huge, or of another protocol."""
    record = content.get(REPLY)
    if not isinstance(record, ConfigRecord):
        return False
    text = str(record["json"])
    kind = int(random.integers(6))
    if kind == 0:
        record["json"] = text[: int(random.integers(len(text)))]
    elif kind == 1:
        record["json"] = _nested(int(random.integers(1, 100_000)))
    elif kind == 2:
        record["json"] = "".join(chr(int(sign)) for sign in random.integers(1, 3000, 60))
    elif kind == 3:
        record["protocol"] = int(random.integers(9))
    elif kind == 4:
        record["version"] = "\r\n\x1b[31m" * 1000
    else:
        record["json"] = text[:-1] + ', "more": "' + "y" * 2_100_000 + '"}'
    return False


def _records(content: RecordDict, random: Random) -> bool:
    """A record is missing, of another kind, empty, or one too many."""
    names = list(content)
    name = names[int(random.integers(len(names)))] if names else "none"
    kind = int(random.integers(5))
    if kind == 0:
        content.pop(name, None)
    elif kind == 1:
        content[name] = MetricRecord({"num-examples": 3})
    elif kind == 2:
        content[name] = ArrayRecord()
    elif kind == 3:
        content["more"] = ArrayRecord([np.zeros(3)])
        return name != REPLY and content.get(REPLY) is not None  # a further record is a function's own affair
    else:
        content[name] = ConfigRecord({"json": "{}", "a": [1, 2]})
    return False


def _array(content: RecordDict, random: Random) -> bool:
    """An array's description does not fit its bytes, or its bytes are cut, or its header is junk."""
    records = [record for record in content.array_records.values() if len(record)]
    if not records:
        return False
    record = records[int(random.integers(len(records)))]
    names = list(record)
    name = names[int(random.integers(len(names)))]
    array = record[name]
    data, dtype, shape, stype = array.data, array.dtype, tuple(array.shape), array.stype
    kind = int(random.integers(8))
    if kind == 0:
        data = data[: int(random.integers(len(data) + 1))]
    elif kind == 1:
        head = bytearray(data[:128])
        for at in random.integers(0, max(1, len(head)), 3):
            head[at : at + 1] = bytes([int(random.integers(256))])
        data = bytes(head) + data[128:]
        return _put(record, name, dtype, shape, stype, data, lied=True)
    elif kind == 2:
        dtype = str(random.choice(["float64", "int8", "bool", "object", "V8", "complex64", "", "bfloat16", "uint32"]))
    elif kind == 3:
        shape = tuple(int(x) for x in random.integers(-2, 2**40, int(random.integers(0, 3))))
    elif kind == 4:
        stype = "torch"
    elif kind == 5:
        record["other"] = array
        del record[name]
        return False
    elif kind == 6:
        claimed = b"\x93NUMPY\x01\x00" + (80).to_bytes(2, "little")
        data = claimed + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(79) + b"\n"
    else:
        data = bytes(random.integers(0, 256, int(random.integers(200)), np.uint8))
    return _put(record, name, dtype, shape, stype, data, lied=False)


def _put(record: ArrayRecord, name: str, dtype: str, shape: Any, stype: str, data: bytes, *, lied: bool) -> bool:
    record[name] = Array(dtype, shape, stype, data)
    return lied


def _numbers(content: RecordDict, random: Random) -> bool:
    """What a liar may send: other numbers, not finite ones, weights below zero or enormous."""
    for record in content.array_records.values():
        for name in list(record):
            try:
                values = record[name].numpy().copy()
            except Exception:  # mutated before
                continue
            if values.size and values.dtype.kind in "fu" and random.random() < 0.7:
                at = int(random.integers(values.size))
                wrong = [0, 1, -1, 1e30, -1e30, np.nan, np.inf, 3e38]
                number = wrong[int(random.integers(len(wrong)))]
                values.reshape(-1)[at] = number if values.dtype.kind == "f" else random.integers(2**32)
                record[name] = Array(values)
    for metrics in content.metric_records.values():
        metrics["num-examples"] = float(random.choice([-1.0, 0.0, 1e-300, 1e300, float("nan"), 5.0]))
    return True


MUTATIONS: tuple[Callable[[RecordDict, Random], bool], ...] = (
    _field,
    _field,
    _text,
    _records,
    _array,
    _array,
    _numbers,
)


@dataclass
class Mutator:
    """Mutates the replies of some workers.

    Attributes:
        random: Where mutations are drawn from.
        workers: The workers.
        most: Replies to mutate at most.
        mutated: How many were.
        lied: Whether numbers were changed that a liar may send.
    """

    random: Random
    workers: frozenset[int]
    most: int
    mutated: int = 0
    lied: bool = False
    lies: bool = True

    def __call__(self, worker: int, message: Message, reply: Message) -> Message:
        if worker not in self.workers or self.mutated >= self.most:
            return reply
        self.mutated += 1
        kind = float(self.random.random())
        if kind < 0.04:
            text = "".join(chr(int(sign)) for sign in self.random.integers(1, 500, 300))
            return Message(Error(int(self.random.integers(0, 300)), text), reply_to=message)
        if not reply.has_content() or kind < 0.06:
            return Message(RecordDict(), reply_to=message)
        content = RecordDict(dict(reply.content.items()))
        for _ in range(int(self.random.integers(1, 3))):
            mutate = MUTATIONS[int(self.random.integers(len(MUTATIONS)))]
            if mutate is _numbers and not self.lies:
                continue
            with contextlib.suppress(ValueError, TypeError, RecursionError):  # a mutation of what is mutated already
                self.lied |= mutate(content, self.random)
        return Message(content, reply_to=message)


@dataclass
class Found:
    """What came of it.

    Attributes:
        replies: Mutated replies.
        outcomes: How often each outcome was seen.
        crashes: What was raised that is no error of ours.
        wrong: Rounds that read "exact" and were not, though nobody had sent other numbers.
        slowest: Seconds of the slowest run.
    """

    replies: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0


def _hidden(code_n: int, app: ClientApp, mutator: Mutator, **kwargs: Any) -> InProcessGrid:
    """A grid that does not say which node is which worker, as an engine's."""
    grid = InProcessGrid(app, code_n, tamper=mutator, seed=int(mutator.random.integers(2**31)), **kwargs)
    grid.known_workers = dict  # type: ignore[method-assign]
    return grid


def _rounds(make: Callable[[], Any], honest: Callable[[Random], set[int]], **options: Any) -> Callable[..., None]:
    """A run of coded rounds, checked against the sum of what honest clients compute."""

    def run(random: Random, most: int, found: Found) -> None:
        code = make()
        n = 8
        keep = honest(random)
        mutator = Mutator(random, frozenset(range(n)) - keep, most, lies=bool(random.random() < 0.3))
        config = None
        if isinstance(code, Discovered):
            config = {"node_config": lambda i: {"partition-id": i, "shards": ",".join(map(str, HELD[i]))}}
        strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, give_up_rounds=None, node_timeout=0.5, **options)
        with _hidden(n, toy_app(), mutator, **(config or {})) as grid:
            try:
                result = strategy.start(grid, initial_arrays(), num_rounds=ROUNDS)
            except FlGradcodeError as error:
                found.outcomes[type(error).__name__] += 1
                found.replies += mutator.mutated
                return
        found.replies += mutator.mutated
        rows = [row["train"] for row in strategy.ledger.rows]
        found.outcomes.update(row["outcome"] for row in rows)
        if mutator.lied or "privacy" in options:
            return
        expected = flat(initial_arrays()).copy()
        for number, row in enumerate(rows, 1):
            if row["outcome"] == "exact":
                weights = range(1, strategy.code.k + 1)
                updates = (weight * update_of(number, weight - 1, expected.size) for weight in weights)
                expected += sum(updates) / sum(weights)
        off = float(np.abs(flat(result.arrays) - expected).max()) if len(result.arrays) == 2 else float("inf")
        if not off < 1e-2:
            found.wrong.append(f"off by {off:.2g}: {[(row['outcome'], row['used']) for row in rows]}")

    return run


def _products(random: Random, most: int, found: Found) -> None:
    app = ClientApp()
    app.query("matmul")(coded_matmul_worker)
    one, other = random.standard_normal((12, 8)), random.standard_normal((8, 12))
    mutator = Mutator(random, frozenset(random.choice(8, 4, replace=False).tolist()), most, lies=False)
    with InProcessGrid(app, 8, tamper=mutator, seed=int(random.integers(2**31))) as grid:
        for _ in range(ROUNDS):
            try:
                product = coded_matmul(grid, one, other, polynomial(8, 2, 2))
                found.outcomes["product"] += 1
                if not mutator.lied and not np.abs(product - one @ other).max() < 1e-6:
                    found.wrong.append("a product")
            except FlGradcodeError as error:
                found.outcomes[type(error).__name__] += 1
    found.replies += mutator.mutated


HELD = {i: (i % 2,) for i in range(8)}


def _one_of_each(random: Random) -> set[int]:
    """One honest worker of each of the two groups: worker i is in group i mod 2."""
    return {int(random.choice([0, 2, 4, 6])), int(random.choice([1, 3, 5, 7]))}


def _all_but(number: int) -> Callable[[Random], set[int]]:
    return lambda random: {*random.choice(8, 8 - number, replace=False).tolist()}


def _cyclic() -> GradientCode:
    return codes.cyclic_repetition(8, 3, rng=np.random.default_rng(0))


CONFIGURATIONS: dict[str, Callable[[Random, int, Found], None]] = {
    "groups": _rounds(lambda: fractional_repetition(8, 3, k=2), _one_of_each),
    "cyclic": _rounds(_cyclic, _all_but(3)),
    "field": _rounds(lambda: codes.reed_solomon(8, 3, fraction_bits=14), _all_but(3)),
    "field with votes": _rounds(lambda: codes.reed_solomon(8, 3, fraction_bits=14), _all_but(1), votes=1),
    "halves": _rounds(lambda: fractional_repetition(8, 2, k=2, m=2), _all_but(2)),
    "votes": _rounds(lambda: fractional_repetition(8, 3, k=2), _all_but(1), votes=1),
    "shards": _rounds(lambda: fractional_repetition(8, 3, k=2), _one_of_each, send="shards", sees="mean"),
    "as returned": _rounds(lambda: fractional_repetition(8, 3, k=2), _one_of_each, send="shards"),
    "discovered": _rounds(lambda: Discovered(2, s=3), _one_of_each),
    "private": _rounds(
        lambda: fractional_repetition(8, 3, k=2),
        _one_of_each,
        privacy=CentralNoise(noise_multiplier=1.0, clipping_norm=1.0),
    ),
    "products": _products,
}


#: Few of their replies may be mutated in one run, or many shards have to be computed for one.
FEW = ("cyclic", "field", "field with votes", "halves", "votes")


def mutated_replies(replies: int, seed: int = 0) -> dict[str, Found]:
    """Returns, for each configuration, what came of its share of so many mutated replies."""
    logging.disable(logging.CRITICAL)
    parts = {name: 1 if name in FEW else 3 for name in CONFIGURATIONS}
    results: dict[str, Found] = {}
    for number, (name, run) in enumerate(CONFIGURATIONS.items()):
        share = -(-replies * parts[name] // sum(parts.values()))
        found, at = results.setdefault(name, Found()), 0
        while found.replies < share and at < 10 * share:
            random = np.random.default_rng((seed, number, at))
            began = time.perf_counter()
            before = found.replies
            try:
                run(random, share - found.replies, found)
            except Exception as error:
                found.crashes.append(f"{name} {(seed, number, at)}: {type(error).__name__}: {str(error)[:200]}")
            found.slowest = max(found.slowest, time.perf_counter() - began)
            found.replies = max(found.replies, before)
            at += 1
    return results


def memory(rounds: int) -> list[float]:
    """Returns the resident MB after each tenth of a long run with mutated replies and a ledger in a file."""
    logging.disable(logging.CRITICAL)
    sizes: list[float] = []

    def note(number: int, *_: Any) -> None:
        if number % (rounds // 10) == 0:
            gc.collect()
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)

    mutator = Mutator(np.random.default_rng(0), frozenset({4, 5, 6, 7}), 10**9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        inner = FedAvg(fraction_evaluate=0.0)
        strategy = GradientCoding(inner, fractional_repetition(8, 3, k=2), ledger=path, on_round_end=note)
        with InProcessGrid(toy_app(), 8, tamper=mutator) as grid:
            strategy.start(grid, initial_arrays(), num_rounds=rounds)
        print(f"ledger: {path.stat().st_size / rounds:,.0f} bytes a round")
    return sizes


def main() -> None:
    if sys.argv[1] == "memory":
        rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
        print(f"MB after each tenth of {rounds} rounds: {', '.join(f'{size:.0f}' for size in memory(rounds))}")
        return
    replies, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began = time.perf_counter()
    results = mutated_replies(replies, seed)
    for name, found in results.items():
        print(f"{name:17} {found.replies:7,} replies, {dict(found.outcomes)}, slowest run {found.slowest:.2f} s")
        for text in [*found.crashes, *found.wrong][:5]:
            print(f"    {text}")
    total = sum(found.replies for found in results.values())
    crashes = sum(len(found.crashes) for found in results.values())
    wrong = sum(len(found.wrong) for found in results.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    print(f"{total:,} replies in {seconds:.0f} s: {crashes} crashes, {wrong} wrong models, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
