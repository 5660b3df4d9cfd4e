"""Planned assignments against all there are: brute force on tiny problems, which knows nothing of flows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fl_gradcode.codes import for_assignment
from fl_gradcode.errors import InvalidCode
from fl_gradcode.placement.assignment import Assignment, assign

thorough = settings(max_examples=120, deadline=None, derandomize=True, database=None)


@dataclass
class Problem:
    capacities: list[int]
    holders: int
    may_hold: list[list[bool]]
    owners: list[int] | None = None
    speeds: list[float] | None = None
    domains: Any = None

    def __post_init__(self) -> None:
        self.fixed = np.zeros((len(self.capacities), len(self.may_hold[0])), bool)
        if self.owners:
            self.fixed[self.owners, range(len(self.owners))] = True
        self.may = np.array(self.may_hold) | self.fixed

    def plan(self, holders: int | None) -> Assignment:
        more = {"owners": self.owners, "speeds": self.speeds, "domains": self.domains}
        may_hold = None if np.all(self.may_hold) else np.array(self.may_hold)
        return assign(self.may.shape[1], self.capacities, holders=holders, may_hold=may_hold, **more)

    def every_plan(self, holders: int) -> Iterator[tuple[tuple[int, ...], ...]]:
        """All plans that keep the rules, each the holders of every shard."""
        teams = [[*combinations(np.flatnonzero(column).tolist(), holders)] for column in self.may.T]
        for plan in product(*teams):
            owned = self.owners is None or all(i in team for i, team in zip(self.owners, plan, strict=True))
            if owned and all(load <= self.capacities[i] for i, load in Counter(chain(*plan)).items()):
                yield plan


@st.composite
def problems(draw: st.DrawFn, *, sites: bool = False) -> Problem:
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    capacities = draw(st.lists(st.integers(0, k + 1), min_size=n, max_size=n))
    flags = st.lists(st.lists(st.integers(0, 3).map(bool), min_size=k, max_size=k), min_size=n, max_size=n)
    may_hold = draw(st.just([[True] * k] * n) | flags)
    owners = draw(st.none() | st.lists(st.integers(0, n - 1), min_size=k, max_size=k))
    for owner, count in Counter(owners or []).items():
        capacities[owner] = max(capacities[owner], count)
    speeds = None if sites else draw(st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.7]), min_size=n, max_size=n))
    domains = draw(st.text("ABC", min_size=n, max_size=n)) if sites else None
    return Problem(capacities, draw(st.integers(1, n)), may_hold, owners, speeds, domains)


# Laws of all plans.


@thorough
@given(problems() | problems(sites=True))
def test_plans_are_found_if_and_only_if_there_are_any(problem: Problem) -> None:
    possible = [r for r in range(1, len(problem.capacities) + 1) if any(problem.every_plan(r))]
    # Without a wish shards get as many holders as there is room for.
    for wish, holders in ((problem.holders, problem.holders), (None, max(possible, default=0))):
        if holders in possible:
            plan = problem.plan(wish)
            assert plan.held.sum(axis=0).tolist() == [holders] * plan.k
            assert all(load <= capacity for load, capacity in zip(plan.loads, problem.capacities, strict=True))
            assert not (plan.held & ~problem.may).any() and not (problem.fixed & ~plan.held).any()
        else:
            with pytest.raises(InvalidCode):
                problem.plan(wish)


@thorough
@given(problems())
def test_the_slowest_worker_ends_as_early_as_it_can(problem: Problem) -> None:
    assert problem.speeds
    loads = [Counter(chain(*plan)) for plan in problem.every_plan(problem.holders)]
    if loads:
        best = min(max(load / problem.speeds[i] for i, load in each.items()) for each in loads)
        assert problem.plan(problem.holders).slowest == pytest.approx(best, rel=1e-12)


@thorough
@given(problems(sites=True))
@example(Problem([1] * 7, 4, [[True]] * 7, domains="AAABBBC"))
def test_the_holders_of_a_shard_are_in_as_many_domains_as_can_be(problem: Problem) -> None:
    plans = problem.every_plan(problem.holders)
    best = max((min(len({problem.domains[i] for i in shard}) for shard in plan) for plan in plans), default=0)
    if best:
        assert problem.plan(problem.holders).domains_to_spare == best - 1


def test_a_shard_that_cannot_spread_holds_no_other_back() -> None:
    plan = assign(2, [2, 2, 2], holders=2, domains="AAB", may_hold=[[0, 1], [0, 1], [1]])
    assert plan.holders_of(0) == (0, 1) and 2 in plan.holders_of(1)


@pytest.mark.parametrize("domains", [(1, 1.0, 2), pytest.param((1, 1, "1"), id="1 and text")])
def test_domains_are_the_same_if_they_are_equal(domains: tuple[Any, ...]) -> None:
    assert assign(1, [1, 1, 1], holders=2, domains=domains).domains_to_spare == 1


@thorough
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=5, max_size=5), st.text("ABC", min_size=5))
def test_domains_to_spare_agrees_with_brute_force(rows: list[list[bool]], names: str) -> None:
    held, domains = np.array(rows), np.array(list(names[:5]))
    held[0] |= ~held.any(axis=0)
    count = 0
    while all(held[~np.isin(domains, gone)].any(axis=0).all() for gone in combinations(set(domains), count + 1)):
        count += 1
    assert Assignment(held, domains=tuple(domains)).domains_to_spare == count
    assert Assignment(held).domains_to_spare == held.sum(axis=0).min() - 1


# What is in the way.

TOO_FEW = re.compile(r"Shard (\d+) may be held by (\d+) workers? \(([\d, and]+|none)\)")
TOO_SMALL = re.compile(r"\D+(?:\d+ workers have room for )?(\d+)\D.*; .* needs? (\d+)\. Raise")
IN_THE_WAY = re.compile(r"Shards? ([\d, and]+) with .* needs? (\d+) places; .* hold \w+ \(([\d, and]+)\) have (\d+)")


@thorough
@given(problems() | problems(sites=True))
@example(Problem([1, 1, 3], 2, [[True, True, False], [True, True, False], [True, False, True]]))
@example(Problem([1, 1, 2], 2, [[True, True], [True, False], [False, True]], owners=[1, 0]))
def test_what_is_said_to_be_in_the_way_is(problem: Problem) -> None:
    if any(problem.every_plan(problem.holders)):
        return
    with pytest.raises(InvalidCode) as caught:
        problem.plan(problem.holders)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("ask for fewer.") and f" {problem.holders} holder" in sentence
    may, room = problem.may, np.minimum(problem.capacities, problem.may.shape[1])
    if match := TOO_FEW.match(sentence):
        named = [int(i) for i in re.findall(r"\d+", match[3])]
        assert named == np.flatnonzero(may[:, int(match[1])]).tolist()
        assert len(named) == int(match[2]) < problem.holders
    elif match := IN_THE_WAY.match(sentence):
        shards, workers = ([int(i) for i in re.findall(r"\d+", match[group])] for group in (1, 3))
        assert workers == np.flatnonzero(may[:, shards].any(axis=1)).tolist()
        elsewhere = problem.fixed.sum(axis=1) - problem.fixed[:, shards].sum(axis=1)
        assert int(match[4]) == np.minimum(room - elsewhere, may[:, shards].sum(axis=1)).sum()
        assert len(shards) * problem.holders == int(match[2]) > int(match[4])
    else:
        match = TOO_SMALL.match(sentence)
        assert match and int(match[1]) == room.sum() < int(match[2]) == may.shape[1] * problem.holders


# What plans say of themselves, and what they are good for.


def test_loads_follow_speeds_within_capacities() -> None:
    assert assign(6, [6, 6, 6], s=1, speeds=[1, 2, 3]).loads == (2, 4, 6)
    assert assign(6, [6, 3, 10], s=1, speeds=[1, 2, 3]).loads == (3, 3, 6)
    plan = assign(6, [6] * 4, s=1, speeds=[2, 1, 2, 1], domains="AABB")
    assert plan.loads == (4, 2, 4, 2) and plan.slowest == 2.0 and plan.domains_to_spare == 1


def test_a_plan_tells_what_it_supports() -> None:
    plan = assign(4, [4, 4, 2, 2], s=1, m=2, speeds=[2, 1, 1, 1], domains=["east", "east", "west", "south"])
    assert (plan.n, plan.k, plan.replication, plan.loads) == (4, 4, 3, (4, 4, 2, 2))
    assert [plan.largest_s(m) for m in (1, 2, 3, 4)] == [2, 1, 0, -1]
    assert [plan.largest_m(s) for s in (0, 1, 2, 3)] == [3, 2, 1, 0]
    assert all(
        plan.held[i, j] == (j in plan.shards_of(i)) == (i in plan.holders_of(j)) for i in range(4) for j in range(4)
    )
    words = ["at least 3 holders", "mean load 3", "s = 2 (m = 1)", "m = 3 at s = 0, m = 2 at s = 1, m = 1 at s = 2"]
    words += ["gone at once: 1", "worker 0 in east: 4 shards, 2 units of time"]
    assert [w for w in words if w not in plan.report()] == []


@pytest.mark.parametrize(("s", "m"), [(0, 1), (2, 1), (1, 2), (0, 3)])
@pytest.mark.parametrize("more", [{}, {"domains": "AABBCC"}, {"owners": [0, 1, 2, 3, 4, 5, 0]}], ids=str)
def test_a_code_for_a_plan_decodes_with_any_s_stragglers(s: int, m: int, more: dict[str, Any]) -> None:
    plan = assign(7, [7, 6, 5, 4, 3, 3], s=s, m=m, **more)
    code = for_assignment(plan, s=s, m=m)
    assert [code.shards_of(i) for i in range(6)] == [plan.shards_of(i) for i in range(6)]
    updates = np.random.default_rng(0).standard_normal((7, 6))
    replies = code.encode(updates)
    for survivors in combinations(range(6), 6 - s):
        total = code.decode(replies[list(survivors)], survivors, length=6)
        np.testing.assert_allclose(total, updates.sum(axis=0), atol=1e-9)


def test_a_thousand_shards_go_evenly_to_a_thousand_workers() -> None:
    held = assign(1000, [1000] * 1000, s=10).held
    assert (held.sum(axis=0) == 11).all() and (held.sum(axis=1) == 11).all()


def test_a_plan_does_not_change() -> None:
    matrix = np.ones((3, 2), bool)
    plan = Assignment(matrix)
    matrix[:] = False
    np.array(plan)[:] = False
    assert np.asarray(plan, float).tolist() == [[1.0, 1.0]] * 3
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(plan)[0, 0] = False
    with pytest.raises(FrozenInstanceError):
        plan.held = matrix  # type: ignore[misc]


# Bad input.

ODD = [float("nan"), float("inf")]
BAD: list[tuple[Any, dict[str, Any], str]] = [
    *(([value, 3], {}, str(value)) for value in (-1, 1.5)),
    *(([2, 2], {"speeds": [1, value]}, str(value)) for value in (0, -0.5, *ODD)),
    *(([2, 2], {"owners": owners}, str(owners)) for owners in ([0], [0, 2], [0, -1])),
    *(([2, 2], {"holders": value, "owners": [0, 0]}, f"holders={value}") for value in (0, 1.5)),
    *(([2, 2], {"may_hold": value}, str(np.shape(value))) for value in ([[0, 1]], np.ones((2, 3)))),
    ([], {}, "empty"),
    ([2, 2], {"speeds": [1]}, "[1]"),
    ([2, 2], {"domains": ["a"]}, "domains"),
    ([2, 2], {"m": 0}, "m=0"),
    ([1, 1], {"owners": [0, 0]}, "Worker 0 owns 2 shards, and its capacity is 1"),
    *(([value, 3], {}, str(value)) for value in (*ODD, "a", None)),
    *(([2, 2], {"s": value}, f"s={value}") for value in (-1, 0.5)),
    ([2, 2], {"speeds": [1, "a"]}, "a"),
    ([2, 2], {"owners": [0, 0.5]}, "[0, 0.5]"),
    ([2, 2], {"s": 1, "holders": 1}, "holders=1"),
    ([1, 1], {"m": 2}, "2 holders"),
]


@pytest.mark.parametrize(("capacities", "more", "value"), BAD)
def test_nonsense_is_refused_with_its_value(capacities: Any, more: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(value)) as caught:
        assign(2, capacities, **more)
    assert caught.type is InvalidCode and re.fullmatch(r".+\.", str(caught.value))
