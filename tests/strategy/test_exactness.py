"""The decoded model is the one that full participation would have given."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi

from clients.app import app as reference_app
from clients.data import load_dataset
from clients.models import build_model
from fl_gradcode import GradientCode, GradientCoding, VirtualGrid, cyclic_repetition, fractional_repetition, uncoded
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.testing import InProcessGrid
from tests.conftest import flat, initial_arrays, relative, run_plain, toy_app, update_of

RUN_CONFIG: dict[str, Any] = {
    "dataset": "digits",
    "data-dir": "",
    "partitioner": "dirichlet",
    "alpha": 0.3,
    "owners": 0,
    "model": "logistic",
    "local-epochs": 1,
    "batch-size": 16,
    "learning-rate": 0.1,
    "seed": 0,
}
STRATEGIES: dict[str, Callable[[], FedAvg]] = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0),
    "FedAvgM": lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0, eta=0.01, tau=0.1),
    "FedYogi": lambda: FedYogi(fraction_evaluate=0.0, eta=0.01, tau=0.1),
    "FedAdagrad": lambda: FedAdagrad(fraction_evaluate=0.0, eta=0.01, tau=0.1),
    "FedProx": lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
}
CODES: dict[str, Callable[[], GradientCode]] = {
    "uncoded": lambda: uncoded(6),
    "fractional": lambda: fractional_repetition(6, 2),
    "cyclic": lambda: cyclic_repetition(6, 2, rng=np.random.default_rng(0)),
}


ROUNDS = 3  # the second and third with what the strategies keep of earlier ones


def silent(workers: tuple[int, ...]) -> Latency:
    return Latency(compute=scaled(lognormal(), dict.fromkeys(workers, float("inf"))))


def digits_model() -> ArrayRecord:
    return ArrayRecord(build_model("logistic", load_dataset("digits"), seed=0).state_dict())


@cache
def full_participation(name: str) -> ArrayRecord:
    """The model after plain Flower's rounds with everybody."""
    with InProcessGrid(reference_app, 6, run_config=RUN_CONFIG) as grid:
        arrays: ArrayRecord = STRATEGIES[name]().start(grid, digits_model(), num_rounds=ROUNDS).arrays
    return arrays


def spy(strategy: FedAvg) -> list[ArrayRecord]:
    """The arrays of the one reply that the wrapped strategy gets in each round: the decoded means."""
    seen: list[ArrayRecord] = []
    aggregate = strategy.aggregate_train

    def aggregate_train(server_round: int, replies: list[Message]) -> Any:
        seen.append(next(iter(replies[0].content.array_records.values())))
        assert len(replies) == 1
        return aggregate(server_round, replies)

    strategy.aggregate_train = aggregate_train  # type: ignore[assignment,method-assign]
    return seen


def plain_means(name: str, globals_: list[ArrayRecord]) -> list[ArrayRecord]:
    """FedAvg's mean over everyone, from the same global arrays, round by round."""
    means = []
    for server_round, arrays in enumerate(globals_, 1):
        with InProcessGrid(reference_app, 6, run_config=RUN_CONFIG) as grid:
            messages = STRATEGIES[name]().configure_train(server_round, arrays, ConfigRecord(), grid)
            mean, _ = FedAvg().aggregate_train(server_round, grid.send_and_receive(messages))
        assert mean is not None
        means.append(mean)
    return means


def run_coded(
    name: str, code: GradientCode, missing: tuple[int, ...]
) -> tuple[Any, list[ArrayRecord], list[ArrayRecord]]:
    inner = STRATEGIES[name]()
    decoded = spy(inner)
    models = [digits_model()]
    strategy = GradientCoding(inner, code, sees="mean", on_round_end=lambda r, arrays, row: models.append(arrays))
    with InProcessGrid(reference_app, 6, run_config=RUN_CONFIG) as grid:
        result = strategy.start(VirtualGrid(grid, silent(missing)), models[0], num_rounds=ROUNDS)
    return result, decoded, models


@pytest.mark.parametrize("code_name", CODES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_with_any_stragglers_each_mean_and_the_final_model_equal_full_participation(name: str, code_name: str) -> None:
    expected = full_participation(name)
    code = CODES[code_name]()
    patterns = list(itertools.combinations(range(6), code.s))
    # What is decoded does not depend on the wrapped strategy: one of them meets all patterns, the others some.
    for missing in patterns if name == "FedAvg" else patterns[::5]:
        result, decoded, models = run_coded(name, code, missing)
        assert relative(result.arrays, expected) < 1e-6
        if missing == patterns[0]:
            for mean, plain in zip(decoded, plain_means(name, models[:ROUNDS]), strict=True):
                assert relative(mean, plain) < 1e-6


def test_the_sum_is_the_one_computed_by_hand(code: GradientCode) -> None:
    result = None
    with InProcessGrid(toy_app(), 6) as grid:
        result = GradientCoding(FedAvg(), code).start(grid, initial_arrays(), num_rounds=1)
    weights = np.arange(1, 7)
    mean = sum(w * update_of(1, j, 11) for j, w in enumerate(weights)) / weights.sum()
    assert np.abs(flat(result.arrays) - (flat(initial_arrays()) + mean)).max() < 1e-6


def test_metrics_are_the_weighted_means_and_the_weight_is_exact(code: GradientCode) -> None:
    plain = run_plain(toy_app(), 6)
    with InProcessGrid(toy_app(), 6) as grid:
        coded = GradientCoding(FedAvg(), code).start(grid, initial_arrays(), num_rounds=3)
    for phase in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        for server_round, metrics in getattr(plain, phase).items():
            ours = getattr(coded, phase)[server_round]
            for key, value in metrics.items():
                assert ours[key] == pytest.approx(value, rel=1e-9)
            assert ours["fl-gradcode.decoded"] == 1


def test_sampling_shards_gives_the_mean_over_those_shards(code: GradientCode) -> None:
    rows: list[dict[str, Any]] = []
    strategy = GradientCoding(
        FedAvg(fraction_train=0.5, fraction_evaluate=0.0), code, on_round_end=lambda r, a, row: rows.append(row)
    )
    with InProcessGrid(toy_app(), 6) as grid:
        result = strategy.start(grid, initial_arrays(), num_rounds=1)
    shards = rows[0]["train"]["shards"]
    assert len(shards) == 3
    mean = sum((j + 1) * update_of(1, j, 11) for j in shards) / sum(j + 1 for j in shards)
    assert np.abs(flat(result.arrays) - (flat(initial_arrays()) + mean)).max() < 1e-6


def test_more_shards_than_workers_train_like_that_many_clients() -> None:
    plain = run_plain(toy_app(), 12)
    strategy = GradientCoding(FedAvg(), fractional_repetition(6, 2, k=12))
    with InProcessGrid(toy_app(), 6) as grid:
        coded = strategy.start(grid, initial_arrays(), num_rounds=3)
    assert relative(coded.arrays, plain.arrays) < 1e-6


def test_an_upload_reduced_code_decodes_the_same_model_from_shorter_replies() -> None:
    # Two groups of three; within a group, an MDS code of rate 2/3 (reference: codes.md, section 6).
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 2)))
    B = np.zeros((6, 6, 2))
    for worker in range(6):
        for shard in range(6):
            if worker % 2 == shard % 2:
                B[worker, shard] = q[worker // 2]
    plain = run_plain(toy_app(), 6)
    for missing in itertools.combinations(range(6), 1):
        strategy = GradientCoding(FedAvg(), GradientCode(B, 1))
        with InProcessGrid(toy_app(), 6) as grid:
            coded = strategy.start(VirtualGrid(grid, silent(missing)), initial_arrays(), num_rounds=3)
        assert relative(coded.arrays, plain.arrays) < 1e-6
        assert coded.train_metrics_clientapp[2]["loss"] == pytest.approx(plain.train_metrics_clientapp[2]["loss"])
