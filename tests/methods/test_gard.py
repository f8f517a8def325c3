"""GARD: scores from effective ranks, ranks in proportion to them."""

from fractions import Fraction

import pytest
import torch

import gradrank as gr
from gradrank.ops.spectrum import gram_matrix
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic
from oracles import spectra as oracle

M = 8


def planted(directions: dict[str, int], size: int = 40, noise: float = 0.0) -> Measurement:
    """Gradients of M batches that span a known number of equally strong directions."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name, count in directions.items():
        basis = torch.linalg.qr(torch.randn(size, max(count, 1), generator=generator)).Q.T
        kept = torch.zeros(M, size)
        for batch in range(M):
            kept[batch] = basis[batch % count] if count else 0
        rows[name] = kept + noise * torch.randn(M, size, generator=generator)
    targets = tuple(gr.Target(name, 16, 16) for name in directions)
    statistic = SpectrumStatistic({name: gram_matrix(r) for name, r in rows.items()}, rows)
    return Measurement(targets, statistic, None, {"base_parameters": 10_000})


def test_scores_are_normalised_effective_ranks() -> None:
    measurement = planted({"a": 1, "b": 2, "c": 4, "d": 0})
    assessment = gr.Gard().assess(measurement.targets, measurement)
    assert assessment.scores == pytest.approx({"a": 1 / 7, "b": 2 / 7, "c": 4 / 7, "d": 0})
    assert sum(assessment.scores.values()) == pytest.approx(1)
    found = {name: row["effective_rank"] for name, row in assessment.details.items()}
    assert found == {"a": 1, "b": 2, "c": 4, "d": 0}
    # Eight batches reach 90 % of a flat spectrum in ceil(7.2) = 8 directions.
    assert assessment.details["c"]["saturation"] == 4 / 8


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.75, 0.9, 1.0])
def test_effective_ranks_equal_the_oracle_on_real_spectra(energy: float) -> None:
    measurement = planted({"a": 1, "b": 3, "c": 8}, noise=0.05)
    assessment = gr.Gard(energy=energy).assess(measurement.targets, measurement)
    for name, rows in measurement.need_spectrum().rows.items():
        values = [Fraction(v) for v in oracle.eigenvalues(rows).tolist()]
        wanted = oracle.effective_rank(values, Fraction(energy))
        assert assessment.details[name]["effective_rank"] == wanted


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_fractional_scores_equal_the_oracle_on_real_spectra(energy: float) -> None:
    measurement = planted({"a": 1, "b": 3, "c": 8}, noise=0.05)
    assessment = gr.Gard(energy=energy, fractional=True).assess(measurement.targets, measurement)
    wanted = {
        name: float(
            oracle.fractional_rank(
                [Fraction(v) for v in oracle.eigenvalues(rows).tolist()], Fraction(energy)
            )
        )
        for name, rows in measurement.need_spectrum().rows.items()
    }
    total = sum(wanted.values())
    assert assessment.scores == pytest.approx({n: v / total for n, v in wanted.items()})


def test_fractions_tell_equal_effective_ranks_apart_and_keep_the_order_of_others() -> None:
    # One rank's budget: at equal effective ranks the first name is served, whatever its energy.
    measurement = planted({"a": 4, "b": 4, "c": 2})
    measurement.need_spectrum().gram["a"][0::4, 0::4] *= 2
    whole = gr.allocate(measurement, gr.Gard(), 32)
    fine = gr.allocate(measurement, gr.Gard(fractional=True), 32)
    assert whole.ranks == {"a": 1, "b": 0, "c": 0}
    assert fine.ranks == {"a": 0, "b": 1, "c": 0}
    scores = gr.Gard(fractional=True).assess(measurement.targets, measurement).scores
    assert scores["b"] > scores["a"] > scores["c"]


def test_centring_removes_the_mean_gradient() -> None:
    measurement = planted({"a": 1, "b": 2, "c": 4})
    assessment = gr.Gard(centring=True).assess(measurement.targets, measurement)
    found = {name: row["effective_rank"] for name, row in assessment.details.items()}
    # One direction always is the mean; orthogonal ones in equal numbers lose just that one.
    assert found == {"a": 0, "b": 1, "c": 3}


def test_ranks_follow_the_effective_rank() -> None:
    measurement = planted({"a": 1, "b": 2, "c": 4, "d": 0})
    plan = gr.allocate(measurement, "gard", 7 * 32)
    assert plan.ranks == {"a": 1, "b": 2, "c": 4, "d": 0}
    assert plan.slack == 0


def test_the_papers_rule_alone_leaves_a_rest() -> None:
    measurement = planted({"a": 2, "b": 2, "c": 2})
    budget = 4 * 32
    assert sum(gr.allocate(measurement, "gard", budget).ranks.values()) == 4
    alone = gr.allocate(measurement, gr.Gard(spend_leftover=False), budget)
    assert alone.ranks == {"a": 1, "b": 1, "c": 1}


def test_saturation_is_one_when_every_batch_is_its_own_direction() -> None:
    assessment = gr.Gard().assess(planted({"a": 8}).targets, planted({"a": 8}))
    assert assessment.details["a"]["saturation"] == 1.0


def test_gradients_that_are_zero_everywhere_are_refused() -> None:
    measurement = planted({"a": 0, "b": 0})
    with pytest.raises(gr.MeasurementError, match="all 2 targets have a zero gradient"):
        gr.allocate(measurement, "gard", 64)


def test_estimators_reach_the_request() -> None:
    assert gr.Gard(estimator="dense").signals() == (gr.Spectrum("dense", 128),)
    assert gr.Gard(sketch_dim=16).signals() == (gr.Spectrum("sketch", 16),)
