"""Water-filling: the directions of the mean gradient that hold the most energy are bought."""

import itertools

import pytest
import torch

import gradrank as gr
from gradrank.signals.mean_gradient import MeanGradientStatistic
from gradrank.signals.measurement import Measurement


def planted(values: dict[str, list[float]], shapes: dict[str, tuple[int, int]]) -> Measurement:
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    targets = tuple(gr.Target(name, *shapes[name]) for name in values)
    statistic = MeanGradientStatistic(
        dict.fromkeys(("whole", "even", "odd"), tensors),
        {},
        {"whole": 4, "even": 2, "odd": 2},
    )
    return Measurement(targets, None, statistic, {})


VALUES = {"a": [5.0, 3.0, 1.0], "b": [4.0, 2.0], "c": [0.5, 0.25, 0.1]}
SHAPES = {"a": (8, 8), "b": (4, 6), "c": (3, 5)}


def best_by_enumeration(measurement: Measurement, budget: int) -> float:
    targets = measurement.targets
    best = 0.0
    for ranks in itertools.product(*(range(len(VALUES[t.name]) + 1) for t in targets)):
        if sum(r * t.cost for r, t in zip(ranks, targets, strict=True)) <= budget:
            energy = sum(
                sum(s * s for s in VALUES[t.name][:r]) for r, t in zip(ranks, targets, strict=True)
            )
            best = max(best, energy)
    return best


@pytest.mark.parametrize("budget", [8, 16, 18, 24, 26, 34, 42, 50, 60, 70, 90])
def test_the_most_energy_within_the_budget_is_bought(budget: int) -> None:
    measurement = planted(VALUES, SHAPES)
    plan = gr.allocate(measurement, "waterfill", budget)
    found = sum(sum(s * s for s in VALUES[name][:r]) for name, r in plan.ranks.items())
    assert found == pytest.approx(best_by_enumeration(measurement, budget), rel=1e-12)
    assert plan.parameters <= budget


def test_the_enumeration_catches_buying_by_energy_alone() -> None:
    measurement = planted(VALUES, SHAPES)
    by_energy = {"a": 1, "b": 0, "c": 0}  # the single strongest direction costs 16
    energy = sum(sum(s * s for s in VALUES[name][:r]) for name, r in by_energy.items())
    assert energy < best_by_enumeration(measurement, 26) - 1


def test_gains_are_energies_and_scores_their_sums() -> None:
    measurement = planted(VALUES, SHAPES)
    assessment = gr.Waterfill().assess(measurement.targets, measurement)
    assert assessment.gains is not None
    assert assessment.gains["a"] == pytest.approx([25.0, 9.0, 1.0])
    assert assessment.scores["b"] == pytest.approx(20.0)
    assert assessment.details["b"]["top_energy_share"] == pytest.approx(16 / 20)


def test_the_greedy_solver_is_near_and_within_budget() -> None:
    measurement = planted(VALUES, SHAPES)
    for budget in (26, 42, 70):
        plan = gr.allocate(measurement, gr.Waterfill(solver="greedy"), budget)
        found = sum(sum(s * s for s in VALUES[name][:r]) for name, r in plan.ranks.items())
        assert plan.parameters <= budget
        assert best_by_enumeration(measurement, budget) - found < 25.0


def test_a_target_without_gradient_gets_nothing() -> None:
    measurement = planted({"a": [2.0, 1.0], "b": [0.0, 0.0]}, SHAPES)
    plan = gr.allocate(measurement, "waterfill", 32)
    assert plan.ranks == {"a": 2, "b": 0}
    assert "top_energy_share" not in plan.to_dict()["targets"]["b"]


def test_a_mean_gradient_that_is_zero_everywhere_is_refused() -> None:
    with pytest.raises(gr.MeasurementError, match="mean gradient of all 2 targets is zero"):
        gr.allocate(planted({"a": [0.0], "b": [0.0]}, SHAPES), "waterfill", 26)


def test_directions_reach_the_request() -> None:
    assert gr.Waterfill(directions=7).signals() == (gr.MeanGradient(7),)
