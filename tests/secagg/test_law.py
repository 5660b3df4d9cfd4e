"""The law of what the server sees, by counting over all streams of a small ring, against certificate and prediction.

Streams are uniform here, as AES is taken to make them. The view of a server with some workers is the replies, given the
streams at the workers' classes. Two inputs cannot be told apart exactly if the view has the same law for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from fl_gradcode.codes import fractional_repetition, reed_solomon
from fl_gradcode.errors import NotCertified
from fl_gradcode.secagg import ClassGraph, ShardClasses, certify, choose_graph, classes_for, leakage

N = 4
EDGES = tuple(combinations(range(N), 2))


def subsets(items: Sequence[int], most: int | None = None) -> Iterator[tuple[int, ...]]:
    return chain.from_iterable(combinations(items, t) for t in range((len(items) if most is None else most) + 1))


def rank(rows: Sequence[Sequence[int]], q: int) -> int:
    """Rank modulo a small prime, in Python's integers."""
    work, found = [[x % q for x in row] for row in rows], 0
    for column in range(len(work[0]) if work else 0):
        pivot = next((i for i in range(found, len(work)) if work[i][column]), None)
        if pivot is None:
            continue
        work[found], work[pivot] = work[pivot], work[found]
        inverse = pow(work[found][column], -1, q)
        work[found] = [x * inverse % q for x in work[found]]
        for i in range(len(work)):
            if i != found and work[i][column]:
                work[i] = [(x - work[i][column] * y) % q for x, y in zip(work[i], work[found], strict=True)]
        found += 1
    return found


@cache
def all_vectors(q: int, length: int) -> NDArray[np.int64]:
    grid = np.indices((q,) * length, dtype=np.int8).reshape(length, -1) if length else np.zeros((0, 1), np.int8)
    return grid.astype(np.int64)


def view_law(view: NDArray[np.int64], edges: Sequence[tuple[int, int]], m: int, q: int) -> NDArray[np.int64]:
    """How many of all streams give each view of zero inputs, shape (q^rows,).

    Args:
        view: What the server sees of the classes' blocks, shape (rows, N * m).
        edges: The edges whose streams it does not know.
        m: Blocks.
        q: Size of the ring.
    """
    incidence = np.zeros((N * m, len(edges) * m), np.int64)
    for number, (low, high) in enumerate(edges):
        for block in range(m):
            incidence[low * m + block, number * m + block] = 1
            incidence[high * m + block, number * m + block] = -1
    seen = (view @ incidence % q) @ all_vectors(q, len(edges) * m) % q
    return np.bincount(coded(seen, q), minlength=q ** len(view))


def coded(columns: NDArray[np.int64], q: int) -> NDArray[np.int64]:
    powers = q ** np.arange(len(columns), dtype=np.int64)
    return powers @ columns if len(columns) else np.zeros(columns.shape[1], np.int64)


def invisible(law: NDArray[np.int64], view: NDArray[np.int64], differences: NDArray[np.int64], q: int) -> list[bool]:
    """Whether the view has the same law for inputs that differ so; `differences` has shape (N * m, count).

    Inputs shift the view, and the laws of shifted views are compared entry by entry.
    """
    points = all_vectors(q, len(view))
    unshifted = law[coded(points, q)]
    _, first, back = np.unique(coded(view @ differences % q, q), return_index=True, return_inverse=True)
    shifts = (view @ differences[:, first] % q).T
    same = [bool((law[coded((points + shift[:, None]) % q, q)] == unshifted).all()) for shift in shifts]
    return [same[i] for i in back]


def rows_of(classes: ShardClasses, replies: Sequence[int], q: int) -> NDArray[np.int64]:
    return classes.matrix[list(replies)].reshape(len(replies), N * classes.m) % q


def small_code(m: int, q: int) -> ShardClasses:
    """A code over F_q on the supports of the Reed-Solomon code of n = 4, s = 1: any three replies give the sum."""
    base = classes_for(reed_solomon(N, 1, m=m))
    rho = 1 + m
    matrix = np.zeros((N, N, m), np.int64)
    for shard, holders in enumerate(base.holders):
        powers = [[pow(1 + i, rho - 1 - row, q) for i in holders] for row in range(rho)]
        for block in range(m):  # the leading coefficients of Lagrange polynomials
            (beta,) = (
                one
                for one in product(range(q), repeat=rho)
                if [sum(x * y for x, y in zip(row, one, strict=True)) % q for row in powers]
                == [int(row == block) for row in range(rho)]
            )
            matrix[list(holders), shard, block] = beta
    target = [[int(block == place % m) for place in range(N * m)] for block in range(m)]
    for three in combinations(range(N), N - 1):
        rows = matrix[list(three)].reshape(N - 1, -1).tolist()
        assert rank([*rows, *target], q) == rank(rows, q)
    return ShardClasses(base.members, matrix, base.holders, "coded", base.ring, 1)


FAMILIES = [
    ("path", ClassGraph("path", (), ((0, 1, 2, 3),)).edges),
    ("cycle", ClassGraph("circulant", (1,), ((0, 1, 2, 3),)).edges),
    ("matching", ClassGraph("circulant", (2,), ((0, 1, 2, 3),)).edges),
    ("complete", EDGES),
    ("none", ()),
    ("star", ((0, 1), (0, 2), (0, 3))),
]


class AnyGraph(ClassGraph):
    """A graph of any edges."""

    def __init__(self, edges: Sequence[tuple[int, int]]) -> None:
        super().__init__("path", (), (tuple(range(N)),))
        self.__dict__["edges"] = tuple(edges)

    def connectivity(self) -> int:
        return 0


def certified(classes: ShardClasses, graph: ClassGraph, colluders: int) -> bool:
    try:
        certify(classes, graph, colluders=colluders, min_classes=2)
    except NotCertified:
        return False
    return True


@pytest.mark.parametrize(("m", "names"), [(1, [name for name, _ in FAMILIES]), (2, ["path", "matching", "star"])])
def test_coded_views_over_five_elements_have_the_predicted_law(m: int, names: list[str]) -> None:
    q, compared = 5, 0
    classes = small_code(m, q)
    rng = np.random.default_rng(0)
    for _, edges in [one for one in FAMILIES if one[0] in names]:
        graph = AnyGraph(edges)
        promise = max((T for T in range(3) if certified(classes, graph, T)), default=-1)
        for colluders in subsets(range(N), 2):
            known = {c for i in colluders for c in classes.supports[i]}
            others = [c for c in range(N) if c not in known]
            if not others:
                continue
            hidden = [edge for edge in edges if known.isdisjoint(edge)]
            components = graph.components(sorted(known))
            for replies in subsets(range(N)):
                view = rows_of(classes, replies, q)
                law = view_law(view, hidden, m, q)
                # Differences of the other classes' inputs: random ones, and those that no component's sum shows.
                differences = np.zeros((60, N, m), np.int64)
                differences[:, others] = rng.integers(0, q, (60, len(others), m))
                for component in components:
                    differences[30:, component[-1]] -= differences[30:, list(component)].sum(axis=1)
                flat = (differences % q).reshape(60, -1).T
                found = invisible(law, view, flat, q)
                assert all(found[30:])
                # What is learnt: the row space of the view without the colluders' columns, where it meets the sums.
                columns = [c * m + block for c in others for block in range(m)]
                seen = view[:, columns].tolist()
                sums = [
                    [int(c in component and b == block) for c in others for b in range(m)]
                    for component in components
                    for block in range(m)
                ]
                learnt = rank(seen, q) + len(sums) - rank([*seen, *sums], q)
                assert all(found) == (learnt == 0)
                if len(colluders) <= promise:
                    assert len(components) == 1 and len(others) >= 2
                    equal = ~(differences.sum(axis=1) % q).any(axis=1)
                    assert all(f for f, e in zip(found, equal.tolist(), strict=True) if e)
                    compared += 1
    assert compared


def test_single_vectors_modulo_four_are_hidden_exactly_where_the_certificate_says() -> None:
    """All 64 graphs on four classes, one shard a message: two workers hold classes 0 and 2, two hold 1 and 3."""
    q = 4
    classes = classes_for(fractional_repetition(N, 1), "shardwise")
    differences = all_vectors(q, N)
    yes = no = 0
    for flags in product((False, True), repeat=len(EDGES)):
        edges = [edge for edge, there in zip(EDGES, flags, strict=True) if there]
        safe = {}
        for known in ((), (0, 2), (1, 3)):  # what no worker, worker 0 or 2, and worker 1 or 3 knows
            others = [c for c in range(N) if c not in known]
            hidden = [edge for edge in edges if set(known).isdisjoint(edge)]
            zero_sum = ~differences[list(known)].any(axis=0) & (differences.sum(axis=0) % q == 0)
            safe[known] = True
            for received in subsets(others):
                view = np.eye(N, dtype=np.int64)[list(received)]
                law = view_law(view, hidden, 1, q)
                safe[known] &= all(invisible(law, view, differences[:, zero_sum], q))
        graph = AnyGraph(edges)
        assert certified(classes, graph, 0) == safe[()]
        assert certified(classes, graph, 1) == all(safe.values())
        assert not certified(classes, graph, 2)  # two workers can hold everything
        yes, no = yes + all(safe.values()), no + (not safe[()])
    # Of the 64 graphs 38 are connected, and 15 of these have both edges that a colluder leaves.
    assert (yes, no) == (15, 64 - 38)


@pytest.mark.parametrize(("m", "dimensions"), [(1, [0, 0, 0, 1, 1]), (2, [0, 0, 1, 2, 2])])
def test_dimensions_that_are_learnt_by_the_number_of_replies(m: int, dimensions: list[int]) -> None:
    classes = classes_for(reed_solomon(N, 1, m=m))
    graph, _ = choose_graph(classes, colluders=0)
    for missing in subsets(range(N)):
        assert leakage(classes, graph, missing=missing).dimensions == dimensions[N - len(missing)]


@pytest.mark.parametrize("m", [1, 2])
def test_the_leakage_is_the_rank_by_another_elimination(m: int) -> None:
    p = 2**31 - 1
    classes = classes_for(reed_solomon(6, 2, m=m))
    rng = np.random.default_rng(0)
    for _ in range(60):
        edges = [edge for edge in combinations(range(6), 2) if rng.random() < 0.4]
        graph = ClassGraph("path", (), (tuple(range(6)),))
        graph.__dict__["edges"] = tuple(edges)
        colluders = rng.choice(6, int(rng.integers(0, 3)), replace=False).tolist()
        missing = rng.choice(6, int(rng.integers(0, 5)), replace=False).tolist()
        found = leakage(classes, graph, colluders=colluders, missing=missing)
        others = [c for c in range(6) if c not in found.known]
        seen = [classes.matrix[i, others].reshape(-1).tolist() for i in found.replies]
        sums = [
            [int(c in component and b == block) for c in others for b in range(m)]
            for component in found.components
            for block in range(m)
        ]
        assert found.dimensions == rank(seen, p) + len(sums) - rank([*seen, *sums], p)
