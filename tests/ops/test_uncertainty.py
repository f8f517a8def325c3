"""Smoothing, ratio and product, against loops over the scores of one element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradrank.ops.uncertainty import COMBINATIONS, combine, smooth_
from oracles import igu as oracle

BETAS = st.sampled_from([0.0, 0.3, 0.85, 0.99])
SCORES = st.lists(st.lists(st.floats(0, 5), min_size=6, max_size=6), min_size=1, max_size=8)


def play(looks: list[list[float]], beta1: float, beta2: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for look in looks:
        smooth_(mean, deviation, torch.tensor(look).double().view(2, 3), beta1, beta2)
    return mean, deviation


@given(SCORES, BETAS, BETAS)
def test_the_recursions_equal_loops_over_elements(
    looks: list[list[float]], beta1: float, beta2: float
) -> None:
    mean, deviation = play(looks, beta1, beta2)
    for i in range(6):
        want = oracle.smoothed([look[i] for look in looks], beta1, beta2)
        assert float(mean.view(-1)[i]) == pytest.approx(want[0], abs=1e-6)
        assert float(deviation.view(-1)[i]) == pytest.approx(want[1], abs=1e-6)


def test_the_loops_catch_a_deviation_from_the_mean_before() -> None:
    looks = [[1.0] * 6, [3.0] * 6, [0.5] * 6]
    _, deviation = play(looks, 0.85, 0.85)
    wrong = oracle.smoothed_by_old_mean([look[0] for look in looks], 0.85, 0.85)[1]
    assert abs(float(deviation[0, 0]) - wrong) > 0.01


def test_by_hand() -> None:
    mean, deviation = play([[4.0] * 6, [0.0] * 6], 0.5, 0.75)
    # s: 4, 0. Mean: 2, 1. Deviation: 0.25 * |4 - 2| = 0.5, then 0.75 * 0.5 + 0.25 * |0 - 1|.
    assert mean[0, 0] == 1.0
    assert deviation[0, 0] == 0.625


def test_without_smoothing_the_last_score_counts_and_nothing_deviates() -> None:
    mean, deviation = play([[7.0] * 6, [3.0] * 6], 0.0, 0.0)
    assert (mean == 3).all()
    assert not deviation.any()


def test_the_score_is_left_as_it_is() -> None:
    score = torch.rand(4, requires_grad=True)
    before = score.detach().clone()
    mean, deviation = torch.zeros(4), torch.zeros(4)
    smooth_(mean, deviation, score, 0.5, 0.5)
    assert torch.equal(score, before)
    assert not mean.requires_grad
    assert not deviation.requires_grad


@pytest.mark.parametrize("in_both", [False, True])
@pytest.mark.parametrize("how", COMBINATIONS)
def test_combinations_element_by_element(how: str, in_both: bool) -> None:
    looks = [[0.1 * (i + 1) * (2 + k) for i in range(6)] for k in range(3)]
    mean, deviation = play(looks, 0.85, 0.85)
    scoring = oracle.Scoring(how=how, eps=1e-3, in_both=in_both)
    found = combine(mean, deviation, how, 1e-3, in_both)
    for i in range(6):
        want = scoring.importance([look[i] for look in looks])
        assert float(found.view(-1)[i]) == pytest.approx(want)


def test_the_published_code_adds_its_constant_to_both_terms() -> None:
    mean, deviation = torch.tensor([2e-6, 0.0]), torch.tensor([1e-6, 0.0])
    assert combine(mean, deviation, "ratio", 1e-6, True).tolist() == pytest.approx([1.5, 1.0])
    assert combine(mean, deviation, "ratio", 1e-6, False).tolist() == pytest.approx([1.0, 0.0])
    assert combine(mean, deviation, "product", 1e-6, True).tolist() == pytest.approx([2e-12, 0.0])


def test_the_ratio_does_not_see_the_size_and_the_product_does() -> None:
    mean, deviation = play([[1.0] * 6, [2.0] * 6], 0.85, 0.85)
    small = (1e-3 * mean, 1e-3 * deviation)
    ratio = combine(mean, deviation, "ratio", 1e-12, False)
    assert torch.allclose(combine(*small, "ratio", 1e-12, False), ratio)
    product = combine(mean, deviation, "product", 0.0, False)
    assert torch.allclose(combine(*small, "product", 0.0, False), 1e-6 * product)
