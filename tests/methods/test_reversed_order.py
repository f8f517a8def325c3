"""Reversed allocation."""

import pytest
import torch

import gradrank as gr
from cases import CASES, batches
from gradrank.signals.measurement import Measurement


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    case = CASES["llama"]
    signals = [gr.Spectrum(), gr.MeanGradient()]
    return gr.measure(case.model(), batches(case, 5), signals, num_batches=5)


@pytest.mark.parametrize("of", ["gard", "gradient-norm", "random", "depth", "waterfill"])
def test_scores_change_hands_from_top_to_bottom(measurement: Measurement, of: str) -> None:
    given = gr.allocate(measurement, of, "uniform:2")
    found = gr.allocate(measurement, gr.Reversed(of=of), "uniform:2")
    assert sorted(found.scores.values()) == pytest.approx(sorted(given.scores.values()))
    top = max(given.scores, key=lambda name: (given.scores[name], name))
    assert found.scores[top] == min(given.scores.values())
    order = sorted(given.scores, key=lambda name: (-given.scores[name], name))
    back = [found.scores[name] for name in order]
    assert back == sorted(back)
    assert found.parameters <= found.budget_parameters


def test_the_order_really_is_reversed() -> None:
    targets = [gr.Target(f"h.{i}.q", 8, 8) for i in range(4)]
    plan = gr.allocate(targets, gr.Reversed(of="depth"), "uniform:2")
    straight = gr.allocate(targets, "depth", "uniform:2")
    assert list(plan.ranks.values()) == list(straight.ranks.values())[::-1]
    assert plan.ranks != straight.ranks


def test_reversed_gains_move_with_their_scores(measurement: Measurement) -> None:
    base = gr.Waterfill().assess(measurement.targets, measurement)
    turned = gr.Reversed(of="waterfill").assess(measurement.targets, measurement)
    assert base.gains is not None
    assert turned.gains is not None
    for name, gains in turned.gains.items():
        assert sum(gains) == pytest.approx(turned.scores[name])
    assert torch.tensor(sorted(map(sum, turned.gains.values()))).tolist() == pytest.approx(
        sorted(map(sum, base.gains.values()))
    )
