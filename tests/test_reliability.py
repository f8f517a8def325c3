"""Split-half reliability: high where something is planted, low where there is only noise."""

from typing import Any

import pytest
import torch

import gradrank as gr
from gradrank.ops.spectrum import gram_matrix
from gradrank.reliability import SATURATED, THRESHOLD, split_half
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic
from oracles.reliability import spearman


def measured(strengths: list[float], noise: float, batches: int = 12) -> Measurement:
    """Gradients whose energies differ between targets by ``strengths``, plus equal noise."""
    generator = torch.Generator().manual_seed(5)
    rows = {}
    for index, strength in enumerate(strengths):
        common = strength * torch.randn(1, 60, generator=generator)
        rows[f"h.{index}.q"] = common + noise * torch.randn(batches, 60, generator=generator)
    targets = tuple(gr.Target(name, 16, 16) for name in rows)
    statistic = SpectrumStatistic({name: gram_matrix(r) for name, r in rows.items()}, rows)
    return Measurement(targets, statistic, None, {})


def judge(measurement: Measurement, method: Any) -> dict[str, Any]:
    assessment = method.assess(measurement.targets, measurement)
    return split_half(method, measurement.targets, measurement, assessment)


def test_planted_scores_agree() -> None:
    result = judge(measured([1, 2, 4, 8, 16, 32], noise=0.1), gr.GradientNorm())
    assert result["split_half"] == pytest.approx(1.0)
    assert result["within_shape"] == pytest.approx(1.0)
    assert result["recommendation"] == "as planned"
    assert result["threshold"] == THRESHOLD
    assert result["splits"] == 8
    assert "1.00" in result["reason"]


def test_pure_noise_recommends_uniform() -> None:
    result = judge(measured([0.0] * 12, noise=1.0), gr.GradientNorm())
    assert abs(result["split_half"]) < THRESHOLD
    assert result["recommendation"] == "use uniform"
    assert "another sample of batches would give another plan" in result["reason"]


def test_the_number_is_the_mean_correlation_of_the_halves() -> None:
    measurement, method = measured([1, 1.2, 1.4, 1.6, 1.8], noise=1.0, batches=6), gr.GradientNorm()
    wanted = []
    for first, second in measurement.halves(8):
        a, b = (method.assess(half.targets, half).scores for half in (first, second))
        wanted.append(spearman(list(a.values()), [b[name] for name in a]))
    found = judge(measurement, method)["split_half"]
    assert found == pytest.approx(sum(wanted) / 8)
    assert 0 < found < 1


def test_constant_scores_tell_nothing() -> None:
    class Constant:
        def assess(self, targets: Any, measurement: Any) -> gr.Assessment:
            return gr.Assessment({target.name: 1.0 for target in targets})

    result = judge(measured([1, 2, 3], noise=0.1), Constant())
    assert result["split_half"] is None
    assert result["recommendation"] == "use uniform"
    assert "all scores are equal" in result["reason"]


def test_halves_of_constant_scores_tell_nothing() -> None:
    class OnlyWhole:
        def assess(self, targets: Any, measurement: Measurement) -> gr.Assessment:
            whole = measurement.batches == 12
            return gr.Assessment({t.name: float(i if whole else 1) for i, t in enumerate(targets)})

    result = judge(measured([1, 2, 3], noise=0.1), OnlyWhole())
    assert result["split_half"] is None
    assert result["recommendation"] == "use uniform"
    assert "constant scores" in result["reason"]


def test_one_batch_cannot_be_halved() -> None:
    result = judge(measured([1, 2, 4], noise=0.1, batches=1), gr.GradientNorm())
    assert result["split_half"] is None
    assert result["splits"] == 0
    assert result["recommendation"] == "use uniform"
    assert "two batches" in result["reason"]


def test_halves_that_cannot_be_assessed_are_left_out() -> None:
    class Fussy:
        calls = 0

        def assess(self, targets: Any, measurement: Measurement) -> gr.Assessment:
            self.calls += 1
            if self.calls == 2:
                raise gr.MeasurementError("zero gradient")
            return gr.GradientNorm().assess(targets, measurement)

    assert judge(measured([1, 2, 4], noise=0.1), Fussy())["splits"] == 7


def test_a_saturated_effective_rank_is_noted() -> None:
    class Saturated:
        def assess(self, targets: Any, measurement: Measurement) -> gr.Assessment:
            scores = {t.name: float(i + 1) for i, t in enumerate(targets)}
            details = {t.name: {"saturation": 0.95} for t in targets}
            return gr.Assessment(scores, details=details)

    result = judge(measured([1, 2, 4], noise=0.1), Saturated())
    assert result["saturation"] == pytest.approx(0.95)
    assert result["saturation"] > SATURATED
    assert result["recommendation"] == "as planned"
    assert "saturated (95% of what 12 batches allow)" in result["reason"]


def test_real_saturation_is_seen_by_gard() -> None:
    result = judge(measured([0.0] * 10, noise=1.0, batches=8), gr.Gard())
    assert result["saturation"] > SATURATED


def test_agreement_between_kinds_of_modules_alone_is_noted() -> None:
    """Two shapes far apart; within each shape the order is reversed from half to half."""

    class Kinds:
        sign = 1.0

        def assess(self, targets: Any, measurement: Measurement) -> gr.Assessment:
            self.sign = -self.sign
            return gr.Assessment(
                {t.name: 100.0 * (t.d_in > 8) + 50 + self.sign * i for i, t in enumerate(targets)}
            )

    base = measured([1.0] * 8, noise=0.1)
    targets = tuple(gr.Target(f"h.{i}", 16 if i < 4 else 8, 16) for i in range(8))
    result = split_half(Kinds(), targets, base, Kinds().assess(targets, base))
    assert result["split_half"] > THRESHOLD
    assert result["within_shape"] == pytest.approx(-1.0)
    assert "kinds of modules" in result["reason"]


def test_shapes_with_fewer_than_three_targets_do_not_count() -> None:
    base = measured([1, 2, 4, 8], noise=0.1)
    targets = tuple(gr.Target(t.name, 16, 16 + i // 2) for i, t in enumerate(base.targets))
    assessment = gr.GradientNorm().assess(targets, base)
    result = split_half(gr.GradientNorm(), targets, base, assessment)
    assert result["within_shape"] is None
    assert result["split_half"] == pytest.approx(1.0)
