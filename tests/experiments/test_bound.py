"""The table of distances from the clairvoyant bound."""

from __future__ import annotations

import pytest

from experiments import bound


def test_the_table_has_each_law_and_no_scheme_below_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "LAWS", {name: bound.LAWS[name] for name in ("all alike", "phones")})
    table = bound.bound(rounds=12, runs=1, adaptive=True)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns[0] == ["all alike", "all alike", "phones", "phones"]
    assert all(float(cell) <= 1 for cell in columns[2])
    assert all(float(cell) >= 1 for column in columns[3:6] for cell in column)
    assert [float(cell) for cell in columns[6][:2]] == [pytest.approx(1.0, abs=0.02)] * 2  # nothing is to gain
