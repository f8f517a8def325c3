"""The tables of the page of findings: nothing that the comparison knows is left out."""

import dataclasses

import numpy as np
import pytest

from benchmarks import findings
from evidence.evidence_cases import record, simulated
from gradrank.evidence.comparison import Comparison, compare


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    rng = np.random.default_rng(0)
    records = simulated(rng, {"uniform": 0.0, "gard": 3.0, "full": 0.5}, seeds=5)
    free = [
        dataclasses.replace(r, comparison={**(r.comparison or {}), "matched": False})
        if r.name == "full"
        else r
        for r in records
    ]
    failed = [
        dataclasses.replace(record(method, seed, status="failed", message="no memory"), items=None)
        for method, seeds in (("broken", range(5)), ("gard", (9,)), ("uniform", ()))
        for seed in seeds
    ]
    found = compare([*free, *failed], resamples=200)
    monkeypatch.setattr(findings, "compared", lambda *_a: found)
    return found


def lines_of(text: str, arm: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {arm} |")]


def test_a_table_shows_failures_sizes_and_what_speaks_against_a_figure(grid: Comparison) -> None:
    text = findings.tables("any", "own", None)
    (gard,), (broken,), (full,) = (lines_of(text, arm) for arm in ("gard", "broken", "full"))
    assert "| 5, 1 failed |" in gard
    assert gard.endswith("| better |")
    assert broken == "| broken |  |  | 0, 5 failed |  |  | | | not tested |"
    assert full.endswith("| not tested |")
    assert "- `gard`: 1 of 6 runs failed; the others alone make the mean." in text
    assert "- `full`: not held to the budget." in text
    assert text.index("| gard |") < text.index("| uniform |") < text.index("| broken |")


def test_the_overview_counts_the_arms_that_were_tested(grid: Comparison) -> None:
    row = findings.overview(["any"]).splitlines()[-1]
    assert row == "| any | toy | uniform:1 | uniform | 1 | gard | none | gard | none |"
    assert len(grid.contrasts) == 3
