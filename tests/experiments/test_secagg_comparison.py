"""The comparison of masked rounds runs, on the digits if nothing else is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import secagg_comparison


def test_accuracy_bytes_and_cpu_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secagg_comparison.secagg(str(tmp_path), size=20_000, rounds=1, repeats=1, simulated=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "digits, 1 rounds, 20,794 parameters" in told and "0 entries clipped" in told
    assert "float32, coded" in told and "masked, coded" in told


def test_a_masked_reply_has_hardly_more_bytes() -> None:
    plain, masked, _, _ = secagg_comparison.whole(100_000, 1)
    assert masked.up <= 1.02 * plain.up and masked.down <= 1.02 * plain.down
