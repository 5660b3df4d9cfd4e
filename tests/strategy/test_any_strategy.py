"""With one shard a message, any of Flower's strategies makes what it makes in plain Flower, whoever is silent."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from fl_gradcode import GradientCoding, VirtualGrid, cyclic_repetition, fractional_repetition, gradient_coding_mod
from fl_gradcode.codes import GradientCode, for_assignment
from fl_gradcode.errors import IncompatibleStrategy, InvalidSetting, UnsuitableApp
from fl_gradcode.latency import Latency, constant, scaled
from fl_gradcode.privacy import DPSGD, CentralNoise
from fl_gradcode.testing import InProcessGrid
from tests.conftest import initial_arrays, relative, toy_app
from tests.once import Once

N, S, ROUNDS = 9, 2, 5
NOISE = DPSGD(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, steps=2)
CODES: dict[str, Callable[[], GradientCode]] = {
    "fractional": lambda: fractional_repetition(N, S),
    "cyclic": lambda: cyclic_repetition(N, S, rng=np.random.default_rng(0)),
    "universal": lambda: for_assignment([[i % N, (i + 2) % N, (i + 5) % N] for i in range(N)], s=S),
}
#: Two of a group of the fractional repetition; the first and the last; two of different groups.
SILENT = [(0, 3), (0, 8), (4, 7), ()]


class NumberedGrid(InProcessGrid):
    """A grid whose nodes are numbered as the shards are, so that a strategy samples the same."""

    def __init__(self, app: ClientApp, num_nodes: int) -> None:
        super().__init__(app, num_nodes)
        contexts = {self._worker[node]: context for node, context in self._contexts.items()}
        self._worker = {i: i for i in range(num_nodes)}
        self._contexts = contexts


def booster(trees: int, first: int) -> bytes:
    """As much of XGBoost's JSON as Flower's bagging reads."""
    model = {
        "gbtree_model_param": {"num_trees": str(trees), "num_parallel_tree": str(trees)},
        "iteration_indptr": [0, trees],
        "trees": [{"id": i, "made-by": first} for i in range(trees)],
        "tree_info": [0] * trees,
    }
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


def tree_client(mods: Sequence[Any] = (), train_mods: Sequence[Any] = ()) -> ClientApp:
    """An app that returns trees: bytes of another length for each shard."""
    app = ClientApp(mods=[*mods])

    @app.train(mods=[*train_mods])
    def train(message: Message, context: Context) -> Message:
        shard, content = int(context.node_config["partition-id"]), message.content
        trees = booster(1, 10 ** (shard + int(content["config"]["server-round"])))  # type: ignore[arg-type]
        arrays = ArrayRecord([np.frombuffer(trees, np.uint8)])
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": shard + 1})}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "auc": float(shard)})}), reply_to=message)

    return app


def largest(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """A metric function that no mean gives: extremes, and a list of all."""
    values = [next(iter(reply.metric_records.values())) for reply in replies]
    key = "loss" if "loss" in values[0] else "accuracy"
    every = sorted(float(value[key]) for value in values)  # type: ignore[arg-type]
    return MetricRecord({"largest": every[-1], "smallest": every[0], "all": every, "count": len(values)})


OWN_METRICS: Any = {"train_metrics_aggr_fn": largest, "evaluate_metrics_aggr_fn": largest}
App = Callable[..., ClientApp]


class FedNova(FedAvg):
    """Each update is divided by its own number of steps."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        contents: list[Any] = [reply.content for reply in replies]
        arrays = [
            [a / content["metrics"]["num-examples"] for a in content["arrays"].to_numpy_ndarrays()]
            for content in contents
        ]
        return ArrayRecord([np.mean(each, axis=0) for each in zip(*arrays, strict=True)]), MetricRecord({"steps": 1})


class Counting(flower.FedMedian):
    """Its model depends on how many replies come, from whom, and how large they are."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = [*replies]
        arrays, _ = super().aggregate_train(server_round, replies)
        contents: list[Any] = [reply.content for reply in replies]
        size = sum(len(array.data) for content in contents for array in content["arrays"].values())
        who = sorted(reply.metadata.src_node_id for reply in replies)
        return arrays, MetricRecord({"bytes": size, "who": who, "replies": len(replies)})


STRATEGIES: dict[str, tuple[Callable[[], Strategy], App, tuple[Any, ...]]] = {
    "FedAvg": (FedAvg, toy_app, ()),
    "FedAvg, extremes of metrics": (lambda: FedAvg(**OWN_METRICS), toy_app, ()),
    "FedAvg, a part of the shards": (lambda: FedAvg(fraction_train=0.6, fraction_evaluate=0.3), toy_app, ()),
    "FedAvgM": (lambda: flower.FedAvgM(server_momentum=0.9), toy_app, ()),
    "FedAdagrad": (flower.FedAdagrad, toy_app, ()),
    "FedAdam": (flower.FedAdam, toy_app, ()),
    "FedYogi": (flower.FedYogi, toy_app, ()),
    "FedProx": (lambda: flower.FedProx(proximal_mu=0.1), toy_app, ()),
    "FedMedian": (flower.FedMedian, toy_app, ()),
    "FedTrimmedAvg": (lambda: flower.FedTrimmedAvg(beta=0.25), toy_app, ()),
    "Krum": (lambda: flower.Krum(num_malicious_nodes=2), toy_app, ()),
    "MultiKrum": (lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4), toy_app, ()),
    "Bulyan": (lambda: flower.Bulyan(num_malicious_nodes=1), toy_app, ()),
    "QFedAvg": (lambda: flower.QFedAvg(client_learning_rate=0.1, q=0.2, train_loss_key="loss"), toy_app, ()),
    "FedXgbBagging": (flower.FedXgbBagging, tree_client, ()),
    "FedXgbCyclic": (flower.FedXgbCyclic, tree_client, ()),
    "server-side fixed clipping": (
        lambda: flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.3, 2.0, N),
        toy_app,
        (),
    ),
    "server-side adaptive clipping": (
        lambda: flower.DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.3, N),
        toy_app,
        (),
    ),
    "client-side fixed clipping": (
        lambda: flower.DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.3, 2.0, N),
        toy_app,
        (fixedclipping_mod,),
    ),
    "client-side adaptive clipping": (
        lambda: flower.DifferentialPrivacyClientSideAdaptiveClipping(FedAvg(), 0.3, N),
        toy_app,
        (adaptiveclipping_mod,),
    ),
    "FedNova": (FedNova, toy_app, ()),
    "counts replies and bytes": (Counting, toy_app, ()),
}


def initial(app: App) -> ArrayRecord:
    return ArrayRecord([np.frombuffer(b"", np.uint8)]) if app is tree_client else initial_arrays()


def recorded(strategy: Strategy) -> tuple[Strategy, list[tuple[int, str, list[int]]]]:
    """The strategy, and a list of whose replies it is given in each phase."""
    heard: list[tuple[int, str, list[int]]] = []
    for method in ("aggregate_train", "aggregate_evaluate"):
        own = getattr(strategy, method)

        def listen(server_round: int, replies: Any, own: Any = own, method: str = method) -> Any:
            replies = [*replies]
            heard.append((server_round, method, sorted(reply.metadata.src_node_id for reply in replies)))
            return own(server_round, replies)

        setattr(strategy, method, listen)
    return strategy, heard


def run(strategy: Strategy, grid: Any, app: App) -> Any:
    random.seed(5)  # which nodes are sampled
    np.random.seed(5)  # noqa: NPY002 - the noise of Flower's wrappers
    return strategy.start(grid, initial(app), num_rounds=ROUNDS, timeout=1000.0)


def model_of(result: Any, app: App) -> Any:
    if app is not tree_client:
        return result.arrays
    model = json.loads(result.arrays["0"].numpy().tobytes())["learner"]["gradient_booster"]["model"]
    return sorted(tree["made-by"] for tree in model["trees"])  # in the order of replies


def figures(metrics: dict[int, MetricRecord]) -> dict[int, dict[str, Any]]:
    """Without this library's own."""
    return {
        number: {key: value for key, value in record.items() if not key.startswith("fl-gradcode.")}
        for number, record in metrics.items()
    }


@pytest.fixture(scope="module")
def plain() -> Callable[[str], tuple[Any, list[Any]]]:
    """What each strategy does in plain Flower, with k nodes that hold a shard each."""
    known: dict[str, tuple[Any, list[Any]]] = {}

    def of(name: str) -> tuple[Any, list[Any]]:
        if name not in known:
            make, app, mods = STRATEGIES[name]
            strategy, heard = recorded(make())
            with NumberedGrid(app([], mods), N) as grid:
                known[name] = run(strategy, grid, app), heard
        return known[name]

    return of


#: A code decides only who may answer for a shard: with the others, one strategy of each kind is enough.
OF_EACH_KIND = ("FedAvg, extremes of metrics", "FedMedian", "FedXgbBagging", "counts replies and bytes")
CASES = [
    *((name, "fractional") for name in STRATEGIES),
    *((name, code) for name in OF_EACH_KIND for code in CODES if code != "fractional"),
]


@pytest.mark.parametrize(("name", "code"), CASES, ids=[f"{name}-{code}" for name, code in CASES])
def test_it_makes_what_it_makes_in_plain_flower(name: str, code: str, plain: Callable[[str], Any]) -> None:
    make, app, mods = STRATEGIES[name]
    expected, heard = plain(name)
    for silent in SILENT if code == "fractional" else SILENT[1:2]:
        inner, listened = recorded(make())
        strategy = GradientCoding(inner, CODES[code](), send="shards")
        latency = Latency(compute=scaled(constant(1.0), dict.fromkeys(silent, float("inf"))))
        with InProcessGrid(app([gradient_coding_mod], mods), N) as clients:
            result = run(strategy, VirtualGrid(clients, latency, seed=1), app)
        assert [row["train"]["outcome"] for row in strategy.ledger.rows] == ["exact"] * ROUNDS
        assert listened == heard
        if app is tree_client:
            assert model_of(result, app) == model_of(expected, app)
        else:
            assert relative(result.arrays, expected.arrays) < 1e-6
        for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
            told, wanted = figures(getattr(result, kind)), figures(getattr(expected, kind))
            assert told.keys() == wanted.keys()
            for number, values in wanted.items():
                assert told[number].keys() == values.keys()
                for key, value in values.items():
                    assert told[number][key] == pytest.approx(value), (number, key)


def test_any_two_may_be_silent() -> None:
    with NumberedGrid(toy_app([]), N) as grid:
        expected = run(flower.FedMedian(fraction_evaluate=0.0), grid, toy_app)
    app: Any = Once(toy_app([gradient_coding_mod]))
    for silent in itertools.combinations(range(N), S):
        strategy = GradientCoding(flower.FedMedian(fraction_evaluate=0.0), CODES["fractional"](), send="shards")
        latency = Latency(compute=scaled(constant(1.0), dict.fromkeys(silent, float("inf"))))
        with InProcessGrid(app, N) as clients:
            result = run(strategy, VirtualGrid(clients, latency, seed=1), toy_app)
        assert relative(result.arrays, expected.arrays) < 1e-6, silent


NEED_REPLIES = [
    name for name in STRATEGIES if name.split(",")[0] not in {"FedAvg", "FedAvgM", "FedProx"} and "Ada" not in name
]


@pytest.mark.parametrize("name", ["FedAvg, extremes of metrics", *(n for n in NEED_REPLIES if n != "FedYogi")])
def test_under_coded_vectors_it_is_refused_with_the_way_out(name: str) -> None:
    make, _, _ = STRATEGIES[name]
    with pytest.raises(IncompatibleStrategy, match="pass send='shards'") as caught:
        GradientCoding(make(), CODES["fractional"]())
    assert "\n" not in str(caught.value)
    assert GradientCoding(make(), CODES["fractional"](), send="adaptive").options.only_mean == ""
    kept = ("FedAvg", "FedNova", "counts")
    own = name.startswith(kept) and not isinstance(make(), flower.FedMedian)
    assert ("sees='mean'" in str(caught.value)) == own
    if own:
        GradientCoding(make(), CODES["fractional"](), sees="mean")
    else:
        with pytest.raises(IncompatibleStrategy, match="pass send='shards'"):
            GradientCoding(make(), CODES["fractional"](), sees="mean")


class Saving(FedAvg):
    """It saves each model, and aggregates nothing by itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.saved: list[ArrayRecord | None] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.saved.append(arrays)
        return arrays, metrics


@pytest.mark.parametrize("send", ["coded", "shards", "adaptive"])
def test_a_strategy_that_only_saves_may_see_the_mean(send: Any) -> None:
    inner = Saving()
    with InProcessGrid(toy_app(), N) as grid:
        result = GradientCoding(inner, CODES["fractional"](), send=send, sees="mean").start(
            grid, initial_arrays(), num_rounds=2
        )
    assert len(inner.saved) == 2 and inner.saved[-1] is not None
    assert relative(inner.saved[-1], result.arrays) == 0


def test_an_adaptive_run_of_such_a_strategy_sends_no_coded_vectors() -> None:
    strategy = GradientCoding(flower.FedMedian(), CODES["fractional"](), send="adaptive")
    latency = Latency(fixed=1.0, compute=0.01)  # where one coded vector would be sooner than three messages
    with InProcessGrid(toy_app(), N) as clients:
        strategy.start(VirtualGrid(clients, latency), initial_arrays(), num_rounds=12)
    assert {row["way"]["send"] for row in strategy.ledger.rows} == {"shards"}
    assert all(row["train"]["outcome"] == "exact" for row in strategy.ledger.rows)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"send": "shards", "privacy": NOISE},
            "privacy= protects only the mean: pass send='shards' ",
        ),
        ({"send": "shards", "privacy": CentralNoise(noise_multiplier=1.0, clipping_norm=1.0)}, "without privacy="),
        ({"send": "shards", "on_undecodable": "approximate"}, "and on_undecodable='skip' or 'raise'"),
        ({"send": "shards", "sees": "mean"}, "sees='mean' gives it one decoded mean"),
    ],
    ids=["DPSGD", "CentralNoise", "estimates", "by its own word"],
)
def test_where_there_is_only_a_mean_it_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(IncompatibleStrategy, match=sentence):
        GradientCoding(flower.FedMedian(), CODES["fractional"](), **settings)


def test_replies_cannot_be_seen_under_coded_vectors() -> None:
    with pytest.raises(
        InvalidSetting, match="sees='replies' needs send='shards' or 'adaptive', and send='coded' gives"
    ):
        GradientCoding(FedAvg(), CODES["fractional"](), sees="replies")
    with pytest.raises(InvalidSetting, match="sees='everything' must be 'mean' or 'replies'"):
        GradientCoding(FedAvg(), CODES["fractional"](), sees="everything")  # type: ignore[arg-type]


def test_all_records_of_a_reply_arrive_as_the_function_returned_them() -> None:
    """Several arrays and metrics, lists, a ConfigRecord, other shapes and names than were sent."""
    app = ClientApp(mods=[gradient_coding_mod])
    heard: list[tuple[int, RecordDict]] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        shard = int(context.node_config["partition-id"])
        content = RecordDict(
            {
                "model": ArrayRecord([np.full(shard + 1, shard, np.float16)]),
                "more": ArrayRecord({"new": ArrayRecord([np.arange(3)])["0"]}),
                "metrics": MetricRecord({"num-examples": 1, "list": [1, 2, shard]}),
                "seconds": MetricRecord({"spent": 0.5}),
                "told": ConfigRecord({"trained": True, "name": f"shard {shard}", "raw": b"\x00\x01"}),
            }
        )
        return Message(content, reply_to=message)

    class Listening(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            heard.extend((reply.metadata.src_node_id, reply.content) for reply in replies)
            return None, MetricRecord({})

    strategy = GradientCoding(Listening(fraction_evaluate=0.0), fractional_repetition(4, 1), send="shards")
    with InProcessGrid(app, 4) as grid:
        strategy.start(grid, initial_arrays(), num_rounds=1)
    contents: dict[int, Any] = dict(heard)
    assert contents.keys() == {0, 1, 2, 3}
    for shard, content in contents.items():
        assert [*content] == ["model", "more", "metrics", "seconds", "told"]
        assert content["model"]["0"].numpy().tolist() == [shard] * (shard + 1)
        assert content["metrics"]["list"] == [1, 2, shard]
        assert dict(content["told"]) == {"trained": True, "name": f"shard {shard}", "raw": b"\x00\x01"}
    (row,) = strategy.ledger.rows
    assert row["train"]["outcome"] == "exact" and row["train"]["model"] is False


def test_a_clipping_mod_before_ours_is_told_where_to_stand() -> None:
    inner = flower.DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.3, 2.0, 4)
    with (
        InProcessGrid(toy_app([fixedclipping_mod, gradient_coding_mod]), 4) as grid,
        pytest.raises(UnsuitableApp, match=r"List gradient_coding_mod first\.$"),
    ):
        GradientCoding(inner, fractional_repetition(4, 1), send="shards").start(grid, initial_arrays(), num_rounds=1)


def test_noise_of_each_holders_own_is_refused_as_before() -> None:
    mods = [gradient_coding_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)]
    with (
        InProcessGrid(toy_app(mods), 4) as grid,
        pytest.raises(UnsuitableApp, match="LocalDpMod does not combine with gradient_coding_mod"),
    ):
        GradientCoding(FedAvg(), fractional_repetition(4, 1), send="shards").start(grid, initial_arrays(), num_rounds=1)
