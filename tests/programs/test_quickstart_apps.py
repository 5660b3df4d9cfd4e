"""Apps in the style of Flower's quickstarts: two changed lines, and a silent worker changes nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fl_gradcode import VirtualGrid
from fl_gradcode.errors import UnsuitableApp
from fl_gradcode.latency import Latency, lognormal, scaled
from fl_gradcode.testing import InProcessGrid
from tests.conftest import relative

APPS = Path(__file__).resolve().parents[1] / "apps"
NAMES = ("quickstart_pytorch", "quickstart_sklearn", "quickstart_numpy")
CODES = ("fractional_repetition(6, 2)", "cyclic_repetition(6, 2, rng=numpy.random.default_rng(0))")
NODES = 6
RANDOM: dict[str, dict[str, Any]] = {
    "quickstart_pytorch": {"shuffle": True, "dropout": 0.3},
    "quickstart_numpy": {"noise": 1.0},
}
IMPORTS = "import numpy; from fl_gradcode import *\n"
FIXED = ('partition_id = context.node_config["partition-id"]', "partition_id = 0")


def the_two_lines(code: str, options: str = "") -> dict[str, str]:
    """What a user changes, next to the import."""
    return {
        "app = ClientApp()": "app = ClientApp(mods=[gradient_coding_mod])",
        "strategy = FedAvg()": f"strategy = GradientCoding(FedAvg(), {code}{options})",
    }


def load(name: str, lines: dict[str, str] | None = None) -> Any:
    """The app's module, from its source with these lines changed and no other."""
    source = (APPS / f"{name}.py").read_text()
    for old, new in (lines or {}).items():
        assert old in source, f"{name} has no line {old!r}"
        source = source.replace(old, new)
    module = ModuleType(name)
    exec(compile(IMPORTS * bool(lines) + source, name, "exec"), module.__dict__)
    return module


def run(module: Any, *, silent: tuple[int, ...] = (), **config: Any) -> Any:
    """The app on six nodes, some of which never answer."""
    run_config = {**module.RUN_CONFIG, **config}
    with InProcessGrid(module.app, NODES, run_config=run_config) as nodes:
        latency = Latency(compute=scaled(lognormal(), dict.fromkeys(silent, float("inf"))))
        grid = VirtualGrid(nodes, latency) if silent else nodes
        return module.main(grid, Context(1, 0, {}, RecordDict(), run_config))


@cache
def plain_run(name: str) -> Any:
    """The app as it is, with everybody."""
    return run(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_app_differs_in_two_lines(name: str) -> None:
    plain = (APPS / f"{name}.py").read_text().splitlines()
    assert not any("fl_gradcode" in line for line in plain)
    for line in the_two_lines(CODES[0]):
        assert [one.strip() for one in plain].count(line) == 1


@pytest.mark.parametrize("code", CODES, ids=["fractional", "cyclic"])
@pytest.mark.parametrize("name", NAMES)
def test_a_silent_worker_does_not_change_the_result(name: str, code: str) -> None:
    plain = plain_run(name)
    coded = run(load(name, the_two_lines(code)), silent=(1,))
    assert relative(coded.arrays, plain.arrays) < 1e-6
    assert list(coded.arrays) == list(plain.arrays)
    for key in plain.arrays:
        assert coded.arrays[key].shape == plain.arrays[key].shape
        assert coded.arrays[key].dtype == plain.arrays[key].dtype
    for part in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        assert getattr(plain, part).keys() == {1, 2, 3}
        for server_round, metrics in getattr(plain, part).items():
            for key, value in metrics.items():
                assert getattr(coded, part)[server_round][key] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_silent_worker_changes_plain_fedavg(name: str) -> None:
    """The other tests would notice: leaving a partition out makes another model."""
    missing = run(
        load(
            name,
            {
                "strategy = FedAvg()": 'strategy = GradientCoding(FedAvg(), uncoded(6), on_undecodable="approximate")',
                "app = ClientApp()": "app = ClientApp(mods=[gradient_coding_mod])",
                "grid=grid,": "grid=grid, timeout=100.0,",
            },
        ),
        silent=(1,),
    )
    assert relative(missing.arrays, plain_run(name).arrays) > 1e-4


@pytest.mark.parametrize("code", CODES, ids=["fractional", "cyclic"])
@pytest.mark.parametrize("name", RANDOM)
def test_randomness_from_global_generators_agrees_between_the_holders_of_a_shard(name: str, code: str) -> None:
    random: dict[str, Any] = {**RANDOM[name], "num-server-rounds": 2}  # the second from what the first one made
    results = []
    for number, silent in enumerate([(1,), (0, 5), (2, 3), (1,)]):
        np.random.seed(number)  # noqa: NPY002  # the state before must not matter
        results.append(run(load(name, the_two_lines(code)), silent=silent, **random).arrays)
    for arrays in results[1:]:
        assert relative(arrays, results[0]) < 1e-6
    # It was random: without randomness the model is another, and so it is with another seed.
    assert (
        relative(run(load(name, the_two_lines(code)), silent=(1,), **{"num-server-rounds": 2}).arrays, results[0])
        > 1e-4
    )
    other = run(load(name, the_two_lines(code, ", seed=1")), silent=(1,), **random)
    assert relative(other.arrays, results[0]) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_app_that_never_reads_partition_id_is_refused(name: str) -> None:
    module = load(name, {**the_two_lines(CODES[0]), FIXED[0]: FIXED[1]})
    with pytest.raises(
        UnsuitableApp, match=r"train\(\) never read context.node_config\['partition-id'\].*allow_fixed_data=True"
    ):
        run(module, silent=(1,))


@pytest.mark.parametrize("name", NAMES)
def test_an_app_with_fixed_data_is_accepted_on_request(name: str) -> None:
    fixed = dict([FIXED])
    coded = run(load(name, {**the_two_lines(CODES[0], ", allow_fixed_data=True"), **fixed}), silent=(1,))
    assert relative(coded.arrays, run(load(name, fixed)).arrays) < 1e-6
