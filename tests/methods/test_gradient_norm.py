"""Gradient-norm allocation: the root mean square of batch gradients' norms."""

import pytest
import torch

import gradrank as gr
from cases import CASES, batches
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic
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


def test_gradients_that_are_zero_everywhere_are_refused() -> None:
    statistic = SpectrumStatistic({"a": torch.zeros(3, 3, dtype=torch.float64)})
    measurement = Measurement((gr.Target("a", 4, 4),), statistic, None, {})
    with pytest.raises(gr.MeasurementError, match="zero gradient"):
        gr.allocate(measurement, "gradient-norm", 8)
