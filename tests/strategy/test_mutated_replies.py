"""Whatever a client sends: no crash, no hang, and no wrong model that reads "exact"."""

from __future__ import annotations

import pytest

from tests.strategy.mutated_replies import CONFIGURATIONS, mutated_replies


@pytest.mark.slow
def test_five_thousand_mutated_replies_neither_crash_nor_count() -> None:
    results = mutated_replies(5000)
    assert {*results} == {*CONFIGURATIONS}
    assert sum(found.replies for found in results.values()) >= 5000
    assert [text for found in results.values() for text in found.crashes] == []
    assert [text for found in results.values() for text in found.wrong] == []
    # Most rounds come to something: whoever sends junk costs its own share.
    outcomes = sum((found.outcomes for found in results.values()), start=type(next(iter(results.values())).outcomes)())
    assert outcomes["exact"] + outcomes["product"] > 0.8 * sum(outcomes.values())
