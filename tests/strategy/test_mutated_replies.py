"""Whatever a client sends: no crash, no hang, and no wrong model that reads "exact"."""

from __future__ import annotations

import pytest

from tests.strategy.mutated_replies import CONFIGURATIONS, mutated_replies


@pytest.mark.slow
@pytest.mark.parametrize("count", [800, pytest.param(5000, marks=pytest.mark.stress)])
def test_mutated_replies_neither_crash_nor_count(count: int) -> None:
    results = mutated_replies(count)
    assert {*results} == {*CONFIGURATIONS}
    assert sum(found.replies for found in results.values()) >= count
    assert [text for found in results.values() for text in found.crashes] == []
    assert [text for found in results.values() for text in found.wrong] == []
    # Most rounds come to something: whoever sends junk costs its own share.
    outcomes = sum((found.outcomes for found in results.values()), start=type(next(iter(results.values())).outcomes)())
    assert outcomes["exact"] + outcomes["product"] > 0.8 * sum(outcomes.values())
