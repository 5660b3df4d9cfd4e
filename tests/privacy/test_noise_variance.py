"""The noise that is left after decoding: as much as the formulas of privacy.md, section 6, say.

The records are zeros, so that all gradients are: an update is noise and nothing else, in every one of 50,000 entries.
"""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_gradcode import GradientCode, cyclic_repetition, fractional_repetition, gradient_coding_mod
from fl_gradcode.privacy import private_training
from tests.conftest import flat
from tests.once import Once
from tests.privacy.private_app import settings
from tests.privacy.test_private_rounds import run

CODES: dict[str, GradientCode] = {
    "fractional": fractional_repetition(6, 2),
    "cyclic": cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
}
ENTRIES = 50_000  # the variance is measured to 0.63 %
RATE, SIGMA, CLIP, STEPS, SAMPLED = 0.5, 1.3, 0.7, 2, 0.25
PAIRS = list(itertools.combinations(range(6), 2))
SETTINGS = {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "sample_rate": SAMPLED, "steps": STEPS}


def examples_of(shard: int) -> int:
    return 12 + 4 * shard


def weight_of(shard: int) -> int:
    """Such that the shards' noise differs: an update's is over the number of examples."""
    return examples_of(shard) * (1 + shard)


def start() -> ArrayRecord:
    return ArrayRecord({"weight": torch.zeros(1, ENTRIES)})


def noise_app() -> ClientApp:
    app = ClientApp(mods=[gradient_coding_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        net = torch.nn.Linear(ENTRIES, 1, bias=False)
        content: Any = message.content
        net.load_state_dict(content["arrays"].to_torch_state_dict())
        x = torch.zeros(examples_of(shard), ENTRIES)
        with private_training(message, context, net, examples=len(x), weight=weight_of(shard)) as dp:
            optimizer = dp.optimizer(torch.optim.SGD(net.parameters(), lr=RATE))
            for batch in dp.batches():
                optimizer.zero_grad()
                dp.model(x[batch]).mean().backward()
                optimizer.step()
        metrics = MetricRecord({"num-examples": weight_of(shard)})
        records: dict[str, Any] = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics, "privacy": dp.record}
        return Message(RecordDict(records), reply_to=message)

    return app


def decoded_noise(
    code: GradientCode, folder: Path, silent: tuple[int, ...], noise: str, app: Any = None
) -> tuple[Any, list[int]]:
    """The decoded sum, and who it is of."""
    arrays, (row,) = run(
        code,
        folder,
        silent,
        app=app or noise_app(),
        arrays=start(),
        privacy=settings(noise=noise, **SETTINGS),
        run=f"{noise} {silent}" if noise == "independent" else "r",
    )
    assert row["train"]["outcome"] == "exact"
    return flat(arrays) * sum(map(weight_of, range(6))), row["train"]["used"]


def single_variances() -> Any:
    """Of each shard's weighted update: u_j^2, u_j = w_j lr sigma C sqrt(E) / (q n_j)."""
    u = [weight_of(j) * RATE * SIGMA * CLIP * np.sqrt(STEPS) / (SAMPLED * examples_of(j)) for j in range(6)]
    return np.square(u)


@pytest.mark.parametrize("name", CODES)
def test_shared_noise_is_that_of_one_release_whoever_answers(name: str, tmp_path: Path) -> None:
    theory = single_variances().sum()
    first = None
    ratios = []
    app = Once(noise_app())  # whoever is silent, the others are asked the same
    for silent in PAIRS:
        noise, _ = decoded_noise(CODES[name], tmp_path, silent, "shared", app)
        ratios.append(noise.var() / theory)
        first = noise if first is None else first
        assert np.abs(noise - first).max() < 1e-4 * noise.std()  # not only as much: the same
    print(f"\nshared noise, {name}: variance over theory {min(ratios):.4f} to {max(ratios):.4f}")
    assert max(np.abs(np.array(ratios) - 1)) < 0.03


@pytest.mark.parametrize("name", CODES)
def test_independent_noise_is_amplified_as_predicted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, caplog.handler.level = CODES[name], logging.WARNING
    variances, factors = single_variances(), []
    ratios = []
    for silent in PAIRS:
        noise, used = decoded_noise(code, tmp_path, silent, "independent")
        # The shortest vector that decodes, by LAPACK; of one reply a group under repetition, whose rows are alike.
        a = np.linalg.lstsq(code.B[used].T, np.ones(6), rcond=None)[0]
        shares = (a[:, None] * code.B[used]) ** 2
        ratios.append(noise.var() / (shares.sum(0) @ variances))
        factors.append(shares.sum() / 6)  # where all shards' noise is alike
    print(f"\nindependent noise, {name}: variance over theory {min(ratios):.4f} to {max(ratios):.4f}")
    assert max(np.abs(np.array(ratios) - 1)) < 0.05

    said = next(r.getMessage() for r in caplog.records if "INDEPENDENT NOISE" in r.getMessage())
    told = re.search(r"variance by (\S+) to (\S+), where", said)
    assert told is not None
    print(f"said {told[1]} to {told[2]}; is {min(factors):.4g} to {max(factors):.4g}")
    assert float(told[1]) == pytest.approx(min(factors), rel=0.05)
    assert float(told[2]) == pytest.approx(max(factors), rel=0.05)
    assert "up to 3 holders" in said


def test_copies_of_a_shard_are_not_mixed_where_shards_are_sent_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = CODES["cyclic"]
    arrays, _ = run(
        code,
        tmp_path,
        app=noise_app(),
        arrays=start(),
        privacy=settings(noise="independent", **SETTINGS),
        send="shards",
    )
    noise = flat(arrays) * sum(map(weight_of, range(6)))
    assert noise.var() == pytest.approx(single_variances().sum(), rel=0.03)
    said = next(r.getMessage() for r in caplog.records if "INDEPENDENT NOISE" in r.getMessage())
    assert "variance by 1 to 1, where" in said
