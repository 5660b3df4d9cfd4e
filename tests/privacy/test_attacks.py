"""The attacks of privacy.md, section 3 and 4, carried out: each works on the naive way, and fails on ours."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fl_gradcode import GradientCoding, cyclic_repetition
from fl_gradcode.errors import PrivacyRefused
from fl_gradcode.privacy import BudgetLedger, Spend, epsilon_of, read_keys
from fl_gradcode.privacy.key_derivation import KeyContext, PRFStream
from fl_gradcode.testing import InProcessGrid, inside_a_run
from tests.privacy.direct import Node, linear, move, records
from tests.privacy.private_app import initial, keys_for, private_app, settings

SIZE = 2000
PURPOSES: tuple[Literal["noise", "sample"], ...] = ("noise", "sample")
ALL = settings(sample_rate=1.0, steps=1)  # one step on all records: the noise is what remains after subtraction


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with inside_a_run():
        yield Node(tmp_path / "node")


def holders(node: Node) -> Iterator[Node]:
    """Further nodes with the same keys, and ledgers of their own."""
    for number in itertools.count():
        yield Node(node.folder.parent / f"holder-{number}", node.folder.parent / "keys")


def clipped(net: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """The update without noise, by the closed form of the gradient; float64."""
    gradients = (2 * (net(x) - y) * x).detach().double()
    lengths = gradients.norm(dim=1, keepdim=True)
    return torch.neg((gradients / lengths.clamp(min=1.0)).sum(0) / len(x))


def noise_of(update: Tensor, net: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """What was added, in units of its standard deviation."""
    return (update - clipped(net, x, y)) * len(x)


def correlation(one: Tensor | np.ndarray[Any, Any], other: Tensor | np.ndarray[Any, Any]) -> float:
    return float(np.corrcoef(np.asarray(one), np.asarray(other))[0, 1])


# ---- A search of all seeds ------------------------------------------------------------------------------------------


def test_a_torch_generator_has_32_bits_only_and_a_search_of_them_strips_its_noise() -> None:
    """The reason for streams of our own."""
    seed = 5 + 2**32 * 123_456_789
    draws = [torch.randn(100, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32, seed, 6)]
    assert draws[0].equal(draws[1]) and draws[0].equal(draws[2]) and not draws[0].equal(draws[3])
    # Whoever sees noise from a 63-bit seed searches 32 bits; here a few of them.
    update = draws[2] + 0.1
    best = max(
        range(200), key=lambda s: correlation(update, torch.randn(100, generator=torch.Generator().manual_seed(s)))
    )
    assert best == 5


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a torch generator in the path of the noise")


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_no_torch_generator_is_in_the_path_of_noise_and_batches(
    node: Node, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = settings(grad_sample_mode=mode)
    x, y = records()
    others = holders(node)
    torch.manual_seed(1)
    before, _ = node.update(linear(), (x, y), privacy=privacy)
    torch.manual_seed(2)
    torch.rand(7)
    np.random.seed(3)  # noqa: NPY002 # the global generator is what must not matter
    again, _ = next(others).update(linear(), (x, y), privacy=privacy)
    assert again.equal(before)
    net, holder, global_state = linear(), next(others), torch.get_rng_state()
    for name in ("Generator", "normal", "randn", "rand", "randint", "randperm", "randn_like", "rand_like", "bernoulli"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with holder.ask(net, privacy=privacy) as dp:
        move(dp, net, x, y)
    monkeypatch.undo()
    assert net.weight.detach().double().flatten().equal(before)
    assert torch.get_rng_state().equal(global_state)  # nor is the process's touched


# ---- Replay ---------------------------------------------------------------------------------------------------------


def test_a_round_asked_again_with_other_weights_is_refused(node: Node) -> None:
    node.update(linear(value=0.0))
    content = node.ledger.read_bytes()
    with pytest.raises(
        PrivacyRefused, match="Shard 0, round 1: this round was answered before, to a request with other"
    ):
        node.update(linear(value=0.1))
    assert node.ledger.read_bytes() == content


def test_without_the_ledger_the_difference_of_two_answers_still_has_the_noise_of_two(node: Node) -> None:
    x, y = records(size=SIZE)
    other = next(holders(node))  # the same keys, and nothing remembered
    weights = (0.0, 0.01)
    one, two = (
        holder.update(linear(SIZE, value), (x, y), privacy=ALL)[0]
        for holder, value in zip((node, other), weights, strict=True)
    )
    noise = [noise_of(u, linear(SIZE, value), x, y) for u, value in zip((one, two), weights, strict=True)]
    assert float((noise[0] - noise[1]).std()) == pytest.approx(np.sqrt(2), rel=0.08)
    assert abs(correlation(*noise)) < 5 / np.sqrt(SIZE)


def test_a_key_that_is_not_bound_to_the_weights_would_give_a_difference_without_noise(node: Node) -> None:
    x, y = records(size=SIZE)
    secret = read_keys(node.folder).secret(0)

    def answer(weights: float, *, bound: bool) -> Tensor:
        digest = hashlib.sha256(str(weights).encode()).digest() if bound else bytes(32)
        stream = PRFStream(KeyContext("r", 1, 0, digest, bytes(32), bytes(32)).derive(secret, "noise"))
        return clipped(linear(SIZE, weights), x, y) + torch.from_numpy(stream.normal(SIZE)) / len(x)

    exact = clipped(linear(SIZE, 0.01), x, y) - clipped(linear(SIZE, 0.0), x, y)
    stripped = answer(0.01, bound=False) - answer(0.0, bound=False)
    assert float((stripped - exact).norm() / exact.norm()) < 1e-9  # all there is to know
    noisy = (answer(0.01, bound=True) - answer(0.0, bound=True) - exact) * len(x)
    assert float(noisy.std()) == pytest.approx(np.sqrt(2), rel=0.08)


CHANGES: dict[str, dict[str, Any]] = {
    "learning rate in the run config": {"run_config": {"lr": 0.2}},
    "a further key in the run config": {"run_config": {"lr": 0.1, "momentum": 0.9}},
    "the message's config": {"config": {"epochs": 2}},
    "bytes for a text": {"config": {"epochs": b"\x01"}},
    "a text for bytes": {"config": {"epochs": "01"}},
    "a float for a whole number": {"config": {"epochs": 1.0}},
    "sampling rate": {"privacy": settings(sample_rate=0.3)},
    "steps": {"privacy": settings(steps=4)},
    "noise multiplier": {"privacy": settings(noise_multiplier=1.01)},
    "clipping norm": {"privacy": settings(max_grad_norm=2.0)},
    "clipping mode": {"privacy": settings(grad_sample_mode="ghost")},
    "how the reply is made": {"reply_as": "other arrays"},
    "a record with a name of the library's": {"records": {"fl-gradcode.x": ConfigRecord({"lr": 0.2})}},
    "a record of another name": {"records": {"b": ConfigRecord({"lr": 0.1})}},
    "a record of another kind": {"records": {"a": MetricRecord({"lr": 0.1})}},
    "the order of records": {"records": {"z": ConfigRecord({}), "a": ConfigRecord({"lr": 0.1})}},
    "delta": {"privacy": settings(delta=1e-6)},
    "seed": {"seed": 8},
    "kind of training": {"message_type": "train.other"},
    "number of shards": {"node_config": {"num-partitions": 3}},
    "binding": {"binding": {"augmentation": "none"}},
    "manifest": {"manifest": "other records"},
    "run": {"run": "another"},
    "round": {"round": 2},
    "number of records": {"examples": 41},
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_the_server_may_change_makes_another_key(node: Node, name: str) -> None:
    base: dict[str, Any] = {"run_config": {"lr": 0.1}, "config": {"epochs": 1}, "seed": 7}
    base["records"] = {"a": ConfigRecord({"lr": 0.1})}
    if name == "the order of records":
        base["records"] = {"a": ConfigRecord({"lr": 0.1}), "z": ConfigRecord({})}

    def digest(holder: Node, **asked: Any) -> str:
        net = linear()
        with holder.ask(net, **asked) as dp:
            move(dp, net, *records(asked.get("examples", 40)))
        return str(dp.record["fl-gradcode.privacy"]).split('"context": "')[1][:64]

    others = holders(node)
    plain = digest(node, **base)
    assert plain == digest(next(others), **base)  # holders of equal requests have equal keys
    changed = {**base, **CHANGES[name]}
    assert digest(next(others), **changed) != plain
    if name not in ("run", "round"):  # those are charged as what they are: a release more
        with pytest.raises(PrivacyRefused):
            digest(node, **changed)


def test_bytes_and_texts_that_look_alike_are_told_apart(node: Node) -> None:
    others = holders(node)
    found = set()
    for value in (b"\x01", "01", 1, 1.0, True, "b'01'", "1"):
        net = linear()
        with next(others).ask(net, config={"x": value}) as dp:
            move(dp, net, *records())
        found.add(str(dp.record["fl-gradcode.privacy"]))
    assert len(found) == 7


def test_a_model_that_is_not_all_in_the_message_is_bound_too(node: Node) -> None:
    """Layers that a node keeps for itself: an equal message to other weights would be another answer."""

    class Personal(nn.Module):
        def __init__(self, head: float) -> None:
            super().__init__()
            self.body, self.head = linear(6, 0.0), linear(1, head)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.body(x))
            return out

    def entered(holder: Node, head: float) -> None:
        sent, own = linear(), Personal(head)
        dp = holder.ask(sent)
        dp._plain = own
        with dp:
            move(dp, own, *records())

    entered(node, 1.0)
    entered(node, 1.0)
    with pytest.raises(PrivacyRefused, match="answered before, to a request with other weights or settings"):
        entered(node, 2.0)


def test_arrays_that_are_not_in_the_model_are_bound_too(node: Node) -> None:
    """Such as a control variate: the update depends on it, the model does not hold it."""

    def entered(sent: float) -> None:
        dp = node.ask(linear(value=sent))
        dp._plain = net = linear()
        with dp:
            move(dp, net, *records())

    entered(1.0)
    with pytest.raises(PrivacyRefused, match="answered before, to a request with other weights or settings"):
        entered(1.0 + 2**-20)


# ---- Equivocation ---------------------------------------------------------------------------------------------------


class TwoFaced(InProcessGrid):
    """A server that sends one worker other weights, and keeps the strategy in the dark."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            if self._worker[message.metadata.dst_node_id] == 1:
                arrays = message.content["arrays"]
                assert isinstance(arrays, ArrayRecord)
                others = ArrayRecord([a + 0.5 for a in arrays.to_numpy_ndarrays()])
                message.content["arrays"] = ArrayRecord(dict(zip(arrays, others.values(), strict=True)))
        return super().push_messages(messages)


def equivocate(folder: Path, grid: type[InProcessGrid], caplog: Any, **changes: Any) -> tuple[dict[str, Any], str]:
    code = cyclic_repetition(3, 1, rng=np.random.default_rng(0))
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), code, privacy=settings(**changes), run="r")
    with grid(private_app(), 3, run_config=keys_for(code, folder)) as nodes:
        strategy.start(nodes, initial(), num_rounds=1)
    return strategy.ledger.rows[0]["train"]["privacy"], caplog.text


def test_holders_that_are_sent_other_weights_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry, told = equivocate(tmp_path / "honest", InProcessGrid, caplog)
    assert entry["other-requests"] == {} and "other weights" not in told
    entry, told = equivocate(tmp_path / "two-faced", TwoFaced, caplog)
    assert entry["other-requests"] and all(1 in pair for pair in entry["other-requests"].values())
    shard = next(iter(entry["other-requests"]))
    assert f"of shard {shard}) bound their noise to different requests" in told


def test_a_server_that_is_not_trusted_is_charged_for_an_answer_by_each_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry, _ = equivocate(tmp_path, TwoFaced, caplog, honest_server=False)
    twice = epsilon_of([Spend(1.0, 0.2, 2 * 3)], 1e-5, accountant="rdp")
    assert entry["epsilon"] == pytest.approx(twice)
    for worker in range(2):
        ledger = BudgetLedger(tmp_path / f"node-{worker}" / "spent")
        assert {ledger.epsilon(shard, 1e-5, accountant="rdp") for shard in ledger.shards} == {twice}


# ---- A server that knows everything but the key ---------------------------------------------------------------------


def test_all_but_the_key_does_not_give_the_noise(node: Node) -> None:
    """Its best guess is no better than chance; with the key it would be the noise itself."""
    x, y = records(count=41, size=SIZE)
    net = linear(SIZE)
    with node.ask(net, privacy=ALL, examples=41) as dp:
        bound = dp._bound_to(1)  # all of this is known to the server, or can be
        move(dp, net, x, y)
    update = net.weight.detach().double().flatten()
    # It knows all records but the last, whose part of the update is small beside the noise.
    seen = clipped(linear(SIZE), x[:40], y[:40]) * 40 - update * 41
    real = PRFStream(bound.derive(read_keys(node.folder).secret(0), "noise")).normal(SIZE)
    assert correlation(seen, real) > 0.99
    digest = bytes.fromhex(bound.digest)
    guesses = [
        bytes(32),
        bytes(range(32)),
        digest,
        bound.weights,
        bound.config,
        bound.manifest,
        *(hashlib.sha256(f"{seed}|1|0".encode()).digest() for seed in range(400)),
        *(seed.to_bytes(32, "big") for seed in range(1, 400)),
        *(np.random.default_rng(seed).bytes(32) for seed in range(200)),
        read_keys(node.folder).secret(1),  # a holder of another shard that helps
    ]
    streams = [bound.derive(guess, purpose) for guess in guesses for purpose in PURPOSES]
    best = max(abs(correlation(seen, PRFStream(key).normal(SIZE))) for key in [*streams, *guesses])
    assert best < 5.2 / np.sqrt(SIZE)  # of 3000 that are independent, one is above in 2000 tries
    torch_guesses = (torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(500))
    assert max(abs(correlation(seen, guess)) for guess in torch_guesses) < 5.2 / np.sqrt(SIZE)


def test_batches_cannot_be_told_from_what_the_server_knows(tmp_path: Path) -> None:
    """Equal requests to holders of other secrets: their batches share no more than chance has it."""
    rate, count = 0.3, 4000
    x, y = records(count=count)

    def batches(node: Node, shard_seed: int) -> list[list[int]]:
        torch.manual_seed(shard_seed)
        net = linear()
        with node.ask(net, examples=count, privacy=settings(sample_rate=rate), seed=7) as dp:
            return move(dp, net, x, y)

    with inside_a_run():
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        mine, holder = Node(tmp_path / "a" / "node"), Node(tmp_path / "a" / "holder", tmp_path / "a" / "keys")
        stranger = Node(tmp_path / "b" / "node")
        one, same, other = batches(mine, 1), batches(holder, 2), batches(stranger, 1)
    assert one == same
    error = 5 * np.sqrt(count) * 0.3
    for a, b in itertools.product(one, other):
        assert abs(len({*a} & {*b}) - rate**2 * count) < error
    for a, b in itertools.combinations(one, 2):  # nor does one step's batch tell another's
        assert abs(len({*a} & {*b}) - rate**2 * count) < error
    assert all(abs(len(a) - rate * count) < 5 * np.sqrt(count * rate * (1 - rate)) for a in [*one, *other])
