"""An audit from outside: guess from what is released whether a record was there, and bound epsilon by the guesses.

The guesser knows everything but the key: all other records, the weights, the settings. With one step on all records the
best that it can do is to look along the record's own gradient. What a node answers is more than numbers: whether it
answers or refuses, what it says, and what it charges are seen too.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor, nn

from fl_gradcode import gradient_coding_mod
from fl_gradcode.privacy import (
    DPSGD,
    Asked,
    BudgetLedger,
    Spend,
    epsilon_of,
    privacy_to_json,
    private_training,
    write_keys,
)
from fl_gradcode.privacy.dp_optimizer import wrap
from fl_gradcode.privacy.key_derivation import KeyContext, PRFStream
from fl_gradcode.protocol import Plan, Row
from fl_gradcode.testing import inside_a_run
from tests.privacy.direct import linear

DELTA = 1e-5
SIGMA, CLIP, SIZE, OTHERS, REPETITIONS = 2.0, 0.5, 4, 6, 500
#: Enough where the two cases hardly overlap: 100 scores judge. If all are told apart they prove an epsilon of 3.1, by
#: bounds of 0.0125^(1/100) and its complement, and if two are not, 2.6; what is claimed there is 2.0.
FEW = 200

Scores = Callable[[bool, int], float]


def least_epsilon(present: NDArray[np.float64], absent: NDArray[np.float64]) -> float:
    """What epsilon is at least, with 95 % confidence, for scores with and without the record.

    The threshold is found on one half of the scores and judged on the other, by Clopper and Pearson's bounds.

    References:
        Jagielski, Ullman, Oprea, "Auditing differentially private machine learning", NeurIPS 2020.
    """

    def bound(threshold: float, there: NDArray[np.float64], not_there: NDArray[np.float64]) -> float:
        best = 0.0
        for hits, alarms in ((there > threshold, not_there > threshold), (not_there <= threshold, there <= threshold)):
            k, n = int(hits.sum()), len(hits)
            few = float(beta.ppf(0.0125, k, n - k + 1)) if k else 0.0  # four bounds at a time: 95 % for all
            k, n = int(alarms.sum()), len(alarms)
            many = float(beta.ppf(1 - 0.0125, k + 1, n - k)) if k < n else 1.0
            best = max(best, math.log(max(few - DELTA, 1e-300) / many))
        return best

    thresholds = np.quantile(np.concatenate([present[::2], absent[::2]]), np.linspace(0.02, 0.98, 97))
    chosen = max(thresholds, key=lambda threshold: bound(float(threshold), present[::2], absent[::2]))
    return bound(float(chosen), present[1::2], absent[1::2])


def audit(scores: Scores, repetitions: int = REPETITIONS) -> float:
    there = np.array([scores(True, i) for i in range(repetitions)])
    not_there = np.array([scores(False, repetitions + i) for i in range(repetitions)])
    return least_epsilon(there, not_there)


def data(present: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Records that leave the first weight alone, and one with a gradient twenty times too long along it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(OTHERS + 1, SIZE, generator=generator)
    x[:, 0] = 0
    x[-1] = torch.tensor([10 * CLIP, 0, 0, 0])
    y = torch.randn(OTHERS + 1, 1, generator=generator)
    y[-1] = 1.0
    count = OTHERS + present
    return x[:count], y[:count]


def key(repetition: int, weight: float, purpose: str = "noise", *, bound: bool = True) -> bytes:
    """Of a secret of its own for each repetition."""
    weights = hashlib.sha256(f"{weight if bound else 0.0}".encode()).digest()
    context = KeyContext("r", 1, 0, weights, bytes(32), bytes(32))
    return context.derive(hashlib.sha256(f"secret {repetition}".encode()).digest(), purpose)  # type: ignore[arg-type]


@cache
def released(
    present: bool,
    repetition: int,
    *,
    weight: float = 0.0,
    steps: int = 1,
    rate: float = 1.0,
    noise_multiplier: float = SIGMA,
    max_grad_norm: float = CLIP,
    bound: bool = True,
) -> NDArray[np.float64]:
    """The update that leaves: of the sum of gradients, in units of the clipping norm. (Cached: do not change it.)"""
    x, y = data(present)
    net = linear(SIZE, weight)
    noise, sampling = (PRFStream(key(repetition, weight, purpose, bound=bound)) for purpose in ("noise", "sample"))
    wrapped = wrap(net, noise, mode="hooks", noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm)
    optimizer = wrapped.optimizer(torch.optim.SGD(net.parameters(), lr=1e-6), expected_batch_size=1.0)
    criterion = wrapped.criterion(nn.MSELoss())
    for _ in range(steps):
        batch = np.flatnonzero(sampling.uniform(len(x)) < rate)
        if not len(batch):
            optimizer.take(None)
            continue
        wrapped.batch_drawn(len(batch))
        optimizer.zero_grad()
        criterion(wrapped.model(x[batch]), y[batch]).backward()
        optimizer.step()
    wrapped.unwrap()
    return (weight - net.weight.detach().double().numpy().ravel()) / (1e-6 * CLIP)


def along(update: NDArray[np.float64]) -> float:
    return -float(update[0])  # the record's gradient is negative there


@pytest.fixture(autouse=True)
def _no_hook_warnings() -> None:
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # pytest restores them


def claimed(steps: int, rate: float = 1.0, noise_multiplier: float = SIGMA) -> float:
    return epsilon_of([Spend(noise_multiplier, rate, steps)], DELTA)


def test_one_step_leaks_less_than_is_claimed() -> None:
    there, not_there = (
        np.array([along(released(present, i)) for i in range(start, start + REPETITIONS)])
        for present, start in ((True, 0), (False, REPETITIONS))
    )
    # The statistic is the best there is: the means are apart by what one record may change, one clipping norm.
    assert there.mean() - not_there.mean() == pytest.approx(1.0, abs=5 * SIGMA * math.sqrt(2 / REPETITIONS))
    assert there.std() == pytest.approx(SIGMA, rel=0.15) and not_there.std() == pytest.approx(SIGMA, rel=0.15)
    assert 0 < least_epsilon(there, not_there) < claimed(1)


def test_several_steps_leak_more_and_less_than_is_claimed() -> None:
    # The means are apart by sqrt(steps) / sigma = 1.5 standard deviations, three times as far as after the step above.
    sigma = 4 / 3
    found = audit(lambda present, i: along(released(present, i, steps=4, noise_multiplier=sigma)))
    assert 0.5 < found < claimed(4, noise_multiplier=sigma)


def test_hidden_batches_leak_less_than_is_claimed() -> None:
    assert audit(lambda present, i: along(released(present, i, steps=4, rate=0.25))) < claimed(4, 0.25)


def test_noise_ten_times_too_small_is_caught() -> None:
    found = audit(lambda present, i: along(released(present, i, noise_multiplier=SIGMA / 10)), FEW)
    assert found > claimed(1)


def test_clipping_left_out_is_caught() -> None:
    # The same noise as ever, and a bound that clips nothing.
    found = audit(
        lambda present, i: along(released(present, i, noise_multiplier=SIGMA / 1000, max_grad_norm=1000 * CLIP)), FEW
    )
    assert found > claimed(1)


def two_answers(present: bool, repetition: int, *, bound: bool) -> float:
    """The difference of two answers to requests with other weights; the record's gradient is another in the second."""
    first = released(present, repetition)  # a key that is not bound to the weights is the one for weights of 0
    second = released(present, repetition, weight=1 / CLIP / 10 * 0.999, bound=bound)
    return along(first - second)


def test_noise_used_twice_is_caught_and_keys_bound_to_the_weights_prevent_it() -> None:
    assert audit(lambda present, i: two_answers(present, i, bound=False)) > claimed(2)
    assert audit(lambda present, i: two_answers(present, i, bound=True)) < claimed(2)


def test_the_bound_holds_where_epsilon_is_known() -> None:
    """Randomised response tells the truth with chance e^eps / (1 + e^eps): exactly eps."""
    rng, epsilon = np.random.default_rng(0), 2.0
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = []
    for _ in range(60):
        there = (rng.random(2000) < truth) + 1e-3 * rng.random(2000)
        not_there = (rng.random(2000) > truth) + 1e-3 * rng.random(2000)
        found.append(least_epsilon(there, not_there))
    assert np.mean(np.array(found) > epsilon) <= 0.05 and np.mean(found) > 1.6


# ---- What is seen besides numbers ------------------------------------------------------------------------------------

SEEN = 100  # 50 judge: if all are told apart they prove an epsilon of 2.4, and 2.0 is claimed


@dataclass(frozen=True)
class Seen:
    """What a server sees of one request.

    Attributes:
        kind: Everything that is no noisy number: answer or refusal, its text, names and shapes, what was charged.
        along: The update along the record's gradient; 0 if there is none.
    """

    kind: str
    along: float


def least_epsilon_of(present: list[Seen], absent: list[Seen]) -> float:
    """What epsilon is at least, if kinds are seen beside numbers.

    Of kinds, the guesser takes those for the record's that are more frequent with it; which these are is found on the
    half of the scores that thresholds are found on.
    """
    frequent = Counter(one.kind for one in present[::2])
    frequent.subtract(Counter(one.kind for one in absent[::2]))

    def scores(seen: list[Seen]) -> NDArray[np.float64]:
        return np.array([1e6 * frequent[one.kind] + one.along for one in seen])

    return least_epsilon(scores(present), scores(absent))


def raising(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """A loop that fails at what it does not expect in a record."""
    _loop(dp, net, x, y, each=lambda rows: _fail() if float(rows.abs().max()) > 4 else None)


def asserting_a_finite_loss(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """As many loops do; at the weights that the server sends, the loss of that record alone overflows."""
    _loop(dp, net, x, y, factor=1e38, check=lambda loss: None if math.isfinite(loss) else _fail())


def limiting_a_large_loss(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The limit is misuse of the library, and reached at that record alone."""
    _loop(dp, net, x, y, then=lambda loss: loss.clamp(max=100.0) if float(loss) > 100 else loss)


def ending_the_process(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    _loop(dp, net, x, y, each=lambda rows: sys.exit(1) if float(rows.abs().max()) > 4 else None)


def leaving_it_out(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    _loop(dp, net, x, y, kept=lambda rows: rows.abs().amax(1) <= 4)


def nothing_fails(dp: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    _loop(dp, net, x, y)


def _fail() -> None:
    raise ValueError("a record of John Smith")


def _loop(
    dp: Any,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    factor: float = 1.0,
    each: Callable[[Tensor], None] = lambda rows: None,
    kept: Callable[[Tensor], Tensor] | None = None,
    check: Callable[[float], Any] = lambda loss: None,
    then: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> None:
    optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=1.0))
    criterion = dp.criterion(nn.MSELoss())
    for drawn in dp.batches():
        batch = drawn if kept is None else drawn[kept(x[drawn])]
        each(x[batch])
        optimizer.zero_grad()
        loss = criterion(factor * dp.model(x[batch]), y[batch])
        check(float(loss.detach()))
        then(loss).backward()
        optimizer.step()


Loop = Callable[[Any, nn.Module, Tensor, Tensor], None]
FAILURES: list[Loop] = [
    raising,
    asserting_a_finite_loss,
    limiting_a_large_loss,
    ending_the_process,
    leaving_it_out,
]


def app_of(loop: Loop, present: bool, *, guarded: bool) -> ClientApp:
    """An app with one shard; without the mod, whatever it raises is told, as by any app in which Opacus is used."""
    app = ClientApp(mods=[gradient_coding_mod] if guarded else [])
    x, y = data(True)
    if not present:  # the number of records is public; one of zeros has no gradient
        x[-1] = 0

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content: Any = message.content
        net = linear(SIZE)
        net.load_state_dict(content["arrays"].to_torch_state_dict())
        context.node_config["partition-id"]
        with private_training(message, context, net, examples=len(y)) as dp:
            loop(dp, net, x, y)
        metrics = MetricRecord({"num-examples": len(y)})
        records: Any = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
        return Message(RecordDict(records), reply_to=message)

    return app


#: At these weights the record has a gradient along the first one, and all others have none.
WEIGHTS = torch.tensor([[10.0, 0.0, 0.0, 0.0]])
AUDITED = DPSGD(noise_multiplier=SIGMA, max_grad_norm=CLIP, sample_rate=1.0, steps=1, accountant="rdp")


def seen(
    loop: Loop,
    present: bool,
    repetition: int,
    keys: Path,
    *,
    guarded: bool = True,
    mode: Any = "hooks",
    sigma: float = SIGMA,
) -> Seen:
    """Ask a node that has the keys, and no memory."""
    folder = keys.parent / "node"
    shutil.copytree(keys / "node-0", folder)
    privacy = replace(AUDITED, grad_sample_mode=mode, noise_multiplier=sigma)
    run = f"run {repetition} {present}"  # has noise of its own
    content = RecordDict({"arrays": ArrayRecord({"weight": WEIGHTS})})
    if guarded:
        plan = Plan(
            run, 0, 1, "train", 1, 1, "num-examples", "arrays", {0: Row((0,), ((1.0,),))},
            privacy=privacy_to_json(privacy), releases={0: (1, ())},
        )  # fmt: skip
        content = plan.add_to(content)
    else:
        Asked(privacy, run, 1, 0, 0).add_to(content)
    node: Any = {"partition-id": 0, "num-partitions": 1, "privacy-dir": str(folder), "max-epsilon": 1e3}
    message = Message(content, dst_node_id=1, message_type="train")
    moved = torch.zeros(1, dtype=torch.float64)
    try:
        reply: Any = app_of(loop, present, guarded=guarded)(message, Context(1, 1, node, RecordDict(), {})).content
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    else:
        told = f"answered {sorted(reply)}"
        array = reply["fl-gradcode.update"]["arrays"] if guarded else reply["arrays"]["weight"]
        values = torch.from_numpy(array.numpy().copy()).double().flatten()
        moved = values / (OTHERS + 1) if guarded else values - WEIGHTS.flatten()
    charged = [replace(one, run="", context="", data="") for one in BudgetLedger(folder / "spent").entries(0)]
    shutil.rmtree(folder)
    return Seen(f"{told} {charged}", -float(moved[0]) * (OTHERS + 1) / CLIP)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Path]:
    write_keys(tmp_path / "keys", [[0]])
    logging.disable(logging.CRITICAL)
    with inside_a_run(), np.errstate(all="ignore"):
        yield tmp_path / "keys"
    logging.disable(logging.NOTSET)


def audit_of(loop: Loop, keys: Path, **options: Any) -> tuple[float, set[str]]:
    there, not_there = (
        [seen(loop, present, number, keys, **options) for number in range(SEEN)] for present in (True, False)
    )
    return least_epsilon_of(there, not_there), {one.kind for one in (*there, *not_there)}


@pytest.mark.parametrize(
    ("loop", "mode"),
    [*((loop, "hooks") for loop in (nothing_fails, *FAILURES)), (asserting_a_finite_loss, "ghost")],
)
def test_outcomes_and_numbers_together_leak_less_than_is_claimed(loop: Loop, mode: str, keys: Path) -> None:
    found, kinds = audit_of(loop, keys, mode=mode)
    assert found < claimed(1)
    assert len(kinds) == 1  # so the numbers alone are left, which have noise


@pytest.mark.parametrize("loop", [raising, limiting_a_large_loss, leaving_it_out])
def test_a_refusal_that_depends_on_a_record_is_caught(loop: Loop, keys: Path) -> None:
    """The same loops, keys and noise, but what fails is told."""
    found, kinds = audit_of(loop, keys, guarded=False)
    assert found > claimed(1) and len(kinds) == 2


def test_so_are_numbers_with_too_little_noise_behind_equal_outcomes(keys: Path) -> None:
    found, kinds = audit_of(nothing_fails, keys, sigma=SIGMA / 20)
    assert found > claimed(1) and len(kinds) == 1


@pytest.mark.parametrize("refused", ["with it", "without it"])
def test_a_refusal_in_some_rounds_alone_is_caught_whoever_is_refused(refused: str) -> None:
    """A record that is drawn in half of the rounds, and shows when it is."""
    rng, noise = np.random.default_rng(3), 1e3  # the numbers say nothing

    def some(often: float) -> list[Seen]:
        kinds = rng.random(2000) < often
        return [Seen("refused" if kind else "answered", noise * rng.standard_normal()) for kind in kinds]

    there, not_there = some(0.5), some(0.0)
    assert least_epsilon_of(*((there, not_there) if refused == "with it" else (not_there, there))) > claimed(1, 0.5)
    assert least_epsilon_of(some(0.5), some(0.5)) < 0.5
