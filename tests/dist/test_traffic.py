"""Bytes that processes exchange: what a decision states is what crossed, and it is little."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist.traffic_worker import METHODS, WINDOW
from launching import run_ranks

pytestmark = pytest.mark.dist

TIMEOUT = 240


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("traffic")
    run_ranks(Path(__file__).with_name("traffic_worker.py"), str(folder), seconds=TIMEOUT)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_a_decision_states_the_bytes_that_crossed(both: list[Any], method: str) -> None:
    for found in both:
        assert found[method]["stated"] == found[method]["seen"]
        assert all(count > 0 for count in found[method]["stated"])
    assert both[0][method] == both[1][method]


def test_nothing_is_counted_that_did_not_cross(both: list[Any]) -> None:
    for found in both:
        assert found["total"]["stated"] == found["total"]["seen"]


def test_a_decision_by_spectra_costs_its_sketches(both: list[Any]) -> None:
    """Per target 11 x 11 numbers and mini-batch; directions for targets that grow alone."""
    found = both[0]["gard-dynamic"]
    sketches = found["targets"] * WINDOW * 121 * 4
    directions = 17 * 48 * 4
    for stated, changed in zip(found["stated"], found["changed"], strict=True):
        assert sketches < stated <= sketches + changed * directions + found["targets"] * 8 + 100
    # Whether all could measure, how much, sketches, ranks, directions, whether all edit alike.
    assert max(found["calls"]) <= 6


def test_looks_at_neurons_exchange_six_numbers_per_target(both: list[Any]) -> None:
    found = both[0]["pilora"]
    looks, (stated,) = 3, found["stated"]
    partitions = found["targets"] * 2 * 8
    assert stated <= looks * found["targets"] * 2 * 3 * 8 + partitions + 32
    assert stated < found["learned"], "less than one byte per parameter of the adapter"


def test_looks_at_directions_exchange_one_number_per_direction(both: list[Any]) -> None:
    directions = both[0]["igu-direction"]["stated"][0]
    elements = both[0]["igu"]["stated"][0]
    assert directions < elements / 10


def test_factors_travel_only_where_processes_differ(both: list[Any]) -> None:
    first, second = (found["agree"] for found in both)
    assert first == second
    assert first["alike"]["bytes"] == 32
    assert first["apart"]["bytes"] == 32 + 15 * 2 + 9 * 8
    assert first["apart"]["values"] == [[1.0] * 5] * 3
    assert first["apart"]["carry"][0][0] == 1.0


def test_tensors_travel_together_until_a_bucket_is_full(both: list[Any]) -> None:
    for found in both:
        assert found["buckets"]["calls"] == 4
        assert found["buckets"]["sums"] == [[9.0] * 4, [9.0] * 4, [41.0] * 20, [], [3.0], [7] * 4]
