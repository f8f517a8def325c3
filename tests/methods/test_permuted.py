"""Permuted allocation."""

from collections import Counter, defaultdict

import pytest

import gradrank as gr
from cases import CASES, batches
from gradrank.signals.measurement import Measurement


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    case = CASES["llama"]
    signals = [gr.Spectrum(), gr.MeanGradient()]
    return gr.measure(case.model(), batches(case, 5), signals, num_batches=5)


def by_shape(plan: gr.Plan) -> dict[tuple[int, int], Counter[int]]:
    found: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for planned in plan.targets:
        found[planned.target.d_in, planned.target.d_out][planned.rank] += 1
    return found


@pytest.mark.parametrize("of", ["gard", "gradient-norm", "random", "depth", "waterfill"])
def test_every_shape_keeps_its_multiset_of_ranks(measurement: Measurement, of: str) -> None:
    given = gr.allocate(measurement, of, 4444)
    moved = 0
    for seed in range(4):
        found = gr.allocate(measurement, gr.Permuted(of=of, seed=seed), 4444)
        assert by_shape(found) == by_shape(given)
        assert found.parameters == given.parameters
        moved += found.ranks != given.ranks
    assert moved > 0
