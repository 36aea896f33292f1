"""The transfer benchmark runs and counts right, at a size that says nothing about speed."""

from __future__ import annotations

import pytest

from fedgraft_simulations.benchmarks.backbone_transfer import measure


def test_a_small_transfer_is_measured() -> None:
    report = measure(repetitions=1, mebibytes=16, sites_mebibytes=2)
    figures = report.figures
    assert report.ratios[0].value > 0
    assert 8 <= figures["killed client: MiB that were here"] <= 16
    assert figures["killed client: MiB fetched again"] == pytest.approx(0, abs=1e-9)
    before = figures["server memory before, MiB"]
    assert before > 0 and figures["server memory, most with 8 sites, MiB"] < before + 100
