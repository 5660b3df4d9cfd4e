"""What would void the claim is refused, with one sentence that says what to do instead."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fl_gradcode import GradientCoding, cyclic_repetition, fractional_repetition, gradient_coding_mod, uncoded
from fl_gradcode.codes import reed_solomon
from fl_gradcode.errors import IncompatibleStrategy, InvalidSetting, UnsuitableApp
from fl_gradcode.privacy import DPSGD, CentralNoise, Spent, in_config
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, run_plain, toy_app
from tests.privacy.private_app import initial, keys_for, private_app, settings

CODE = fractional_repetition(6, 2)
SPENDS: dict[str, Any] = {
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "sample_rate": 0.2,
    "steps": 3,
    "accountant": "rdp",
}


class Derived(LocalDpMod):
    """Somebody's own, which calls Flower's."""

    def __call__(self, msg: Message, ctxt: Context, call_next: Any) -> Message:
        return super().__call__(msg, ctxt, call_next)


class Rewritten(LocalDpMod):
    """Somebody's own, which does not."""

    def __call__(self, msg: Message, ctxt: Context, call_next: Any) -> Message:
        return call_next(msg, ctxt)  # type: ignore[no-any-return]


LOCAL = LocalDpMod(1.0, 1.0, 1.0, 1e-5)
MODS: dict[str, Any] = {
    "LocalDpMod": LOCAL,
    "LocalDpMod, derived": Derived(1.0, 1.0, 1.0, 1e-5),
    "LocalDpMod, rewritten": Rewritten(1.0, 1.0, 1.0, 1e-5),
    "LocalDpMod, partial": functools.partial(LOCAL),
    "fixedclipping_mod": fixedclipping_mod,
    "fixedclipping_mod, partial": functools.partial(fixedclipping_mod),
    "adaptiveclipping_mod": adaptiveclipping_mod,
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", MODS)
def test_flower_s_privacy_mods_are_refused_wherever_they_are_listed(name: str, before: bool) -> None:
    mods = [MODS[name], gradient_coding_mod] if before else [gradient_coding_mod, MODS[name]]
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE)
    config = ConfigRecord({"clipping_norm": 1.0})
    with (
        InProcessGrid(private_app(mods=mods), 6) as grid,
        pytest.raises(UnsuitableApp, match=rf"{name.partition(',')[0]} does not combine .* privacy=CentralNoise"),
    ):
        strategy.start(grid, initial(), num_rounds=1, train_config=config)
    assert strategy.ledger.rows[0]["train"]["outcome"] == "skipped"


def test_other_mods_inside_are_none_of_our_business() -> None:
    def counting(message: Message, context: Context, call_next: Any) -> Message:
        seen.append(1)
        return call_next(message, context)  # type: ignore[no-any-return]

    seen: list[int] = []
    app = private_app(mods=[gradient_coding_mod, counting, functools.partial(counting)])
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE)
    with InProcessGrid(app, 6) as grid:
        result = strategy.start(grid, initial(), num_rounds=1)
    plain = run_plain(private_app(mods=()), 6, FedAvg(fraction_evaluate=0.0), rounds=1, arrays=initial())
    assert relative(result.arrays, plain.arrays) < 1e-6
    assert len(seen) > 6


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DifferentialPrivacyServerSideFixedClipping": lambda s: flower.DifferentialPrivacyServerSideFixedClipping(
        s, 1.0, 1.0, 6
    ),
    "DifferentialPrivacyClientSideFixedClipping": lambda s: flower.DifferentialPrivacyClientSideFixedClipping(
        s, 1.0, 1.0, 6
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": lambda s: flower.DifferentialPrivacyServerSideAdaptiveClipping(
        s, 0.1, 6
    ),
    "DifferentialPrivacyClientSideAdaptiveClipping": lambda s: flower.DifferentialPrivacyClientSideAdaptiveClipping(
        s, 0.1, 6
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_flower_s_privacy_wrappers_do_not_go_around_coding(name: str) -> None:
    outer = WRAPPERS[name](GradientCoding(FedAvg(), CODE))
    with InProcessGrid(toy_app(), 6) as grid:
        with pytest.raises(IncompatibleStrategy, match=rf"^{name} cannot be put around .*privacy=CentralNoise"):
            outer.start(grid, initial_arrays(), num_rounds=1)
        assert sum(grid.calls) == 0


def test_a_wrapper_is_refused_around_a_strategy_that_has_run_without_it() -> None:
    strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), CODE)
    with InProcessGrid(toy_app(), 6) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
        outer = flower.DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 1.0, 6)
        with pytest.raises(IncompatibleStrategy, match="cannot be put around"):
            outer.start(grid, initial_arrays(), num_rounds=1)
        with pytest.raises(IncompatibleStrategy, match="cannot be put around"):
            outer.configure_train(5, initial_arrays(), ConfigRecord(), grid)


@pytest.mark.parametrize("name", WRAPPERS)
def test_flower_s_privacy_wrappers_go_inside_where_they_see_each_reply(name: str) -> None:
    with pytest.raises(IncompatibleStrategy, match=rf"^{name} aggregates .*: pass send='shards', which gives it one"):
        GradientCoding(WRAPPERS[name](FedAvg()), CODE)
    GradientCoding(WRAPPERS[name](FedAvg()), CODE, send="shards")
    noise = CentralNoise(noise_multiplier=1.0, clipping_norm=1.0)
    with pytest.raises(IncompatibleStrategy, match=rf"^{name} adds privacy, and so does privacy=: "):
        GradientCoding(WRAPPERS[name](FedAvg()), CODE, send="shards", privacy=noise)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no noise": (
        lambda: DPSGD(**{**SPENDS, "noise_multiplier": 0.0}),
        "noise_multiplier=0.0 must be a number from 1e-09",
    ),
    "NaN": (lambda: DPSGD(**{**SPENDS, "noise_multiplier": float("nan")}), "noise_multiplier=nan"),
    "infinite": (lambda: CentralNoise(noise_multiplier=1.0, clipping_norm=float("inf")), "clipping_norm=inf"),
    "text": (lambda: DPSGD(**{**SPENDS, "max_grad_norm": "1"}), "max_grad_norm='1'"),
    "rate 0": (lambda: DPSGD(**{**SPENDS, "sample_rate": 0.0}), "sample_rate=0.0 must be a number from 1e-09 to 1"),
    "rate 2": (lambda: DPSGD(**{**SPENDS, "sample_rate": 2.0}), "sample_rate=2.0"),
    "large norm": (
        lambda: DPSGD(**{**SPENDS, "max_grad_norm": 1e25}),
        "max_grad_norm=1e+25 must be a number from",
    ),
    "small norm": (
        lambda: DPSGD(**{**SPENDS, "max_grad_norm": 9e-7}),
        "max_grad_norm=9e-07 must be a number from",
    ),
    "much noise": (lambda: DPSGD(**{**SPENDS, "noise_multiplier": 1e5}), "noise_multiplier=100000.0 must be a number"),
    "many steps": (lambda: DPSGD(**{**SPENDS, "steps": 10**6}), "steps=1000000 must be at most 100000"),
    "no steps": (lambda: DPSGD(**{**SPENDS, "steps": 0}), "steps=0 must be a whole number"),
    "half steps": (lambda: DPSGD(**{**SPENDS, "steps": 1.5}), "steps=1.5"),
    "delta": (lambda: DPSGD(**SPENDS, delta=1.0), "delta=1.0 must lie between 0 and 1"),
    "budget": (lambda: DPSGD(**SPENDS, max_epsilon=0.0), "max_epsilon=0.0 must be greater than 0"),
    "noise": (lambda: DPSGD(**{**SPENDS, "noise": "none"}), "noise='none' must be one of shared, independent"),
    "mode": (
        lambda: DPSGD(**{**SPENDS, "grad_sample_mode": "ew"}),
        "grad_sample_mode='ew' must be one of hooks, ghost",
    ),
    "gdp": (lambda: DPSGD(**{**SPENDS, "accountant": "gdp"}), "accountant='gdp' must be one of prv, rdp"),
    "folder": (
        lambda: CentralNoise(noise_multiplier=1.0, clipping_norm=1.0, folder="here"),
        "folder='here' is a relative path",
    ),
    "none of ours": (lambda: GradientCoding(FedAvg(), CODE, privacy=1.0), "privacy=1.0: pass a DPSGD"),  # type: ignore[arg-type]
    "a class": (lambda: GradientCoding(FedAvg(), CODE, privacy=DPSGD), "pass a DPSGD"),  # type: ignore[arg-type]
    "field": (
        lambda: GradientCoding(FedAvg(), reed_solomon(6, 2), privacy=settings(noise="independent")),
        "independent noise differs: take noise='shared'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_one_sentence(case: str) -> None:
    make, reason = WRONG[case]
    with pytest.raises(InvalidSetting) as caught:
        make()
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


# Without coding


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_plain_fedavg_trains_privately_too(noise: str, tmp_path: Path) -> None:
    privacy = settings(noise=noise)
    told: list[Spent] = []

    def look(worker: int, message: Message, reply: Message) -> Message:
        spent = Spent.find_in(reply.content)
        assert spent is not None and spent.shard == worker
        told.append(spent)
        return reply

    run_config = keys_for(uncoded(3), tmp_path) if noise == "shared" else {}
    with InProcessGrid(private_app(mods=()), 3, run_config=run_config, tamper=look) as grid:
        result = FedAvg(fraction_evaluate=0.0).start(
            grid, initial(), num_rounds=2, train_config=ConfigRecord({**in_config(privacy)})
        )
    assert relative(result.arrays, initial()) > 1e-3
    assert [one.epsilon for one in told] == pytest.approx([privacy.epsilon(r) for r in (1, 1, 1, 2, 2, 2)])
    assert [one.round for one in told] == [1, 1, 1, 2, 2, 2]


def test_plain_shared_noise_without_keys_is_refused() -> None:
    errors: list[str] = []

    def look(worker: int, message: Message, reply: Message) -> Message:
        errors.append(str(reply.error.reason) if reply.has_error() else "")
        return reply

    with InProcessGrid(private_app(mods=()), 3, tamper=look) as grid:
        FedAvg(fraction_evaluate=0.0).start(
            grid, initial(), num_rounds=1, train_config=ConfigRecord({**in_config(settings())})
        )
    assert len(errors) == 3 and all("fl-gradcode keys make" in one for one in errors)


# Servers without PyTorch

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "opacus"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else found(name, *a)
from flwr.serverapp.strategy import FedAvg
from fl_gradcode import GradientCoding, fractional_repetition
from fl_gradcode.privacy import DPSGD
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, toy_app
strategy = GradientCoding(FedAvg(fraction_evaluate=0.0), fractional_repetition(6, 2))
with InProcessGrid(toy_app(), 6) as grid:
    strategy.start(grid, initial_arrays(), num_rounds=1)
assert "torch" not in sys.modules
print(strategy.ledger.rows[0]["train"]["outcome"])
try:
    strategy = GradientCoding(
        FedAvg(),
        fractional_repetition(6, 2),
        privacy=DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, steps=1, accountant="rdp"),
    )
    with InProcessGrid(toy_app(), 6) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_server_without_torch_runs_and_says_what_privacy_needs() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    outcome, needs = done.stdout.strip().splitlines()
    assert outcome == "exact"
    assert "pip install 'opacus" in needs, needs


@pytest.mark.parametrize("app", ["without keys", "with a damaged ledger"])
def test_a_run_that_no_client_is_set_up_for_ends(app: str, tmp_path: Path) -> None:
    code = cyclic_repetition(6, 2, rng=np.random.default_rng(0))
    run_config = {} if app == "without keys" else keys_for(code, tmp_path)
    if app != "without keys":
        for worker in range(6):
            (tmp_path / f"node-{worker}" / "spent").write_text("a file, where a folder should be")
    strategy = GradientCoding(FedAvg(), code, privacy=settings())
    with (
        InProcessGrid(private_app(), 6, run_config=run_config) as grid,
        pytest.raises(UnsuitableApp, match=r"No client can take part: .*InvalidSetting: .*(keys make|spent privacy)"),
    ):
        strategy.start(grid, initial(), num_rounds=3)
