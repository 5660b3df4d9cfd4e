"""Graphs on classes: which are recomputed, and which of them hide all but one sum."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fl_gradcode.codes import (
    GradientCode,
    PrimeField,
    cyclic_repetition,
    fractional_repetition,
    reed_solomon,
    stochastic,
    uncoded,
)
from fl_gradcode.errors import InvalidCode, InvalidSetting, NotCertified
from fl_gradcode.secagg import ClassGraph, ShardClasses, certify, choose_graph, classes_for, leakage
from fl_gradcode.secagg.graph import vertex_order


def connected(vertices: set[int], edges: list[tuple[int, int]]) -> bool:
    """By merging, unlike the library."""
    parent = {v: v for v in vertices}

    def root(v: int) -> int:
        while parent[v] != v:
            v = parent[v]
        return v

    for a, b in edges:
        if a in parent and b in parent:
            parent[root(a)] = root(b)
    return len({root(v) for v in vertices}) == 1


def holds(classes: ShardClasses, graph: ClassGraph, colluders: int) -> bool:
    """The condition by brute force over all sets of at most so many workers."""
    for count in range(colluders + 1):
        for workers in combinations(range(classes.n), count):
            gone = {c for worker in workers for c in classes.supports[worker]}
            for cohort in graph.cohorts:
                rest = set(cohort) - gone
                if len(rest) < 2 or not connected(rest, [*graph.edges]):
                    return False
    return True


def certified(classes: ShardClasses, graph: ClassGraph, colluders: int, min_classes: int = 2) -> bool:
    try:
        certify(classes, graph, colluders=colluders, min_classes=min_classes)
    except NotCertified:
        return False
    return True


def one_class_each(count: int) -> ShardClasses:
    return classes_for(fractional_repetition(2 * count, 1, k=count))


@pytest.mark.parametrize("count", range(3, 10))
def test_a_harary_graph_has_its_connectivity_and_no_more(count: int) -> None:
    order = tuple(range(count))
    for connectivity in range(1, count):
        graph = ClassGraph("harary", (connectivity,), (order,))
        for gone in (set(one) for size in range(connectivity) for one in combinations(order, size)):
            assert connected(set(order) - gone, [*graph.edges])
        assert graph.connectivity() == connectivity
        degrees = [len(graph.edges_at([v])) for v in order]
        if connectivity > 1:  # one: a path
            odd = connectivity % 2 and count % 2 and connectivity < count - 1
            assert sorted(degrees) == [connectivity] * (count - 1) + [connectivity + bool(odd)]


@pytest.mark.parametrize(("count", "colluders"), [(5, 1), (6, 2), (7, 2), (8, 3), (9, 3), (12, 4)])
def test_one_more_colluder_than_the_graph_is_made_for_reads_a_class(count: int, colluders: int) -> None:
    classes = one_class_each(count)
    graph, certificate = choose_graph(classes, colluders=colluders)
    assert (graph.family, graph.parameters, certificate.method) == ("harary", (colluders + 1,), "repetition")
    assert holds(classes, graph, colluders)
    with pytest.raises(NotCertified, match="separate sums"):
        certify(classes, graph, colluders=colluders + 1)
    victim = next(v for v in range(count) if len(graph.edges_at([v])) == colluders + 1)
    around = {a + b - victim for a, b in graph.edges_at([victim])}
    holders = [classes.holders[c][0] for c in around]
    found = leakage(classes, graph, colluders=holders)
    assert (victim,) in found.components and not found.protects
    assert "alone, which should be hidden" in found.sentence
    assert leakage(classes, graph, colluders=holders[1:]).protects


def test_without_colluders_the_graph_is_a_path_and_never_a_matching() -> None:
    for count in range(3, 14):
        classes = one_class_each(count)
        graph, _ = choose_graph(classes, colluders=0)
        assert graph.family == "path" and len(graph.edges) == count - 1
        # "Degree T + 1" at T = 0 would be a matching, with which the server reads sums of pairs.
        assert len(ClassGraph("harary", (1,), graph.cohorts).edges) == count - 1
        if count % 2 == 0 and count > 3:
            matching = ClassGraph("circulant", (count // 2,), graph.cohorts)
            assert not certified(classes, matching, 0)
            assert len(leakage(classes, matching).learnt) == count // 2


# (n, s): for T = 0, 1, ... the offsets and the streams of a worker.
CYCLIC = {
    (20, 2): [((), 4), ((1,), 4), ((1, 10), 7), ((1, 4), 10), ((1, 4, 10), 13)],
    (20, 4): [((), 6), ((1,), 6), ((1, 10), 11), ((1, 6), 16)],
    (40, 3): [((), 5), ((1,), 5), ((1, 20), 9), ((1, 5), 13)],
    (64, 3): [((), 5), ((1,), 5), ((1, 32), 9)],
}


@pytest.mark.parametrize(("n", "s"), CYCLIC)
def test_circulants_of_cyclic_supports_are_those_of_the_table(n: int, s: int) -> None:
    classes = classes_for(reed_solomon(n, s))
    for colluders, (offsets, streams) in enumerate(CYCLIC[n, s]):
        graph, _ = choose_graph(classes, colluders=colluders)
        assert graph.parameters == offsets
        assert max(len(graph.edges_at(held)) for held in classes.supports) == streams
        if colluders and n == 20 and colluders < 3:
            assert holds(classes, graph, colluders)
            assert not certified(classes, graph, colluders + 1)


def test_colluders_who_hold_all_but_one_class_are_named() -> None:
    classes = classes_for(reed_solomon(20, 4))
    with pytest.raises(NotCertified, match="workers 0, 5, 10 and 16 would know all but 1 of the 20 classes"):
        choose_graph(classes, colluders=4)


def with_supports(supports: list[tuple[int, ...]]) -> ShardClasses:
    """Classes with any holders; the code does not matter here."""
    count = max(c for one in supports for c in one) + 1
    matrix = np.zeros((len(supports), count, 1), np.int64)
    for worker, held in enumerate(supports):
        matrix[worker, list(held)] = 1
    holders = tuple(tuple(np.flatnonzero(matrix[:, c, 0]).tolist()) for c in range(count))
    ring = classes_for(reed_solomon(3, 1)).ring
    return ShardClasses(tuple((c,) for c in range(count)), matrix, holders, "coded", ring, 0)


def test_fewer_colluders_can_be_worse_than_more() -> None:
    # Class 0 hangs on class 1 alone, which worker 0 has. Everybody else has class 0, and so takes it away again.
    classes = with_supports([(1,), *((0, own) for own in range(2, 7))])
    graph = ClassGraph("path", (), (tuple(range(7)),))
    graph.__dict__["edges"] = ((0, 1), *combinations(range(1, 7), 2))
    for pair in combinations(range(6), 2):
        rest = {*range(7)} - {c for worker in pair for c in classes.supports[worker]}
        assert len(rest) >= 2 and connected(rest, [*graph.edges])
    assert certified(classes, graph, 0)
    assert not certified(classes, graph, 1)
    with pytest.raises(NotCertified, match="server and worker 0 would learn 2 separate sums"):
        certify(classes, graph, colluders=2)


@pytest.mark.parametrize("seed", range(40))
def test_the_certificate_is_the_condition_for_random_supports(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, count = int(rng.integers(3, 8)), int(rng.integers(3, 9))
    supports = [tuple(sorted(rng.choice(count, int(rng.integers(1, 3)), replace=False).tolist())) for _ in range(n)]
    classes = with_supports([*supports, (count - 1,)])
    family = ["path", "harary", "circulant"][seed % 3]
    parameters = () if family == "path" else (int(rng.integers(1, count // 2 + 1)),)
    graph = ClassGraph(family, parameters, (tuple(range(count)),))  # type: ignore[arg-type]
    for colluders in range(3):
        assert certified(classes, graph, colluders) == holds(classes, graph, colluders)


def test_cohorts_are_certified_one_by_one() -> None:
    classes = classes_for(fractional_repetition(24, 1))
    graph, _ = choose_graph(classes, colluders=1, cohorts=3)
    assert [len(cohort) for cohort in graph.cohorts] == [4, 4, 4]
    assert holds(classes, graph, 1) and len(graph.components()) == 3
    with pytest.raises(NotCertified, match="sum would be taken over 2 classes"):
        choose_graph(classes, colluders=0, cohorts=6)
    with pytest.raises(NotCertified, match="mix two cohorts"):
        choose_graph(classes_for(reed_solomon(8, 1)), colluders=0, cohorts=2)
    with pytest.raises(InvalidSetting, match="cohorts=13"):
        choose_graph(classes, colluders=0, cohorts=13)


def test_two_classes_are_refused_since_each_reads_the_other_off_the_sum() -> None:
    with pytest.raises(NotCertified, match="at least 3"):
        choose_graph(classes_for(fractional_repetition(4, 1)), colluders=0)
    with pytest.raises(InvalidSetting, match="min_classes=1"):
        choose_graph(classes_for(fractional_repetition(4, 1)), colluders=0, min_classes=1)


def test_a_class_counts_as_held_by_everybody_who_is_given_its_seed() -> None:
    code = fractional_repetition(8, 1)
    given = [code.holders_of(j) for j in range(8)]
    nosy = [tuple(sorted({*one, 0})) if j % 4 < 2 else one for j, one in enumerate(given)]  # worker 0 has two classes
    plain, more = classes_for(code), classes_for(code, holders=nosy)
    assert plain.supports[0] == (0,) and more.supports[0] == (0, 1)
    graph, _ = choose_graph(plain, colluders=1)
    certify(plain, graph, colluders=1)
    with pytest.raises(NotCertified):
        certify(more, ClassGraph("path", (), graph.cohorts), colluders=1)
    with pytest.raises(InvalidSetting, match="not among its holders"):
        classes_for(code, holders=[()] * 8)


def test_many_workers_are_certified_by_connectivity_or_refused() -> None:
    classes = classes_for(reed_solomon(300, 2))
    graph, certificate = choose_graph(classes, colluders=3)
    assert (graph.parameters, certificate.method) == ((10,), "connectivity")
    with pytest.raises(NotCertified, match="too many to look at all"):
        certify(classes, ClassGraph("circulant", (1, 4), graph.cohorts), colluders=3)


def test_classes_are_the_columns_that_are_equal() -> None:
    assert classes_for(fractional_repetition(6, 1, k=7)).members == ((0, 3, 6), (1, 4), (2, 5))
    assert classes_for(fractional_repetition(6, 1), "shardwise").members == tuple((j,) for j in range(6))
    assert len(classes_for(reed_solomon(6, 1))) == 6
    consecutive = reed_solomon(6, 1, assignment=[[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]])
    assert classes_for(consecutive).members == ((0, 1), (2, 3), (4, 5))
    # One shard a message: classes of one group stand next to each other in the graph.
    assert vertex_order(classes_for(fractional_repetition(6, 1), "shardwise").holders) == (0, 3, 1, 4, 2, 5)


@pytest.mark.parametrize(
    "code",
    [
        cyclic_repetition(6, 1, rng=np.random.default_rng(0)),
        fractional_repetition(8, 1, m=2),
        stochastic(6, 2, rng=np.random.default_rng(0)),
        GradientCode(np.ones((3, 3)), 2),
    ],
    ids=lambda code: code.name,
)
def test_codes_over_the_reals_are_refused(code: GradientCode) -> None:
    with pytest.raises(InvalidCode, match=r"over the reals|approximate"):
        classes_for(code)


def test_uncoded_runs_are_masked_too_and_wait_for_all() -> None:
    classes = classes_for(uncoded(5))
    assert (len(classes), classes.s) == (5, 0)
    assert certified(classes, choose_graph(classes, colluders=2)[0], 2)


def test_graphs_that_are_none_are_refused() -> None:
    for family, parameters in (("path", (1,)), ("harary", ()), ("circulant", (0,)), ("star", ())):
        with pytest.raises(InvalidSetting, match="A graph is"):
            ClassGraph(family, parameters, ((0, 1, 2),))  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="go up to 1"):
        _ = ClassGraph("circulant", (2,), ((0, 1, 2),)).edges
    for colluders in (-1, 1.5, "1"):
        with pytest.raises(InvalidSetting, match="whole number of at least 0"):
            choose_graph(one_class_each(4), colluders=colluders)  # type: ignore[arg-type]
    with pytest.raises(NotCertified, match="exactly once"):
        certify(one_class_each(4), ClassGraph("path", (), ((0, 1, 2),)), colluders=0)


def test_the_code_over_classes_decodes_where_the_code_over_shards_does() -> None:
    for code in (fractional_repetition(7, 2, k=9), reed_solomon(6, 2), reed_solomon(6, 1, m=2)):
        inner = classes_for(code).code
        assert isinstance(inner.numbers, PrimeField) == isinstance(code.numbers, PrimeField)
        for count in range(1, code.n + 1):
            for survivors in combinations(range(code.n), count):
                assert inner.decodable(survivors) == code.decodable(survivors)
