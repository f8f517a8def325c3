"""Gradient-norm allocation: the root mean square of batch gradients' norms."""

import pytest
import torch

import gradrank as gr
from cases import CASES, batches
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic
from oracles.controls import gradient_norms, weighted_by_depth
from oracles.gradients import weight_gradients


def test_scores_are_root_mean_square_norms() -> None:
    case = CASES["llama"]
    model, data = case.model(), batches(case, 4)
    targets = ["self_attn.q_proj", "self_attn.v_proj"]
    found = gr.measure(model, data, "spectrum", targets, num_batches=4)
    scores = gr.GradientNorm().assess(found.targets, found).scores
    gradients = weight_gradients(model, data, list(scores))
    for name, grads in gradients.items():
        # These targets fit the sketch, so that their norms are exact.
        wanted = (sum(float(g.square().sum()) for g in grads) / 4) ** 0.5
        assert scores[name] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "targets"),
    [("llama", ["q_proj", "o_proj"]), ("bert", ["query", "pooler.dense"])],
)
def test_depth_multiplies_norms_by_the_line_over_the_blocks(case: str, targets: list[str]) -> None:
    model, data = CASES[case].model(), batches(CASES[case], 4)
    found = gr.measure(model, data, "spectrum", targets, num_batches=4)  # small: norms are exact
    norms = gradient_norms(weight_gradients(model, data, [t.name for t in found.targets]))
    places = {t.name: None if t.depth is None else (t.depth, 2) for t in found.targets}
    assert (None in places.values()) == (case == "bert")  # the pooler
    scores = gr.GradientNorm(depth=True).assess(found.targets, found).scores
    wanted = weighted_by_depth(norms, places)
    assert scores == pytest.approx(wanted, rel=1e-4)
    # Off, or the other way round, would be noticed.
    assert gr.GradientNorm().assess(found.targets, found).scores == pytest.approx(norms, rel=1e-4)
    for broken in (norms, weighted_by_depth(norms, places, 1.5, 0.5)):
        assert scores != pytest.approx(broken, rel=1e-2)


def test_depth_moves_ranks_to_later_blocks() -> None:
    model, data = CASES["llama"].model(), batches(CASES["llama"], 4)
    found = gr.measure(model, data, "spectrum", num_batches=4)

    def late(method: gr.GradientNorm) -> int:
        plan = gr.allocate(found, method, "uniform:4")
        return sum(p.parameters for p in plan.targets if p.target.depth == 1)

    assert late(gr.GradientNorm(depth=True)) > late(gr.GradientNorm())


def test_gradients_that_are_zero_everywhere_are_refused() -> None:
    statistic = SpectrumStatistic({"a": torch.zeros(3, 3, dtype=torch.float64)})
    measurement = Measurement((gr.Target("a", 4, 4),), statistic, None, {})
    with pytest.raises(gr.MeasurementError, match="zero gradient"):
        gr.allocate(measurement, "gradient-norm", 8)
